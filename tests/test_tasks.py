"""Tasks by name and their metrics; Chinese from file to classifier."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import tiny_model
from transformers import BertTokenizerFast, DataCollatorWithPadding, EvalPrediction

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data import (
    TASKS,
    DataError,
    LabelledText,
    load_labelled,
    load_task,
    match_labels,
    metrics_for,
    tokenize,
)
from modeling_spikebert.data.metrics import METRICS, compute_metrics

SHARED = Path(__file__).parents[2] / "shared" / "data"
PAPER = ("mr", "sst2", "subj", "sst5", "chnsenti", "waimai")
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli-mm", "qnli", "rte", "wnli")


def needs(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"no data in {path}")


def folder_on_the_hub(monkeypatch, folder: Path, name: str, splits: dict[str, dict[str, list]]) -> None:
    """A folder that `load_dataset` takes as it takes the task's data set: parquet files and a card that lists them."""
    task = TASKS[name]
    card = [f"- config_name: {task.config or 'default'}", "  data_files:"]
    for split, rows in splits.items():
        Dataset.from_dict(rows, features=hub_features(name)).to_parquet(folder / f"{split}.parquet")
        card += [f"  - split: {split}", f"    path: {split}.parquet"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *card, "---", ""]))
    monkeypatch.setitem(TASKS, name, replace(task, path=str(folder)))


def hub_features(name: str) -> Features:
    task = TASKS[name]
    label = Value("float32") if task.regression else ClassLabel(names=list(task.label_names))
    return Features({column: label if ours == "label" else Value("string") for ours, column in task.columns.items()})


def hub_rows(name: str, count: int) -> dict[str, list]:
    task = TASKS[name]
    texts = {column: [f"{column} {i}" for i in range(count)] for column in task.columns.values()}
    labels = (
        [i % 6 + 0.5 for i in range(count)] if task.regression else [i % len(task.label_names) for i in range(count)]
    )
    return texts | {task.label_column: labels}


# The table


def test_all_tasks_of_glue_and_of_the_paper_are_there():
    assert set(TASKS) == {*GLUE, *PAPER}
    assert all(TASKS[name].path == "nyu-mll/glue" for name in GLUE)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_consistent(name):
    task = TASKS[name]
    assert task.path.count("/") == 1
    assert set(task.metrics) <= set(METRICS)
    assert task.regression == (name == "stsb") == ("pearson" in task.metrics)
    assert len(task.label_names) == {"stsb": 0, "mnli": 3, "mnli-mm": 3, "sst5": 5}.get(name, 2)
    assert "test" not in {task.train_split, task.validation_split}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_loads_from_a_data_set_of_its_form(tmp_path, monkeypatch, name):
    task = TASKS[name]
    splits = {"train": hub_rows(name, 40), "test": hub_rows(name, 3)}
    if task.validation_split is not None:
        splits[task.validation_split] = hub_rows(name, 6)
    folder_on_the_hub(monkeypatch, tmp_path, name, splits)
    text = load_task(name)
    pair = ["text_pair"] if task.text_pair_column else []
    assert text.train.column_names == text.validation.column_names == ["text", *pair, "label"]
    assert (len(text.train), len(text.validation)) == ((36, 4) if task.validation_split is None else (40, 6))
    assert text.label_names == list(task.label_names)
    assert text.problem_type == ("regression" if name == "stsb" else "single_label_classification")
    for row in text.validation:  # the label belongs to its text
        i = int(row["text"].split()[-1])
        assert row["label"] == (i % 6 + 0.5 if task.regression else i % len(task.label_names))
        assert not pair or row["text_pair"] == f"{task.text_pair_column} {i}"


def test_a_tenth_is_held_out_where_there_is_no_validation_split(tmp_path, monkeypatch):
    folder_on_the_hub(monkeypatch, tmp_path, "subj", {"train": hub_rows("subj", 50), "test": hub_rows("subj", 9)})
    first, second = load_task("subj"), load_task("subj")
    assert first.validation.to_dict() == second.validation.to_dict()
    assert len(first.validation) == 5
    assert set(first.train["text"]).isdisjoint(first.validation["text"])
    assert {*first.train["text"], *first.validation["text"]} == {f"text {i}" for i in range(50)}


def test_rows_of_the_hub_without_text_are_left_out(tmp_path, monkeypatch):
    rows = hub_rows("qqp", 6)
    rows["question2"][3] = ""
    folder_on_the_hub(monkeypatch, tmp_path, "qqp", {"train": rows, "validation": hub_rows("qqp", 4)})
    assert load_task("qqp").train["text"] == [f"question1 {i}" for i in (0, 1, 2, 4, 5)]


# Files of one's own


def write(file: Path, rows: dict[str, list]) -> str:
    Dataset.from_dict(rows).to_json(file)
    return str(file)


@pytest.mark.parametrize("labels", [[0, 4, 2], ["very negative", "very positive", "neutral"]], ids=["ids", "names"])
@pytest.mark.parametrize("name", ["sst5"])
def test_labels_of_a_file_are_names_or_numbers_of_the_task(tmp_path, name, labels):
    file = write(tmp_path / "data.jsonl", {"text": ["a", "b", "c"], "label": labels})
    text = load_task(name, file, file)
    assert text.label_names == list(TASKS[name].label_names)
    assert text.train["label"] == [0, 4, 2]


