"""`spikebert augment`: changed copies of the training text of a task, and sentences of other text, for stage 2.

The teacher labels them."""

import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from datasets import ClassLabel, Dataset

from ..data import DataError
from ..data.augmentation import AugmentationSettings, MaskedLanguageModel, augment, sentences_of
from ..data.streams import open_rows
from ..data.texts import has_text, read_table, select_columns
from ..hub.fetching import reach_hub
from .options import DataclassParser, check_at_least

SHUFFLE_BUFFER_SIZE = 10_000  # texts from which the next one is drawn


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


def main(arguments: list[str]) -> None:
    parser = DataclassParser(
        cast(Any, (AugmentArguments, AugmentationSettings)), prog="spikebert augment", description=__doc__
    )
    args, settings = parser.parse_args_into_dataclasses(arguments)
    if args.num_proc > 1 and hasattr(os, "register_at_fork"):
        keep_children_quiet()
    run(args, settings)


def keep_children_quiet() -> None:
    """On Ctrl-C this process ends the others, which need not say anything, not even while they are forked."""

    def hold() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def go_on() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        go_on()

    os.register_at_fork(before=hold, after_in_parent=go_on, after_in_child=ignore)


def run(args: AugmentArguments, settings: AugmentationSettings) -> Dataset:
    """Reads, makes copies, writes the file and prints what is in it."""
    train = _read(args.train_file, args, {"label": args.label_column})
    _check_labels(train, args)
    validation = None if args.validation_file is None else _read(args.validation_file, args, {})
    reach_hub(args.masked_lm)
    masked_lm = None if args.masked_lm is None else MaskedLanguageModel(args.masked_lm)
    sentences = None if args.sentences_file is None else _draw_sentences(args.sentences_file, args, settings)
    table, dropped = augment(train, settings, args.num_proc, masked_lm, validation, sentences)

    _write(table, Path(args.output_file))
    counts = Counter(table["kind"])
    width = max(map(len, counts))
    print(f"{args.output_file}: {len(table)} rows")
    for kind, count in counts.most_common():
        print(f"  {kind:{width}} {count:9}")
    print(f"Dropped: {dropped['duplicates']} duplicates", end="")
    print("." if validation is None else f", {dropped['validation']} that equal a validation sentence.")
    return table


def _write(table: Dataset, file: Path) -> None:
    """Writes the file in full, or leaves nothing behind."""
    content = BytesIO()
    table.to_parquet(content)  # in memory: pyarrow 26 ends the process where a disk is full
    partial = Path(f"{file}.partial")
    try:
        partial.write_bytes(content.getbuffer())
        partial.replace(file)
    except OSError as error:
        raise OSError(
            f"{file} could not be written ({error.strerror}). It takes {content.getbuffer().nbytes / 1e6:.1f} MB: free "
            "some space, or name another --output-file."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(source: str, args: AugmentArguments, columns: dict[str, str]) -> Dataset:
    texts = {"text": args.text_column}
    if args.text_pair_column is not None:
        texts["text_pair"] = args.text_pair_column
    return select_columns(read_table(source, texts.values()), source, texts | columns)


def _draw_sentences(source: str, args: AugmentArguments, settings: AugmentationSettings) -> list[str]:
    rows, column = open_rows(source, args.text_column)
    texts = (row[column] for row in rows.shuffle(settings.seed, buffer_size=SHUFFLE_BUFFER_SIZE))
    return sentences_of(filter(has_text, texts), settings.language, args.num_sentences)


def _check_labels(train: Dataset, args: AugmentArguments) -> None:
    """Refuses rows without label, since a missing label is the mark of a copy; training checks labels fully."""
    no_label = {None, ""} | ({-1} if isinstance(train.features["label"], ClassLabel) else set())
    rows = [row for row, label in enumerate(train["label"], start=1) if label in no_label or label != label]
    if rows:
        raise DataError(
            f"{args.train_file}: {len(rows)} rows have no label in {args.label_column!r}, the first is row {rows[0]}. "
            "Augment the labelled rows only."
        )
