"""Model cards: what the Hub reads of them, as far as its own code tells without a network, and what people read."""

import re
from pathlib import Path

import pytest
import torch
from helpers import random_ids, tiny_model
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from packaging.licenses import canonicalize_license_expression
from tiny_training import BERT_SIZES
from transformers import BertConfig, BertForSequenceClassification
from transformers.pipelines import SUPPORTED_TASKS

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.energy import EnergyComparison, estimate_energy
from modeling_spikebert.hub import model_card

CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "spikebert-6x384-sst2"
# https://huggingface.co/docs/hub/model-cards: the fields that these cards use, and the relations to a base model.
FIELDS = {
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "library_name",
    "license",
    "metrics",
    "model-index",
    "pipeline_tag",
    "tags",
    "widget",
}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
SAID = {
    "repository": "someone/student",
    "language": "en",
    "license": "apache-2.0",
    "base_model": "someone/teacher",
    "dataset": "someone/reviews",
    "num_sentences": 400,
    "metrics": {"accuracy": 0.9, "f1": 0.85},
    "comparison": {"majority class": {"accuracy": 0.5}},
    "examples": ['A "good" one: it\'s <fine>.', "Not this."],
    "training": {"seed": 42},
    "tags": ["reviews"],
}


@pytest.fixture(scope="module")
def classifier():
    return tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32)


@pytest.fixture(params=["all that can be said", "nothing said", "no classifier", "given away"])
def card(request, classifier, tmp_path):
    """As it is read from its file."""
    if request.param == "given away":
        return ModelCard.load(CHECKPOINT / "README.md")
    if request.param == "all that can be said":
        made = model_card(classifier, "student", **SAID)
    elif request.param == "nothing said":
        made = model_card(classifier, "student")
    else:
        made = model_card(tiny_model(SpikeBertModel, "reference"), "student")
    made.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_every_field_is_one_that_the_hub_knows(card):
    fields = card.data.to_dict()
    assert fields.keys() <= FIELDS
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] in SUPPORTED_TASKS
    assert {"spikebert", "spiking-neural-network", "knowledge-distillation"} <= set(fields["tags"])
    assert len(fields["tags"]) == len(set(fields["tags"]))
    assert all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in fields["tags"])
    for name in [*fields.get("datasets", []), *([fields["base_model"]] if "base_model" in fields else [])]:
        validate_repo_id(name)
    if "license" in fields:  # the Hub has SPDX's names in small letters
        assert canonicalize_license_expression(fields["license"]).lower() == fields["license"]
    if "language" in fields:
        assert re.fullmatch(r"[a-z]{2,3}", fields["language"])
    assert ("base_model" in fields) == ("base_model_relation" in fields)
    assert fields.get("base_model_relation", "finetune") in RELATIONS
    assert all(row.keys() == {"text"} and row["text"] for row in fields.get("widget", []))
    assert fields.get("widget") != []


def test_results_are_read_back_by_the_hubs_own_code(card):
    fields = card.data.to_dict()
    assert ModelCardData(**fields).to_dict() == fields
    assert ("model-index" in fields) == ("metrics" in fields)
    if "model-index" in fields:
        name, results = model_index_to_eval_results(fields["model-index"])
        assert f"# {name}\n" in card.text
        assert [result.metric_type for result in results] == fields["metrics"]
        assert {result.task_type for result in results} == {fields["pipeline_tag"]}
        for result in results:
            assert f" {result.metric_value:.4f} |" in card.text


def test_sections_are_in_the_order_of_a_readers_questions(card):
    sections = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert sections[:5] == ["Use", "Results", "Energy", "Training", "Limits"]


def test_all_that_is_said_is_in_the_file(classifier, tmp_path):
    model_card(classifier, "student", **SAID).save(tmp_path / "README.md")
    fields = metadata_load(tmp_path / "README.md")
    assert {name: fields[name] for name in ("base_model", "language", "license", "metrics", "datasets")} == {
        "base_model": "someone/teacher",
        "language": "en",
        "license": "apache-2.0",
        "metrics": ["accuracy", "f1"],
        "datasets": ["someone/reviews"],
    }
    assert [row["text"] for row in fields["widget"]] == SAID["examples"]
    assert fields["tags"][-1] == "reviews"
    (row,) = fields["model-index"][0]["results"]
    assert row["dataset"] == {"name": "someone/reviews", "type": "someone/reviews", "split": "validation"}


def test_the_table_has_the_standard_error_of_each_accuracy(classifier):
    text = model_card(classifier, "student", **SAID).text
    table = [line for line in text.split("## Results")[1].split("## Energy")[0].splitlines() if line.startswith("|")]
    assert table == [  # the root of p (1 - p) / 400
        "|  | accuracy | standard error | f1 |",
        "|---|---|---|---|",
        "| student | 0.9000 | 0.0150 | 0.8500 |",
        "| majority class | 0.5000 | 0.0250 |  |",
    ]
    assert "validation split of someone/reviews, 400 sentences." in text


def test_without_the_number_of_sentences_there_is_no_standard_error(classifier):
    text = model_card(classifier, "student", metrics={"accuracy": 0.9}).text
    assert "| student | 0.9000 |" in text
    assert "standard error" not in text.lower()


def test_the_first_example_is_in_the_code(classifier):
    text = model_card(classifier, "student", **SAID).text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert """classify("A \\"good\\" one: it's <fine>.", truncation=True)""" in code
    assert 'model="someone/student"' in code


def test_energy_begins_with_what_a_sentence_takes_memory_traffic_included(classifier):
    teacher = BertForSequenceClassification(BertConfig(**BERT_SIZES)).eval()
    inputs = {"input_ids": random_ids(3, 7)}
    energy = EnergyComparison(estimate_energy(classifier, inputs), estimate_energy(teacher, inputs))
    figures, section = energy.to_dict(), energy.to_markdown("reviews")
    first, second = section.splitlines()[:2]
    assert second == ""
    assert f"{figures['strict']['energy_mj']:.3g} mJ for arithmetic" in first
    for ratios in ("ratio", "ratio_to_int8"):
        arithmetic, memory = (f"{100 * figures[ratios][name]:.1f} %" for name in ("strict", "strict_with_memory"))
        assert f"{arithmetic} and {memory} of what" in first
    assert "mean over 3 sentences of reviews" in section
    alone = EnergyComparison(energy.student).to_markdown()
    assert "BERT" not in alone.splitlines()[0]


def test_the_lines_of_the_card_that_is_given_away_classify_its_examples(monkeypatch):
    card = ModelCard.load(CHECKPOINT / "README.md")
    monkeypatch.chdir(CHECKPOINT)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    labels = [row["label"] for row in names["classify"]([row["text"] for row in card.data.widget])]
    assert labels == ["positive", "negative", "positive", "negative"]


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        (
            "default",
            "Each linear layer inside its blocks sees spikes, zeros and ones, instead of real numbers. The arch",
        ),
        ("reference", "Its residual stream is a sum of spikes, as published. The architecture"),
        (
            "neuromorphic",
            "for neuromorphic hardware: norms fold into weights, and attention is gates. The architecture",
        ),
    ],
)
def test_a_card_says_what_the_variant_is(mode, sentence):
    assert sentence in model_card(tiny_model(SpikeBertForSequenceClassification, mode), "student").text
