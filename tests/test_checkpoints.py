"""Checkpoints that survive kills, full disks and damage."""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_training import make_trainer, stage_models, tiny_teacher
from transformers import BertForSequenceClassification

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.distillation import PROJECTIONS_NAME, checkpoints
from modeling_spikebert.distillation.checkpoints import INCOMPLETE_NAME, MANIFEST_NAME, complete, last_checkpoint

TESTS = Path(__file__).parent
stages = pytest.mark.parametrize("stage", ["general", "task"])


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    make_trainer(tmp_path, "task", save_strategy="steps", save_steps=1, max_steps=2).train()
    return tmp_path / "checkpoint-2"


def resume(folder: Path, checkpoint: Path | str | bool, **overrides) -> None:
    models = stage_models("task", **overrides)
    make_trainer(folder, "task", models, max_steps=3).train(resume_from_checkpoint=checkpoint)


# Killed


@stages
def test_a_training_that_is_killed_ends_with_the_same_weights(tmp_path, stage):
    """`kill_training.py --kills 20` is the long form."""
    result = run(sys.executable, TESTS / "kill_training.py", "--stage", stage, "--kills", 5, "--folder", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"stage {stage}: 5 kills" in result.stdout


def test_a_half_written_checkpoint_is_not_taken_and_is_removed(checkpoint):
    checkpoints.begin(checkpoint)
    assert last_checkpoint(checkpoint.parent).name == "checkpoint-1"
    trainer = make_trainer(checkpoint.parent, "task", max_steps=3)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3
    assert not checkpoint.exists()


def test_checkpoints_of_a_plain_trainer_stay(checkpoint):
    """They have no manifest, and are none of ours to remove."""
    (checkpoint / MANIFEST_NAME).unlink()
    make_trainer(checkpoint.parent, "task", max_steps=1).train()
    assert (checkpoint / "model.safetensors").is_file()


def test_a_checkpoint_that_is_written_again_is_half_written_until_it_is_whole(checkpoint, monkeypatch):
    seen = []

    def look(folder: Path) -> None:
        seen.append(((folder / MANIFEST_NAME).exists(), (folder / INCOMPLETE_NAME).exists()))
        complete(folder)

    monkeypatch.setattr(checkpoints, "complete", look)
    make_trainer(checkpoint.parent, "task", max_steps=2, save_strategy="steps", save_steps=2).train()
    assert seen == [(False, True)]
    assert last_checkpoint(checkpoint.parent) == checkpoint
    assert not (checkpoint / INCOMPLETE_NAME).exists()


def test_resuming_at_the_end_changes_nothing(checkpoint):
    """It may be killed between its last checkpoint and its end."""
    trainer = make_trainer(checkpoint.parent, "task", max_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 2
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in saved.items())


@pytest.mark.parametrize("last", ["last", True])
def test_the_last_checkpoint_is_the_one_of_the_most_steps(tmp_path, last):
    make_trainer(tmp_path, "task", save_strategy="steps", save_steps=1, max_steps=11).train()
    trainer = make_trainer(tmp_path, "task", max_steps=12)
    trainer.train(resume_from_checkpoint=last)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 13))


def test_without_a_checkpoint_the_last_one_is_the_beginning(tmp_path):
    trainer = make_trainer(tmp_path, "task", max_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 2


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []

    def look(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.parent.glob("checkpoint-*")))
        complete(folder)

    monkeypatch.setattr(checkpoints, "complete", look)
    make_trainer(tmp_path, "task", max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_saved_arguments_are_those_of_the_training(tmp_path):
    make_trainer(tmp_path, "task", save_strategy="steps", save_steps=1, save_total_limit=3).train()
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)  # written just now
    assert saved.save_total_limit == 3


def test_stale_files_of_an_older_checkpoint_go(checkpoint):
    (checkpoint / "rng_state_1.pth").write_bytes(b"of two processes")
    make_trainer(checkpoint.parent, "task", max_steps=2, save_strategy="steps", save_steps=2).train()
    assert not (checkpoint / "rng_state_1.pth").exists()


# A full disk