def test_columns_of_a_file_are_ours_or_those_of_the_task(tmp_path):
    ours = {"text": ["a", "b"], "text_pair": ["c", "d"], "label": [0, 1]}
    theirs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": ["not_equivalent", "equivalent"]}
    text = load_task("mrpc", write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs))
    assert text.train.to_dict() == text.validation.to_dict() == ours


def test_augmented_train_file_with_the_validation_split_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    splits = {"train": hub_rows("sst2", 4), "validation": hub_rows("sst2", 2)}
    folder_on_the_hub(monkeypatch, tmp_path / "hub", "sst2", splits)
    rows = {"text": ["a", "b", "c"], "label": [1, None, 0], "kind": ["original", "mask", "original"]}
    text = load_task("sst2", train=write(tmp_path / "train.jsonl", rows))
    assert text.train["label"] == [1, -100, 0]
    assert text.validation["text"] == ["sentence 0", "sentence 1"]


def test_a_train_file_beside_a_held_out_tenth_is_refused(tmp_path):
    file = write(tmp_path / "train.jsonl", {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(DataError, match=r"^SetFit/subj has no validation split.* Pass validation\.$"):
        load_task("subj", train=file)


def test_labels_that_the_task_lacks_are_named(tmp_path):
    file = write(tmp_path / "data.jsonl", {"text": ["a", "b", "c"], "label": [0, 1, 2]})
    with pytest.raises(
        DataError, match=r"label '2' \(row 3\) is not in the task, which has \['negative', 'positive'\]"
    ):
        load_task("sst2", file, file)


def test_unknown_task():
    with pytest.raises(DataError, match=r"^There is no task 'sst3'\. There are cola, sst2, "):
        load_task("sst3")
    with pytest.raises(DataError, match="There is no task 'sst3'"):
        metrics_for(two_classes(), "sst3")


@pytest.mark.parametrize("name", PAPER)
def test_local_copies_of_the_papers_six(name):
    needs(SHARED / name)
    files = [SHARED / name / f"{split}.parquet" for split in ("validation", "validation")]  # small
    text = load_task(name, *map(str, files))
    assert text.label_names == list(TASKS[name].label_names)
    assert set(text.validation["label"]) == set(range(len(text.label_names)))
    assert 700 < len(text.validation) < 1300


# Metrics


def two_classes(names: tuple[str, str] = ("no", "yes")) -> LabelledText:
    split = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    return LabelledText(split, split, list(names))


def classified(predicted: list[int], actual: list[int], num_labels: int = 2) -> EvalPrediction:
    return EvalPrediction(predictions=np.eye(num_labels)[predicted], label_ids=np.array(actual))


def numbers(predicted: list[float], actual: list[float]) -> EvalPrediction:
    return EvalPrediction(
        predictions=np.array(predicted, dtype=np.float32)[:, None], label_ids=np.array(actual, dtype=np.float32)
    )


def test_f1_of_the_positive_class_by_hand():
    prediction = classified([1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0])
    # Class 1: 1 hit, 3 predicted, 2 actual. Class 0: 2 hits, 3 predicted, 4 actual.
    assert metrics_for(two_classes(), "mrpc")(prediction) == pytest.approx({"accuracy": 3 / 6, "f1": 2 / 5})
    assert metrics_for(two_classes())(prediction) == pytest.approx({"accuracy": 3 / 6, "f1": (2 / 5 + 4 / 7) / 2})


def test_f1_follows_the_positive_class_into_the_teachers_numbers():
    names = ("not_equivalent", "equivalent")
    text, prediction = two_classes(names), classified([1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0])
    turned = match_labels(text, {0: "equivalent", 1: "not_equivalent"})
    turned_prediction = classified([0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1])
    assert metrics_for(turned, "mrpc")(turned_prediction) == metrics_for(text, "mrpc")(prediction)


def test_f1_of_a_class_that_does_not_occur_is_0():
    assert metrics_for(two_classes(), "qqp")(classified([0, 0], [0, 0])) == {"accuracy": 1.0, "f1": 0.0}


def test_matthews_correlation_by_hand():
    # 2 true positives, 1 true negative, 1 false positive, 0 false negatives: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1).
    result = metrics_for(two_classes(), "cola")(classified([1, 1, 1, 0], [1, 1, 0, 0]))
    assert result == pytest.approx({"matthews_correlation": 2 / 12**0.5})


def test_pearson_and_spearman_by_hand():
    result = metrics_for(two_classes(), "stsb")(numbers([1, 2, 3, 9], [1, 2, 3, 4]))
    # Deviations -2.75, -1.75, -0.75, 5.25 and -1.5, -0.5, 0.5, 1.5: products add up to 12.5, squares to 38.75 and 5.
    assert result == pytest.approx({"pearson": 12.5 / (38.75 * 5) ** 0.5, "spearmanr": 1.0})
    tied = compute_metrics(numbers([1, 1, 2], [1, 2, 3]), ["spearmanr"])  # ranks 1.5, 1.5, 3: deviations -.5, -.5, 1
    assert tied == pytest.approx({"spearmanr": 1.5 / (1.5 * 2) ** 0.5})


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e38])
def test_a_constant_prediction_correlates_with_nothing(constant):
    result = compute_metrics(numbers([constant] * 3, [1, 2, 3]), ["pearson", "spearmanr"])
    assert result == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute_metrics(classified([1, 1, 1], [0, 1, 0]), ["matthews_correlation"]) == {"matthews_correlation": 0.0}


