"""What int8 weights and early exit cost in accuracy, and what they save, on a validation set.

    python examples/benchmarks/accuracy.py --model runs/quickstart/student --teacher runs/quickstart/teacher

Sentences come alone, one after the other, and each goes through all variants in turn: the checkpoint as it is; with
int8 weights; these with several thresholds of confidence, at which a sentence needs no further time steps; and the
teacher with dynamic int8 quantisation. Milliseconds are means over sentences.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from comparing import int8_bert, print_machine, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data import load_labelled, match_labels
from modeling_spikebert.data.bundled import bundled_tweets

NUM_WARMING = 3


@dataclass
class AccuracyArguments:
    model: str = field(metadata={"help": "Folder or Hub name of a classifier with float weights."})
    teacher: str | None = field(default=None, metadata={"help": "A BERT of the same task, to compare the time with."})
    validation_file: str | None = field(default=None, metadata={"help": "Labelled sentences. Default: bundled tweets."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99], metadata={"help": "Exit thresholds."}
    )
    max_length: int = field(default=128, metadata={"help": "Longest sentence, in tokens."})
    json: str | None = field(default=None, metadata={"help": "File for the figures."})
    plot: str | None = field(default=None, metadata={"help": "File for the picture of accuracy against mean steps."})


@torch.inference_mode()
def main(args: AccuracyArguments) -> None:
    machine = print_machine()
    load = SpikeBertForSequenceClassification.from_pretrained
    model = load(args.model)
    int8 = load(args.model, quantization_config={"quant_method": "spikebert_int8"})
    text = bundled_tweets()
    if args.validation_file is not None:
        text = load_labelled(args.validation_file, args.validation_file)
    validation = match_labels(text, model.config.id2label).validation
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sentences = [
        tokenizer([sentence], truncation=True, max_length=args.max_length, return_tensors="pt")
        for sentence in validation["text"]
    ]
    exits = {f"exit at {threshold}": threshold for threshold in args.thresholds}
    variants: dict[str, Any] = {"float32": model, "int8": int8} | dict.fromkeys(exits, int8)
    if args.teacher is not None:
        variants["bert-int8"] = int8_bert(AutoModelForSequenceClassification.from_pretrained(args.teacher))

    logits, steps, seconds = defaultdict(list), defaultdict(list), defaultdict(list)
    for count, sentence in enumerate(sentences[:NUM_WARMING] + sentences):
        for name, variant in variants.items():
            variant.config.exit_threshold = exits.get(name)
            start = time.perf_counter()
            outputs = variant(**sentence)
            if count >= NUM_WARMING:
                seconds[name].append(time.perf_counter() - start)
                logits[name].append(outputs.logits)
                if name in exits:
                    steps[name].append(int(outputs.exit_steps))

    labels = torch.tensor(validation["label"])
    scores = {name: torch.cat(values) for name, values in logits.items()}
    answers = {name: values.argmax(-1) for name, values in scores.items()}
    rows = [
        {
            "name": name,
            "accuracy": 100 * float((answers[name] == labels).float().mean()),
            "mean_steps": sum(steps[name]) / len(steps[name]) if name in exits else model.config.num_time_steps,
            "ms": 1000 * sum(seconds[name]) / len(labels),
        }
        for name in variants
    ]
    if args.teacher is not None:
        rows[-1]["mean_steps"] = None
        for row in rows:
            row |= {"against": "bert-int8", "ratio": row["ms"] / rows[-1]["ms"]}
    differ = int((answers["int8"] != answers["float32"]).sum())
    error = float((scores["int8"] - scores["float32"]).norm() / scores["float32"].norm())
    print(f"{len(labels)} sentences, standard error of an accuracy up to {50 / len(labels) ** 0.5:.1f} points")
    for row in rows:
        spelled = "" if row["mean_steps"] is None else f"{row['mean_steps']:.2f} steps"
        ratio = f"   {row['ratio']:.2f} x bert-int8" if "ratio" in row else ""
        print(f"{row['name']:14} {row['accuracy']:6.2f} %   {row['ms']:7.2f} ms{ratio}   {spelled}")
    print(f"int8 against float32: {differ} answers differ, relative error of the logits {error:.4f}")
    figures = {"sentences": len(labels), "answers_that_differ": differ, "relative_error_of_logits": error}
    write(args.json, machine, rows, **figures)
    if args.plot is not None:
        plot(rows, exits, args.plot)


def plot(rows: list[dict[str, Any]], exits: dict[str, float], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    curve = [row for row in rows if row["name"] in exits]
    axis.plot([row["mean_steps"] for row in curve], [row["accuracy"] for row in curve], marker="o", label="early exit")
    for row in curve:
        axis.annotate(str(exits[row["name"]]), (row["mean_steps"], row["accuracy"]), fontsize=8, va="top")
    full = next(row for row in rows if row["name"] == "int8")
    axis.plot([full["mean_steps"]], [full["accuracy"]], marker="s", linestyle="none", label="all time steps")
    axis.set(xlabel="time steps, mean over sentences", ylabel="accuracy on validation data, %")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(AccuracyArguments).parse_args_into_dataclasses()
    main(arguments)
