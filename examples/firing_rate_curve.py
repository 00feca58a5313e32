"""Accuracy against energy: stage 2 from the same start with several weights of the firing-rate penalty.

    spikebert quickstart --output-dir runs/quickstart
    python examples/firing_rate_curve.py --run runs/quickstart --output-dir runs/firing_rate

Takes the teacher and the stage-1 student of a quickstart run, and its data. Writes `curve.json` and `curve.png`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from modeling_spikebert import (
    DistillationTrainer,
    DistillationTrainingArguments,
    SpikeBertForSequenceClassification,
)
from modeling_spikebert.data import accuracy_metrics, load_labelled, match_labels, tokenize
from modeling_spikebert.data.bundled import bundled_tweets
from modeling_spikebert.energy import estimate_energy


@dataclass
class CurveArguments:
    run: str = field(metadata={"help": "Folder of a quickstart run: teacher/ and stage1/ are taken from it."})
    output_dir: str = field(metadata={"help": "Where curve.json and curve.png go."})
    train_file: str | None = field(default=None, metadata={"help": "Data of the run. By default the bundled tweets."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    weights: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 3.0, 10.0, 30.0], metadata={"help": "Weights of the penalty, one run each."}
    )
    target_firing_rate: float = field(default=0.0, metadata={"help": "Rate up to which nothing is penalised."})
    steps: int = field(default=300, metadata={"help": "Optimiser steps of each run."})
    batch_size: int = field(default=16, metadata={"help": "Sentences in a step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate."})
    max_length: int = field(default=48, metadata={"help": "Longest sentence, in tokens."})
    num_energy_sentences: int = field(default=200, metadata={"help": "Validation sentences to count energy on."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of sentences and of the new classifier."})

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("Pass both --train-file and --validation-file, or neither.")


def main(args: CurveArguments) -> None:
    folder, run = Path(args.output_dir), Path(args.run)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = AutoModelForSequenceClassification.from_pretrained(run / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(run / "teacher")
    if args.train_file is None or args.validation_file is None:
        text = bundled_tweets()
    else:
        text = load_labelled(args.train_file, args.validation_file)
    text = match_labels(text, teacher.config.id2label)
    train, validation = (tokenize(split, tokenizer, args.max_length) for split in (text.train, text.validation))
    collator = DataCollatorWithPadding(tokenizer)
    measured = validation.select(range(min(args.num_energy_sentences, len(validation))))

    points = []
    for weight in args.weights:
        set_seed(args.seed)
        student = SpikeBertForSequenceClassification.from_pretrained(run / "stage1", **text.label_maps)
        trainer = DistillationTrainer(
            student,
            teacher,
            training_arguments(args, weight),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=collator,
            compute_metrics=accuracy_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()
        report = estimate_energy(student, DataLoader(measured, batch_size=16, collate_fn=collator))
        points.append(
            {
                "firing_rate_weight": weight,
                "accuracy": metrics["eval_accuracy"],
                "standard_error": (metrics["eval_accuracy"] * (1 - metrics["eval_accuracy"]) / len(validation)) ** 0.5,
                "firing_rate": report.firing_rate,
                "published_mj": report.published.energy_mj,
                "strict_mj": report.strict.energy_mj,
            }
        )
        print(json.dumps(points[-1]), flush=True)
        (folder / "curve.json").write_text(json.dumps({"options": vars(args), "points": points}, indent=2))
    plot(points, folder / "curve.png")


def training_arguments(args: CurveArguments, weight: float) -> DistillationTrainingArguments:
    return DistillationTrainingArguments(
        str(Path(args.output_dir) / "training"),
        stage="task",
        initial_projections=str(Path(args.run) / "stage1"),
        firing_rate_weight=weight,
        target_firing_rate=args.target_firing_rate,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        warmup_steps=max(1, args.steps // 10),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=args.seed,
    )


def plot(points: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, account in zip(axes, ("published", "strict"), strict=True):
        energies = [point[f"{account}_mj"] for point in points]
        accuracies, errors = ([100 * point[name] for point in points] for name in ("accuracy", "standard_error"))
        axis.errorbar(energies, accuracies, errors, marker="o", capsize=3)
        for energy, point in zip(energies, points, strict=True):
            label = f" {point['firing_rate_weight']:g} (rate {point['firing_rate']:.3f})"
            axis.annotate(label, (energy, 100 * point["accuracy"]), fontsize=8)
        axis.set(xlabel=f"energy of a sentence, {account} account, mJ", ylabel="validation accuracy, %")
        axis.margins(x=0.3)
    figure.suptitle("Weight of the firing-rate penalty, and the firing rate that it leads to")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(CurveArguments).parse_args_into_dataclasses())
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        sys.exit(f"firing_rate_curve.py: {error}")
