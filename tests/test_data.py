"""Reading text for training: what is accepted, and how each kind of bad data is refused."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import tiny_model
from tiny_training import tiny_tokenizer
from transformers import BertTokenizerFast, DataCollatorWithPadding, EvalPrediction

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data import (
    DataError,
    LabelledText,
    accuracy_metrics,
    load_labelled,
    load_unlabelled,
    match_labels,
    tokenize,
)
from modeling_spikebert.data.mapping import mapped

ROWS = [("a fine film", "good"), ("so dull", "bad"), ("it runs, mostly", "fair"), ("very fine", "good")]
TYPES = ("csv", "json", "jsonl", "parquet")
types = pytest.mark.parametrize("suffix", TYPES)


def write(file: Path, rows: list[tuple], columns: tuple[str, ...] = ("text", "label")) -> str:
    """Rows as csv, json lines or parquet, by the file's suffix."""
    if file.suffix.startswith(".json"):
        file.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        return str(file)
    table = Dataset.from_dict({column: [row[i] for row in rows] for i, column in enumerate(columns)})
    table.to_csv(file) if file.suffix == ".csv" else table.to_parquet(file)
    return str(file)


class Pickled:
    """What happens when it is hashed."""

    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, row: dict) -> dict:
        return {"text": row["text"].upper()}

    def __reduce__(self):
        raise self.error


def test_ctrl_c_ends_the_hashing_of_what_maps():
    with pytest.raises(KeyboardInterrupt):
        mapped(Dataset.from_dict({"text": ["a"]}), Pickled(KeyboardInterrupt()))


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_hashed_maps_all_the_same():
    assert mapped(Dataset.from_dict({"text": ["a"]}), Pickled(TypeError()))["text"][:] == ["A"]


def test_tokens_have_a_fingerprint_of_text_and_length():
    """The cache of a teacher's outputs is named by it."""

    def fingerprint(text: str, length: int) -> str:
        return tokenize(Dataset.from_dict({"text": [text]}), tiny_tokenizer(), length)._fingerprint

    assert fingerprint("word1", 8) == fingerprint("word1", 8)
    others = [fingerprint("word1", 8), fingerprint("word2", 8), fingerprint("word1", 9)]
    assert len(set(others)) == 3


def labelled(folder: Path, train: list[tuple], validation: list[tuple] | None = None, suffix: str = "jsonl", **options):
    files = [
        write(folder / f"train.{suffix}", train),
        write(folder / f"validation.{suffix}", validation or train),
    ]
    return load_labelled(*files, **options)


def refused(message: str, *parts: object):
    """The message is one line that holds `parts` and matches `message`."""
    pattern = "".join(f"(?=.*{re.escape(str(part))})" for part in parts)
    return pytest.raises(DataError, match=rf"^{pattern}.*{message}[^\n]*$")


# Labelled text


@types
def test_string_labels_are_sorted(tmp_path, suffix):
    text = labelled(tmp_path, ROWS, ROWS[:2], suffix)
    assert text.label_names == ["bad", "fair", "good"]
    assert text.train.to_dict() == {"text": [row[0] for row in ROWS], "label": [2, 0, 1, 2]}
    assert text.validation.to_dict() == {"text": [row[0] for row in ROWS[:2]], "label": [2, 0]}


def test_strings_that_are_integers_are_sorted_by_value(tmp_path):
    text = labelled(tmp_path, [("one", "10"), ("two", "9"), ("three", " 9 ")])
    assert text.label_names == ["9", "10"]
    assert text.train["label"] == [1, 0, 0]


def test_labels_of_several_types_are_told_apart(tmp_path):
    text = labelled(tmp_path, [("one", 10), ("two", "a"), ("three", True), ("four", 2)])
    assert text.label_names == ["2", "10", "True", "a"]


@types
def test_integer_labels_keep_their_numerical_order(tmp_path, suffix):
    text = labelled(tmp_path, [("one", 10), ("two", 2), ("three", -1)], [("four", 2)], suffix)
    assert text.label_names == ["-1", "2", "10"]
    assert text.train["label"] == [2, 1, 0]
    assert text.validation["label"] == [1]


def test_class_labels_keep_their_names_and_ids(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["worse", "better", "absent"])})
    file = str(tmp_path / "data.parquet")
    Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]}, features=features).to_parquet(file)
    text = load_labelled(file, file)
    assert text.label_names == ["worse", "better", "absent"]
    assert text.train["label"] == [1, 0]


