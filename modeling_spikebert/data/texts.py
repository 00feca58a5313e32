"""Text for training, from files or the Hub, checked before work begins."""

import codecs
import json
import math
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..console.loudness import unsaid
from ..hub.fetching import reach_hub
from .mapping import mapped

logger = logging.get_logger(__name__)

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IGNORED_LABEL = -100  # what torch's cross entropy ignores, and a teacher fills in
LARGEST_NUMBER = 1e18  # in regression: its square is finite in float32
NO_ROWS = "there are no rows. At least one sentence is needed."
MOST_UNKNOWN = 0.05  # of all tokens, without a word about it
ROWS_LOOKED_AT = 1000  # for tokens that are unknown


class DataError(ValueError):
    """The data cannot be used; the message says which file and rows, and what to do."""


@dataclass
class LabelledText:
    """Training and validation text of one task.

    Args:
        train: columns `text` (string), for sentence pairs `text_pair` (string), and `label`: a class id (int), or the
            number itself in regression (float). Augmented copies that a teacher has to label have -100 or NaN.
        validation: the same, with a label in every row.
        label_names: name of each class id; none in regression, or the name of the teacher's one output.
        problem_type: `"single_label_classification"` or `"regression"`, as in configs.
    """

    train: Dataset
    validation: Dataset
    label_names: list[str]
    problem_type: str = "single_label_classification"

    @property
    def label_maps(self) -> dict[str, Any]:
        """`id2label` and `label2id`, in regression the problem type too, for `from_pretrained(..., **label_maps)`."""
        id2label = dict(enumerate(self.label_names))
        maps: dict[str, Any] = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
        if self.problem_type == "regression":
            return {"problem_type": "regression", **(maps if id2label else {"num_labels": 1})}
        return maps

    @property
    def label_counts(self) -> dict[str, int]:
        """Training rows of each class."""
        counts = Counter(self.train["label"])
        return {name: counts[i] for i, name in enumerate(self.label_names)}

    @property
    def num_unlabelled(self) -> int:
        """Training rows without label."""
        return sum(label == IGNORED_LABEL or math.isnan(label) for label in self.train["label"])

    def check_all_labelled(self) -> None:
        """For training without a teacher.

        Raises:
            DataError: there are training rows without label.
        """
        if self.num_unlabelled:
            raise DataError(
                f"{self.num_unlabelled} of {len(self.train)} training rows have no label: they are augmented copies, "
                "which a teacher labels. Pass a teacher, or the file without them."
            )

    def check_apart(self) -> None:
        """For training that validation is to judge. Rows that are in both parts are counted in a warning.

        Raises:
            DataError: both parts are the same text.
        """
        sides = [name for name in ("text", "text_pair") if name in self.train.column_names]
        train, validation = (
            Counter(zip(*(part[name] for name in sides), strict=True)) for part in (self.train, self.validation)
        )
        if train == validation:
            raise DataError(
                f"Training and validation data are the same {len(self.train)} rows. A model is measured on text that "
                "it was not trained on: name another file for validation."
            )
        both = sum(count for row, count in validation.items() if row in train)
        if both:
            logger.warning(
                f"{both} of {len(self.validation)} validation rows are in the training data, too. Remove them from one "
                "of the files: they say nothing of text that is new to the model."
            )


def load_labelled(
    train: str,
    validation: str,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
    regression: bool = False,
) -> LabelledText:
    """Reads two files or Hub splits of a task.

    A training file may be one of `spikebert augment`, with the columns `text`, `text_pair`, `label` and `kind`: rows of
    another kind than "original" may lack a label.

    Args:
        train: a csv, json lines or parquet file, or `name:split` or `name:config:split` of a data set on the Hub.
        validation: the same; it must use the labels of `train`.
        text_column: column of the text.
        label_column: column of the label: integers or strings, in regression numbers.
        text_pair_column: column of the second sentence, if the task has pairs.
        regression: whether the labels are numbers to be predicted and not classes.

    Raises:
        DataError: a file or column is missing, there are no rows, or rows lack text or a usable label.
    """
    columns = {"text": text_column, "label": label_column}
    if text_pair_column is not None:
        columns["text_pair"] = text_pair_column
    tables = []
    with naming_carriage_returns(train, validation):
        for source in (train, validation):
            table = read_table(source, columns.values())
            augmented = "kind" in table.column_names and text_column not in table.column_names  # it has our names
            tables.append(select_columns(table, source, {name: name for name in columns} if augmented else columns))
        return labelled_text(tables, (train, validation), regression)


