"""Checkpoints that survive kills, full disks and damage."""

import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_training import make_trainer, stage_models, stage_text, tiny_teacher
from transformers import BertForSequenceClassification

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.distillation import PROJECTIONS_NAME, checkpoints
from modeling_spikebert.distillation.checkpoints import (
    INCOMPLETE_NAME,
    MANIFEST_NAME,
    OPTIONS_NAME,
    complete,
    last_checkpoint,
)
from modeling_spikebert.distillation.run_folder import LOCK_NAME

TESTS = Path(__file__).parent


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a training of two steps; no test changes it."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, "task", save_strategy="steps", save_steps=1, max_steps=2).train()
    return folder


@pytest.fixture
def written(trained) -> Path:
    """A checkpoint that no test changes."""
    return trained / "checkpoint-1"


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """The last checkpoint of a folder of its own."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "checkpoint-2"


def resume(folder: Path, checkpoint: Path | str | bool, **overrides) -> None:
    models = stage_models("task", **overrides)
    make_trainer(folder, "task", models, max_steps=3).train(resume_from_checkpoint=checkpoint)


def write_again(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint.parent, "task", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint.with_name("checkpoint-1"))


# Killed


def test_a_training_that_is_killed_ends_with_the_same_weights(tmp_path):
    """`kill_training.py --kills 20` is the long form."""
    options = ["--stage", "general", "task", "--kills", 5, "--folder", tmp_path]
    result = run(sys.executable, TESTS / "kill_training.py", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"stage (\w+): 5 kills", result.stdout) == ["general", "task"]


def test_a_half_written_checkpoint_is_not_taken_and_is_removed(checkpoint):
    checkpoints.begin(checkpoint)
    assert last_checkpoint(checkpoint.parent).name == "checkpoint-1"
    trainer = make_trainer(checkpoint.parent, "task", max_steps=3)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 3
    assert not checkpoint.exists()


def test_a_checkpoint_that_is_written_again_is_half_written_until_it_is_whole(checkpoint, monkeypatch):
    seen = []

    def look(folder: Path) -> None:
        seen.append(((folder / MANIFEST_NAME).exists(), (folder / INCOMPLETE_NAME).exists()))
        complete(folder)

    monkeypatch.setattr(checkpoints, "complete", look)
    write_again(checkpoint)
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


def test_stale_files_of_an_older_checkpoint_go(checkpoint):
    (checkpoint / "rng_state_1.pth").write_bytes(b"of two processes")
    write_again(checkpoint)
    assert not (checkpoint / "rng_state_1.pth").exists()


# One training in a folder


@pytest.fixture
def another_process(tmp_path):
    """That trains in the same folder: a process of its own holds the lock, as a training does."""
    code = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("holds", flush=True)
    sys.stdin.read()
"""
    lock = tmp_path / LOCK_NAME
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_folder_in_which_another_process_trains_is_refused_until_it_is_killed(tmp_path, another_process):
    trainer = make_trainer(tmp_path, "task")
    with pytest.raises(ValueError, match=rf"Another process trains in {re.escape(str(tmp_path))}: wait for its end"):
        trainer.train()
    assert trainer.state.global_step == 0
    another_process.kill()
    another_process.wait()
    trainer.train()
    assert trainer.state.global_step == 1
    assert not list(tmp_path.glob("*.lock"))