def test_the_same_text_for_training_and_validation(tmp_path, caplog):
    with pytest.raises(DataError, match="are the same 4 rows"):
        labelled(tmp_path, ROWS, ROWS[::-1]).check_apart()
    labelled(tmp_path, ROWS, [("new", "good")]).check_apart()
    assert not caplog.records
    labelled(tmp_path, ROWS, [ROWS[0], ("new", "good"), (ROWS[0][0], "bad")]).check_apart()
    assert caplog.records[0].getMessage().startswith("2 of 3 validation rows are in the training data, too.")


def test_labels_are_counted_and_similar_ones_are_named(tmp_path, caplog):
    rows = [("a", "good"), ("b", "bad"), ("c", "good"), ("d", " good")]
    text = labelled(tmp_path, rows, suffix="csv")
    assert text.label_counts == {"bad": 1, "good": 3}
    assert not caplog.records
    rows[2:] = [("c", "Good"), ("d", "GOOD")]
    assert labelled(tmp_path, rows, suffix="csv").label_counts == {"GOOD": 1, "Good": 1, "bad": 1, "good": 1}
    (record,) = caplog.records
    assert record.getMessage().startswith("The labels 'GOOD' and 'Good' differ in case or white space alone, and are")


@pytest.mark.parametrize(("known", "warned"), [(19, False), (18, True)])
def test_unknown_tokens_are_named_above_one_in_twenty(known, warned, caplog):
    text = Dataset.from_dict({"text": ["word1 " * known + "strange"]})
    for _ in range(20 - known - 1):
        text = Dataset.from_dict({"text": [text["text"][0] + " strange"]})
    tokenize(text, tiny_tokenizer(), 64)
    assert [record.getMessage()[:4] for record in caplog.records] == (["10 %"] if warned else [])


def test_the_two_files_may_be_of_two_types(tmp_path):
    train, validation = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.parquet", ROWS[:1])
    text = load_labelled(train, validation)
    assert (len(text.train), len(text.validation)) == (4, 1)


def test_capital_letters_in_the_type_of_a_file(tmp_path):
    file = tmp_path / "train.csv"
    write(file, ROWS)
    assert len(load_unlabelled(str(file.rename(tmp_path / "TRAIN.CSV")))) == 4


def test_columns_of_other_names(tmp_path):
    file = write(tmp_path / "data.csv", [(*row, 7) for row in ROWS], ("sentence", "mood", "number"))
    text = load_labelled(file, file, text_column="sentence", label_column="mood")
    assert text.train.column_names == ["text", "label"]
    assert text.train["label"] == [2, 0, 1, 2]


def test_text_with_commas_quotes_line_breaks_and_other_scripts(tmp_path):
    sentences = ['"so", he said', "two\nlines", "灰色的鸟", "naïve 🙂", "null", "NA", "1.5"]
    for suffix in TYPES:
        text = labelled(tmp_path, [(s, i % 2) for i, s in enumerate(sentences)], suffix=suffix)
        assert text.train["text"] == sentences, suffix


def test_numbers_as_text_in_a_csv(tmp_path):
    file = tmp_path / "numbers.csv"
    file.write_text("text,label\n12,a\n7,b\n")
    assert load_unlabelled(str(file))["text"] == ["12", "7"]


# Sentence pairs

PAIRS = [("it rains", "it is wet", "yes"), ("it snows", "it is hot", "no")]
PAIR_COLUMNS = ("premise", "hypothesis", "label")


@types
def test_sentence_pairs(tmp_path, suffix):
    file = write(tmp_path / f"data.{suffix}", PAIRS, PAIR_COLUMNS)
    text = load_labelled(file, file, "premise", text_pair_column="hypothesis")
    assert text.train.to_dict() == {
        "text": ["it rains", "it snows"],
        "text_pair": ["it is wet", "it is hot"],
        "label": [1, 0],
    }
    assert text.validation.to_dict() == text.train.to_dict()


@pytest.mark.parametrize("empty", ["", None, "\u200b"])
def test_a_row_without_second_sentence_is_named(tmp_path, empty):
    file = write(tmp_path / "data.jsonl", [*PAIRS, ("alone", empty, "yes")], PAIR_COLUMNS)
    with refused(r"no text in 'hypothesis' \(row 3\)", file):
        load_labelled(file, file, "premise", text_pair_column="hypothesis")


def test_no_second_column(tmp_path):
    file = write(tmp_path / "data.csv", PAIRS, PAIR_COLUMNS)
    with refused("no column 'text_pair'", file, list(PAIR_COLUMNS)):
        load_labelled(file, file, "premise", text_pair_column="text_pair")


