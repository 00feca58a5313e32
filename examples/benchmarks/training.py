"""Time and memory of a training step compared with the naive forms, in one process, on real sentences.

    python examples/benchmarks/training.py --json training.json

A step is forward, backward and AdamW on a padded batch of sentences in random order. `naive` has the naive forms of all
operators, `fast` is the model as it runs; both under bfloat16 autocast, as a Trainer with `bf16=True` does it, and in
float32. Memory is the peak of all tensors that a step makes, over what it found.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from comparing import interleaved, naive, print_machine, rows_of, write
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, HfArgumentParser, set_seed

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.data import load_unlabelled
from modeling_spikebert.data.bundled import bundled_teacher, bundled_tweets


@dataclass
class TrainingArguments:
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks of all models."})
    hidden_size: int = field(default=384, metadata={"help": "Their width; heads are 32 wide, as MiniLM's."})
    num_time_steps: int = field(default=4, metadata={"help": "Time steps T."})
    batch_size: int = field(default=48, metadata={"help": "Sentences in a step."})
    train_file: str | None = field(default=None, metadata={"help": "Sentences (column text). Default: bundled tweets."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub name or folder. Default: that of MiniLM."})
    max_length: int = field(default=128, metadata={"help": "Longest sentence, in tokens."})
    repeats: int = field(default=7, metadata={"help": "Timed rounds, each with a batch of its own."})


def batches_of(args: TrainingArguments, device: str) -> list[dict[str, Any]]:
    text = bundled_tweets().train if args.train_file is None else load_unlabelled(args.train_file)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or bundled_teacher())
    sentences = text.shuffle(seed=0)["text"][: args.batch_size * (args.repeats + 1)]
    batches = []
    for start in range(0, len(sentences), args.batch_size):
        chosen = sentences[start : start + args.batch_size]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
        batch["labels"] = torch.arange(len(chosen)) % 2
        batches.append(batch.to(device))
    return batches


def training_step(model: Any, batches: list[dict[str, Any]], bf16: bool) -> Callable[[], None]:
    """A function that makes a step with the next batch, over and over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    turns = cycle(batches)

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**next(turns)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(run: Callable[[], None]) -> float:
    """MB of tensors at the worst moment of a run, over those that were there before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def main(args: TrainingArguments) -> None:
    machine = print_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = batches_of(args, device)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    longest = sum(batch["input_ids"].shape[1] for batch in batches) / len(batches)
    print(f"{args.batch_size} sentences a step, {real:.0f} tokens of {args.batch_size * longest:.0f} with padding")
    sizes: dict[str, Any] = {
        "num_hidden_layers": args.num_hidden_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": max(1, args.hidden_size // 32),
        "intermediate_size": 4 * args.hidden_size,
    }

    def spiking() -> Any:
        set_seed(0)
        config = SpikeBertConfig(**sizes, num_time_steps=args.num_time_steps)
        return SpikeBertForSequenceClassification(config).to(device).train()

    def bert() -> Any:
        return BertForSequenceClassification(BertConfig(**sizes)).to(device).train()

    models = {  # model, bfloat16 autocast
        "naive-fp32": (spiking(), False),
        "naive": (spiking(), True),
        "fast-fp32": (spiking(), False),
        "fast": (spiking(), True),
        "fast-less-memory": (spiking(), True),  # gradient checkpointing
        "bert-fp32": (bert(), False),
        "bert-bf16": (bert(), True),
    }
    with warnings.catch_warnings():  # newer versions of transformers have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        models["fast-less-memory"][0].gradient_checkpointing_enable()
    steps = {name: training_step(model, batches, bf16) for name, (model, bf16) in models.items()}
    steps = {name: naive(step) if "naive" in name else step for name, step in steps.items()}
    medians = interleaved(steps, args.repeats)
    pairs = [("naive", "naive-fp32"), ("fast-fp32", "naive-fp32"), ("fast", "naive-fp32"), ("fast", "naive")]
    pairs += [("fast-less-memory", "fast"), ("fast-fp32", "bert-fp32"), ("fast", "bert-fp32"), ("fast", "bert-bf16")]
    shape = {"batch": args.batch_size, "tokens": round(real), "places": round(args.batch_size * longest)}
    shape |= {"T": args.num_time_steps, "layers": args.num_hidden_layers, "hidden": args.hidden_size}
    rows = rows_of(medians, pairs, shape)
    memory = {name: peak_memory(step) for name, step in steps.items()}
    for name, peak in memory.items():
        print(f"{name:18} peak {peak:7.0f} MB, {peak / memory['naive-fp32']:.2f} x naive-fp32")
    write(args.json, machine, rows, peak_memory_mb=memory)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    main(arguments)
