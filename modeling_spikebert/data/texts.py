"""Text for training, from files or the Hub, checked before work begins."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class DataError(ValueError):
    """The data cannot be used; the message says which file and rows, and what to do."""


@dataclass
class LabelledText:
    """Training and validation sentences of one classification task.

    Args:
        train: columns `text` (string) and `label` (int).
        validation: the same.
        label_names: name of each label id.
    """

    train: Dataset
    validation: Dataset
    label_names: list[str]

    @property
    def label_maps(self) -> dict[str, Any]:
        """`id2label` and `label2id`, for `from_pretrained(..., **label_maps)`."""
        id2label = dict(enumerate(self.label_names))
        return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def load_labelled(train: str, validation: str, text_column: str = "text", label_column: str = "label") -> LabelledText:
    """Reads two files or Hub splits of a classification task.

    Args:
        train: a csv, json lines or parquet file, or `name:split` or `name:config:split` of a data set on the Hub.
        validation: the same; it must use the labels of `train`.
        text_column: column of the text.
        label_column: column of the label, integers or strings.

    Raises:
        DataError: a file or column is missing, there are no rows, or rows lack text or a usable label.
    """
    tables = [_read(source, text_column, label_column) for source in (train, validation)]
    names = _label_names(tables[0], label_column, train)
    ids = {name: i for i, name in enumerate(names)}
    splits = []
    for source, table in zip((train, validation), tables, strict=True):
        labels = _label_strings(table, label_column)
        unknown = [row for row, label in enumerate(labels) if label not in ids]
        if unknown:
            raise DataError(
                f"{source}: label {labels[unknown[0]]!r} ({_rows(unknown)}) is not in {train}, which has {names}."
            )
        splits.append(Dataset.from_dict({"text": list(table[text_column]), "label": [ids[label] for label in labels]}))
    return LabelledText(splits[0], splits[1], names)


def load_unlabelled(source: str, text_column: str = "text") -> Dataset:
    """Reads the text of a file or Hub split; see `load_labelled`. Returns one column, `text`."""
    table = _read(source, text_column, None).select_columns(text_column)
    return table if text_column == "text" else table.rename_column(text_column, "text")


def match_labels(text: LabelledText, id2label: dict[int, str]) -> LabelledText:
    """Renumbers the labels of `text` as a teacher numbers them.

    Labels are matched by name. Data whose labels are the numbers 0, 1, ... take the teacher's names.

    Raises:
        DataError: the labels are others than the teacher's.
    """
    theirs = [id2label[i] for i in sorted(id2label)]
    if text.label_names == [str(i) for i in range(len(theirs))]:
        return LabelledText(text.train, text.validation, theirs)
    if sorted(text.label_names) != sorted(theirs):
        raise DataError(
            f"The data have the labels {text.label_names}, the teacher has {theirs}. Fine-tune the teacher on this "
            "task first, or rename its id2label."
        )
    ids = [theirs.index(name) for name in text.label_names]

    def renumber(row: dict[str, Any]) -> dict[str, Any]:
        return {"label": ids[row["label"]]}

    return LabelledText(text.train.map(renumber), text.validation.map(renumber), theirs)


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Replaces the text by token ids of at most `max_length` tokens; labels stay, as `labels`.

    Raises:
        DataError: the tokenizer has no words, as one has that is read from a folder without tokenizer files.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            f"The tokenizer ({tokenizer.name_or_path}) has no words, only {tokenizer.all_special_tokens}. Are its "
            "files in the folder? Save it there: tokenizer.save_pretrained(folder)."
        )

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = dict(tokenizer(batch["text"], truncation=True, max_length=max_length))
        return encoded | ({"labels": batch["label"]} if "label" in batch else {})

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")


def _read(source: str, text_column: str, label_column: str | None) -> Dataset:
    suffix = Path(source).suffix.lower()
    if suffix in FILE_TYPES:
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file. Check the path.")
        if not Path(source).stat().st_size:
            raise DataError(f"{source}: the file is empty. Was it written completely?")
        # In a csv a text "null", "NA" or "12" is text as well; pandas would read a missing value or a number.
        options: dict[str, Any] = {"keep_default_na": False, "converters": {text_column: str}}
        try:
            table = load_dataset(
                FILE_TYPES[suffix], data_files=source, split="train", **(options if suffix == ".csv" else {})
            )
        except Exception as error:  # the readers raise errors of many types
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):
                raise DataError(f"{source}: there are no rows. At least one sentence is needed.") from error
            raise DataError(
                f"{source}: cannot be read as {FILE_TYPES[suffix]}: {cause}. It must be whole and in UTF-8."
            ) from error
    elif ":" in source:
        *name, split = source.split(":")
        try:
            table = load_dataset(*name, split=split)
        except Exception as error:
            raise DataError(f"{source}: cannot be loaded from the Hub: {error}") from error
    else:
        raise DataError(
            f"{source}: neither a file of type {', '.join(FILE_TYPES)} nor a split of a Hub data set (name:split)."
        )
    for column in (text_column, label_column):
        if column is not None and column not in table.column_names:
            raise DataError(
                f"{source}: no column {column!r}; it has {table.column_names}. Name the right one (text_column, "
                "label_column); a csv must be separated by commas."
            )
    if not len(table):
        raise DataError(f"{source}: there are no rows. At least one sentence is needed.")
    texts = table[text_column]
    empty = [row for row, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise DataError(f"{source}: {len(empty)} rows have no text in {text_column!r} ({_rows(empty)}). Remove them.")
    return table


def _label_names(table: Dataset, label_column: str, source: str) -> list[str]:
    feature, labels = table.features[label_column], table[label_column]
    known = range(len(feature.names)) if isinstance(feature, ClassLabel) else None  # -1 and None are without label
    wrong = [
        row
        for row, label in enumerate(labels)
        if not isinstance(label, (int, str)) or label == "" or (known is not None and label not in known)
    ]
    if wrong:
        raise DataError(
            f"{source}: labels in {label_column!r} must be integers or strings, not {labels[wrong[0]]!r} "
            f"({_rows(wrong)}). Write class names or numbers."
        )
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if len(set(labels)) < 2:
        raise DataError(f"{source}: all rows have the label {labels[0]!r}; at least two labels are needed.")
    return [str(label) for label in sorted(set(labels))]


def _label_strings(table: Dataset, label_column: str) -> list[str]:
    feature = table.features[label_column]
    if isinstance(feature, ClassLabel):
        names = dict(enumerate(feature.names))
        return [names.get(label, str(label)) for label in table[label_column]]
    return [str(label) for label in table[label_column]]


def _rows(indices: list[int]) -> str:
    shown = ", ".join(str(i + 1) for i in indices[:5])
    return f"row{'s' if len(indices) > 1 else ''} {shown}{', ...' if len(indices) > 5 else ''}"
