"""`spikebert distill` under `accelerate launch`, with the configuration files of `examples/accelerate`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import flags
from safetensors.torch import load_file
from tiny_training import LABELS, tiny_teacher, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from modeling_spikebert import DistillationTrainingArguments
from modeling_spikebert.distillation import PROJECTIONS_NAME

ROOT = Path(__file__).parent.parent
MODULE = ["-m", "modeling_spikebert", "distill"]
ON_CPU = [Path(__file__).parent / "fsdp_on_cpu.py", "distill"]
CONFIGS = ROOT / "examples" / "accelerate"
without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config-file"]


def launch(
    command: list[object], folder: Path, output: str, batch_size: int, refused: bool = False, **options: object
) -> str:
    """What it prints, or the error: six steps of eight sentences, checkpoints after three and six."""
    common = {
        "stage": "task",
        "teacher": "teacher",
        "train_file": "train.csv",
        "validation_file": "validation.csv",
        "output_dir": output,
        "per_device_train_batch_size": batch_size,
        "max_length": 12,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "tensorboard",
        "disable_tqdm": True,
    }
    result = subprocess.run(
        [*map(str, command), *flags(**(common | options))],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TENSORBOARD_LOGGING_DIR": f"{output}/events"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.returncode != 0) == refused, result.stdout + result.stderr
    return result.stderr if refused else result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, text, and `one`, trained by one process."""
    folder = tmp_path_factory.mktemp("scale")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    tiny_teacher().save_pretrained(folder / "teacher")
    words, names = random.Random(0), list(LABELS["label2id"])
    for name, count in (("train", 48), ("validation", 12)):
        rows = [
            f"{' '.join(f'word{words.randrange(59)}' for _ in range(words.randrange(2, 9)))},{names[i % 3]}"
            for i in range(count)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    launch([sys.executable, *MODULE], folder, "one", batch_size=8, use_cpu=True)
    return folder


def assert_same_training(folder: Path, output: str) -> None:
    """Losses of each step and final weights are those of one process, to rounding."""
    logs = []
    for name in ("one", output):
        state = json.loads((folder / name / "checkpoint-6" / "trainer_state.json").read_text())
        logs.append([entry for entry in state["log_history"] if "loss" in entry])
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4, 5, 6]
    names = ["loss", "grad_norm", "firing_rate", *(name for name in logs[0][0] if name.startswith("loss_"))]
    assert len(names) == 7
    for ours, theirs in zip(*logs, strict=True):
        assert {name: theirs[name] for name in names} == pytest.approx({name: ours[name] for name in names}, rel=1e-4)
    for file in ("model.safetensors", f"checkpoint-6/{PROJECTIONS_NAME}"):
        one, two = (load_file(folder / name / file) for name in ("one", output))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert (two[name] - weight).abs().max() < 1e-5, name


def test_two_processes_train_as_one_and_write_once(folder):
    config = CONFIGS / "two_cpu_processes.yaml"
    printed = launch([*LAUNCH, config, *MODULE], folder, "two", batch_size=4)  # the file alone: no --use-cpu
    assert json.loads((folder / "two" / "run.json").read_text())["processes"] == 2
    assert_same_training(folder, "two")
    assert printed.count("Layer map") == 1
    assert printed.count(" sentences/s ") == 6
    assert "6 steps of 8 sentences on 2 x cpu" in printed
    assert printed.count("Theoretical energy") == 1
    assert len(list((folder / "two" / "events").rglob("events.out.*"))) == len(
        list((folder / "one" / "events").rglob("events.out.*"))
    )
    files = [
        {path.relative_to(folder / name) for path in (folder / name).rglob("*") if "events" not in str(path)}
        for name in ("one", "two")
    ]
    states = {Path(f"checkpoint-{step}/rng_state_{rank}.pth") for step in (3, 6) for rank in (0, 1)}
    assert files[1] - files[0] == states  # the random numbers of each process
    assert files[0] - files[1] == {Path(f"checkpoint-{step}/rng_state.pth") for step in (3, 6)}


def test_two_processes_resume_to_the_same_weights(folder):
    config = CONFIGS / "two_cpu_processes.yaml"
    launch([*LAUNCH, config, *MODULE], folder, "resumed", 4, resume_from_checkpoint="one/checkpoint-3")
    assert_same_training(folder, "resumed")


def test_fsdp_on_two_processes_trains_as_one_and_resumes(folder):
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (folder / "fsdp.yaml").write_text(yaml.safe_dump(config))
    command = [*LAUNCH, "fsdp.yaml", *ON_CPU]
    launch(command, folder, "fsdp", batch_size=4, use_cpu=True)
    assert_same_training(folder, "fsdp")
    checkpoint = folder / "fsdp" / "checkpoint-3"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file()  # it was FSDP
    assert (checkpoint / "modeling_spikebert.py").is_file()  # and saved the code of the student, not that of FSDP
    student = AutoModelForSequenceClassification.from_pretrained(folder / "fsdp")
    assert type(student).__name__ == "SpikeBertForSequenceClassification"
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == student.config.auto_map
    launch(command, folder, "fsdp_resumed", 4, use_cpu=True, resume_from_checkpoint=checkpoint)
    assert_same_training(folder, "fsdp_resumed")


def test_fsdp_in_the_precision_of_its_file(folder):
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    assert config["mixed_precision"] == "bf16"
    (folder / "bf16.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True}))
    command = [*LAUNCH, "bf16.yaml", *ON_CPU]
    launch(command, folder, "bf16", batch_size=4, max_steps=3, use_cpu=True)
    states = [
        json.loads((folder / name / "checkpoint-3" / "trainer_state.json").read_text()) for name in ("one", "bf16")
    ]
    ours, theirs = ([entry["loss"] for entry in state["log_history"] if "loss" in entry][:3] for state in states)
    assert theirs == pytest.approx(ours, rel=0.05)
    assert theirs != ours


@without_gpu
def test_more_processes_than_gpus_are_refused(folder):
    error = launch([*LAUNCH, CONFIGS / "ddp.yaml", "--num-processes", 2, *MODULE], folder, "ddp", 4, refused=True)
    line = "spikebert distill: 2 processes were started on a machine with 0 GPUs: lower --num-processes"
    assert line in error
    assert 'distill.py", line' not in error  # no traceback of the command
    assert not (folder / "ddp").exists()


@without_gpu
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, "8 processes .* on a machine with 0 GPUs"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "told to train in bf16 on a GPU, and this machine has none"),
        ({"WORLD_SIZE": "2"}, "2 processes were started, but each would train alone"),
    ],
    ids=["too_few_gpus", "single_gpu", "alone"],
)
def test_what_a_launcher_asks_in_vain_is_refused(tmp_path, monkeypatch, environment, message):
    """By the arguments, so that plain fine-tuning refuses it, too."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(str(tmp_path))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configuration_files_are_accelerates(file):
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "single_gpu": "NO"}
    assert config.distributed_type == kinds.get(file.stem, "MULTI_GPU")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")
    if file.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2
