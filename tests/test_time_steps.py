"""`examples/time_steps.py`: its lines against each sentence on its own, and its bits against known counts."""

import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import make_neurons_fire
from tiny_training import BERT_SIZES, LABELS, tiny_tokenizer

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.modeling_spikebert import SpikeBertNeuron

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "time_steps.py"))
SENTENCES = [" ".join(f"word{(7 * i + 5 * j) % 59}" for j in range(2 + i % 4)) for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier whose neurons fire, its tokenizer, and a csv file of sentences."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in BERT_SIZES.items() if name != "initializer_range"}
    model = SpikeBertForSequenceClassification(SpikeBertConfig(**sizes, **LABELS, num_time_steps=4))
    make_neurons_fire(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    labels = [list(LABELS["label2id"])[i % 3] for i in range(len(SENTENCES))]
    Dataset.from_dict({"text": SENTENCES, "label": labels}).to_csv(tmp_path / "validation.csv")
    return tmp_path


def lines(folder: Path, **options: object) -> list[dict[str, float]]:
    arguments = EXAMPLE["Arguments"](str(folder / "model"), str(folder / "validation.csv"), **options)
    return EXAMPLE["main"](arguments)


def test_a_line_says_what_each_sentence_alone_gives(folder, capsys):
    one, four = lines(folder, time_steps=[1, 4], teacher=str(folder / "model"), batch_size=2)
    model, tokenizer = SpikeBertForSequenceClassification.from_pretrained(folder / "model").eval(), tiny_tokenizer()
    counted = {1: [], 4: []}
    neurons = [module for module in model.modules() if isinstance(module, SpikeBertNeuron)]
    for module in neurons:
        module.register_forward_hook(lambda m, args, out: counted[len(out)].append(out.sum(0).flatten(0, -2)))
    with torch.no_grad():
        logits = {
            steps: torch.cat(
                [model(**tokenizer(s, return_tensors="pt"), num_time_steps=steps).logits for s in SENTENCES]
            )
            for steps in counted
        }
    labels = torch.arange(len(SENTENCES)) % 3
    right = {steps: (scores.argmax(-1) == labels).double() for steps, scores in logits.items()}
    for row in (one, four):
        assert row["accuracy"] == pytest.approx(100 * right[row["time_steps"]].mean().item())
        layers = [torch.cat(counted[row["time_steps"]][i :: len(neurons)]) for i in range(len(neurons))]
        columns = [column for layer in layers for column in layer.T]
        assert row["bits"] == pytest.approx(sum(map(bits_of, columns)) / len(columns))
    difference = 100 * (right[4] - right[1])
    assert four["gain"] == pytest.approx(difference.mean().item())
    assert four["gain_error"] == pytest.approx(difference.std().item() / len(SENTENCES) ** 0.5)
    wanted = logits[4].log_softmax(-1)  # the teacher is the model, with the time steps of its config
    divergence = (wanted.exp() * (wanted - logits[1].log_softmax(-1))).sum(-1).mean().item()
    assert (one["kl"], four["kl"]) == (pytest.approx(divergence, rel=1e-4), pytest.approx(0, abs=1e-6))
    assert divergence > 0.001
    assert 0 < one["bits"] < 1 < four["bits"]
    assert "12 sentences\nT  1   accuracy" in capsys.readouterr().out


def bits_of(counts: torch.Tensor) -> float:
    shares = counts.unique(return_counts=True)[1].double() / len(counts)
    return -sum(share * share.log2() for share in shares).item()


def test_bits_of_known_counts():
    counts = torch.tensor([[8, 4, 1], [0, 4, 1], [0, 0, 1], [0, 0, 1]])
    assert EXAMPLE["entropy"](counts).tolist() == pytest.approx([0, 1, 2])