def test_a_full_disk_leaves_the_last_checkpoint_usable(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=20m none {shlex.quote(str(disk))}"
    in_own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        allowed = run(*in_own_mounts, mount).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("a small disk cannot be mounted here (unshare, tmpfs)")
    script = shlex.join([sys.executable, str(TESTS / "small_disk.py"), str(disk), str(tmp_path)])
    result = run(*in_own_mounts, f"{mount} && exec {script}")
    assert result.returncode == 0, result.stdout + result.stderr
    run_folder = re.escape(str(disk / "run"))
    message = rf"error: {run_folder}/checkpoint-2 could not be written \(.*\); its disk has \d+\.\d MB free\. Last "
    assert re.search(message + rf"checkpoint: {run_folder}/checkpoint-1; if the disk is full, free", result.stdout)
    assert "folders: ['checkpoint-1']" in result.stdout
    assert "same: True" in result.stdout


def test_a_student_that_cannot_be_saved_at_the_end_says_what_is_left(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", "general", save_strategy="steps", save_steps=1)
    trainer.train()

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        OSError, match=r"student could not be written .*No space left.*MB free\. Last checkpoint: .*-1;"
    ):
        trainer.save_model(str(tmp_path / "new" / "student"))


# Damaged


FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    PROJECTIONS_NAME,
]


def test_the_manifest_has_every_file(checkpoint):
    files = json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    assert set(FILES) <= files.keys() == {path.name for path in checkpoint.iterdir()} - {MANIFEST_NAME}


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_name(checkpoint, name):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged: it has {len(content) // 2} of {len(content)} bytes"):
        resume(checkpoint.parent, checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_by_name(checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged, or was changed after it was saved"):
        resume(checkpoint.parent, checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing. Resume from an earlier checkpoint"):
        resume(checkpoint.parent, checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"config.json": 3}}'])
def test_a_damaged_manifest_is_refused(checkpoint, content):
    (checkpoint / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged"):
        resume(checkpoint.parent, checkpoint)


def test_a_folder_without_manifest_is_refused(checkpoint):
    (checkpoint / MANIFEST_NAME).unlink()
    with pytest.raises(ValueError, match=f"has no {MANIFEST_NAME}: it was not written to its end"):
        resume(checkpoint.parent, checkpoint)


def test_a_checkpoint_that_does_not_exist(checkpoint):
    with pytest.raises(ValueError, match=r"checkpoint-7: no such checkpoint.*'checkpoint-1', 'checkpoint-2'"):
        resume(checkpoint.parent, checkpoint.parent / "checkpoint-7")


@pytest.mark.parametrize(("field", "value"), [("tau", 3.0), ("num_time_steps", 2), ("v_threshold", 0.5)])
def test_a_student_of_another_config_does_not_go_on(checkpoint, field, value):
    saved = json.loads((checkpoint / "config.json").read_text())[field]
    with pytest.raises(
        ValueError, match=rf"config\.json is not the student's config: {field} is {saved} there and {value}"
    ):
        resume(checkpoint.parent, checkpoint, **{field: value})


# Pickles


class Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_resuming_executes_no_pickle(checkpoint, tmp_path, name):
    """Even where the manifest was made to fit."""
    torch.save(Payload(tmp_path / "executed"), checkpoint / name)
    complete(checkpoint)
    if name == "training_args.bin":  # nobody reads it
        resume(tmp_path, checkpoint)
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            resume(tmp_path, checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_loading_a_model_executes_no_pickle(tmp_path, kind):
    cls = {"student": SpikeBertForSequenceClassification, "teacher": BertForSequenceClassification}[kind]
    model = {"student": stage_models("task")[0], "teacher": tiny_teacher()}[kind]
    model.save_pretrained(tmp_path / kind)
    (tmp_path / kind / "model.safetensors").unlink()
    torch.save(Payload(tmp_path / "executed"), tmp_path / kind / "pytorch_model.bin")
    with pytest.raises((OSError, pickle.UnpicklingError), match="Weights only load failed"):
        cls.from_pretrained(tmp_path / kind)
    assert not (tmp_path / "executed").exists()


def test_a_weights_only_file_of_the_student_is_read(tmp_path):
    """The same path as above, so that its refusal is not that of a missing file."""
    model = stage_models("task")[0]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = SpikeBertForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
