"""Checkpoint folders and repositories, as users without this package meet them.

Each fixture that ends in `_result` is one process of `hub_client.py`; the tests below it assert parts of what it saw.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CODE_FILES, tiny_model
from hub_client import SENTENCES, logits_of, states_of
from huggingface_hub import ModelCard
from local_hub import LocalHub
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.hub import model_card

MODEL_FILES = {"config.json", "model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
AUTO_MAP = {
    "AutoConfig": "configuration_spikebert.SpikeBertConfig",
    "AutoModel": "modeling_spikebert.SpikeBertModel",
    "AutoModelForSequenceClassification": "modeling_spikebert.SpikeBertForSequenceClassification",
}
REPO, TRAINED_REPO = "user/student", "user/trained"


def run_client(environment: dict[str, str], *args: str | Path) -> dict:
    """Runs one step of `hub_client.py` with closed stdin, so that a question about trust fails at once."""
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("hub_client.py"), *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES).lower())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(vocabulary))
    return BertTokenizerFast(str(file))


@pytest.fixture(scope="module")
def model(tokenizer):
    labels = ["negative", "neutral", "positive"]
    return tiny_model(
        SpikeBertForSequenceClassification,
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


@pytest.fixture(scope="module")
def logits(model, tokenizer):
    logits = logits_of(model, tokenizer)
    assert len({tuple(row) for row in logits}) == len(SENTENCES)
    return logits


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


# A folder


@pytest.fixture(scope="module")
def saved_again(tmp_path_factory):
    return tmp_path_factory.mktemp("saved_again")


@pytest.fixture(scope="module")
def folder_pull_result(checkpoint, saved_again, tmp_path_factory):
    environment = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_OFFLINE": "1"}
    return run_client(environment, "pull", checkpoint, "--save-to", saved_again)


def test_folder_holds_weights_code_and_tokenizer(checkpoint):
    assert {file.name for file in checkpoint.iterdir()} == MODEL_FILES | CODE_FILES | TOKENIZER_FILES


def test_folder_config_names_all_auto_classes(checkpoint):
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_folder_brings_its_own_code(folder_pull_result):
    assert folder_pull_result["transformers_module"] == "transformers_modules"
    assert folder_pull_result["model_type"] == "spikebert"


def test_folder_gives_the_same_classifier_without_the_package(folder_pull_result, logits):
    assert folder_pull_result["logits"] == logits


def test_folder_gives_the_same_base_model_without_the_package(folder_pull_result, model, tokenizer):
    assert folder_pull_result["states"] == states_of(model.spikebert, tokenizer)


def test_folder_gives_the_same_pipeline_without_the_package(folder_pull_result, logits):
    assert folder_pull_result["pipeline"] == logits


def test_folder_saved_again_without_the_package_is_complete(folder_pull_result, saved_again, logits):
    assert {file.name for file in saved_again.iterdir()} == MODEL_FILES | CODE_FILES
    assert json.loads((saved_again / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert folder_pull_result["logits_saved_again"] == logits


# A repository


@pytest.fixture(scope="module")
def push_result(checkpoint, hub, tmp_path_factory):
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    options = ("--repo", REPO, "--trained-repo", TRAINED_REPO, "--save-to", tmp_path_factory.mktemp("output"))
    return run_client(environment, "push", checkpoint, *options)


@pytest.fixture(scope="module")
def commits(push_result, hub):
    return {commit.title: commit for commit in hub.commits(REPO)}


@pytest.fixture(scope="module")
def hub_pull_result(commits, first_save, hub, tmp_path_factory):
    """The newest version, then an earlier one, then the first that the Trainer pushed."""
    saved_again = tmp_path_factory.mktemp("saved_again")
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    pinned = (f"{REPO}@{commits['tokenizer'].sha}", f"{TRAINED_REPO}@{first_save.sha}")
    return run_client(environment, "pull", REPO, "--save-to", saved_again, "--pinned", *pinned)


@pytest.fixture(scope="module")
def second_logits(model, tokenizer):
    """Of the second version, whose classifier has the opposite weights."""
    second = SpikeBertForSequenceClassification(model.config).eval()
    second.load_state_dict(model.state_dict())
    with torch.no_grad():
        second.classifier.weight.neg_()
    return logits_of(second, tokenizer)


def test_package_loads_a_folder_without_trust_remote_code(push_result, logits):
    assert push_result["is_package_class"]
    assert push_result["logits"] == logits
    assert push_result["pipeline"] == logits


def test_push_of_the_model_brings_the_code(commits):
    assert set(commits["first version"].files) >= MODEL_FILES | CODE_FILES


def test_repository_holds_weights_code_tokenizer_and_card(hub, push_result):
    files = hub.commits(REPO)[-1].files
    assert set(files) == MODEL_FILES | CODE_FILES | TOKENIZER_FILES | {"README.md", ".gitattributes"}
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP


def test_repository_keeps_the_card(hub, push_result):
    card = ModelCard(hub.commits(REPO)[-1].files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.base_model == "user/teacher"
    assert card.data.eval_results[0].metric_value == 0.5


def test_repository_gives_the_same_classifier_and_pipeline_without_the_package(hub_pull_result, second_logits):
    assert hub_pull_result["transformers_module"] == "transformers_modules"
    assert hub_pull_result["logits"] == second_logits
    assert hub_pull_result["pipeline"] == second_logits


def test_repository_gives_the_same_base_model_without_the_package(hub_pull_result, model, tokenizer):
    assert hub_pull_result["states"] == states_of(model.spikebert, tokenizer)


def test_repository_model_saves_and_loads_again(hub_pull_result, second_logits):
    assert hub_pull_result["logits_saved_again"] == second_logits


def test_repository_pinned_revision_gives_the_earlier_model(hub_pull_result, logits, second_logits):
    assert logits != second_logits
    assert hub_pull_result["pinned"][0] == logits


def test_card_claims_no_license_of_its_own(model):
    card = model_card(model, "student")
    assert card.data.license is None
    assert "license" not in str(card).lower()  # the Hub checks the field when it is there, and only then


# The Trainer's own pushes


@pytest.fixture(scope="module")
def first_save(push_result, hub):
    return next(commit for commit in hub.commits(TRAINED_REPO) if "config.json" in commit.files)


def test_trainer_first_save_brings_the_code(first_save):
    assert first_save.title == "Training in progress, step 1"
    assert set(first_save.files) >= MODEL_FILES | CODE_FILES | TOKENIZER_FILES
    assert json.loads(first_save.files["config.json"])["auto_map"] == AUTO_MAP


def test_trainer_first_save_loads_without_the_package(hub_pull_result, push_result):
    first, last = (torch.tensor(logits) for logits in (hub_pull_result["pinned"][1], push_result["trained"]["logits"]))
    assert 1e-6 < (first - last).abs().max() < 1e-2  # a step of training lies between them


def test_trainer_last_push_is_the_trained_student(push_result, hub, tmp_path):
    for name, data in hub.commits(TRAINED_REPO)[-1].files.items():
        (tmp_path / name).write_bytes(data)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    trained = torch.tensor(push_result["trained"]["logits"])
    pushed = torch.tensor(logits_of(student, AutoTokenizer.from_pretrained(tmp_path)))
    torch.testing.assert_close(pushed, trained, rtol=0, atol=1e-7)  # of two processes: they may round otherwise


def test_trainer_last_push_holds_no_projections(push_result, hub):
    files = MODEL_FILES | CODE_FILES | TOKENIZER_FILES | {"README.md", ".gitattributes"}
    assert set(hub.commits(TRAINED_REPO)[-1].files) == files


def test_no_push_of_the_trainer_holds_a_pickle_of_its_arguments(push_result, hub):
    """Which would carry paths of the machine; a folder that is uploaded later has none either."""
    commits = hub.commits(TRAINED_REPO)
    assert sum("model.safetensors" in commit.files for commit in commits) >= 2
    assert not [name for commit in commits for name in commit.files if "training_args" in name]
    assert not [name for name in push_result["trained"]["files"] if "training_args" in name]


# Damaged folders


@pytest.fixture
def damaged_folder(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def test_missing_weights_raise(damaged_folder):
    (damaged_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"model.safetensors.*{re.escape(str(damaged_folder))}"):
        AutoModelForSequenceClassification.from_pretrained(damaged_folder)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-100], id="end cut off"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", id="Git LFS pointer"),
    ],
)
def test_damaged_weights_raise(damaged_folder, damage):
    weights = damaged_folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(OSError, match=f"{re.escape(str(weights))} cannot be read .*git lfs pull"):
        AutoModelForSequenceClassification.from_pretrained(damaged_folder)


def test_config_that_is_not_json_raises(damaged_folder):
    (damaged_folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=f"{re.escape(str(damaged_folder / 'config.json'))}.*not a valid JSON file"):
        AutoModelForSequenceClassification.from_pretrained(damaged_folder)
