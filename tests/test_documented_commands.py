"""The commands and the code of the documentation, read from its pages and run as they stand.

A page's blocks run in order in a folder of its own, which holds what a user brings (files, models of the Hub: tiny).
Commands get options behind their own that make them short. The plain `spikebert quickstart` is a process, as in a
terminal; the others run in this one, which has its imports behind it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from datasets import Dataset, config
from datasets.packaged_modules.parquet.parquet import Parquet
from helpers import CODE_FILES, make_neurons_fire
from huggingface_hub import constants
from local_hub import LocalHub
from published_model import PublishedSpikeBert
from tiny_training import BERT_SIZES, VOCABULARY
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.commands import main as spikebert

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Page and first line of the blocks that are not run, and why.
NOT_RUN = {
    ("README.md", 'pip install -c constraints.txt -e ".[quickstart,test]"'): "it is this suite",
    ("CONTRIBUTING.md", "python3 -m venv"): "it makes an environment; .ci/run does the same",
    ("CONTRIBUTING.md", "@dataclass"): "test_repository.py runs it with the tests that the page names",
    ("CONTRIBUTING.md", "SURROGATES ="): "the same",
    ("CONTRIBUTING.md", "pytest tests/test_norm_lif.py -k"): "the same",
    (
        "CONTRIBUTING.md",
        "cd examples/checkpoints",
    ): "for a file that is not there yet; test_released.py reads the links",
    ("docs/long_trainings.md", "accelerate launch --config-file"): "needs GPUs; test_scale.py starts two CPU processes",
    ("docs/deploy.md", 'pip install -c constraints.txt ".[serve]"'): "a server does not end; test_serve.py starts some",
    ("docs/deploy.md", "curl"): "the same",
    ("docs/deploy.md", "apt install wrk"): "minutes; test_benchmarks.py runs it small",
    ("docs/deploy.md", "(cd examples/browser"): "test_browser.py does it with its own folder",
    ("docs/results.md", "python examples/fetch_teacher.py"): "needs a GPU; test_examples_gpu.py runs it small",
    ("docs/performance.md", "python examples/benchmarks/inference.py"): "minutes; test_benchmarks.py runs it small",
}
# What makes a command short, behind its own options.
SHORT = {
    "pip install": None,  # not run
    "spikebert quickstart": "--teacher google-bert/bert-base-uncased --num-hidden-layers 1 --batch-size 4 "
    "--teacher-steps 2 --general-steps 2 --task-steps 2",
    "spikebert energy": "",
    "spikebert show": "",
    "spikebert augment": "",
    "spikebert convert": "",
    "spikebert export": "",
    "spikebert distill": "--max-steps 2 --per-device-train-batch-size 4 --use-cpu --disable-tqdm 1",
    "hf upload": "",
}
# Files that a page's last readers find.
LEFT_BEHIND = {
    "README.md": ["energy.json", "pictures/words.png", "pictures-of-energy/raster.png", "runs/own/student"],
    "docs/deploy.md": ["runs/onnx/onnx/model_int8.onnx"],
    "docs/energy.md": [],
    "docs/neuromorphic.md": ["runs/chip/model.nir", "runs/events/events.npz"],
    "docs/performance.md": ["runs/int8/config.json"],
    "docs/training.md": [f"runs/{name}/model.safetensors" for name in ("student", "from_python", "published")],
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning",  # the reader of csv files leaves one open that is not read to its end
    "ignore:'pin_memory' argument is set as true:UserWarning",  # the trainer's default, where there is no GPU
)


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and content of each block."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def is_run(page: str, language: str, block: str) -> bool:
    return language != "" and not any(where == page and block.startswith(start) for where, start in NOT_RUN)


def commands_of(block: str) -> list[list[str]]:
    """The words of each command; comments are left out."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [list(words) for line in lines for joins, words in groupby(line, "&&".__eq__) if not joins]


RUN = {page: [block for block in blocks_of(page) if is_run(page, *block)] for page in PAGES}
RUN = {page: blocks for page, blocks in RUN.items() if blocks}


# What a user has


@pytest.fixture(scope="module")
def hub_cache():
    """The cache of the Hub's client, with a tiny model in place of each that the pages name, and SST-2."""
    tokenizer = BertTokenizerFast(vocab={token: i for i, token in enumerate(VOCABULARY)})
    bert = BertForSequenceClassification(BertConfig(**BERT_SIZES | {"max_position_embeddings": 128}))
    cache, sha = Path(constants.HF_HUB_CACHE), "0" * 40
    made = []
    for name in ("bert-base-uncased", "bert-base-cased"):
        made.append(cache / f"models--google-bert--{name}")
        (made[-1] / "refs").mkdir(parents=True)
        (made[-1] / "refs" / "main").write_text(sha)
        for part in (tokenizer, bert):
            part.save_pretrained(made[-1] / "snapshots" / sha)
    made.append(Path(config.HF_DATASETS_CACHE) / "nyu-mll___glue")
    cache_dataset(made[-1] / "sst2" / "0.0.0" / sha, "glue", "sst2")
    yield
    for folder in made:
        shutil.rmtree(folder)


