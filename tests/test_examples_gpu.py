"""`examples/train_on_gpu.py` from end to end, small and on whatever device there is."""

import json
import random
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import CODE_FILES, flags, make_neurons_fire
from safetensors.torch import load_file
from tiny_training import VOCABULARY
from transformers import BertTokenizerFast, MPNetConfig, MPNetForSequenceClassification, MPNetModel, pipeline

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = str(EXAMPLES / "train_on_gpu.py")
UNK, PAD = 0, 1  # as MPNet has them: its positions count from 2


@pytest.fixture(autouse=True)
def other_examples(monkeypatch):
    """As for a script that is started by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)


def sentence(words: random.Random, label: int) -> str:
    """Of 5 to 9 words; the label says which of them."""
    return " ".join(f"word{words.randrange(30) + 29 * label}" for _ in range(words.randrange(5, 10)))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("gpu")
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[PAD]", *VOCABULARY[2:]])}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder / "mpnet")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = MPNetConfig(
        vocab_size=len(vocabulary), max_position_embeddings=34, pad_token_id=PAD, initializer_range=0.2, **sizes
    )
    MPNetModel(config).save_pretrained(folder / "mpnet")
    words = random.Random(0)
    for name, count in (("train", 64), ("validation", 32), ("text", 96)):
        labels = [i % 2 for i in range(count)]
        rows = {"text": [sentence(words, label) for label in labels], "label": [("bad", "good")[i] for i in labels]}
        Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")
    Dataset.from_dict(rows | {"label": labels}).to_parquet(folder / "numbered.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("train", "validation", "text", "numbered")} | {
        "teacher": str(folder / "mpnet")
    }


def train(monkeypatch, data: dict[str, str], folder: Path, **options: Any) -> dict[str, Any]:
    common = {
        "teacher": data["teacher"],
        "train-file": data["train"],
        "validation-file": data["validation"],
        "text": data["text"],
        "output-dir": folder,
        "num-hidden-layers": 2,
        "hidden-size": 16,
        "teacher-steps": 32,
        "teacher-lr": 3e-3,
        "stage1-steps": 24,
        "stage1-lr": 1e-2,
        "stage2-steps": 80,
        "stage2-lr": 1e-2,
        "tokens-per-step": 256,
        "logging-steps": 8,
    }
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags(**(common | options))])
    runpy.run_path(SCRIPT, run_name="__main__")
    return json.loads((folder / "student" / "results.json").read_text())


def test_from_a_plain_teacher_and_from_a_fine_tuned_one(data, tmp_path, monkeypatch, capsys):
    results = train(monkeypatch, data, tmp_path / "first")
    assert "64 labelled sentences, 32 to validate, 96 without labels; stage 2 has 288." in capsys.readouterr().out
    for training, loss in (("teacher", "labels"), ("stage 1", "hidden_states"), ("stage 2", "hidden_states")):
        log = results["losses"][training]
        assert [row["step"] for row in log] == list(range(8, log[-1]["step"] + 1, 8))
        assert log[-1][loss] < 0.95 * log[0][loss], (training, log)
    assert results["losses"]["stage 2"][-1]["logits"] < results["losses"]["stage 2"][0]["logits"]
    assert results["teacher_accuracy"] > 90
    assert results["accuracy"] > 75
    assert 0 < results["firing_rate"] < 1

    # The student's folder is complete, and says what was measured
    folder = tmp_path / "first" / "student"
    assert {path.name for path in folder.iterdir()} >= CODE_FILES | {"tokenizer.json"}
    rows = Dataset.from_parquet(data["validation"])
    said = [row["label"] for row in pipeline("text-classification", model=str(folder))(rows["text"][:])]
    right = sum(map(str.__eq__, said, rows["label"]))
    assert 100 * right / len(rows) == pytest.approx(results["accuracy"], abs=100 / len(rows))

    # Its teacher is taken as it is; a student of the same width starts from the very embeddings
    again = {"teacher": tmp_path / "first" / "teacher", "hidden-size": 32, "stage1-steps": 8, "stage2-steps": 8}
    second = train(monkeypatch, data, tmp_path / "second", **again, int8_weights=True)
    between = tmp_path / "second" / "stage1"
    _, info = SpikeBertForSequenceClassification.from_pretrained(between, output_loading_info=True)
    assert not any(info.values()), info
    assert second["losses"].keys() == {"stage 1", "stage 2"}
    assert second["teacher_accuracy"] == results["teacher_accuracy"]
    assert second["losses"]["stage 1"][0]["embeddings"] < 0.05

    # Stage 2 alone, with the projections that the student had
    example, stage1 = runpy.run_path(SCRIPT), tmp_path / "first" / "stage1"
    alone = {"teacher": str(tmp_path / "first" / "teacher"), "student": str(stage1), "stage2-steps": 8}
    once_more = train(monkeypatch, data, tmp_path / "once more", **alone, seed=7)
    assert once_more["losses"].keys() == {"stage 2"}
    args = example["Arguments"](alone["teacher"], [data["text"]], "", student=alone["student"])
    teacher = MPNetForSequenceClassification.from_pretrained(alone["teacher"])
    projections = example["make_student"](args, teacher, None)[1].state_dict()
    torch.testing.assert_close(projections, load_file(stage1 / "projections.safetensors"), rtol=0, atol=0)

    # It goes on with several time steps
    more = {"teacher": tmp_path / "first" / "teacher", "student": folder, "num-time-steps": 4, "stage2-steps": 8}
    third = train(monkeypatch, data, tmp_path / "third", **more, mixed_time_steps=True, int8_weights=True)
    assert third["losses"].keys() == {"stage 2"}
    end, start = (run["losses"]["stage 2"] for run in (results, third))
    assert start[0]["hidden_states"] < 2 * end[-1]["hidden_states"]  # with new projections five times as much
    assert json.loads((tmp_path / "third" / "student" / "config.json").read_text())["num_time_steps"] == 4

    # And is given away, with fewer of them
    release = {"run": tmp_path / "third" / "student", "folder": tmp_path / "release", "num-time-steps": 1}
    release |= {"teacher": tmp_path / "first" / "teacher", "validation-file": data["numbered"], "max-length": 32}
    monkeypatch.setattr(sys, "argv", ["release.py", *flags(**release)])
    runpy.run_path(str(EXAMPLES / "release.py"), run_name="__main__")
    given_away = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "release")
    assert given_away.config.num_time_steps == 1
    measured = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "third" / "student")
    torch.testing.assert_close(given_away.state_dict(), measured.state_dict(), rtol=0, atol=0)
    card = (tmp_path / "release" / "README.md").read_text()
    assert "- command: `python examples/train_on_gpu.py --teacher teacher" in card
    assert re.search(r"^\| \d+ \| \d+ \| 1 \| ", card, re.MULTILINE)  # layers, width, time steps

    with pytest.raises(SystemExit, match=r"first exists already\. Remove it, or pass another --output-dir\."):
        train(monkeypatch, data, tmp_path / "first")


@pytest.mark.parametrize(
    ("form", "variant", "steps"),
    [("published", "published", 2), ("one-bit", "membrane", 1), ("rate", "membrane", 1)],
)
def test_other_forms_and_other_shares_of_text(data, tmp_path, monkeypatch, capsys, form, variant, steps):
    few = {"teacher-steps": 0, "stage1-steps": 24, "stage2-steps": 0, "text-share": 0.25, "train-copies": 5}
    results = train(monkeypatch, data, tmp_path / form, **few, form=form, num_time_steps=steps)
    assert "stage 2 has 344." in capsys.readouterr().out  # 24 sentences, and 64 of the task 5 times
    config = SpikeBertConfig.from_pretrained(tmp_path / form / "student")
    assert (config.variant, config.num_time_steps) == (variant, steps)
    log = results["losses"]["stage 1"]
    assert log[-1]["hidden_states"] < log[0]["hidden_states"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "dense"}, "--form must be one of membrane, published, neuromorphic, one-bit, rate, got dense"),
        ({"form": "one-bit", "num-time-steps": 4}, "--form one-bit has one time step"),
        ({"form": "rate", "int8-weights": True}, "--form rate has no int8 file"),
        ({"text-share": 2}, r"--text-share must be from 0 to 1, got 2\.0"),
        ({"train-copies": 0}, "--train-copies must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit(data, tmp_path, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=message):
        train(monkeypatch, data, tmp_path / "out", **options)


@pytest.mark.parametrize("variant", ["membrane", "neuromorphic"])
def test_the_first_of_several_time_steps_computes_what_the_only_one_did(variant):
    with_time_steps = runpy.run_path(SCRIPT)["with_time_steps"]
    torch.manual_seed(0)
    config = SpikeBertConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=32, tau=1.0)
    config.num_time_steps, config.num_hidden_layers, config.variant = 1, 2, variant
    student = SpikeBertForSequenceClassification(config).eval()
    make_neurons_fire(student)
    more = with_time_steps(student, 4).eval()
    assert (more.config.num_time_steps, more.config.tau) == (4, 2.0)
    ids = torch.randint(0, 40, (3, 7))
    torch.testing.assert_close(more(ids, num_time_steps=1).logits, student(ids).logits)
    assert not torch.equal(more(ids).logits, student(ids).logits)


@pytest.mark.parametrize("variant", ["membrane", "neuromorphic"])
def test_rounded_weights_are_those_of_an_int8_file_and_learn(tmp_path, variant):
    example = runpy.run_path(SCRIPT)
    torch.manual_seed(0)
    config = SpikeBertConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=32, variant=variant
    )
    student = SpikeBertForSequenceClassification(config).eval()
    make_neurons_fire(student)
    student.save_pretrained(tmp_path)
    int8 = {"quant_method": "spikebert_int8", "dequantize": True}
    plain = SpikeBertForSequenceClassification.from_pretrained(tmp_path, quantization_config=int8).train()
    ids, labels = torch.randint(0, 40, (3, 7)), torch.tensor([0, 1, 1])

    example["round_weights"](student.train())
    losses = [model(ids, labels=labels).loss for model in (student, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    learned = {name.replace("parametrizations.weight.original", "weight"): x for name, x in student.named_parameters()}
    for name, weight in plain.named_parameters():  # the very gradients, though these weights are not rounded
        torch.testing.assert_close(learned[name].grad, weight.grad, msg=name)
    assert any(not torch.equal(learned[name], weight) for name, weight in plain.named_parameters())

    example["keep_rounded"](student)
    torch.testing.assert_close(student.state_dict(), plain.state_dict(), rtol=0, atol=0)
