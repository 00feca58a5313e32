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
from modeling_spikebert.commands import main as spikebert
from modeling_spikebert.distillation import PROJECTIONS_NAME

CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate"
COMMANDS = Path(__file__).with_name("launched_commands.py")
without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def distill(output: str, batch_size: int, **options: object) -> list[str]:
    """The command: six steps of eight sentences, checkpoints after three and six."""
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
        "adam_epsilon": 1e-4,  # Adam divides by a gradient's size: with 1e-8, rounding of one near 0 becomes a step
        "report_to": "tensorboard",
        "disable_tqdm": True,
    }
    return ["distill", *flags(**(common | options))]


def launch(folder: Path, config: Path | str, *arguments: object, refused: bool = False) -> str:
    """What it prints, or the error."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config-file", config, *arguments]
    result = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.returncode != 0) == refused, result.stdout + result.stderr
    return result.stderr if refused else result.stdout


def events(output: str) -> str:
    return f"TENSORBOARD_LOGGING_DIR={output}/events"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, text, and `one`, trained by one process: this one."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(*events("one").split("="))
        spikebert(distill("one", 8, use_cpu=True))
    return folder


@pytest.fixture(scope="module")
def two_printed(folder) -> str:
    """What two processes print that train `two`, then go on from the checkpoint of one process."""
    runs = [  # by the configuration file alone: no --use-cpu
        *(events("two"), *distill("two", 4)),
        "then",
        *(events("resumed"), *distill("resumed", 4, resume_from_checkpoint="one/checkpoint-3")),
    ]
    return launch(folder, CONFIGS / "two_cpu_processes.yaml", COMMANDS, *runs)


@pytest.fixture(scope="module")
def fsdp(folder) -> dict[str, object]:
    """The configuration file; with it, two processes train in its precision, then in float32, which is resumed."""
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())
    (folder / "fsdp.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True}))
    runs = [
        *(events("bf16"), *distill("bf16", 4, max_steps=3, use_cpu=True)),
        "then",
        *("ACCELERATE_MIXED_PRECISION=no", events("fsdp"), *distill("fsdp", 4, use_cpu=True)),
        "then",
        *distill("fsdp_resumed", 4, use_cpu=True, resume_from_checkpoint="fsdp/checkpoint-3"),
    ]
    launch(folder, "fsdp.yaml", COMMANDS, *runs)
    return config


def assert_same_training(folder: Path, output: str) -> None:
    """Losses of each step and final weights are those of one process, to rounding."""
    logs = []
    for name in ("one", output):
        state = json.loads((folder / name / "checkpoint-6" / "trainer_state.json").read_text())
        logs.append([entry for entry in state["log_history"] if "loss" in entry])
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4, 5, 6]
    names = ["loss", "grad_norm", "firing_rate", *(name for name in logs[0][0] if name.startswith("loss_"))]
    assert len(names) == 6
    for ours, theirs in zip(*logs, strict=True):
        assert {name: theirs[name] for name in names} == pytest.approx({name: ours[name] for name in names}, rel=1e-4)
    for file in ("model.safetensors", f"checkpoint-6/{PROJECTIONS_NAME}"):
        one, two = (load_file(folder / name / file) for name in ("one", output))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            assert (two[name] - weight).abs().max() < 1e-5, name


def test_two_processes_train_as_one_and_write_once(folder, two_printed):
    assert json.loads((folder / "two" / "run.json").read_text())["processes"] == 2
    assert_same_training(folder, "two")
    assert two_printed.count("Layer map") == 2  # once in each of the two runs
    assert two_printed.count(" sentences/s ") == 6 + 3
    assert two_printed.count("6 steps of 8 sentences on 2 x cpu") == 1  # the other goes on
    assert two_printed.count("Energy on ") == 2
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


def test_two_processes_resume_to_the_same_weights(folder, two_printed):
    assert_same_training(folder, "resumed")


def test_fsdp_on_two_processes_trains_as_one_and_resumes(folder, fsdp):
    assert_same_training(folder, "fsdp")
    checkpoint = folder / "fsdp" / "checkpoint-3"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file()  # it was FSDP
    assert (checkpoint / "modeling_spikebert.py").is_file()  # and saved the code of the student, not that of FSDP
    student = AutoModelForSequenceClassification.from_pretrained(folder / "fsdp")
    assert type(student).__name__ == "SpikeBertForSequenceClassification"
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == student.config.auto_map
    assert_same_training(folder, "fsdp_resumed")


def test_fsdp_in_the_precision_of_its_file(folder, fsdp):
    assert fsdp["mixed_precision"] == "bf16"
    states = [
        json.loads((folder / name / "checkpoint-3" / "trainer_state.json").read_text()) for name in ("one", "bf16")
    ]
    ours, theirs = ([entry["loss"] for entry in state["log_history"] if "loss" in entry][:3] for state in states)
    assert theirs == pytest.approx(ours, rel=0.05)
    assert theirs != ours


@without_gpu
def test_more_processes_than_gpus_are_refused(folder):
    command = ["--num-processes", 2, "-m", "modeling_spikebert", *distill("ddp", 4)]  # as it is documented
    error = launch(folder, CONFIGS / "ddp.yaml", *command, refused=True)
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
