"""What it saves to pass over silent synapses, on a CPU in float32, in one process.

    python examples/benchmarks/sparse.py --model examples/checkpoints/spikebert-6x384-sst2 --json sparse.json

A trained model, because its firing rate decides (that of the inputs of Linears is printed). `forward` is inference,
`step` a training step (forward, backward, AdamW) on a padded batch of sentences in random order. `sums` is the model as
it is, `products` the same with ordinary products, `naive` all operators in their naive form, `bert` a BERT of the same
shape with random weights, which computes padding, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from comparing import interleaved, naive, print_machine, rows_of, write
from training import batches_of, training_step
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from modeling_spikebert import SpikeBertForSequenceClassification, spike_linear_spikebert
from modeling_spikebert.modeling_spikebert import FIRING_RATE_NAMES

LINEAR_INPUTS = [FIRING_RATE_NAMES.index(name) for name in ("attention_input", "context", "mlp_input", "intermediate")]
SIZES = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


@dataclass
class SparseArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a classifier with float weights."})
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    batch_size: int = field(default=48, metadata={"help": "Sentences in a batch."})
    train_file: str | None = field(default=None, metadata={"help": "Sentences (column text). Default: bundled tweets."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub name or folder. Default: that of MiniLM."})
    max_length: int = field(default=64, metadata={"help": "Longest sentence, in tokens."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds, each with a batch of its own."})


def forward_pass(model: Any, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """A function that classifies the next batch, over and over."""
    turns = cycle(batches)

    def run() -> None:
        with torch.inference_mode():
            model(**next(turns))

    return run


def main(args: SparseArguments) -> None:
    machine = print_machine()
    batches = batches_of(args, "cpu")
    load = SpikeBertForSequenceClassification.from_pretrained
    models: dict[str, Any] = {name: load(args.model) for name in ("naive", "products", "sums")}
    config = models["sums"].config
    with torch.inference_mode():
        rates = torch.stack(models["sums"](**batches[0], output_firing_rates=True).firing_rates)
    models["bert"] = BertForSequenceClassification(BertConfig(**{name: getattr(config, name) for name in SIZES}))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    shape = {"batch": args.batch_size, "tokens": round(tokens), "T": config.num_time_steps}
    shape["firing_rate"] = round(float(rates[..., LINEAR_INPUTS].mean()), 3)

    products = patch.object(spike_linear_spikebert, "MAX_FIRING_RATE", -1.0)
    rows = []
    for kind, run_of in (("forward", forward_pass), ("step", partial(training_step, bf16=False))):
        runs = {f"{kind}-{name}": run_of(model.train(kind == "step"), batches) for name, model in models.items()}
        runs[f"{kind}-products"] = products(runs[f"{kind}-products"])
        runs[f"{kind}-naive"] = naive(runs[f"{kind}-naive"])
        pairs = (("sums", "products"), ("sums", "naive"), ("sums", "bert"), ("products", "bert"))
        spelled = [(f"{kind}-{name}", f"{kind}-{against}") for name, against in pairs]
        rows += rows_of(interleaved(runs, args.repeats), spelled, shape)
    write(args.json, machine, rows)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(SparseArguments).parse_args_into_dataclasses()
    main(arguments)
