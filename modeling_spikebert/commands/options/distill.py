"""`spikebert distill`: trains one stage of the distillation of a student from a BERT-like teacher.

Without --teacher it fine-tunes a model. Data are csv, json lines or parquet files, splits on the Hub (name:split), or a
task by its name (--task sst2). Options may also stand in a json or yaml file, named first; those of the command line go
before it.

After an interruption, the same command goes on with --resume-from-checkpoint last. On several GPUs:
`accelerate launch -m modeling_spikebert distill` with the same options. --help-all lists all options of
transformers.TrainingArguments, too."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

from ...console.text import did_you_mean
from ...data.known_tasks import TASKS
from ...distillation.arguments import DistillationTrainingArguments
from . import OptionParser, with_dashes

EXAMPLES = [
    "spikebert distill --task sst2 --model-name-or-path google-bert/bert-base-uncased --output-dir runs/teacher",
    "spikebert distill --stage general --teacher runs/teacher --train-file text.csv --output-dir runs/stage1",
    "spikebert distill --task sst2 --teacher runs/teacher --model-name-or-path runs/stage1 --output-dir runs/student",
    "spikebert distill recipe.yaml --seed 1",
]
# What the help shows; the others are shown by --help-all.
GROUPS = {
    "teacher and student": ("teacher", "model_name_or_path", "student_config", "from_scratch"),
    "data": (
        "task",
        "train_file",
        "validation_file",
        "text_column",
        "text_pair_column",
        "label_column",
        "regression",
        "max_length",
        "streaming",
        "shuffle_buffer_size",
        "packing",
    ),
    "stage and losses": (
        "stage",
        "hidden_state_weight",
        "embedding_weight",
        "logit_weight",
        "cross_entropy_weight",
        "temperature",
        "layer_map",
        "firing_rate_weight",
        "target_firing_rate",
        "mixed_time_steps",
        "initial_projections",
        "teacher_cache",
    ),
    "training": (
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "adam_beta2",
        "bf16",
        "use_cpu",
        "seed",
        "non_finite",
    ),
    "checkpoints, evaluation and log": (
        "resume_from_checkpoint",
        "save_steps",
        "save_total_limit",
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "metric_for_best_model",
        "logging_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
    ),
}
# Of those that transformers has, in our words.
HELP = {
    "output_dir": "Folder for the model and its checkpoints.",
    "num_train_epochs": "How often the training text is read.",
    "max_steps": "Optimiser steps, which go before --num-train-epochs; a stream needs them.",
    "gradient_accumulation_steps": "Batches whose gradients make a step.",
    "lr_scheduler_type": "How the learning rate falls, such as cosine or constant_with_warmup",
    "weight_decay": "Of AdamW, on weights of Linears and embeddings.",
    "bf16": "Compute in bfloat16 where the machine can.",
    "use_cpu": "Train on the CPU, also where there is a GPU.",
    "seed": "Seed of weights and of the order of sentences.",
    "resume_from_checkpoint": "Go on from a checkpoint: its folder, or 'last' for the newest in --output-dir.",
    "save_steps": "Steps between two checkpoints; below 1, a part of all steps.",
    "save_total_limit": "Most checkpoints that are kept, the best one among them. Without it, all.",
    "eval_strategy": "When to evaluate while training; after it, it is always done",
    "eval_steps": "Steps between two evaluations of --eval-strategy steps (default: 500)",
    "per_device_eval_batch_size": "Sentences of each process in a step of evaluation.",
    "load_best_model_at_end": "Keep the best model and not the last; needs --eval-strategy.",
    "metric_for_best_model": "What is best, such as accuracy (default: loss)",
    "report_to": "Other places for the log, such as tensorboard",
    "push_to_hub": "Push each model that is saved to the Hub.",
    "hub_model_id": "Its name there, such as user/name.",
}
METAVARS = {
    "teacher": "BERT",
    "model_name_or_path": "MODEL",
    "student_config": "JSON",
    "layer_map": "NAME",
    "initial_projections": "DIR",
    "teacher_cache": "DIR",
    "resume_from_checkpoint": "DIR",
    "metric_for_best_model": "METRIC",
    "report_to": "NAME",
    "hub_model_id": "NAME",
}
MOST_CHOICES = 8  # that the help lists; a wrong one is answered with all


@dataclass
class ModelArguments:
    teacher: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the teacher. Without it, the model is fine-tuned plainly."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the student to go on with. By default a new one, from the teacher."},
    )
    student_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the new student's config that differ from the teacher's, as json."}
    )
    from_scratch: bool = field(
        default=False,
        metadata={
            "help": "For comparison: a new student with the vocabulary and sizes of --teacher but none of its weights, "
            "which learns from the labels alone."
        },
    )

    def __post_init__(self) -> None:
        if self.from_scratch and (self.teacher is None or self.model_name_or_path is not None):
            raise ValueError("--from-scratch takes --teacher, for vocabulary and sizes, and no --model-name-or-path.")
        if self.teacher is None and self.model_name_or_path is None:
            raise ValueError("Pass --teacher (distillation), --model-name-or-path (plain fine-tuning), or both.")
        if isinstance(self.student_config, str):
            try:
                self.student_config = json.loads(self.student_config)
            except json.JSONDecodeError as error:
                raise ValueError(
                    "--student-config must be json such as "
                    f"""'{{"num_hidden_layers": 6}}', got {self.student_config!r}."""
                ) from error
        if self.student_config and self.model_name_or_path is not None:
            raise ValueError("--student-config is for a new student; --model-name-or-path brings its own config.")

    @property
    def new_config(self) -> dict[str, Any]:
        """`student_config` as keyword arguments."""
        return cast(dict[str, Any], self.student_config or {})


@dataclass
class DataArguments:
    task: str | None = field(
        default=None,
        metadata={
            "help": f"Task with data on the Hub, columns and metrics of its own, one of {', '.join(TASKS)}. Files that "
            "are named here take the place of its own."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "csv, json lines or parquet file, or name:split on the Hub. With --streaming also a folder, a "
            "pattern, or plain text."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second sentence of pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    regression: bool = field(default=False, metadata={"help": "Labels are numbers to be predicted, not classes."})
    max_length: int = field(default=128, metadata={"help": "Longest sentence, in tokens."})
    streaming: bool = field(
        default=False, metadata={"help": "Stage 1: read --train-file while training, without end; needs --max-steps."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows of a stream from which the next one is drawn."}
    )
    packing: str = field(
        default="none",
        metadata={
            "choices": ("none", "length", "packed"),
            "help": "Rows of a stream: 'none' (a text each), 'length' (batches of similar length), 'packed' (texts one "
            "behind the other, all rows full).",
        },
    )

    def __post_init__(self) -> None:
        if self.task is None and self.train_file is None:
            raise ValueError("Pass --train-file, or --task.")
        if self.packing != "none" and not self.streaming:
            raise ValueError("--packing is for streams; without one, --train-sampling-strategy group_by_length.")


class DataclassParser(OptionParser, HfArgumentParser):
    """Options for all fields of dataclasses, spelled with dashes, of which the help shows the groups above."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shows_all = False
        self.add_argument("--help-all", action=HelpAll, help="show the options of transformers.TrainingArguments, too")

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        field = names[0].lstrip("-").replace("-", "_")
        kwargs |= {"help": HELP[field]} if field in HELP else {}
        kwargs |= {"metavar": METAVARS[field]} if field in METAVARS else {}
        if len(kwargs.get("choices", ())) > MOST_CHOICES:
            kwargs["metavar"] = "NAME"
        return super().add_argument(*dict.fromkeys(map(with_dashes, names)), **kwargs)

    def groups(self) -> Iterable[tuple[str | None, list[argparse.Action]]]:
        options = {action.dest: action for action in reversed(self._actions)}  # not --no-x, which is behind --x
        for title, names in GROUPS.items():
            yield title, [options[name] for name in names]
        shown = {name for names in GROUPS.values() for name in names}
        common = ("help", "help_all", "verbose")
        if self.shows_all:
            others = [action for action in self._actions if action.dest not in shown.union(common)]
            yield "other options of transformers.TrainingArguments", others
        yield "other options", [options[name] for name in common]