def load_unlabelled(source: str, text_column: str = "text") -> Dataset:
    """Reads the text of a file or Hub split; see `load_labelled`. Returns one column, `text`."""
    with naming_carriage_returns(source):
        return select_columns(read_table(source, [text_column]), source, {"text": text_column}).select_columns("text")


@contextmanager
def naming_carriage_returns(*sources: str) -> Iterator[None]:
    """Where a csv is refused, says whether carriage returns cut its rows: pandas writes such texts without quotes."""
    try:
        yield
    except DataError as error:
        for source in sources:
            if str(error).startswith(f"{source}:") and _has_carriage_returns(Path(source)):
                raise DataError(
                    f"{error} The file has carriage returns inside lines: put these texts in quotes."
                ) from error
        raise


def _has_carriage_returns(file: Path) -> bool:
    """Inside the lines of a csv, and not in quotes."""
    if file.suffix.lower() != ".csv" or not file.is_file():
        return False
    content = re.sub(rb'"[^"]*"', b"", file.read_bytes())
    return b"\n" in content and re.search(rb"\r(?!\n)", content) is not None


def match_labels(text: LabelledText, id2label: dict[int, str]) -> LabelledText:
    """Renumbers the labels of `text` as a teacher numbers them.

    Labels are matched by name. Data whose labels are the numbers 0, 1, ... take the teacher's names. Rows without label
    stay so. In regression the teacher must have one output, whose name is taken.

    Raises:
        DataError: the labels are others than the teacher's.
    """
    theirs = [id2label[i] for i in sorted(id2label)]
    if text.problem_type == "regression":
        if len(theirs) != 1:
            raise DataError(
                f"The labels are numbers (regression), but the teacher has the classes {theirs}. Fine-tune a teacher "
                "with one output on this task first, or load the data without regression."
            )
        return replace(text, label_names=theirs)
    if text.label_names == [str(i) for i in range(len(theirs))]:
        return replace(text, label_names=theirs)
    if sorted(text.label_names) != sorted(theirs):
        raise DataError(
            f"The data have the labels {text.label_names}, the teacher has {theirs}. Fine-tune the teacher on this "
            "task first, or rename its id2label."
        )
    ids = {i: theirs.index(name) for i, name in enumerate(text.label_names)} | {IGNORED_LABEL: IGNORED_LABEL}

    def renumber(row: dict[str, Any]) -> dict[str, Any]:
        return {"label": ids[row["label"]]}

    train, validation = (mapped(part, renumber) for part in (text.train, text.validation))
    return replace(text, train=train, validation=validation, label_names=theirs)


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Replaces text, or pairs of it, by token ids of at most `max_length` tokens; labels stay, as `labels`.

    Raises:
        DataError: the tokenizer has no words, as one has that is read from a folder without tokenizer files, or
            `max_length` leaves no room for them.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(
            f"The tokenizer ({tokenizer.name_or_path}) has no words, only {tokenizer.all_special_tokens}. Are its "
            "files in the folder? Save it there: tokenizer.save_pretrained(folder)."
        )
    pairs = "text_pair" in dataset.column_names
    num_special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= num_special + pairs:  # at least one token of each sentence
        raise DataError(
            f"max_length={max_length} leaves no room for text: the tokenizer adds {num_special} tokens of its own. "
            "Raise it."
        )

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch["text"], batch["text_pair"]] if pairs else [batch["text"]]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        return encoded | ({"labels": batch["label"]} if "label" in batch else {})

    tokens = mapped(dataset, encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")
    some = tokens.select(range(0, len(tokens), 1 + len(tokens) // ROWS_LOOKED_AT))
    warn_of_unknown(some["input_ids"], tokenizer)
    return tokens


def warn_of_unknown(rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Says how much of a text the tokenizer does not know, if that is much; `rows` are token ids."""
    others = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    tokens = [token for row in rows for token in row if token not in others]
    share = tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))
    if share > MOST_UNKNOWN:
        logger.warning(
            f"{100 * share:.0f} % of the tokens are unknown to the tokenizer ({tokenizer.name_or_path}), so a model "
            "learns little from this text. Name a teacher for the language of the text."
        )


def read_table(source: str, text_columns: Iterable[str]) -> Dataset:
    """Opens a file or Hub split as it is. In a csv, `text_columns` are read as strings, whatever they look like."""
    suffix = Path(source).suffix.lower()
    if os.path.isdir(source):
        raise DataError(f"{source} is a folder. Name a file in it, of type {', '.join(FILE_TYPES)}.")
    if suffix in FILE_TYPES:
        if not Path(source).is_file():
            raise DataError(f"{source}: no such file. Check the path.")
        kind = FILE_TYPES[suffix]
        options = reader_options(kind, [source], text_columns)
        try:
            with unsaid(f"datasets.packaged_modules.{kind}.{kind}"):  # it would say the error a second time
                table = load_dataset(kind, split="train", **options)
        except Exception as error:  # the readers raise errors of many types
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):
                raise DataError(f"{source}: {NO_ROWS}") from error
            if isinstance(cause, OSError) and cause.errno:  # of the disk, as when it is full
                raise DataError(f"{source}: cannot be read: {cause}.") from error
            line = _damaged_line(source) if suffix == ".jsonl" else None
            raise DataError(
                f"{source}: cannot be read as {kind}: {' '.join(str(cause).split()).rstrip('.')}"
                f"{'' if line is None else f' (line {line + 1} of the file)'}. It must be whole and in UTF-8"
                f"{', its columns separated by commas. Put texts with commas in quotes' if kind == 'csv' else ''}."
            ) from error
    elif ":" in source:
        *name, split = source.split(":")
        reach_hub(name[0], repo_type="dataset")
        try:
            table = load_dataset(*name, split=split)
        except Exception as error:
            raise DataError(f"{source}: cannot be loaded from the Hub: {error}") from error
    else:
        raise DataError(
            f"{source}: neither a file of type {', '.join(FILE_TYPES)} nor a split of a Hub data set (name:split)."
        )
    if not len(table):
        raise DataError(f"{source}: {NO_ROWS}")
    return table


def reader_options(kind: str, files: list[str], text_columns: Iterable[str]) -> dict[str, Any]:
    """What `load_dataset` takes for files of one type.

    Raises:
        DataError: a file is empty, or json that would end the process.
    """
    for file in files:
        if not Path(file).stat().st_size:
            raise DataError(f"{file}: the file is empty. Was it written completely?")
        if kind == "json" and _begins_with_null(file):  # pyarrow 26 ends the process there
            raise DataError(f"{file}: cannot be read as json: it begins with null. Every row must have columns.")
    options: dict[str, Any] = {"data_files": files}
    if kind == "csv":  # a text "null", "NA" or "12" is text as well; pandas would read a missing value or a number
        options |= {"keep_default_na": False, "converters": dict.fromkeys(text_columns, str)}
    return options


def check_columns(source: str, columns: Mapping[str, str], names: list[str]) -> None:
    """Whether there are `columns`, from "text", "text_pair" and "label" to their names in the data."""
    for role, column in columns.items():
        if column not in names:
            raise DataError(f"{source}: no column {column!r}; it has {names}. {_column_hint(role, columns, names)}")


def _column_hint(role: str, columns: Mapping[str, str], names: list[str]) -> str:
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        return "In a csv, commas separate columns."
    option = f"--{role.replace('_', '-')}-column"
    free = [name for name in names if name not in columns.values()]
    alike = [name for name in free if name.strip().casefold() == columns[role].strip().casefold()]
    meant = alike or (free if len(free) == 1 else [])
    if meant:
        return f"Did you mean {meant[0]!r}? Pass {option} {shlex.quote(meant[0])}, or rename it."
    return f"Pass the right one, {option} NAME, or rename it."


def select_columns(table: Dataset, source: str, columns: dict[str, str]) -> Dataset:
    """The table with its `columns` under our names (the keys), and `kind` if it has that; every text is checked."""
    check_columns(source, columns, table.column_names)
    ours = {column: name for name, column in columns.items()}
    if len(ours) < len(columns):
        raise DataError(f"{source}: {columns} must be different columns.")
    for column in (columns[name] for name in ("text", "text_pair") if name in columns):
        texts = _values(table, column, source)
        empty = [row for row, text in enumerate(texts) if not has_text(text)]
        if empty:
            count, them = ("1 row has", "it") if len(empty) == 1 else (f"{len(empty)} rows have", "them")
            raise DataError(f"{source}: {count} no text in {column!r} ({_rows(empty)}). Remove {them}.")
    kind = [] if "kind" in columns.values() or "kind" not in table.column_names else ["kind"]
    return table.select_columns([*ours, *kind]).rename_columns(ours | {name: name for name in kind})


def has_text(value: Any) -> bool:
    """Whether a value is a string with more in it than white space, control and format characters (NUL, zero-width
    space) and marks that combine with nothing: many tokenizers make no tokens of these."""
    return isinstance(value, str) and any(
        (category := unicodedata.category(character)) not in ("Cc", "Cf") and category[0] not in "MZ"
        for character in value
    )


def labelled_text(
    tables: Sequence[Dataset], sources: Sequence[str], regression: bool = False, label_names: Sequence[str] = ()
) -> LabelledText:
    """Checks labels and numbers them.

    Args:
        tables: for training and for validation, from `select_columns`.
        sources: names of both, for messages.
        regression: see `load_labelled`.
        label_names: of a task that has its own; the data may then have them or their numbers.
    """
    train, validation = tables
    labels = [_labels(train, sources[0], regression, copies=True), _labels(validation, sources[1], regression)]
    known = {label for label in labels[0] if label is not None}
    if len(known) < 2:
        raise DataError(
            f"{sources[0]}: all rows have the label {next(iter(known), None)!r}; at least two labels are needed."
        )
    if regression:
        numbers = [[math.nan if label is None else label for label in split] for split in labels]
        splits = [_split(*part, Value("float32")) for part in zip(tables, numbers, strict=True)]
        return LabelledText(splits[0], splits[1], [], "regression")

    feature = train.features["label"]
    names = list(label_names or (feature.names if isinstance(feature, ClassLabel) else sorted(known, key=_by_number)))
    warn_of_similar(names)
    ids = ({str(i): i for i in range(len(names))} if label_names else {}) | {name: i for i, name in enumerate(names)}
    splits = []
    for table, source, split in zip(tables, sources, labels, strict=True):
        unknown = [row for row, label in enumerate(split) if label is not None and label not in ids]
        if unknown:
            owner, advice = sources[0], "Add it to the training text, or remove these rows."
            if label_names:
                owner, advice = "the task", "Rename it, or remove these rows."
            raise DataError(
                f"{source}: label {split[unknown[0]]!r} ({_rows(unknown)}) is not in {owner}, which has {names}. "
                f"{advice}"
            )
        splits.append(_split(table, [IGNORED_LABEL if x is None else ids[x] for x in split], Value("int64")))
    return LabelledText(splits[0], splits[1], names)


def warn_of_similar(labels: Sequence[str]) -> None:
    """Names the first two labels that differ in case or outer white space alone."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(label.strip().casefold(), label)
        if other is not label:
            logger.warning(
                f"The labels {other!r} and {label!r} differ in case or white space alone, and are two classes. If they "
                "are meant as one, write them alike."
            )
            return


def _split(table: Dataset, labels: list[Any], dtype: Value) -> Dataset:
    texts = [name for name in ("text", "text_pair") if name in table.column_names]
    features = Features({name: Value("string") for name in texts} | {"label": dtype})
    return Dataset.from_dict({name: table[name][:] for name in texts} | {"label": labels}, features=features)


def _labels(table: Dataset, source: str, regression: bool, copies: bool = False) -> list[Any]:
    """Class names, or numbers in regression; with `copies`, None for augmented copies without label."""
    feature, values = table.features["label"], _values(table, "label", source)
    if regression:
        labels: list[Any] = [_number(value) for value in values]
    elif isinstance(feature, ClassLabel):  # -1 and None are without label
        labels = [feature.names[value] if value in range(len(feature.names)) else None for value in values]
    else:
        labels = [_class_name(value) for value in values]
    kinds = table["kind"][:] if copies and "kind" in table.column_names else [None] * len(table)
    wrong = [
        row
        for row, (label, value, kind) in enumerate(zip(labels, values, kinds, strict=True))
        if label is None and (kind in (None, "original") or not _is_missing(value))
    ]
    missing = [row for row in wrong if _is_missing(values[row]) or isinstance(feature, ClassLabel)]
    if missing:
        has, them = ("has", "it") if len(missing) == 1 else ("have", "them")
        raise DataError(f"{source}: {_rows(missing)} {has} no label. Label {them}, or remove {them}.")
    if wrong:
        expected = f"numbers of less than {LARGEST_NUMBER:.0e}" if regression else "integers or strings"
        raise DataError(
            f"{source}: labels must be {expected}, not {values[wrong[0]]!r} ({_rows(wrong)}). Write "
            f"{'numbers' if regression else 'class names or numbers; real numbers are for regression'}."
        )
    return labels


def _class_name(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers beside nulls
        value = int(value)
    if not isinstance(value, (int, str)) or _is_missing(value):
        return None
    name = str(value).strip()
    return None if re.fullmatch(r"[+-]?\d*\.\d+", name) else name


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < LARGEST_NUMBER else None


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _by_number(name: str) -> tuple[int, int, str]:
    """Sorts names that are integers by value, in front of the others."""
    return (0, int(name), name) if re.fullmatch(r"-?[0-9]{1,18}", name) else (1, 0, name)


def _values(table: Dataset, column: str, source: str) -> list[Any]:
    try:
        return table[column][:]
    except UnicodeDecodeError as error:  # parquet and json readers do not look at strings
        data = table.data.column(column).cast("binary").to_pylist()
        wrong = [row for row, value in enumerate(data) if value and value.decode(errors="ignore").encode() != value]
        raise DataError(f"{source}: {column!r} is not in UTF-8 ({_rows(wrong)}). Write the file in UTF-8.") from error


def _begins_with_null(source: str) -> bool:
    with Path(source).open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    return first.removeprefix(codecs.BOM_UTF8).strip().startswith(b"null")


def _damaged_line(source: str) -> int | None:
    """The first line that is no json, or has half of a surrogate pair, which no UTF-8 can write."""
    with Path(source).open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                json.dumps(json.loads(line.strip() or b"null"), ensure_ascii=False).encode()
            except (ValueError, RecursionError):  # also of the encoding
                return number
    return None


def _rows(indices: list[int]) -> str:
    shown = ", ".join(str(i + 1) for i in indices[:5])
    return f"row{'s' if len(indices) > 1 else ''} {shown}{', ...' if len(indices) > 5 else ''}"