def test_one_column_for_both_sentences(tmp_path):
    file = write(tmp_path / "data.csv", PAIRS, PAIR_COLUMNS)
    with refused("must be different columns", file):
        load_labelled(file, file, "premise", text_pair_column="premise")


def test_numbers_as_second_sentence_in_a_csv(tmp_path):
    file = tmp_path / "numbers.csv"
    file.write_text("text,text_pair,label\n12,007,a\n7,NA,b\n")
    assert load_labelled(str(file), str(file), text_pair_column="text_pair").train["text_pair"] == ["007", "NA"]


def test_pairs_are_tokenized_together():
    pairs = {"text": ["word0 word1"] * 2, "text_pair": ["word2 word3 word4", "word2"], "label": [1, 0]}
    table = tokenize(Dataset.from_dict(pairs), tiny_tokenizer(), max_length=7)
    # [CLS] two words [SEP] three words [SEP] are eight: the longer sentence loses one. word0 is token 5.
    assert table["input_ids"] == [[2, 5, 6, 3, 7, 8, 3], [2, 5, 6, 3, 7, 3]]
    assert table["token_type_ids"] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert table["labels"] == [1, 0]


# Regression

SCORES = [("one", 2.5), ("two", 0.0), ("three", -1.25)]


@types
def test_numbers_to_be_predicted(tmp_path, suffix):
    text = labelled(tmp_path, SCORES, SCORES[:1], suffix, regression=True)
    assert text.problem_type == "regression"
    assert text.train["label"] == [2.5, 0.0, -1.25]
    assert text.validation["label"] == [2.5]
    assert text.label_names == []
    assert text.label_maps == {"problem_type": "regression", "num_labels": 1}


def test_integers_to_be_predicted_are_real_numbers(tmp_path):
    text = labelled(tmp_path, [("one", 1), ("two", 5)], regression=True)
    assert text.train["label"] == [1.0, 5.0]
    assert text.train.features["label"].dtype == "float32"


@pytest.mark.parametrize(
    "wrong", [None, "", "high", float("nan"), float("inf"), 1e30, [1.0]], ids=lambda wrong: str(wrong) or "empty"
)
def test_labels_that_are_no_numbers_are_named(tmp_path, wrong):
    missing = wrong in (None, "") or wrong != wrong
    expected = "row 2 has no label" if missing else r"labels must be numbers of less than 1e\+18, not .* \(row 2\)"
    with refused(expected, tmp_path / "train.jsonl"):
        labelled(tmp_path, [("one", 1.0), ("two", wrong), ("three", 2.0)], regression=True)


def test_one_number_alone(tmp_path):
    with refused("all rows have the label 3.0; at least two", tmp_path / "train.csv"):
        labelled(tmp_path, [("a", 3), ("b", 3.0)], suffix="csv", regression=True)


def test_real_numbers_are_not_taken_for_classes(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\none,3\ntwo,3.5\n")
    with refused(r"not '3.5' \(row 2\).*real numbers are for regression", file):
        load_labelled(str(file), str(file))


def test_regression_goes_from_file_to_loss(tmp_path):
    text = labelled(tmp_path, [("word1", 2.5), ("word2 word3", -1.0)], regression=True)
    tokens = tokenize(text.train, tiny_tokenizer(), 8)
    batch = DataCollatorWithPadding(tiny_tokenizer())([tokens[0], tokens[1]])
    model = tiny_model(SpikeBertForSequenceClassification, **text.label_maps)
    with torch.no_grad():
        outputs = model(**batch)
    assert batch["labels"].tolist() == [2.5, -1.0]
    assert outputs.logits.shape == (2, 1)
    expected = ((outputs.logits[:, 0] - batch["labels"]) ** 2).mean()
    assert float(outputs.loss) == pytest.approx(float(expected))


def test_regression_takes_the_name_of_the_teachers_output(tmp_path):
    text = match_labels(labelled(tmp_path, SCORES, regression=True), {0: "similarity"})
    assert text.label_maps == {
        "problem_type": "regression",
        "id2label": {0: "similarity"},
        "label2id": {"similarity": 0},
    }
    assert tiny_model(SpikeBertForSequenceClassification, **text.label_maps).config.num_labels == 1
    assert text.train["label"] == [2.5, 0.0, -1.25]


def test_regression_needs_a_teacher_with_one_output(tmp_path):
    with refused("Fine-tune a teacher with one output", ["bad", "good"]):
        match_labels(labelled(tmp_path, SCORES, regression=True), {0: "bad", 1: "good"})


# Augmented copies, which a teacher labels

COPIES = [("one", 1, "original"), ("[MASK]", None, "mask"), ("two", 0, "original"), ("few", 0, "ngram")]
COPY_COLUMNS = ("text", "label", "kind")


@types
def test_copies_may_lack_a_label(tmp_path, suffix):
    train = write(tmp_path / f"train.{suffix}", COPIES, COPY_COLUMNS)
    text = load_labelled(train, write(tmp_path / "validation.csv", [("three", 1)]))
    assert text.label_names == ["0", "1"]
    assert text.train.to_dict() == {"text": ["one", "[MASK]", "two", "few"], "label": [1, -100, 0, 0]}
    assert text.num_unlabelled == 1
    assert tokenize(text.train, tiny_tokenizer(), 8)["labels"] == [1, -100, 0, 0]


def test_copies_beside_labels_that_pandas_made_floats_of(tmp_path):
    file = str(tmp_path / "train.parquet")
    Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [10.0, math.nan, 9.0], "kind": ["original", "mask", "mask"]}
    ).to_parquet(file)
    text = load_labelled(file, write(tmp_path / "validation.csv", [("d", 10)]))
    assert text.label_names == ["9", "10"]
    assert text.train["label"] == [1, -100, 0]


