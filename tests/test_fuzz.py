"""Any input gives finite numbers or an error that says what is wrong; hypothesis draws the inputs."""

import json
import re
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from helpers import SIZES, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import tiny_tokenizer
from transformers import DataCollatorWithPadding, EvalPrediction

from modeling_spikebert import SpikeBertForSequenceClassification, checks_spikebert, modeling_spikebert
from modeling_spikebert.data import DataError, load_labelled, load_unlabelled, tokenize
from modeling_spikebert.data.metrics import compute_metrics

COMMON = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
MODELS = {
    mode: tiny_model(SpikeBertForSequenceClassification, mode, torch.float32, num_labels=2)
    for mode in ("default", "reference")
}
TYPES = ("csv", "jsonl", "parquet")
modes = pytest.mark.parametrize("mode", MODELS)
FILE_NUMBERS = count()  # `datasets` keeps what it has read by file name

VISIBLE = st.sampled_from(["word1 word2", "灰色", "👍", "é", "a\0b", "#", "\x1bword3", "\U0010ffff"])
# `st.text()` has no surrogates by default in a codec; json can carry their halves.
TEXTS = st.one_of(VISIBLE, st.text(st.characters(codec="utf-8"), max_size=30))
JSON_VALUES = st.one_of(
    TEXTS,
    st.text(st.characters(categories=("Cs", "Cc", "Lo")), max_size=3),
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)

LABELS = st.sampled_from(["a", "b", 0, 1, 2.0, 2.5, None, "", True])
JSON_ROWS = st.one_of(
    st.fixed_dictionaries({"text": VISIBLE, "label": LABELS}, optional={"kind": st.sampled_from(["original", "mask"])}),
    st.dictionaries(st.sampled_from(["text", "label", "kind"]), JSON_VALUES),
)


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    disable_progress_bar()
    yield
    enable_progress_bar()


def new_file(folder: Path, suffix: str) -> Path:
    return folder / f"{next(FILE_NUMBERS)}.{suffix}"


def check_message(error: DataError, file: Path) -> None:
    """It names the file, and rows or a line, or what the whole file lacks."""
    message = str(error)
    whole = ("no column", "there are no rows", "the file is empty", "cannot be read as", "at least two labels")
    assert message.startswith(f"{file}: "), message
    assert re.search(r"\b(row|rows|line) \d", message) or any(part in message for part in whole), message


def read_or_refuse(load: Callable[[], Any], file: Path) -> Any:
    """None if the file is refused with a proper message; any other exception fails the test."""
    try:
        return load()
    except DataError as error:
        check_message(error, file)
        return None


