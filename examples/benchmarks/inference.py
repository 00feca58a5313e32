"""Time of inference beside BERT's, in one process, with random weights.

    python examples/benchmarks/inference.py --json inference.json

Ratios hold, milliseconds do not: a machine's speed changes from minute to minute. `published-naive` is the published
variant with the naive forms of all operators (Python loops over time steps), `naive` the default model with them,
`fast` the same as it runs. The int8 model is loaded with `quantization_config`, as users do. `int8-exit-1` and
`int8-exit-2` stop after 1 and 2 time steps, by early exit.
"""

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from comparing import int8_bert, interleaved, naive, print_machine, rows_of, write
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, set_seed

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification


@dataclass
class InferenceArguments:
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks of all models."})
    hidden_size: int = field(default=768, metadata={"help": "Their width; heads are 64 wide."})
    num_time_steps: int = field(default=4, metadata={"help": "Time steps T."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Sentences in a batch."})
    length: int = field(default=128, metadata={"help": "Tokens in a sentence."})
    long: int = field(default=512, metadata={"help": "Tokens of the long sentences, for the ratio of lengths."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds."})


def build_models(args: InferenceArguments, folder: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_hidden_layers": args.num_hidden_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": max(1, args.hidden_size // 64),
        "intermediate_size": 4 * args.hidden_size,
        "max_position_embeddings": max(args.length, args.long),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def spiking(config: SpikeBertConfig) -> Any:
        set_seed(0)
        return SpikeBertForSequenceClassification(config).to(device)

    bert = BertForSequenceClassification(BertConfig(**sizes)).to(device)
    steps = {"num_time_steps": args.num_time_steps}
    default = spiking(SpikeBertConfig(**sizes, **steps))
    models = {
        "bert-fp32": bert,
        "published-naive": spiking(SpikeBertConfig.reference(**(sizes | steps))),
        "naive": default,
        "fast": default,
    }
    if device == "cpu":
        models["bert-int8"] = int8_bert(bert)
        default.save_pretrained(folder)
        int8: dict[str, Any] = {"quantization_config": {"quant_method": "spikebert_int8"}}
        load = SpikeBertForSequenceClassification.from_pretrained
        # Every class is sure enough for the first threshold; for the second none is, so that 1 and then 2 steps run.
        models["int8-exit-1"] = load(folder, exit_threshold=1e-6, **int8)
        models["int8-exit-2"] = load(folder, num_time_steps=2, exit_threshold=1.0, **int8)
        models["int8"] = load(folder, **int8)
    return {name: model.eval() for name, model in models.items()}


@torch.inference_mode()
def main(args: InferenceArguments) -> None:
    machine = print_machine()
    with tempfile.TemporaryDirectory() as folder:
        models = build_models(args, folder)
    device = models["bert-fp32"].device
    rows = []

    def inputs_of(batch: int, length: int) -> dict[str, Any]:
        ids = torch.randint(1000, 30000, (batch, length), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def runs_of(names: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        runs = {name: lambda model=models[name]: model(**inputs) for name in names}
        return {name: naive(run) if "naive" in name else run for name, run in runs.items()}

    for batch in args.batch_sizes:
        inputs = inputs_of(batch, args.length)
        medians = interleaved(runs_of(models, inputs), args.repeats)
        pairs = [(name, "bert-fp32") for name in models if name != "bert-fp32"] + [("fast", "naive")]
        if "int8" in models:
            pairs += [
                ("int8", "published-naive"),
                *((name, "bert-int8") for name in ("int8", "int8-exit-2", "int8-exit-1")),
            ]
        shape = {"batch": batch, "length": args.length, "T": args.num_time_steps}
        rows += rows_of(medians, pairs, shape | {"layers": args.num_hidden_layers, "hidden": args.hidden_size})

    fastest = "int8" if "int8" in models else "fast"
    short, long = (f"{fastest}-{length}-tokens" for length in (args.length, args.long))
    runs = {name: runs_of([fastest], inputs_of(1, n))[fastest] for name, n in ((short, args.length), (long, args.long))}
    shape = {"batch": 1, "T": args.num_time_steps, "layers": args.num_hidden_layers, "hidden": args.hidden_size}
    rows += rows_of(interleaved(runs, args.repeats), [(long, short)], shape)
    write(args.json, machine, rows)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(InferenceArguments).parse_args_into_dataclasses()
    main(arguments)
