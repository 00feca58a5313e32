"""`spikebert augment`: changed copies of the training text of a task, and sentences of other text, for stage 2.

The teacher labels them."""

import argparse
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from types import FrameType

import multiprocess
from datasets import ClassLabel, Dataset

from ..console.loudness import set_loudness
from ..console.text import align
from ..data import DataError
from ..data.augmentation import MaskedLanguageModel, augment, sentences_of
from ..data.settings import AugmentationSettings
from ..data.streams import open_rows
from ..data.texts import has_text, naming_carriage_returns, read_table, select_columns
from ..hub.fetching import reach_hub
from .options.augment import AugmentArguments

SHUFFLE_BUFFER_SIZE = 10_000  # texts from which the next one is drawn
DELAY = 0.1  # seconds from Ctrl-C to its end


def keep_children_quiet() -> None:
    """On Ctrl-C this process ends the others, which need not say anything, not even while they are forked.

    Ctrl-C is raised a moment later, as SIGALRM: Python swallows what is raised in a hook of a fork, and forgets a child
    at once if it is raised right behind it.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # whose program has the handlers
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # Ctrl-C is ignored, as behind `&` in a script, or handled before
    forking: list[bool] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM and not forking:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, DELAY)

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, interrupt)
    # Neither is a Python function, in which an interrupt could be raised before or after it did its work.
    os.register_at_fork(before=partial(forking.append, True), after_in_parent=forking.pop, after_in_child=ignore)


@contextmanager
def ending_children() -> Iterator[None]:
    """Ends those that `Dataset.map` left: interrupted, it can forget one, for which Python would wait forever."""
    try:
        yield
    finally:
        for child in multiprocess.active_children():
            child.terminate()


def run(options: argparse.Namespace) -> Dataset:
    """Reads, makes copies, writes the file and prints what is in it."""
    set_loudness(options.verbose)
    args, settings = options.augment, options.settings
    if args.num_proc > 1 and hasattr(os, "register_at_fork"):
        keep_children_quiet()
    with naming_carriage_returns(args.train_file, args.validation_file or ""):
        train = _read(args.train_file, args, {"label": args.label_column})
        _check_labels(train, args)
        validation = None if args.validation_file is None else _read(args.validation_file, args, {})
    reach_hub(args.masked_lm)
    masked_lm = None if args.masked_lm is None else MaskedLanguageModel(args.masked_lm)
    sentences = None if args.sentences_file is None else _draw_sentences(args.sentences_file, args, settings)
    with ending_children():
        table, dropped = augment(train, settings, args.num_proc, masked_lm, validation, sentences)

    _write(table, Path(args.output_file))
    counts = Counter(table["kind"])
    print("\n".join(align([["kind", "rows"], *([kind, f"{count:,}"] for kind, count in counts.most_common())])))
    print(f"Dropped: {dropped['duplicates']:,} duplicates", end="")
    print("." if validation is None else f", {dropped['validation']:,} that equal a validation sentence.")
    print(f"Written: {args.output_file}, {len(table):,} rows.")
    print(f"Next, stage 2: spikebert distill --teacher BERT --train-file {args.output_file} --validation-file FILE ...")
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
        count = "1 row has" if len(rows) == 1 else f"{len(rows)} rows have"
        raise DataError(
            f"{args.train_file}: {count} no label in {args.label_column!r}, the first is row {rows[0]}. "
            "Augment the labelled rows only."
        )