def test_a_new_training_over_older_checkpoints_is_refused(checkpoint):
    trainer = make_trainer(checkpoint.parent, "task", max_steps=2, save_strategy="steps", save_steps=1)
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"up to checkpoint-2: pass --resume-from-checkpoint last to go on from there"):
        trainer.train()
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_checkpoints_of_a_plain_trainer_stay(tmp_path):
    """They have no manifest, and are none of ours to remove or to write over."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"weights")
    trainer = make_trainer(tmp_path, "task")
    with pytest.raises(ValueError, match=r"checkpoint-1 has no manifest: .* Pass another --output-dir"):
        trainer.train(resume_from_checkpoint="last")
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == b"weights"


# Other options


def learning_rates(trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry][2:]


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1e-6, 1e-6]), ("linear", [5e-7, 2.5e-7]), ("reduce_lr_on_plateau", [1e-6])]
)
def test_a_resumed_training_takes_its_new_learning_rate(tmp_path, capsys, schedule, expected):
    options = {"max_steps": 4, "lr_scheduler_type": schedule, "save_strategy": "steps", "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 4}
    make_trainer(tmp_path, "task", learning_rate=1e-3, **options).train()
    new = {"learning_rate": 1e-6, "weight_decay": 0.1, "logit_weight": 0.5, "temperature": 2.0}
    trainer = make_trainer(tmp_path, "task", **(options | new))
    capsys.readouterr()
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert learning_rates(trainer)[: len(expected)] == pytest.approx(expected)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}
    line = "Resumed with learning_rate 1e-06 (was 0.001), weight_decay 0.1 (was 0.0), logit_weight 0.5 (was 1.0), "
    assert line + "temperature 2.0 (was 1.0)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7}, "seed is 42 there and 7 here"),
        ({"data_seed": 7}, "data_seed is None there and 7 here"),
        ({"per_device_train_batch_size": 2}, "global_batch_size is 4 there and 2 here"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is random there and group_by_length"),
        ({"trainer_options": {"train_dataset": stage_text("task", 20)}}, "training_rows is 16 there and 20 here"),
        (
            {"trainer_options": {"train_dataset": stage_text("task", seed=1)}},
            "training_text is [0-9a-f]{12} there and ",
        ),
        ({"layer_map": [2, 2]}, r"layer_map is \[1, 2\] there and \[2, 2\] here"),
        ({"hidden_state_weight": 0.0}, "hidden_state_weight > 0 is True there and False here"),
        ({"embedding_weight": 0.0}, "embedding_weight > 0 is True there and False here"),
        ({"optim": "sgd"}, "optim is adamw_.* there and sgd here"),
    ],
)
def test_what_a_resumed_training_cannot_change_is_refused(tmp_path, options, message, written):
    with pytest.raises(ValueError, match=rf"checkpoint-1 cannot go on with these options: {message}.*begin anew"):
        make_trainer(tmp_path, "task", max_steps=3, **options).train(resume_from_checkpoint=written)


def test_a_training_that_lets_go_of_the_order_of_the_data_may_change_it(tmp_path, capsys, written):
    options = {"seed": 7, "per_device_train_batch_size": 2, "ignore_data_skip": True, "max_steps": 3}
    trainer = make_trainer(tmp_path, "task", **options)
    trainer.train(resume_from_checkpoint=written)
    assert trainer.state.global_step == 3
    assert "seed 7 (was 42), global_batch_size 2 (was 4)" in capsys.readouterr().out


def test_the_same_batch_in_another_division_goes_on(tmp_path, written):
    trainer = make_trainer(tmp_path, "task", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    trainer.train(resume_from_checkpoint=written)
    assert trainer.state.global_step == 2


def test_a_training_in_float16_goes_on_in_a_wider_format(checkpoint):
    """As its error advises; the state of its scaler is left behind."""
    torch.save({"scale": 65536.0}, checkpoint / "scaler.pt")
    complete(checkpoint)
    resume(checkpoint.parent, checkpoint)


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
    assert {*FILES, OPTIONS_NAME} <= files.keys() == {path.name for path in checkpoint.iterdir()} - {MANIFEST_NAME}


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"files": {"config.json": 3}}', "TypeError"),
        ('{"files": {}}', "it does not name config.json, model.safetensors, optimizer.pt"),
        ('{"files": {"../x": {"bytes": 1, "sha256": ""}}}', "it names '../x', which is outside of the folder"),
        ('{"files": {"/x": {"bytes": 1, "sha256": ""}}}', "it names '/x', which is outside of the folder"),
    ],
)
def test_a_damaged_manifest_is_refused(checkpoint, content, message):
    (checkpoint / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged: .*{message}"):
        resume(checkpoint.parent, checkpoint)


def test_a_file_that_was_added_to_a_checkpoint_is_refused(checkpoint):
    (checkpoint / "scaler.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} is damaged: it does not name scaler.pt"):
        resume(checkpoint.parent, checkpoint)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(1, torch.int64, "numbers of torch.int64"), (math.nan, torch.float32, "numbers that are not finite")],
    ids=["whole", "nan"],
)
def test_projections_that_are_no_weights_are_refused_by_name(checkpoint, value, dtype, message):
    weights, name = load_file(checkpoint / PROJECTIONS_NAME), "layers.0.0.bias"
    weights[name] = torch.full_like(weights[name], value, dtype=dtype)
    save_file(weights, checkpoint / PROJECTIONS_NAME)
    complete(checkpoint)
    with pytest.raises(ValueError, match=f"{PROJECTIONS_NAME} is damaged: {name} has {message}"):
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
        ValueError, match=rf"config\.json is not the model's config: {field} is {saved} there and {value}"
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
        with pytest.raises(ValueError, match=rf"{name} holds code \(posix\.mkdir\), which is not run\. Resume from"):
            resume(tmp_path, checkpoint)
        (checkpoint / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))  # as torch once wrote
        complete(checkpoint)
        with pytest.raises(ValueError, match=f"{name} was not written by torch.save"):
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