def write(folder: Path, suffix: str, texts: list[str]) -> Path:
    file = new_file(folder, suffix)
    table = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[suffix](file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def classify(mode: str, table: Dataset) -> None:
    """Tokens, logits and loss of all rows are finite."""
    tokens = tokenize(table, tiny_tokenizer(), SIZES["max_position_embeddings"])
    batch = DataCollatorWithPadding(tiny_tokenizer())([tokens[i] for i in range(len(tokens))])
    with torch.no_grad():
        outputs = MODELS[mode](**batch)
    assert outputs.logits.isfinite().all()
    assert "labels" not in batch or outputs.loss.isfinite()


# Raw text


@modes
@pytest.mark.parametrize("suffix", TYPES)
@settings(max_examples=15, **COMMON)
@given(texts=st.lists(TEXTS, min_size=2, max_size=5))
def test_any_text_is_classified_or_refused(folder, suffix, mode, texts):
    file = write(folder, suffix, texts)
    text = read_or_refuse(lambda: load_labelled(str(file), str(file)), file)
    if text is None:
        return
    assert text.train.to_dict() == {"text": texts, "label": [i % 2 for i in range(len(texts))]}
    classify(mode, text.train)


@settings(max_examples=60, **COMMON)
@given(rows=st.lists(JSON_ROWS, max_size=4))
def test_any_json_lines_are_classified_or_refused(folder, rows):
    file = new_file(folder, "jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read_or_refuse(lambda: load_labelled(str(file), str(file)), file)
    if text is not None:
        classify("default", text.train.remove_columns("label"))  # there may be more than two


@pytest.mark.parametrize("suffix", TYPES)
@settings(max_examples=15, **COMMON)
@given(start=st.integers(0, 10_000), patch=st.binary(max_size=8), end=st.one_of(st.none(), st.integers(1, 10_000)))
def test_any_damaged_file_is_classified_or_refused(folder, suffix, start, patch, end):
    """Some bytes are overwritten, or the end is missing."""
    content = write(folder, suffix, ["word1 word2", "灰色", "a, b"] * 5).read_bytes()
    start %= len(content)
    file = new_file(folder, suffix)
    file.write_bytes((content[:start] + patch + content[start + len(patch) :])[:end])
    text = read_or_refuse(lambda: load_unlabelled(str(file)), file)
    if text is not None:
        classify("default", text)


# Tokens


@st.composite
def batches(draw) -> dict[str, torch.Tensor]:
    """Ids and masks `[B, L]` with a token in every row, and labels `[B]`."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, SIZES["max_position_embeddings"]))

    def rows(values: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(values, min_size=batch, max_size=batch)

    ids = draw(rows(st.lists(st.integers(0, SIZES["vocab_size"] - 1), min_size=length, max_size=length)))
    mask = draw(rows(st.lists(st.integers(0, 1), min_size=length, max_size=length).filter(any)))
    labels = draw(rows(st.integers(0, 1)))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


@modes
@settings(max_examples=40, **COMMON)
@given(batch=batches())
def test_any_tokens_give_a_finite_loss_and_finite_gradients(mode, batch):
    model = MODELS[mode]
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert outputs.loss.isfinite()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    assert "classifier.weight" in gradients


@modes
@settings(max_examples=20, **COMMON)
@given(batch=batches(), wrong=st.one_of(st.integers(-(2**63), -1), st.integers(SIZES["vocab_size"], 2**63 - 1)))
def test_any_id_outside_the_vocabulary_is_refused(mode, batch, wrong):
    batch["input_ids"][-1, 0] = wrong
    with pytest.raises(ValueError, match=rf"^input_ids must lie between 0 and 63, got .*{wrong}"):
        MODELS[mode](**batch)


@modes
@settings(max_examples=20, **COMMON)
@given(batch=batches(), data=st.data())
def test_any_row_of_padding_is_refused(mode, batch, data):
    row = data.draw(st.integers(0, len(batch["input_ids"]) - 1))
    batch["attention_mask"][row] = 0
    with pytest.raises(ValueError, match=f"^Row {row} of the batch has only padding"):
        MODELS[mode](**batch)


# Any object as any argument


SHAPES = st.one_of(
    st.sampled_from([(2, 5), (2,), (5,), (1, 5), (2, 5, 32), (2, 3)]),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
)
VALUES = st.sampled_from([0, 1, 1, 2, 63, 64, -1, -100, 0.5, 3e38, 1e300, float("nan"), float("inf"), -float("inf")])
DTYPES = st.sampled_from([
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.uint16, torch.float8_e4m3fn,
])  # fmt: skip
FORMS = st.sampled_from([*[lambda x: x] * 5, torch.Tensor.to_sparse, lambda x: x.to("meta"), torch.Tensor.numpy])


@st.composite
def arrays(draw) -> Any:
    """Tensors of any type, shape and layout, and numpy arrays, filled with one value and a different one at the end."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    first, last = draw(VALUES), draw(VALUES)
    wide = torch.full(shape, float(first), dtype=torch.float64)
    wide.view(-1)[-1:] = last
    if not dtype.is_floating_point:
        wide = wide.nan_to_num(7).clamp(-200, 200)
    try:
        return draw(FORMS)(wide.to(dtype))
    except (RuntimeError, TypeError):  # a form that this type does not have
        return wide.to(dtype)


OBJECTS = st.one_of(
    *[arrays()] * 4,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.recursive(st.integers(0, 3), lambda inner: st.lists(inner, max_size=3) | st.tuples(inner), max_leaves=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([object(), int, torch, torch.int64, np.float32(1), b"ids"]),
)
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "output_hidden_states")
ARGUMENTS += ("output_attentions", "output_firing_rates", "output_logits_per_step", "num_time_steps", "labels")
ARGUMENTS += ("num_items_in_batch",)
CHECKS = {Path(module.__file__).name for module in (checks_spikebert, modeling_spikebert)}
SOUND = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5]] * 2),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([0, 1]),
}


