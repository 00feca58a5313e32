"""`spikebert augment`: changed copies of the training text of a task, and sentences of other text, for stage 2.

The teacher labels them. Copies have words masked or replaced, or are cut; they are made of the training text alone."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from ...data.settings import AugmentationSettings
from . import OptionParser, check_at_least, of_class

EXAMPLES = ["spikebert augment --train-file train.csv --output-file augmented.parquet --language en"]


@dataclass
class AugmentArguments:
    train_file: str = field(
        metadata={"help": "csv, json lines or parquet file, or name:split on the Hub; nothing else gives words."}
    )
    output_file: str = field(metadata={"help": "The parquet file to write."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The same as --train-file; copies that equal one of its sentences are dropped."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second sentence of pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    masked_lm: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a masked language model that replaces words; with --p-mlm."},
    )
    sentences_file: str | None = field(
        default=None,
        metadata={
            "help": "Text of the same domain without labels, whose sentences are added: a file, folder or pattern, or "
            "name:split on the Hub."
        },
    )
    num_sentences: int = field(default=100_000, metadata={"help": "Sentences that are added from --sentences-file."})
    num_proc: int = field(default=1, metadata={"help": "Processes. The copies do not depend on it."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_proc", "num_sentences")
        output = Path(self.output_file)
        if output.suffix.lower() != ".parquet":
            raise ValueError(f"{output}: the output is a parquet file. Name it so: {output.with_suffix('.parquet')}.")
        for source in (self.train_file, self.validation_file, self.sentences_file):
            if source is not None and Path(source).resolve() == output.resolve():
                raise ValueError(f"{output} is read. Choose another --output-file.")
        if not output.parent.is_dir():
            raise ValueError(f"{output.parent}: no such folder. Make it first.")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert augment",
        takes="--train-file FILE --output-file FILE --language {en,zh}",
        description=__doc__,
        examples=EXAMPLES,
    )
    files = parser.add_argument_group("text")
    parser.add_fields(files, AugmentArguments, "train_file", "output_file", "validation_file")
    parser.add_fields(files, AugmentationSettings, "language")
    parser.add_fields(files, AugmentArguments, "text_column", "text_pair_column", "label_column")
    copies = parser.add_argument_group("copies")
    names = ("copies", "p_mask", "p_pos", "p_ngram", "mask_token", "p_mlm")
    parser.add_fields(copies, AugmentationSettings, *names)
    parser.add_fields(copies, AugmentArguments, "masked_lm")
    others = parser.add_argument_group("sentences of other text")
    parser.add_fields(others, AugmentArguments, "sentences_file", "num_sentences")
    work = parser.add_argument_group("work")
    parser.add_fields(work, AugmentationSettings, "seed")
    parser.add_fields(work, AugmentArguments, "num_proc")
    options = parser.parse_args(arguments)
    return argparse.Namespace(
        verbose=options.verbose,
        augment=of_class(AugmentArguments, options),
        settings=of_class(AugmentationSettings, options),
    )
