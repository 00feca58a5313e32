"""The benchmark scripts, on tiny models and without the compiler: that they run and write what they promise."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from tiny_onnx import write_folder
from transformers import AutoTokenizer

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data.bundled import bundled_teacher, bundled_tweets

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in this process; what it wrote to its json file, and what it printed."""

    def run(script: str, *arguments: str) -> tuple[dict, str]:
        file = tmp_path / "rows.json"
        monkeypatch.syspath_prepend(BENCHMARKS)  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [script, "--json", str(file), *arguments])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        written = json.loads(file.read_text())
        assert written["machine"]["torch"] == torch.__version__
        return written, capsys.readouterr().out

    return run


def check_ratios(rows: list[dict]) -> set[tuple[str, str]]:
    """Every row has its fields, and two rows of one name and shape agree. Returns the pairs that were compared."""
    seconds = {}
    for row in rows:
        assert set(row) == {"name", "shape", "seconds", "against", "ratio"}
        assert row["seconds"] > 0
        against = row["seconds"] / row["ratio"]
        for name, value in ((row["name"], row["seconds"]), (row["against"], against)):
            assert seconds.setdefault((name, str(row["shape"])), value) == pytest.approx(value)
    return {(row["name"], row["against"]) for row in rows}


def test_inference(run):
    sizes = ("--num_hidden_layers", "1", "--hidden_size", "64", "--length", "5", "--long", "9", "--repeats", "1")
    written, printed = run("inference.py", *sizes)
    pairs = check_ratios(written["rows"])
    assert {("int8", name) for name in ("bert-fp32", "bert-int8", "published-naive")} <= pairs
    assert {("int8-exit-1", "bert-int8"), ("fast", "naive"), ("int8-9-tokens", "int8-5-tokens")} <= pairs
    assert {row["shape"]["batch"] for row in written["rows"] if row["name"] == "int8"} == {1, 4}
    assert "x bert-fp32" in printed


def test_training(run):
    sizes = ("--num_hidden_layers", "1", "--hidden_size", "32", "--batch_size", "3", "--repeats", "1")
    written, printed = run("training.py", *sizes)
    assert {("fast", "naive"), ("fast-fp32", "naive-fp32"), ("fast", "bert-fp32")} <= check_ratios(written["rows"])
    assert all(peak > 0 for peak in written["peak_memory_mb"].values())
    assert "3 sentences a step" in printed


def test_sparse(run, tmp_path):
    sizes = {"vocab_size": len(AutoTokenizer.from_pretrained(bundled_teacher())), "max_position_embeddings": 64}
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, **sizes)
    model.save_pretrained(tmp_path / "model")
    options = ("--model", str(tmp_path / "model"), "--batch_size", "3", "--repeats", "1")
    written, printed = run("sparse.py", *options)
    pairs = check_ratios(written["rows"])
    for kind in ("forward", "step"):
        assert {(f"{kind}-sums", f"{kind}-{name}") for name in ("products", "naive", "bert")} <= pairs
    assert all(0 < row["shape"]["firing_rate"] < 1 for row in written["rows"])
    assert "firing_rate" in printed


def test_accuracy(run, tmp_path):
    """Accuracy and mean steps are those of the model called directly."""
    text = bundled_tweets()
    tokenizer = AutoTokenizer.from_pretrained(bundled_teacher())
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, **sizes, **text.label_maps)
    with torch.no_grad():
        model.classifier.weight.mul_(0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tweets = text.validation.select(range(40))
    names = [text.label_names[label] for label in tweets["label"]]
    tweets.remove_columns("label").add_column("label", names).to_parquet(tmp_path / "validation.parquet")
    picture = tmp_path / "curve.png"
    written, _ = run(
        "accuracy.py",
        *("--model", str(tmp_path / "model"), "--validation_file", str(tmp_path / "validation.parquet")),
        *("--plot", str(picture), "--thresholds", "0.01", "1.0"),
    )
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["float32", "int8", "exit at 0.01", "exit at 1.0"]
    assert [row["mean_steps"] for row in rows.values()] == [4, 4, 1, 4]
    assert rows["exit at 1.0"]["accuracy"] == rows["int8"]["accuracy"]
    assert written["sentences"] == 40
    assert 0 < written["relative_error_of_logits"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer([text], return_tensors="pt")).logits for text in tweets["text"]])
    right = (logits.argmax(-1) == torch.tensor(tweets["label"])).float().mean().item()
    assert rows["float32"]["accuracy"] == pytest.approx(100 * right)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk, which makes the load, is not installed")
def test_serve(run, tmp_path):
    folder = str(write_folder(tmp_path / "exported"))
    written, printed = run("serve.py", "--folders", folder, "--clients", "1", "4", "--seconds", "1", "--rounds", "1")
    assert [(row["name"], row["clients"]) for row in written["rows"]] == [(folder, 1), (folder, 4)]
    for row in written["rows"]:
        assert row["sentences_per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert "4 clients" in printed