def test_metrics_without_a_task_follow_the_problem_type():
    split = Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.5]})
    regression = LabelledText(split, split, [], "regression")
    assert metrics_for(regression)(numbers([1, 2], [3, 4])) == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})
    assert metrics_for(two_classes())(classified([0, 1], [0, 1])) == {"accuracy": 1.0, "f1": 1.0}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_metrics_of_its_predictions(name):
    task = TASKS[name]
    prediction = numbers([1, 2, 3], [1, 2, 3])
    if not task.regression:
        prediction = classified([0, 1, 1], [0, 1, 1], len(task.label_names))
    split = Dataset.from_dict({"text": ["a"], "label": [0]})
    results = metrics_for(LabelledText(split, split, list(task.label_names)), name)(prediction)
    assert results == pytest.approx(dict.fromkeys(task.metrics, 1.0))
    assert all(type(value) is float for value in results.values())


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    for num_labels in (2, 4):
        actual, predicted = random.integers(0, num_labels, (2, 50))
        ours = compute_metrics(classified(predicted, actual, num_labels), ["accuracy", "f1", "matthews_correlation"])
        assert ours == pytest.approx(
            {
                "accuracy": sklearn.accuracy_score(actual, predicted),
                "f1": sklearn.f1_score(actual, predicted, average="macro"),
                "matthews_correlation": sklearn.matthews_corrcoef(actual, predicted),
            }
        )
        positive = compute_metrics(classified(predicted, actual, num_labels), ["f1"], positive_label=1)["f1"]
        assert positive == pytest.approx(sklearn.f1_score(actual == 1, predicted == 1))


@pytest.mark.parametrize("seed", range(5))
def test_correlations_agree_with_scipy(seed):
    scipy = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    actual = random.normal(size=50).round(1)  # with ties
    predicted = actual + random.normal(size=50)
    ours = compute_metrics(EvalPrediction(predicted[:, None], actual), ["pearson", "spearmanr"])
    expected = scipy.pearsonr(predicted, actual).statistic, scipy.spearmanr(predicted, actual).statistic
    assert tuple(ours.values()) == pytest.approx(expected)


# Chinese


CHINESE = [("酒店很好、服务周到。", "好"), ("房间太小了、不会再来", "差"), ("iPhone 送餐快 👍", "好")]


def classify(text: LabelledText, tokenizer: BertTokenizerFast, max_length: int, **sizes) -> torch.Tensor:
    """Logits of a tiny classifier for the validation text."""
    tokens = tokenize(text.validation, tokenizer, max_length)
    batch = DataCollatorWithPadding(tokenizer)([tokens[i] for i in range(min(8, len(tokens)))])
    model = tiny_model(SpikeBertForSequenceClassification, **sizes, **text.label_maps)
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.loss.isfinite()
    return outputs.logits


def test_chinese_from_file_to_classifier(tmp_path):
    characters = sorted({character for text, _ in CHINESE for character in text if "\u4e00" <= character <= "\u9fff"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, "、", "。", "iphone"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    rows = {"text": [text for text, _ in CHINESE], "label": [label for _, label in CHINESE]}
    file = tmp_path / "data.csv"
    Dataset.from_dict(rows).to_csv(file)
    text = load_labelled(str(file), str(file))
    assert text.label_names == ["好", "差"]
    tokens = tokenize(text.train, tokenizer, 32)
    assert tokenizer.decode(tokens[0]["input_ids"]) == "[CLS] 酒 店 很 好 、 服 务 周 到 。 [SEP]"
    assert tokenizer.convert_ids_to_tokens(tokens[2]["input_ids"]) == ["[CLS]", "iphone", *"送餐快", "[UNK]", "[SEP]"]
    logits = classify(text, tokenizer, 32, vocab_size=len(words), max_position_embeddings=32)
    assert logits.shape == (3, 2)
    assert logits.isfinite().all()


def test_chinese_reviews_with_the_vocabulary_of_bert():
    vocabulary = SHARED / "vocab-zh" / "vocab.txt"
    needs(vocabulary)
    needs(SHARED / "chnsenti")
    words = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # two words hold other line breaks
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    file = str(SHARED / "chnsenti" / "validation.parquet")
    text = load_task("chnsenti", file, file)
    ids = np.concatenate(tokenize(text.validation, tokenizer, 64)["input_ids"][:])
    assert np.mean(ids == tokenizer.unk_token_id) < 0.01
    logits = classify(text, tokenizer, 64, vocab_size=len(words), max_position_embeddings=64)
    assert logits.shape == (8, 2)
    assert logits.isfinite().all()