def test_copies_beside_class_labels(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "kind": Value("string")})
    file = str(tmp_path / "train.parquet")
    rows = {"text": ["a", "b", "c"], "label": [1, None, 0], "kind": ["original", "mask", "original"]}
    Dataset.from_dict(rows, features=features).to_parquet(file)
    text = load_labelled(file, write(tmp_path / "validation.csv", [("d", "yes")]))
    assert text.label_names == ["no", "yes"]
    assert text.train["label"] == [1, -100, 0]


@types
def test_copies_in_regression_have_no_number(tmp_path, suffix):
    rows = [("one", 1.5, "original"), ("[MASK]", None, "mask"), ("two", 0.5, "original")]
    train = write(tmp_path / f"train.{suffix}", rows, COPY_COLUMNS)
    text = load_labelled(train, write(tmp_path / "validation.csv", [("three", 1)]), regression=True)
    assert text.num_unlabelled == 1
    np.testing.assert_array_equal(tokenize(text.train, tiny_tokenizer(), 8)["labels"], [1.5, math.nan, 0.5])


@types
def test_an_original_without_label_is_named(tmp_path, suffix):
    train = write(tmp_path / f"train.{suffix}", [*COPIES, ("three", None, "original")], COPY_COLUMNS)
    with refused("row 5 has no label", train):
        load_labelled(train, write(tmp_path / "validation.csv", [("four", 1)]))


def test_a_copy_with_a_wrong_label_is_named(tmp_path):
    rows = [("a", 1.0, "original"), ("b", 0.5, "mask"), ("c", 2.0, "original")]
    train = write(tmp_path / "train.parquet", rows, COPY_COLUMNS)
    with refused(r"not 0.5 \(row 2\)", train):
        load_labelled(train, train)


def test_validation_text_has_no_copies_without_label(tmp_path):
    file = write(tmp_path / "data.parquet", COPIES, COPY_COLUMNS)
    with refused("rows? 2.* no label", file):
        load_labelled(write(tmp_path / "train.csv", [("a", 0), ("b", 1)]), file)


def test_copies_alone(tmp_path):
    train = write(tmp_path / "train.jsonl", [("a", None, "mask"), ("b", None, "mask")], COPY_COLUMNS)
    with refused("all rows have the label None; at least two", train):
        load_labelled(train, write(tmp_path / "validation.csv", [("c", 1)]))


def test_copies_need_a_teacher(tmp_path):
    train = write(tmp_path / "train.parquet", COPIES, COPY_COLUMNS)
    text = load_labelled(train, write(tmp_path / "validation.csv", [("three", 1)]))
    with refused("1 of 4 training rows have no label.*Pass a teacher"):
        text.check_all_labelled()
    labelled(tmp_path, ROWS).check_all_labelled()


def test_copies_keep_to_be_without_label_in_the_teachers_numbers(tmp_path):
    rows = [(text, {0: "bad", 1: "good"}.get(label), kind) for text, label, kind in COPIES]
    train = write(tmp_path / "train.parquet", rows, COPY_COLUMNS)
    text = load_labelled(train, write(tmp_path / "validation.csv", [("three", "good")]))
    assert match_labels(text, {0: "good", 1: "bad"}).train["label"] == [0, -100, 1, 1]


# Unlabelled text