class HelpAll(argparse.Action):
    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line that may begin with a recipe: a json or yaml file with options."""
    parser = DataclassParser(
        cast(Any, (ModelArguments, DataArguments, DistillationTrainingArguments)),
        prog="spikebert distill",
        takes="[RECIPE.yaml]",
        description=__doc__,
        examples=EXAMPLES,
    )
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        file, *arguments_behind = arguments
        set_recipe(parser, file)
    else:
        arguments_behind = arguments
    model, data, training, common = cast(Any, parser.parse_args_into_dataclasses(arguments_behind))
    return argparse.Namespace(verbose=common.verbose, arguments=arguments, model=model, data=data, training=training)


def set_recipe(parser: DataclassParser, file: str) -> None:
    """Makes the options of a recipe the defaults.

    Raises:
        ValueError: it has an option that is not there, or a choice.
    """
    recipe = {str(key).replace("-", "_"): value for key, value in read_recipe(Path(file)).items()}
    options = {action.dest: action for action in parser._actions}
    unknown = [key for key in recipe if key not in options]
    if unknown:
        hint = did_you_mean(unknown[0], options) or "; see --help."
        raise ValueError(f"{file} has keys that are no options of spikebert distill: {', '.join(unknown)}{hint}")
    for key, value in recipe.items():
        try:
            parser._check_value(options[key], value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{file}: {key}: {error.message}") from error
    parser.set_defaults(**recipe)


def read_recipe(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The options of a recipe and, where it has none, of the recipe next to it that it names as `base`.

    `above` are the recipes that build on this one.
    """
    above = (*above, file.resolve())
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))  # json is yaml, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no yaml or json: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} must have one option a line, such as `stage: task`.")
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise ValueError(f"{file}: base must name a recipe, such as student.yaml, got {base!r}.")
    if (file.parent / base).resolve() in above:
        raise ValueError(f"{file}: its base {base} builds on {file.name} in turn. Name another base.")
    return read_recipe(file.parent / base, above) | recipe
