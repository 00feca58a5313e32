"""The checkpoints of this repository: whole, small enough, with today's code, and of use."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CODE_FILES
from huggingface_hub import ModelCard

import modeling_spikebert
from modeling_spikebert import SpikeBertForSequenceClassification

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "examples" / "checkpoints"
FOLDERS = sorted(CHECKPOINTS.iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files_are_whole(folder):
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"} - CODE_FILES
    for name, expected in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_code_is_linked_and_not_stored_twice(folder):
    package = Path(modeling_spikebert.__file__).parent
    assert {path.name for path in folder.iterdir() if path.is_symlink()} == CODE_FILES
    for name in CODE_FILES:
        assert (folder / name).resolve() == (package / name).resolve(), f"{name}: CONTRIBUTING.md says how to link it"


def test_weights_are_the_only_large_files_and_few():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a clone of the repository")
    files = [ROOT / name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()]
    large = {path for path in files if path.stat().st_size > 1e6}
    weights = {path for path in large if path.suffix == ".safetensors" and path.is_relative_to(CHECKPOINTS)}
    assert large - weights == set()
    assert 0 < sum(path.stat().st_size for path in weights) < 40e6
    assert max(path.stat().st_size for path in weights) < 20e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_cards_say_what_it_is(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "sentence-transformers/all-mpnet-base-v2"
    for section in ("## Use", "## Energy", "## Training", "## Data", "## Limits"):
        assert section in card.content
    assert "examples/train_on_gpu.py" in card.content


def test_card_ends_with_the_notes_that_a_release_takes():
    card = (CHECKPOINTS / "spikebert-6x384-sst2" / "README.md").read_text(encoding="utf-8")
    assert card.endswith((ROOT / "examples" / "recipes" / "sst2" / "notes.md").read_text(encoding="utf-8"))


def test_asking_for_int8_says_that_the_file_is_int8_and_what_to_do(tmp_path):
    folder = CHECKPOINTS / "spikebert-6x384-sst2"
    int8 = {"quantization_config": {"quant_method": "spikebert_int8"}}
    with pytest.raises(ValueError, match=r"sst2 is quantized already: load it without quantization_config"):
        SpikeBertForSequenceClassification.from_pretrained(folder, **int8)
    SpikeBertForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path)
    model = SpikeBertForSequenceClassification.from_pretrained(tmp_path, **int8)
    assert model.spikebert.encoder.layer[0].mlp.output.weight.dtype == torch.int8


CLASSIFY = """
import sys
sys.modules["modeling_spikebert"] = None  # the package must not be needed
from transformers import pipeline
classify = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True)
print([row["label"] for row in classify(sys.argv[2:])])
"""


def test_the_first_lines_of_the_readme(tmp_path):
    """In a process of its own, as a new user, in a folder of any name. The sentences are made up.

    `test_documented_commands.py` runs these lines as they stand.
    """
    folder = tmp_path / "模型"
    folder.symlink_to(CHECKPOINTS / "spikebert-6x384-sst2")
    sentences = {
        "A wonderful film, funny and moving.": "positive",
        "I loved every minute of it.": "positive",
        "Dull, clumsy and far too long.": "negative",
        "The worst acting I have ever seen.": "negative",
    }
    command = [sys.executable, "-c", CLASSIFY, str(folder), *sentences]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(list(sentences.values()))
