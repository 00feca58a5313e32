"""Text that is read while it is trained on: corpora larger than memory, or than the disk."""

import glob
from collections.abc import Iterator
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as parquet  # type: ignore[import-untyped]
import torch
from datasets import load_dataset
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..hub.fetching import reach_hub
from .texts import FILE_TYPES, NO_ROWS, DataError, check_columns, has_text, reader_options, warn_of_unknown

STREAM_TYPES = FILE_TYPES | {".txt": "text"}
PACKINGS = ("none", "length", "packed")
ROWS_LOOKED_AT = 100  # for tokens that are unknown, before training
ROWS_AT_ONCE = 1000  # read and tokenised together
BATCHES_SORTED_TOGETHER = 64
# Sequences whose places are remembered: more than a loader reads ahead of the training.
PLACES = 65536


class Place(NamedTuple):
    """Where a sequence begins: in which pass, at which row of that pass (in its shuffled order), and how many tokens of
    that row (packed), or sequences of the group that begins there, are gone."""

    epoch: int = 0
    row: int = 0
    offset: int = 0


class TextStream(IterableDataset):
    """Token ids of the text of files or a Hub split, without end; for `Trainer` with `max_steps`.

    Each pass over the text has an order of its own, which follows from the seed: files are shuffled, and rows are drawn
    from a buffer. Rows without text are left out. Every process reads the whole stream and takes its share of each
    batch, so the batches of a step do not depend on the number of processes. One worker of a loader reads; more would
    be idle.

    A training that is resumed goes on with the very sequence that would have come next. The place of it is part of the
    checkpoint (`state_dict`); what came before in the same pass is read again, but not tokenised.

    Args:
        source: a file, a folder (with those below it) or a pattern (`wiki/*.parquet`) of csv, json lines, parquet or
            plain text files (a row for each line), all of one type, also as `.gz`; or `name:split` or
            `name:config:split` of a data set on the Hub.
        tokenizer: of the teacher.
        max_length: tokens of a sequence, with special tokens.
        text_column: column of the text; plain text files need none.
        packing: `"none"`: a sequence for each row, cut at `max_length`. `"length"`: the same, but each `batch_size`
            sequences are of similar length, for little padding; batches come in random order. `"packed"`: rows one
            behind the other, [CLS] a [SEP] b [SEP], in sequences of `max_length`; the last row goes on in the next
            sequence, so that nothing is cut.
        batch_size: sequences of all processes in a forward pass; only for `"length"`.
        buffer_size: rows from which the next one is drawn.
        seed: of the order.

    Raises:
        DataError: at once for files, columns or text that are missing; on the way for what cannot be read.
        ValueError: another packing, a buffer or batch of less than one row.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        text_column: str = "text",
        packing: str = "none",
        batch_size: int = 1,
        buffer_size: int = 10_000,
        seed: int = 0,
    ):
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}.")
        if min(batch_size, buffer_size) < 1:
            raise ValueError(f"batch_size ({batch_size}) and buffer_size ({buffer_size}) must be at least 1.")
        self.source, self.tokenizer, self.max_length = source, tokenizer, max_length
        self.options: dict[str, Any] = {
            "packing": packing,
            "max_length": max_length,
            "batch_size": batch_size if packing == "length" else 1,
            "buffer_size": buffer_size,
            "seed": seed,
        }
        self._rows, self._column = open_rows(source, text_column)
        # Sequence number and place behind it; shared with the worker of a loader that fills it.
        self._places = torch.zeros(PLACES, 1 + len(Place._fields), dtype=torch.int64).share_memory_()
        self._start, self._num_skipped = Place(), 0
        # Raises here what the first rows have wrong.
        first = [text for text, _ in islice(self._texts(Place()), ROWS_LOOKED_AT)]
        warn_of_unknown(tokenizer(first, truncation=True, max_length=max_length)["input_ids"], tokenizer)

    def state_dict(self, num_sequences: int) -> dict[str, Any] | None:
        """What a checkpoint after `num_sequences` sequences of this run holds; None if they were not read lately."""
        number, *place = self._places[num_sequences % PLACES].tolist()
        return {**self.options, "place": place} if number == num_sequences else None

    def load_state_dict(self, state: dict[str, Any] | None, num_skipped: int) -> None:
        """Sets where the next iteration begins.

        Args:
            state: from `state_dict`; None for the beginning, from where `Trainer` skips what it has seen.
            num_skipped: sequences that `Trainer` will skip because it has seen them. They are not read again.

        Raises:
            ValueError: the stream has other options than the one in the checkpoint.
        """
        if state is None:
            self._start, self._num_skipped = Place(), 0
            return
        others = {name: (state.get(name), value) for name, value in self.options.items() if state.get(name) != value}
        if others:
            raise ValueError(
                "The stream of text is another than that of the checkpoint: "
                + ", ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in others.items())
                + ". Resume with the same options."
            )
        self._start, self._num_skipped = Place(*state["place"]), num_skipped

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        yield from repeat(self._model_inputs([self.tokenizer.pad_token_id or 0]), self._num_skipped)
        sequences = self._packed if self.options["packing"] == "packed" else self._grouped
        for number, (ids, place) in enumerate(sequences(self._start), start=self._num_skipped + 1):
            self._places[number % PLACES] = torch.tensor([number, *place])
            yield self._model_inputs(ids)

    def _model_inputs(self, ids: list[int]) -> dict[str, list[int]]:
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        return {name: inputs[name] for name in inputs if name in self.tokenizer.model_input_names}

    def _packed(self, start: Place) -> Iterator[tuple[list[int], Place]]:
        before, after = special_tokens(self.tokenizer)
        ids = [*before]
        gone = start.offset
        texts = self._texts(start)
        while batch := list(islice(texts, ROWS_AT_ONCE)):
            tokens = self.tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
            for (_, place), text in zip(batch, tokens, strict=True):
                while gone < len(text):
                    part = text[gone : gone + self.max_length - len(ids) - len(after)]
                    gone += len(part)
                    ids += part + after
                    if len(ids) + len(after) >= self.max_length:  # no room for a token more
                        yield ids, place._replace(offset=gone)
                        ids = [*before]
                gone = 0

    def _grouped(self, start: Place) -> Iterator[tuple[list[int], Place]]:
        by_length = self.options["packing"] == "length"
        size = self.options["batch_size"]
        gone = start.offset
        texts = self._texts(start)
        while group := list(islice(texts, BATCHES_SORTED_TOGETHER * size if by_length else ROWS_AT_ONCE)):
            rows = self.tokenizer([text for text, _ in group], truncation=True, max_length=self.max_length)["input_ids"]
            first = group[0][1]
            if by_length:
                rows.sort(key=len)
                order = np.random.default_rng([self.options["seed"], *first]).permutation(BATCHES_SORTED_TOGETHER)
                rows = [row for i in order for row in rows[i * size : (i + 1) * size]]
            for i, ids in enumerate(rows[gone:], start=gone + 1):
                yield ids, first._replace(offset=i)
            gone = 0

    def _texts(self, start: Place) -> Iterator[tuple[str, Place]]:
        """Rows with text from a place on, pass after pass."""
        for epoch in count(start.epoch):
            any_text = False
            first = start.row if epoch == start.epoch else 0
            for row, text in self._pass(epoch, first):
                if text is not None and has_text(text):
                    any_text = True
                    yield text, Place(epoch, row)
            if not any_text and not first:
                raise DataError(f"{self.source}: there are no rows with text. At least one sentence is needed.")

    def _pass(self, epoch: int, first: int) -> Iterator[tuple[int, str | None]]:
        order = np.random.default_rng([self.options["seed"], epoch])
        # From one file at a time: the threads that read several sleep for five seconds at the end of each pass.
        shuffled = self._rows.shuffle(
            generator=order, buffer_size=self.options["buffer_size"], max_buffer_input_shards=1
        ).with_format("arrow")
        begin = 0
        try:
            for table in shuffled.iter(ROWS_AT_ONCE):
                end = begin + len(table)
                if first < end:
                    column = table.column(self._column)
                    if str(column.type) not in ("string", "large_string", "string_view", "null"):
                        raise self._no_text(str(column.type))
                    values = column.slice(max(first - begin, 0)).to_pylist()
                    yield from enumerate(values, start=max(first, begin))
                begin = end
        except DataError:
            raise
        except Exception as error:  # the readers raise errors of many types
            raise DataError(f"{self.source}: cannot be read: {error.__cause__ or error}") from error

    def _no_text(self, dtype: str) -> DataError:
        values = ((row, example[self._column]) for row, example in enumerate(self._rows, start=1))
        wrong = next(((row, value) for row, value in values if not isinstance(value, str | None)), None)
        where = "" if wrong is None else f" (row {wrong[0]} over all files, in the order of their names: {wrong[1]!r})"
        return DataError(
            f"{self.source}: {self._column!r} has values of type {dtype}, which are no text{where}. Name another "
            "column (text_column), or write strings."
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and behind it."""
    whole = tokenizer("a", return_special_tokens_mask=True)
    mask = whole["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - mask[::-1].index(0)
    return whole["input_ids"][:first], whole["input_ids"][last:]


def open_rows(source: str, text_column: str) -> tuple[datasets.IterableDataset, str]:
    """The rows of a source in the order of its files, and the column of the text in them."""
    files = find_files(source)
    if not files:
        reach_hub(source.split(":")[0], repo_type="dataset")
    try:
        if not files:
            *name, split = source.split(":")
            rows = load_dataset(*name, split=split, streaming=True)
        else:
            kind = STREAM_TYPES[_type(files[0])]
            text_column = "text" if kind == "text" else text_column
            options = reader_options(kind, files, [text_column])
            if kind == "parquet":
                options["columns"] = [text_column]
                for file in files:  # the others are too slow to look at all of them
                    check_columns(file, {"text": text_column}, parquet.read_schema(file).names)
            rows = load_dataset(kind, split="train", streaming=True, **options)
        names = rows.column_names or next(iter(rows.with_format("arrow").iter(1))).column_names
    except DataError:
        raise
    except StopIteration:
        raise DataError(f"{source}: {NO_ROWS}") from None
    except Exception as error:  # as above
        raise DataError(f"{source}: cannot be read: {error.__cause__ or error}") from error
    check_columns(source, {"text": text_column}, names)
    return rows.select_columns([text_column]), text_column


def find_files(source: str) -> list[str]:
    """The files that `source` names, sorted; none if it is a name on the Hub."""
    path = Path(source)
    if path.is_dir():
        files = [str(file) for file in path.rglob("*") if _type(str(file)) in STREAM_TYPES]
    else:
        files = [source] if path.is_file() else glob.glob(source, recursive=True)
    if not files and (":" not in source or glob.has_magic(source) or _type(source) in STREAM_TYPES):
        raise DataError(
            f"{source}: no such file, and no folder or pattern with files of type {', '.join(STREAM_TYPES)}. Check the "
            "path."
        )
    types = {_type(file) for file in files}
    if len({STREAM_TYPES.get(suffix) for suffix in types}) > 1 or not types <= STREAM_TYPES.keys():
        raise DataError(
            f"{source}: files of one type are needed, of {', '.join(STREAM_TYPES)}; got {', '.join(sorted(types))}. "
            "Name them by a pattern (*.parquet)."
        )
    return sorted(files)


def _type(file: str) -> str:
    """The ending that says what is in a file, before one of gzip."""
    return Path(file.lower().removesuffix(".gz")).suffix