@types
def test_unlabelled_text_has_one_column(tmp_path, suffix):
    file = write(tmp_path / f"data.{suffix}", ROWS, ("sentence", "label"))
    assert load_unlabelled(file, "sentence").to_dict() == {"text": [row[0] for row in ROWS]}


def test_unlabelled_text_without_a_label_column(tmp_path):
    file = write(tmp_path / "data.csv", [("a",), ("b",)], ("text",))
    assert load_unlabelled(file).to_dict() == {"text": ["a", "b"]}


# Refusals


@types
def test_missing_file(tmp_path, suffix):
    file = tmp_path / f"absent.{suffix}"
    with refused("no such file", file):
        load_unlabelled(str(file))
    with refused("no such file", file):
        load_labelled(write(tmp_path / "train.csv", ROWS), str(file))


@types
def test_empty_file(tmp_path, suffix):
    file = tmp_path / f"empty.{suffix}"
    file.touch()
    with refused("the file is empty", file):
        load_unlabelled(str(file))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_file_without_rows(tmp_path, suffix):
    file = tmp_path / f"header.{suffix}"
    if suffix == "parquet":
        write(file, [])
    else:
        file.write_text("text,label\n" if suffix == "csv" else "\n")
    with refused("there are no rows", file):
        load_unlabelled(str(file))


@types
def test_no_text_column(tmp_path, suffix):
    file = write(tmp_path / f"data.{suffix}", ROWS, ("sentence", "label"))
    with refused("no column 'text'", file, ["sentence", "label"]):
        load_unlabelled(file)


@types
def test_no_label_column(tmp_path, suffix):
    file = write(tmp_path / f"data.{suffix}", ROWS, ("text", "mood"))
    with refused("no column 'label'", file, ["text", "mood"]):
        load_labelled(file, file)


INVISIBLE = {
    "empty": "",
    "null": None,
    "whitespace": " \t\u3000\u2028",
    "nul": "\0",
    "control": "\x01\x7f\x85",
    "zero_width": "\u200b\u200d\ufeff\u2060",
    "accent_alone": "\u0301\ufe0f",
}


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ("sentence,label", "Did you mean 'sentence'? Pass --text-column sentence, or rename it."),
        ("Text,label,id", "Did you mean 'Text'? Pass --text-column Text, or rename it."),
        (" text,label,id", "Did you mean ' text'? Pass --text-column ' text', or rename it."),
        ("sentence,label,id", "Pass the right one, --text-column NAME, or rename it."),
        ("text;label", "In a csv, commas separate columns."),
    ],
)
def test_a_column_that_is_not_there_has_a_hint(tmp_path, columns, hint):
    file = tmp_path / "data.csv"
    file.write_text(f"{columns}\n" + ",".join(["word"] * (columns.count(",") + 1)) + "\n")
    with refused(re.escape(f"no column 'text'; it has {columns.split(',')}. {hint}"), file):
        load_labelled(str(file), str(file))


def test_rows_without_label_are_named(tmp_path):
    file = write(tmp_path / "data.csv", [ROWS[0], ("a", ""), ROWS[1]])
    with refused(r"data\.csv: row 2 has no label\. Label it, or remove it\.", file):
        load_labelled(file, file)
    file = write(tmp_path / "other.csv", [ROWS[0], ("a", ""), ("b", " "), ROWS[1]])
    with refused(r"other\.csv: rows 2, 3 have no label\. Label them, or remove them\.", file):
        load_labelled(file, file)


def test_one_row_without_text(tmp_path):
    file = write(tmp_path / "data.csv", [ROWS[0], ("", "good")])
    with refused(r"1 row has no text in 'text' \(row 2\)\. Remove it\.", file):
        load_unlabelled(file)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "data.csv").mkdir()
    with refused("is a folder. Name a file in it, of type .csv, ", tmp_path / "data.csv"):
        load_unlabelled(str(tmp_path / "data.csv"))


CUT = "The file has carriage returns inside lines: put these texts in quotes."


def test_carriage_returns_inside_lines_are_named(tmp_path):
    rows = [ROWS[0], ("first\rsecond", "bad"), ROWS[1]]
    file = tmp_path / "data.csv"
    file.write_bytes("\n".join(["text,label", *map(",".join, rows)]).encode())  # as pandas writes it
    with refused(rf"row 2 has no label.*{CUT}", file):
        load_labelled(str(file), str(file))
    file.write_bytes("\r\n".join(["text,label", *map(",".join, ROWS[:2]), ""]).encode())  # as Windows ends lines
    assert len(load_labelled(str(file), str(file)).train) == 2
    file.write_bytes(b'text,label\n"first\rsecond",good\nshort,bad\nempty,\n')
    with pytest.raises(DataError) as caught:
        load_labelled(str(file), str(file))
    assert CUT not in str(caught.value)