def cache_dataset(folder: Path, name: str, part: str) -> None:
    """Writes what `datasets` keeps of a data set that it has loaded once."""
    with TemporaryDirectory() as source:
        files = {split: f"{source}/{split}.parquet" for split in ("train", "validation")}
        for file, numbers in zip(files.values(), (range(16), range(16, 24)), strict=True):
            rows = {"sentence": [sentence(i) for i in numbers], "label": [i % 2 for i in numbers]}
            Dataset.from_dict(rows).to_parquet(file)
        Parquet(source, dataset_name=name, config_name=part, data_files=files).download_and_prepare(str(folder))


def sentence(i: int) -> str:
    return " ".join(f"word{(7 * i + j) % 59}" for j in range(3 + i % 6))


@pytest.fixture
def folder(hub_cache, tmp_path, monkeypatch) -> Path:
    """A clone of the repository with the user's files, the current folder."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, numbers in (("train", range(16)), ("validation", range(16, 32))):
        rows = [f"{sentence(i)},{('good', 'bad')[i % 2]}" for i in numbers]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (tmp_path / "text").mkdir()
    Dataset.from_dict({"text": [sentence(i) for i in range(40)]}).to_parquet(tmp_path / "text" / "0.parquet")
    published = PublishedSpikeBert(len(VOCABULARY), 32, 12, num_labels=2, steps=4, tau=2.0)
    make_neurons_fire(published)
    torch.save(published.state_dict(), tmp_path / "sst2_epoch9")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_before(page: str) -> dict[str, Any]:
    """What the code of a page takes as given."""
    bert = "google-bert/bert-base-uncased"
    if page == "docs/energy.md":
        model = SpikeBertForSequenceClassification.from_teacher(BertForSequenceClassification.from_pretrained(bert))
        return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(bert), "sentences": ["word1", "word2 word3"]}
    return {}


# Running


class Reader:
    """Does what a page says, in the current folder."""

    def __init__(self, page: str, hub: LocalHub):
        self.names, self.hub = names_before(page), hub

    def read(self, language: str, block: str) -> None:
        if language == "python":
            exec(compile(block, "block", "exec"), self.names)
        elif language == "yaml":  # the recipe that the page starts by this name
            Path("recipe.yaml").write_text(block)
            self.follow(["spikebert", "distill", "recipe.yaml"])
        else:
            for words in commands_of(block):
                self.follow(words)

    def follow(self, words: list[str]) -> None:
        """Runs one command, short."""
        kind = " ".join(words[:2])
        assert kind in SHORT, f"SHORT has no options for: {shlex.join(words)}"
        if SHORT[kind] is None:
            return
        program, *arguments = words + shlex.split(SHORT[kind])
        if program == "hf":
            start(sys.executable, "-m", "huggingface_hub.cli.hf", *arguments, env=self.hub.environment(Path("home")))
        elif words == ["spikebert", "quickstart"]:
            start(Path(sys.executable).with_name(program), *arguments, env=os.environ)
        else:
            threads = torch.get_num_threads()
            spikebert(arguments)
            torch.set_num_threads(threads)


def start(*command: str | Path, env: Mapping[str, str]) -> None:
    env = {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert output.returncode == 0, output.stdout + output.stderr


@pytest.mark.parametrize("page", RUN)
def test_page_does_what_it_says(page, folder):
    with LocalHub() as hub:
        reader = Reader(page, hub)
        for language, block in RUN[page]:
            reader.read(language, block)
        assert [name for name in LEFT_BEHIND[page] if not (folder / name).exists()] == []
        if page == "docs/training.md":
            pushed = hub.commits("user/name")[-1].files
            assert pushed.keys() >= CODE_FILES | {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
            assert not any(name.startswith("checkpoint-") for name in pushed)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_language_that_is_run(page):
    """One without a language shows files or what a command prints."""
    for language, block in blocks_of(page):
        assert language in ("", "bash", "python", "yaml")
        assert language or not re.match(r"(\$ )?(accelerate|hf|pip|python|spikebert) ", block), block


def test_blocks_that_are_not_run_are_there():
    for page, start in NOT_RUN:
        assert sum(block.startswith(start) for _, block in blocks_of(page)) == 1, start


@pytest.mark.parametrize("page", PAGES)
def test_extras_that_are_installed_exist(page):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"\.\[([\w,]+)\]", (ROOT / page).read_text(encoding="utf-8"))
    assert {extra for extras in named for extra in extras.split(",")} <= setup["options.extras_require"].keys()
