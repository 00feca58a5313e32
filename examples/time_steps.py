"""What more time steps bring to a checkpoint: accuracy, distance from its teacher, and how much its neurons say.

    python examples/time_steps.py --model examples/checkpoints/spikebert-6x384-sst2 \
        --validation-file data/sst2/validation.parquet --teacher runs/gpu/teacher

One line for each number of time steps, all with the same weights:

- `gain`: points of accuracy over the first line, with the standard error of the difference on the same sentences.
- `KL`: divergence of the answers from the teacher's, `KL(teacher || student)`, in nats.
- `bits`: the entropy of how often a neuron fires for a token, mean over the neurons of the blocks. With one step it is
  at most 1 bit, with T steps log2(T + 1).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, PreTrainedModel

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data import load_labelled, match_labels, tokenize
from modeling_spikebert.distillation.losses import logit_loss
from modeling_spikebert.modeling_spikebert import SpikeBertNeuron


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub name of a classifier."})
    validation_file: str = field(metadata={"help": "Columns text and label."})
    teacher: str | None = field(default=None, metadata={"help": "Its teacher, with the same tokenizer."})
    time_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Numbers of time steps."})
    max_length: int = field(default=64, metadata={"help": "Longest sentence, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Most sentences at once."})


def main(args: Arguments) -> list[dict[str, float]]:
    model = SpikeBertForSequenceClassification.from_pretrained(args.model, dtype=torch.float32).eval()
    text = load_labelled(args.validation_file, args.validation_file)
    text = match_labels(text, model.config.id2label)
    tokens = tokenize(text.validation, AutoTokenizer.from_pretrained(args.model), args.max_length)
    batches = list(batches_of(tokens, args.batch_size))
    labels = torch.cat([labels for _, labels in batches])
    wanted = None
    if args.teacher is not None:
        wanted = logits_of(AutoModelForSequenceClassification.from_pretrained(args.teacher).eval(), batches)

    rows: list[dict[str, float]] = []
    first: Tensor | None = None  # whether each answer is right, 0 or 1, in the first row
    print(f"{len(labels)} sentences")
    for steps in args.time_steps:
        with spike_counts(model, steps) as counts:
            logits = logits_of(model, batches, num_time_steps=steps)
        right = (logits.argmax(-1) == labels).double()
        first = right if first is None else first
        gain = 100 * (right - first)
        row = {
            "time_steps": steps,
            "accuracy": 100 * right.mean().item(),
            "gain": gain.mean().item(),
            "gain_error": (gain.std() / len(gain) ** 0.5).item(),
            "bits": torch.cat([entropy(count) for count in counts.values()]).mean().item(),
        }
        if wanted is not None:
            row["kl"] = logit_loss(logits, wanted, 1.0, None).mean().item()
        rows.append(row)
        print(spelled(row), flush=True)
    return rows


def batches_of(tokens: Dataset, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids `[B, L]` and labels `[B]` of sentences of one length, so that there is no padding to leave out."""
    rows = sorted(zip(tokens["input_ids"], tokens["labels"], strict=True), key=lambda row: len(row[0]))
    for _, same in groupby(rows, key=lambda row: len(row[0])):
        ids, labels = (torch.tensor(column) for column in zip(*same, strict=True))
        yield from zip(ids.split(most), labels.split(most), strict=True)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, batches: list[tuple[Tensor, Tensor]], **options: Any) -> Tensor:
    return torch.cat([model(input_ids=ids, **options).logits for ids, _ in batches])


@contextmanager
def spike_counts(model: nn.Module, steps: int) -> Iterator[dict[str, Tensor]]:
    """How often each neuron fired 0, 1, ..., `steps` times for a token: `[steps + 1, D]` for each layer of neurons."""
    counts: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, spikes: Tensor) -> None:  # [T, ..., D]
            times = spikes.sum(0).long().flatten(0, -2)  # [N, D]
            new = torch.stack([(times == fired).sum(0) for fired in range(steps + 1)])
            counts[name] = counts.get(name, 0) + new

        return count

    neurons = [(name, module) for name, module in model.named_modules() if isinstance(module, SpikeBertNeuron)]
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in neurons]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def entropy(counts: Tensor) -> Tensor:
    """In bits, of each column: `[K, D]` to `[D]`."""
    share = counts.double() / counts.sum(0)
    return -torch.xlogy(share, share).sum(0) / torch.tensor(2.0).log()


def spelled(row: dict[str, float]) -> str:
    kl = f"   KL {row['kl']:.3f}" if "kl" in row else ""
    return (
        f"T {row['time_steps']:2}   accuracy {row['accuracy']:6.2f} %   "
        f"gain {row['gain']:+5.2f} +- {row['gain_error']:.2f}{kl}   bits {row['bits']:.2f}"
    )


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"time_steps.py: {error}")
