"""What the pictures of energies say, read from their SVG form."""

import re
from pathlib import Path

import pytest
from helpers import random_ids, tiny_model
from matplotlib import rc_context
from tiny_training import tiny_tokenizer

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.energy import estimate_energy
from modeling_spikebert.energy.plots import _firing_rates, plot_raster


@pytest.fixture(scope="module")
def model():
    return tiny_model(SpikeBertForSequenceClassification)


def texts(file: Path) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))


def test_blocks_of_firing_rates_count_from_1(model, tmp_path):
    with rc_context({"svg.fonttype": "none"}):
        file = _firing_rates(estimate_energy(model, {"input_ids": random_ids(2, 5)}), tmp_path / "rates.svg")
    blocks = {text.split()[0] for text in texts(file) if re.fullmatch(r"\d+ (attention|mlp)\.\w+", text)}
    assert blocks == {"1", "2"}


@pytest.mark.parametrize(("block", "shown"), [(0, "block 1"), (-1, "block 2")])
def test_block_of_a_raster_counts_from_1(model, tmp_path, block, shown):
    with rc_context({"svg.fonttype": "none"}):
        file = plot_raster(model, tiny_tokenizer(), "word1 word2", tmp_path / "raster.svg", block)
    assert any(shown in text for text in texts(file))
