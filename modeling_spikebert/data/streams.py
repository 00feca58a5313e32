"""Text that is read while it is trained on: corpora larger than memory, or than the disk.

    stream_text("wiki/*.parquet") -> endless, shuffled text -> tokenize_stream(...) -> rows for a Trainer with max_steps

Each row of a stream follows from its files, the seed and its place, so a training that is resumed reads its stream
again up to where it stopped, and goes on exactly as it would have.
"""

import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase

from .texts import FILE_TYPES, DataError, has_text

STREAM_TYPES = FILE_TYPES | {".txt": "text"}
PACKINGS = ("none", "length", "packed")
# Rows that are packed together: the last sequence of each such group stays shorter.
ROWS_PACKED_TOGETHER = 1000
# Batches whose rows are sorted by length together.
BATCHES_SORTED_TOGETHER = 64


def stream_text(source: str, text_column: str = "text", buffer_size: int = 10_000, seed: int = 0) -> IterableDataset:
    """Reads text without end, in an order that a seed decides.

    Files come in random order, and rows through a buffer from which they are drawn at random; behind the last row it
    begins again. Rows without text are left out.

    Args:
        source: a file, a folder or a pattern (`wiki/*.parquet`) of csv, json lines, parquet or plain text files (a row
            for each line), also with `.gz`; or `name:split` or `name:config:split` of a data set on the Hub.
        text_column: column of the text; plain text files have none.
        buffer_size: rows from which the next one is drawn.
        seed: of the order.

    Returns:
        one column, `text`. It has no length.

    Raises:
        DataError: at once for files, columns or text that are missing; on the way for a value that is no text, with its
            row (counted over all files, in the order of their names).
    """
    rows, column = _open(source, text_column)

    def check(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[str]]:
        for index, value in zip(indices, batch[column], strict=True):
            if value is not None and not isinstance(value, str):
                raise DataError(f"{source}: row {index + 1} has {value!r} in {column!r}, which is no text.")
        return {"text": [value for value in batch[column] if has_text(value)]}

    try:
        columns = {name for row in rows.take(1) for name in row}
        if columns and column not in columns:
            raise DataError(
                f"{source}: no column {column!r}; it has {sorted(columns)}. Name the right one (text_column)."
            )
        text = rows.map(check, batched=True, with_indices=True, remove_columns=list(columns))
        if not list(text.take(1)):
            raise DataError(f"{source}: there are no rows with text. At least one sentence is needed.")
    except DataError:
        raise
    except Exception as error:  # the readers raise errors of many types
        raise DataError(f"{source}: cannot be read: {error.__cause__ or error}") from error
    # Repeated before it is shuffled: so each pass has an order of its own.
    return text.repeat(None).shuffle(seed=seed, buffer_size=buffer_size)


def tokenize_stream(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: str = "none",
    batch_size: int = 1,
    seed: int = 0,
) -> IterableDataset:
    """Turns a stream of text into rows for a model, of at most `max_length` tokens.

    Args:
        stream: from `stream_text`.
        tokenizer: of the teacher.
        max_length: in tokens.
        packing: `"none"`: a row for each text, cut at `max_length`. `"length"`: the same, in an order in which each
            `batch_size` rows are of similar length, for little padding. `"packed"`: texts one behind the other, with
            the tokenizer's separator between them, in rows of `max_length`, for no padding; long texts go on in the
            next row.
        batch_size: rows of a step of all processes (before gradient accumulation).
        seed: of the order of batches.

    Raises:
        ValueError: another packing.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}.")
    special = tokenizer("")["input_ids"]  # [CLS] [SEP]
    before, after = special[:-1], special[-1:]
    with_types = "token_type_ids" in tokenizer.model_input_names

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=max_length))

    def sort(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[list[int]]]:
        encoded = cut(batch)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = np.argsort(lengths, kind="stable")
        whole = len(order) // batch_size
        batches = np.random.default_rng([seed, indices[0]]).permutation(order[: whole * batch_size].reshape(whole, -1))
        order = np.concatenate([batches.ravel(), order[whole * batch_size :]])
        return {name: [values[i] for i in order] for name, values in encoded.items()}

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = (token for ids in texts for token in (*ids, *after))
        rows = [[*before, *part] for part in _parts(tokens, max_length - len(before), after)]
        columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        return columns | ({"token_type_ids": [[0] * len(row) for row in rows]} if with_types else {})

    options: dict[str, Any] = {"batched": True, "remove_columns": ["text"]}
    if packing == "packed":
        return stream.map(pack, batch_size=ROWS_PACKED_TOGETHER, **options)
    if packing == "length":
        return stream.map(sort, with_indices=True, batch_size=BATCHES_SORTED_TOGETHER * batch_size, **options)
    return stream.map(cut, **options)


def _parts(tokens: Iterator[int], size: int, end: list[int]) -> Iterator[list[int]]:
    """Cuts tokens into parts of at most `size`, each of which ends with the separator."""
    while part := list(islice(tokens, size - len(end))):
        if part[-len(end) :] == end:
            yield part
        else:
            yield part + end


def _open(source: str, text_column: str) -> tuple[IterableDataset, str]:
    """The rows of a source in the order of its files, and the column of the text."""
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if _type(file) is not None)
    else:
        files = sorted(glob.glob(source))
    kinds = {_type(Path(file)) for file in files}
    if not files and (":" not in source or "*" in source or _type(path) is not None):
        raise DataError(
            f"{source}: no such file, and no folder or pattern with files of type {', '.join(STREAM_TYPES)}."
        )
    if len(kinds) > 1 or None in kinds:
        raise DataError(f"{source}: files of one type are needed, of {', '.join(STREAM_TYPES)}; got {files[:5]}.")
    try:
        if files:
            kind = kinds.pop()
            rows = load_dataset(kind, data_files=files, split="train", streaming=True)
            return rows, "text" if kind == "text" else text_column
        *name, split = source.split(":")
        return load_dataset(*name, split=split, streaming=True), text_column
    except Exception as error:  # as above
        raise DataError(f"{source}: cannot be opened: {error.__cause__ or error}") from error


def _type(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    return STREAM_TYPES.get(suffixes[-1]) if suffixes else None
