"""The teacher's outputs, computed in each step or once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import (
    OTHER_SIZES,
    in_float64,
    make_trainer,
    stage_models,
    stage_text,
    tiny_teacher,
    tiny_tokenizer,
    weights_of,
)
from torch import nn
from transformers import (
    BertModel,
    default_data_collator,
)

from modeling_spikebert.distillation import teachers

stages = pytest.mark.parametrize("stage", ["general", "task"])


class Counter:
    """How often a model is called."""

    def __init__(self, model: nn.Module):
        self.calls = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.calls += 1


# Cached


@stages
def test_a_training_with_cached_outputs_follows_the_same_path(tmp_path, stage, monkeypatch):
    """To rounding: kept here in float32, while files have float16.

    Adam divides a gradient by its size, so without a larger epsilon rounding alone would turn gradients near 0 around.
    """
    monkeypatch.setattr(teachers, "STATE_DTYPE", np.float32)
    options = {"max_steps": 6, "adam_epsilon": 1e-3}
    trainers = []
    for name in ("plain", "cached"):
        models = stage_models(stage, **OTHER_SIZES)
        cache = {"teacher_cache": str(tmp_path / "cache")} if name == "cached" else {}
        trainer = in_float64(make_trainer(tmp_path / name, stage, models, **options, **cache))
        counter = Counter(trainer.teacher)
        trainer.train()
        trainer.evaluate()  # is not cached
        assert counter.calls == (8 if name == "plain" else 2)
        trainers.append(trainer)
    plain, cached = (weights_of(trainer.model) for trainer in trainers)
    assert plain.keys() == cached.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(cached[name], weight, rtol=0, atol=1e-5, msg=name)
    logs = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_files_of_half_precision_change_the_loss_by_little(tmp_path):
    losses = [
        make_trainer(tmp_path / "run", "task", **options).train().training_loss
        for options in ({}, {"teacher_cache": str(tmp_path / "cache")})
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1] != losses[0]


def test_another_run_finds_the_file_and_another_teacher_does_not(tmp_path):
    def calls_while_building(teacher=None, **options) -> int:
        student, first = stage_models("task")
        teacher = teacher or first
        counter = Counter(teacher)
        make_trainer(tmp_path / "run", "task", (student, teacher), teacher_cache=str(tmp_path / "cache"), **options)
        return counter.calls

    other = tiny_teacher()
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    assert [calls_while_building(), calls_while_building()] == [4, 0]
    assert calls_while_building(other) == 4
    assert calls_while_building(layer_map=[2, 2]) == 4
    assert calls_while_building(trainer_options={"train_dataset": stage_text("task", seed=5)}) == 4
    assert calls_while_building() == 0
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 4


@pytest.mark.parametrize("damage", ["changed", "cut", "no_checksum", "no_file"])
def test_a_damaged_file_is_computed_again(tmp_path, damage, caplog):
    def build() -> tuple[int, bytes]:
        student, teacher = stage_models("task")
        counter = Counter(teacher)
        trainer = make_trainer(tmp_path / "run", "task", (student, teacher), teacher_cache=str(tmp_path / "cache"))
        return counter.calls, b"".join(row[teachers.STATES] for row in trainer.train_dataset)

    _, states = build()
    (file,), (checksum,) = (list((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("arrow", "sha256"))
    content, digest = file.read_bytes(), checksum.read_text()
    if damage == "changed":  # in the midst of a row
        place = content.index(states[: len(states) // 16])
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "no_checksum":  # killed in front of it
        checksum.unlink()
    else:
        file.unlink()
    assert build() == (4, states)
    assert (f"{file.name} is damaged; the teacher runs again" in caplog.text) == (damage in ("changed", "cut"))
    assert checksum.read_text() == digest
    assert build() == (0, states)


def test_the_file_is_found_by_another_process(tmp_path):
    """Whose sets and hashes are in another order."""
    student, teacher = stage_models("task")
    counter = Counter(teacher)
    make_trainer(tmp_path / "run", "task", (student, teacher), teacher_cache=str(tmp_path / "cache"))
    assert counter.calls == 4
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_training import make_trainer, stage_models
from test_teachers import Counter
student, teacher = stage_models("task")
counter = Counter(teacher)
make_trainer({str(tmp_path / "run")!r}, "task", (student, teacher), teacher_cache={str(tmp_path / "cache")!r})
print(json.dumps(counter.calls))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == 0


def test_a_stream_cannot_be_cached(tmp_path):
    stream = stage_text("general").to_iterable_dataset()
    with pytest.raises(ValueError, match=r"teacher_cache needs a data set of fixed rows, got IterableDataset\. Leave"):
        make_trainer(
            tmp_path, "general", trainer_options={"train_dataset": stream}, teacher_cache=str(tmp_path / "cache")
        )


def test_rows_keep_their_order_and_columns(tmp_path):
    rows = stage_text("task", 10)
    cache = str(tmp_path / "cache")
    trainer = make_trainer(tmp_path, "task", trainer_options={"train_dataset": rows}, teacher_cache=cache)
    assert isinstance(trainer.train_dataset, Dataset)
    assert trainer.train_dataset["input_ids"][:] == rows["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == rows["labels"][:]
    with torch.no_grad():
        expected = trainer.teacher(torch.tensor([rows[7]["input_ids"]]), output_hidden_states=True)
    torch.testing.assert_close(torch.tensor([trainer.train_dataset[7][teachers.LOGITS]]), expected.logits)
    states = np.frombuffer(trainer.train_dataset[7][teachers.STATES], np.float16).reshape(-1, 2, 32)  # [L, K, D]
    for place, layer in enumerate(trainer.layer_map):
        actual = torch.from_numpy(states[:, place].astype(np.float32))
        torch.testing.assert_close(actual, expected.hidden_states[layer][0], rtol=1e-3, atol=1e-3)


# Refused, or not needed


def test_rows_of_equal_length_need_no_attention_mask(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[2, 9 + i, 8, 3] for i in range(8)]})
    data = {"train_dataset": rows, "data_collator": default_data_collator}
    losses = [
        make_trainer(tmp_path / "run", "general", trainer_options=dict(data), **options).train().training_loss
        for options in ({}, {"teacher_cache": str(tmp_path / "cache")})
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_padding_on_the_left_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="teacher_cache needs padding on the right"):
        make_trainer(
            tmp_path, "task", trainer_options={"processing_class": tokenizer}, teacher_cache=str(tmp_path / "cache")
        )


def test_states_beyond_float16_are_cut(tmp_path):
    teacher = tiny_teacher(BertModel)
    with torch.no_grad():
        teacher.encoder.layer[-1].output.LayerNorm.bias[0] = 1e5
    models = (stage_models("general")[0], teacher)
    trainer = make_trainer(tmp_path / "run", "general", models, teacher_cache=str(tmp_path / "cache"))
    assert math.isfinite(trainer.train().training_loss)
