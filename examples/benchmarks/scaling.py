"""Time and memory of a training step for each token, as depth, width, time steps and length change one at a time.

    python examples/benchmarks/scaling.py --json scaling.json

A step is forward, backward and AdamW on a batch of random tokens without padding, under bfloat16 autocast, as a Trainer
with `bf16=True` runs it. Memory is the peak of all tensors that
a step makes, over what it found (weights and moments), with and without gradient checkpointing.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from comparing import print_machine, write
from training import peak_memory, training_step
from transformers import HfArgumentParser, set_seed

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification

BASE = {"layers": 6, "hidden": 384, "T": 4, "length": 128}
CHANGES: dict[str, list[int]] = {"layers": [3, 12], "hidden": [192, 768], "T": [1, 2, 8], "length": [32, 512]}
BERT_BASE = {"layers": 12, "hidden": 768, "T": 4, "length": 128}


@dataclass
class ScalingArguments:
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    tokens: int = field(default=2048, metadata={"help": "Tokens in a step; the batch follows from the length."})
    repeats: int = field(default=5, metadata={"help": "Timed steps of each size."})


def sizes() -> Iterator[dict[str, int]]:
    yield BASE
    for name, values in CHANGES.items():
        for value in values:
            yield BASE | {name: value}
    yield BERT_BASE


def measure(size: dict[str, int], tokens: int, repeats: int, device: str) -> dict[str, Any]:
    """A row: milliseconds of a step (median), microseconds and bytes for each token."""
    set_seed(0)
    config = SpikeBertConfig(
        num_hidden_layers=size["layers"],
        hidden_size=size["hidden"],
        num_attention_heads=size["hidden"] // 32,
        intermediate_size=4 * size["hidden"],
        num_time_steps=size["T"],
    )
    model = SpikeBertForSequenceClassification(config).to(device).train()
    batch = max(1, tokens // size["length"])
    ids = torch.randint(5, config.vocab_size, (batch, size["length"]), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
    step = training_step(model, [{name: value.to(device) for name, value in inputs.items()}], bf16=True)
    step()  # compiles
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median, count = statistics.median(seconds), ids.numel()
    memory = peak_memory(step)
    model.gradient_checkpointing_enable()
    parameters = sum(p.numel() for p in model.spikebert.encoder.parameters())
    return size | {
        "batch": batch,
        "tokens": count,
        "ms": round(1e3 * median, 1),
        "us_per_token": round(1e6 * median / count, 1),
        # 2 operations a multiply-add; backward takes twice what forward takes
        "gflops_per_second": round(6 * size["T"] * parameters * count / median / 1e9, 1),
        "kb_per_token": round(1024 * memory / count, 1),
        "kb_per_token_checkpointing": round(1024 * peak_memory(step) / count, 1),
    }


def main(args: ScalingArguments) -> None:
    machine = print_machine()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size in sizes():
        rows.append(measure(size, args.tokens, args.repeats, device))
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    write(args.json, machine, rows)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(ScalingArguments).parse_args_into_dataclasses()
    main(arguments)