def test_too_many_commas_are_said_once(tmp_path, monkeypatch):
    file = tmp_path / "data.csv"
    file.write_text("text,label\nshort,good\nlong, with, commas,bad\n")
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler := logging.Handler()])
    handler.emit = lambda record: said.append(record.getMessage())
    with refused(r"its columns separated by commas\. Put texts with commas in quotes\.", file):
        load_labelled(str(file), str(file))
    assert said == []


@pytest.mark.parametrize("empty", INVISIBLE.values(), ids=INVISIBLE)
@types
def test_rows_without_text(tmp_path, suffix, empty):
    rows = [ROWS[0], (empty, "bad"), *ROWS[1:], (empty, "good")]
    file = write(tmp_path / f"data.{suffix}", rows)
    with refused(r"2 rows have no text in 'text' \(rows 2, 6\)\. Remove them", file):
        load_unlabelled(file)
    with refused(r"2 rows have no text in 'text' \(rows 2, 6\)\. Remove them", file):
        load_labelled(file, file)


UNUSUAL = {
    "very_long": "ab " * 33_333 + "c",
    "one_very_long_word": "a" * 100_000,
    "emoji": "👩‍👩‍👧‍👦🫨🏳️‍🌈",
    "mixed_scripts": "naïve Straße 灰色 привет שלום 한국어",
    "nul_inside": "word1\0word2",
    "control_inside": "\x1bword1\x07 \u200bword2",
    "private_use": "\uf8ff",
    "half_of_a_flag": "🇩",
}


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
@types
def test_unusual_text_is_kept_and_tokenized(tmp_path, suffix, unusual):
    text = labelled(tmp_path, [(unusual, "a"), ("word1", "b")], suffix=suffix)
    assert text.train["text"] == [unusual, "word1"]
    tokens = tokenize(text.train, tiny_tokenizer(), 16)
    batch = DataCollatorWithPadding(tiny_tokenizer())([tokens[0], tokens[1]])
    assert batch["input_ids"].shape[1] <= 16
    assert tiny_model(SpikeBertForSequenceClassification, **text.label_maps)(**batch).logits.isfinite().all()


def test_half_of_a_surrogate_pair_in_json_is_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "whole \U0001f600"}) + '\n{"text": "half \\ud83d"}\n')
    with refused(r"cannot be read as json: .*\(line 2 of the file\)", file):
        load_unlabelled(str(file))