def is_finite(value: Any) -> bool:
    return all(map(is_finite, value)) if isinstance(value, tuple) else bool(value.isfinite().all())


@pytest.mark.parametrize("base", [True, False], ids=["base", "classifier"])
@modes
@settings(max_examples=250, **COMMON)
@given(
    changed=st.dictionaries(st.sampled_from(ARGUMENTS), OBJECTS, min_size=1, max_size=2),
    embeds=st.integers(0, 3).map(lambda choice: choice == 0),
    problem=st.sampled_from([None, "regression", "single_label_classification", "multi_label_classification"]),
)
def test_any_object_as_any_argument_gives_finite_numbers_or_the_packages_own_error(
    mode, base, changed, embeds, problem
):
    model = MODELS[mode]
    model.config.problem_type = problem
    arguments = SOUND | {"labels": SOUND["labels"] if problem != "regression" else torch.zeros(2, 2)}
    if problem == "multi_label_classification":
        arguments["labels"] = torch.ones(2, 2)
    if embeds:
        arguments = arguments | {"input_ids": None, "inputs_embeds": torch.ones(2, 5, SIZES["hidden_size"])}
    arguments = arguments | changed
    refusal = None
    try:
        with torch.no_grad():
            outputs = (model.base_model if base else model)(**arguments)
    except (TypeError, ValueError) as error:
        refusal = error
    finally:
        model.config.problem_type = None
    if refusal is None:
        assert all(map(is_finite, outputs.to_tuple())), outputs
    else:
        raised_in = traceback.extract_tb(refusal.__traceback__)[-1].filename
        assert Path(raised_in).name in CHECKS, (raised_in, refusal)
        message = str(refusal)
        assert re.search("|".join((*ARGUMENTS, "^The inputs? ", "^Row ")), message), message
        assert re.fullmatch(r"[^\n]{20,300}[.?]", message), message


# Metrics


@settings(max_examples=40, **COMMON)
@given(data=st.data(), rows=st.integers(1, 6), num_labels=st.integers(2, 4))
def test_metrics_of_any_logits_are_in_range(data, rows, num_labels):
    floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
    logits = data.draw(
        st.lists(st.lists(floats, min_size=num_labels, max_size=num_labels), min_size=rows, max_size=rows)
    )
    labels = data.draw(st.lists(st.integers(0, num_labels - 1), min_size=rows, max_size=rows))
    prediction = EvalPrediction(np.array(logits, dtype=np.float32), np.array(labels))
    results = compute_metrics(prediction, ["accuracy", "f1", "matthews_correlation"])
    assert 0 <= results["accuracy"] <= 1
    assert 0 <= results["f1"] <= 1
    assert -1 <= results["matthews_correlation"] <= 1
    assert 0 <= compute_metrics(prediction, ["f1"], positive_label=1)["f1"] <= 1


@settings(max_examples=60, **COMMON)
@given(
    pairs=st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2), min_size=1, max_size=6),
)
def test_correlations_of_any_numbers_are_in_range(pairs):
    predicted, actual = np.array(pairs).T
    results = compute_metrics(EvalPrediction(predicted[:, None], actual), ["pearson", "spearmanr"])
    assert all(-1 <= value <= 1 for value in results.values()), results