@pytest.mark.parametrize("start", ["", "\n ", "\ufeff"], ids=["at_once", "after_space", "after_mark"])
def test_json_thatbegins_with_null(tmp_path, start):
    file = tmp_path / "data.jsonl"
    file.write_text(start + 'null\n{"text": "a"}\n')
    with refused("begins with null", file):
        load_unlabelled(str(file))
    file.write_text(start + '{"text": "a"}\nnull\n')
    with refused(r"no text in 'text' \(row 2\)", file):
        load_unlabelled(str(file))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_text_in_another_encoding_is_named(tmp_path, suffix):
    file = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        file.write_bytes(b'{"text": "fine"}\n{"text": "na\xefve"}\n{"text": "caf\xe9"}\n')
    else:
        table = pa.table({"text": pa.array([b"fine", b"na\xefve", b"caf\xe9"]).view(pa.string())})
        pq.write_table(table, file)
    with refused(r"'text' is not in UTF-8 \(rows 2, 3\)", file):
        load_unlabelled(str(file))


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, 1.5], ids=["list", "struct", "float"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labels_that_are_neither_integers_nor_strings(tmp_path, suffix, wrong):
    with refused(r"must be integers or strings, not .* \(rows 1, 2\)", tmp_path / f"train.{suffix}"):
        labelled(tmp_path, [("one", wrong), ("two", wrong)], suffix=suffix)


def test_many_rows_without_text_are_not_all_listed(tmp_path):
    file = write(tmp_path / "data.jsonl", [("", "a")] * 100 + ROWS)
    with refused(r"100 rows have no text in 'text' \(rows 1, 2, 3, 4, 5, \.\.\.\)", file):
        load_unlabelled(file)


def test_text_that_is_no_string(tmp_path):
    file = write(tmp_path / "data.jsonl", [(1.5, "a"), (2.5, "b")])
    with refused(r"no text in 'text' \(rows 1, 2\)", file):
        load_unlabelled(file)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0.5, r"must be integers or strings, not 1\.5 \(rows 1"),
        (None, "row 2 has no label"),
        ("", "row 2 has no label"),
    ],
    ids=["float", "null", "empty_string"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labels_of_a_wrong_type(tmp_path, suffix, wrong, message):
    other = 1.5 if isinstance(wrong, float) else "a"
    with refused(message, tmp_path / f"train.{suffix}"):
        labelled(tmp_path, [("one", other), ("two", wrong), ("three", other)], suffix=suffix)


def test_a_row_without_label_is_named(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\none,a\ntwo,\nthree,b\n")
    with refused("row 2 has no label", file):
        load_labelled(str(file), str(file))


def test_a_row_of_integers_without_label_is_named(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\none,0\ntwo,\nthree,1\n")
    with refused("row 2 has no label", file):
        load_labelled(str(file), str(file))


@pytest.mark.parametrize("missing", [None, -1])  # test splits of data sets on the Hub often have -1
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_class_label_that_is_missing_is_named(tmp_path, split, missing):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation")}
    for name, file in files.items():
        labels = [0, missing if name == split else 0, 1]
        Dataset.from_dict({"text": ["one", "two", "three"], "label": labels}, features=features).to_parquet(file)
    with refused("row 2 has no label", files[split]):
        load_labelled(**files)


def test_one_class_alone(tmp_path):
    with refused("all rows have the label 'good'; at least two", tmp_path / "train.jsonl"):
        labelled(tmp_path, [("a", "good"), ("b", "good")])


def test_validation_label_that_training_lacks(tmp_path):
    names = "['bad', 'fair', 'good']"
    with refused(
        r"label 'odd' \(rows 2, 3\).*Add it to the training text, or remove these rows\.",
        tmp_path / "validation.jsonl",
        tmp_path / "train.jsonl",
        names,
    ):
        labelled(tmp_path, ROWS, [ROWS[0], ("b", "odd"), ("c", "odd")])


def test_validation_row_without_label(tmp_path):
    with refused("row 2 has no label", tmp_path / "validation.jsonl"):
        labelled(tmp_path, ROWS, [ROWS[0], ("b", None)])


@pytest.mark.parametrize("source", ["data", "data.txt", "folder/data.xlsx", ""])
def test_unknown_source(source):
    with refused(r"neither a file of type \.csv, \.json, \.jsonl, \.parquet nor a split of a Hub", source):
        load_unlabelled(source)


def test_data_set_that_the_hub_does_not_give():
    with pytest.raises(DataError, match=r"^nobody/nothing:train: cannot be loaded from the Hub: \S"):
        load_unlabelled("nobody/nothing:train")


@pytest.mark.parametrize(
    ("suffix", "content", "kind"),
    [
        ("parquet", b"PAR1 and then something else", "parquet"),
        ("jsonl", b'{"text": "whole"}\n{"text": "torn', "json"),
        ("csv", b"text,label\n\xff\xfe\xfa,1\n", "csv"),
        ("csv", b'text,label\n"never closed,1\n', "csv"),
    ],
    ids=["parquet", "json", "csv_encoding", "csv_quote"],
)
def test_damaged_file(tmp_path, suffix, content, kind):
    file = tmp_path / f"damaged.{suffix}"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}: cannot be read as {kind}: \S"):
        load_unlabelled(str(file))


# Labels of a teacher


def two_rows(labels: list[int], names: list[str]) -> LabelledText:
    split = Dataset.from_dict({"text": ["one", "two"], "label": labels})
    return LabelledText(split, split, names)


def test_labels_are_matched_by_name():
    text = match_labels(two_rows([0, 1], ["bad", "good"]), {0: "good", 1: "bad"})
    assert text.label_names == ["good", "bad"]
    assert text.train["label"] == text.validation["label"] == [1, 0]
    assert text.train["text"] == ["one", "two"]


def test_labels_that_agree_stay():
    text = match_labels(two_rows([0, 1], ["bad", "good"]), {1: "good", 0: "bad"})
    assert text.label_names == ["bad", "good"]
    assert text.train["label"] == [0, 1]


def test_numbers_take_the_names_of_the_teacher():
    text = match_labels(two_rows([1, 0], ["0", "1"]), {0: "LABEL_0", 1: "LABEL_1"})
    assert text.label_names == ["LABEL_0", "LABEL_1"]
    assert text.train["label"] == [1, 0]


@pytest.mark.parametrize("names", [["bad", "fair"], ["bad"], ["0", "1", "2"], ["1", "2"]])
def test_labels_that_are_not_the_teachers(names):
    with refused(re.escape(str(["bad", "good"])), names):
        match_labels(two_rows([0, 0], names), {0: "bad", 1: "good"})


# Tokens


def test_tokens_are_truncated_and_labels_stay():
    tokenizer = tiny_tokenizer()
    text = Dataset.from_dict({"text": ["word1 word2 word3 word4", "word5"], "label": [1, 0]})
    table = tokenize(text, tokenizer, max_length=4)
    assert table["input_ids"] == [[2, 6, 7, 3], [2, 10, 3]]  # [CLS] ... [SEP]; word0 is token 5
    assert table["attention_mask"] == [[1] * 4, [1] * 3]
    assert table["labels"] == [1, 0]
    assert set(table.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_tokens_of_unlabelled_text_have_no_labels():
    table = tokenize(Dataset.from_dict({"text": ["word1"]}), tiny_tokenizer(), max_length=8)
    assert set(table.column_names) == {"input_ids", "token_type_ids", "attention_mask"}


@pytest.mark.parametrize(("max_length", "columns"), [(2, ["text"]), (4, ["text", "text_pair"])])
def test_a_length_that_leaves_no_room_for_words(max_length, columns):
    text = Dataset.from_dict({column: ["word1 word2"] for column in columns})
    with refused("leaves no room for text", f"max_length={max_length}", f"adds {1 + len(columns)} tokens"):
        tokenize(text, tiny_tokenizer(), max_length)
    assert len(tokenize(text, tiny_tokenizer(), max_length + 1)["input_ids"][0]) == max_length + 1


# Metrics


def test_accuracy_and_macro_f1_by_hand():
    actual = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, 0, 1])
    # Class 0: 2 hits, 3 predicted, 3 actual: F1 4/6. Class 1: 1, 3, 2: 2/5. Class 2: 0, 0, 1: 0.
    logits = np.eye(3)[predicted] * 5 - 2
    metrics = accuracy_metrics(EvalPrediction(predictions=logits, label_ids=actual))
    assert metrics == pytest.approx({"accuracy": 3 / 6, "f1": (4 / 6 + 2 / 5 + 0) / 3})
    assert all(type(value) is float for value in metrics.values())


def test_metrics_of_a_perfect_and_of_a_constant_prediction():
    actual = np.array([0, 1, 1, 0])
    assert accuracy_metrics(EvalPrediction(np.eye(2)[actual], actual)) == {"accuracy": 1.0, "f1": 1.0}
    constant = accuracy_metrics(EvalPrediction(np.eye(2)[[0] * 4], actual))
    assert constant == pytest.approx({"accuracy": 0.5, "f1": (2 * 2 / 6 + 0) / 2})


OFFLINE = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError(f"a connection was opened: {args}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sys
import numpy as np
from transformers import EvalPrediction
from modeling_spikebert.data import accuracy_metrics, load_labelled
text = load_labelled(sys.argv[1], sys.argv[1])
print(accuracy_metrics(EvalPrediction(np.eye(3)[text.train["label"]], np.array(text.train["label"]))))
"""


def test_files_and_metrics_need_no_network(tmp_path):
    file = write(tmp_path / "data.csv", ROWS)
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, file], env=online, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "{'accuracy': 1.0, 'f1': 1.0}"


def test_splits_of_a_data_set_by_name(tmp_path):
    """`load_dataset` takes a folder as it takes a name on the Hub."""
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text,label\nfine day,good\nrainy day,bad\n")
    text = load_labelled(f"{tmp_path}:train", f"{tmp_path}:validation")
    assert text.label_names == ["bad", "good"]
    assert text.validation["label"] == [1, 0]


def test_tokenizer_without_words(tmp_path):
    """What `AutoTokenizer` makes of a BERT's folder without tokenizer files."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no words.*save_pretrained"):
        tokenize(Dataset.from_dict({"text": ["fine day"]}), tokenizer, 8)


def test_an_augmented_file_beside_one_with_other_column_names(tmp_path):
    """`spikebert augment` writes our names, whatever those of its input were."""
    augmented, validation = tmp_path / "augmented.parquet", tmp_path / "validation.parquet"
    rows = {"text": ["a", "b", "c"], "label": ["x", "y", None], "kind": ["original", "original", "masking"]}
    Dataset.from_dict(rows).to_parquet(augmented)
    Dataset.from_dict({"sentence": ["d"], "class": ["y"]}).to_parquet(validation)
    text = load_labelled(str(augmented), str(validation), "sentence", "class")
    assert text.train["label"][:] == [0, 1, -100]
    assert text.validation["text"][:] == ["d"]
