"""The command line, as a user runs it. `test_distill.py` has more of `spikebert distill`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CODE_FILES, flags
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_training import tiny_teacher, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
)

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification, SpikeBertModel, __version__
from modeling_spikebert.commands import COMMANDS, main
from modeling_spikebert.commands.options.quickstart import WORKING
from modeling_spikebert.commands.options.quickstart import parse as parse_quickstart
from modeling_spikebert.commands.quickstart import NAMES, compare, verdict
from modeling_spikebert.distillation import PROJECTIONS_NAME
from modeling_spikebert.distillation.run_folder import LOCK_NAME
from modeling_spikebert.pictures import raster, save, spikes_of

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CHECKPOINT_FILES = CODE_FILES | {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)


def write_csv(file: Path, count: int) -> Path:
    """Sentences of two classes that share no word."""
    words = {"good": ["word1", "word2", "word3", "word4"], "bad": ["word11", "word12", "word13", "word14"]}
    lines = ["text,label"]
    for i in range(count):
        label = ("good", "bad")[i % 2]
        lines.append(" ".join(words[label][(i // 2 + j) % 4] for j in range(1 + i % 4)) + f",{label}")
    file.write_text("\n".join(lines) + "\n")
    return file


@dataclass
class Inputs:
    teacher: Path
    train: Path
    validation: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    tiny_teacher(**labels).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    return Inputs(folder / "teacher", write_csv(folder / "train.csv", 64), write_csv(folder / "validation.csv", 41))


# The console script


def test_console_script_lists_every_command(capsys):
    output = run(Path(sys.executable).with_name("spikebert"), "--help")
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith("usage: spikebert COMMAND")
    assert output.stderr == ""
    for name, summary in COMMANDS.items():
        assert f"  {name}" in output.stdout
        assert summary in output.stdout
    assert run(Path(sys.executable).with_name("spikebert"), "--version").stdout == f"spikebert {__version__}\n"
    for arguments in ([], ["-h"]):
        main(arguments)
        assert capsys.readouterr().out == output.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstrat", "--seed", "1"], "spikebert: no command 'quickstrat'; did you mean quickstart?"),
        (["--verion"], "spikebert: no command '--verion'; did you mean --version?"),
        (["train"], f"spikebert: no command 'train'; there is {', '.join(COMMANDS)}."),
        (
            ["quickstart", "--learnign-rate", "1e-3"],
            "spikebert quickstart: unknown option --learnign-rate; did you mean --learning-rate?",
        ),
        (
            ["augment", "--train_flie=a.csv"],
            "spikebert augment: unknown option --train_flie; did you mean --train-file?",
        ),
        (
            ["quickstart", "--train-fil", "a.csv", "--validation-fil", "b.csv"],
            "spikebert quickstart: unknown option --train-fil; did you mean --train-file?",
        ),
        (["quickstart", "--out", "a"], "spikebert quickstart: unknown option --out; did you mean --output-dir?"),
        (
            ["distill", "--validation-fil=b.csv", "--train-file", "a.csv"],
            "spikebert distill: unknown option --validation-fil; did you mean --validation-file?",
        ),
        (["energy", "model", "--zzz"], "spikebert energy: unknown option --zzz; see --help."),
        (["energy", "model", "other", "--text", "a"], "spikebert energy: no option takes 'other'; see --help."),
        (["energy", "--text", "a"], "spikebert energy: the following arguments are required: MODEL"),
        (
            ["convert", "a.pt", "--config", "{}", "--output_dri", "out"],
            "spikebert convert: unknown option --output_dri; did you mean --output-dir?",
        ),
        (
            ["export", "folder", "--output-dir", "out", "--precision", "in8"],
            "spikebert export: argument --precision: no choice 'in8'; did you mean int8?",
        ),
        (
            ["augment", "--language", "german"],
            "spikebert augment: argument --language: no choice 'german'; there is en, zh.",
        ),
        (["quickstart", "--seed", "one"], "spikebert quickstart: argument --seed: invalid int value: 'one'"),
    ],
)
def test_a_usage_error_is_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", expected + "\n")


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` of each command prints, on a terminal of 100 columns."""
    pages = {}
    for name in COMMANDS:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as page:
            patch.setenv("COLUMNS", "100")
            with pytest.raises(SystemExit) as stopped:
                main([name, "--help"])
        assert stopped.value.code == 0
        pages[name] = page.getvalue()
    return pages


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_and_groups_its_options(helps, name):
    page = helps[name]
    assert page.startswith(f"`spikebert {name}`: ")
    assert f"\nusage: spikebert {name} " in page
    titles = re.findall(r"^(\w[\w, ]+):$", page, re.MULTILINE)
    assert len(titles) >= 3
    assert titles[-2] == "other options"
    assert titles[-1] in ("example", "examples")
    assert "\n  -v, --verbose " in page
    options = re.findall(r"--[\w-]+", page)
    assert options
    assert not any("_" in option for option in options)
    assert "(default: None)" not in page
    assert max(map(len, page.splitlines())) <= 120  # examples and usage are not broken


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_a_help_can_be_typed(helps, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has left its folder
    _, examples = re.split(r"^examples?:\n", helps[name], flags=re.MULTILINE)
    commands = [shlex.split(line) for line in examples.replace("\\\n", " ").splitlines()]
    assert commands
    parse = import_module(f"modeling_spikebert.commands.options.{name}").parse
    for program, command, *arguments in commands:
        assert (program, command) == ("spikebert", name)
        if not arguments or arguments[0] != "recipe.yaml":  # a file of the user's
            assert parse(arguments).verbose is False
            assert parse([*arguments, "-v"]).verbose is True


def test_help_does_not_wait_for_torch():
    code = """
import sys
from modeling_spikebert.commands import COMMANDS, main
for name in COMMANDS:
    if name != "distill":  # its options are those of transformers
        try:
            main([name, "--help"])
        except SystemExit:
            pass
print({"torch", "transformers", "datasets", "numpy"} & sys.modules.keys(), file=sys.stderr)
"""
    output = run(sys.executable, "-c", code)
    assert output.stderr == "set()\n"
    assert output.stdout.count("usage: ") == len(COMMANDS) - 1


# What stops a command


def test_ctrl_c_is_one_line_while_a_command_is_still_imported():
    code = """
import os, signal, sys
from modeling_spikebert.commands import COMMANDS, main
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "fastapi"):  # the server has no torch
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
arguments = {
    "energy": ["folder", "--text", "word"],
    "show": ["folder", "--text", "word"],
    "augment": ["--train-file", "a.csv", "--output-file", "a.parquet", "--language", "en"],
    "export": ["folder", "--output-dir", "out"],
    "convert": ["file", "--config", "{}", "--output-dir", "out"],
    "serve": ["folder"],
}
for name in COMMANDS:
    try:
        main([name, *arguments.get(name, [])])
    except SystemExit as stopped:
        print(stopped.code.strip())
"""
    output = run(sys.executable, "-c", code)
    assert output.stderr == ""
    lines = output.stdout.splitlines()
    assert [line.split(";")[0].rstrip(".") for line in lines] == [f"spikebert {name}: interrupted" for name in COMMANDS]


def test_a_hub_that_does_not_answer(inputs, tmp_path):
    hub = "http://127.0.0.1:9"  # where nobody listens
    code = f"""
import time
from modeling_spikebert.commands import main
import modeling_spikebert.commands.energy, modeling_spikebert.commands.quickstart
for arguments in (
    ["energy", "google-bert/bert-tiny", "--text", "a"],
    ["energy", {str(inputs.teacher)!r}, "--dataset", "nyu-mll/glue:sst2:train"],
    ["quickstart", "--teacher", "google-bert/bert-tiny", "--train-file", {str(inputs.train)!r}, "--validation-file",
     {str(inputs.validation)!r}, "--output-dir", {str(tmp_path / "run")!r}],
):
    start = time.perf_counter()
    try:
        main(arguments)
    except SystemExit as stopped:
        print(time.perf_counter() - start < 8, stopped.code)
"""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150)
    names = ["google-bert/bert-tiny", "nyu-mll/glue", "google-bert/bert-tiny"]
    assert [line for line in output.stderr.splitlines() if line.startswith("Fetching")] == [
        f"Fetching {name} from {hub}." for name in names
    ], output.stderr
    commands = ["energy", "energy", "quickstart"]
    for line, command, name in zip(output.stdout.splitlines(), commands, names, strict=True):
        assert line.startswith(f"True spikebert {command}: {name} is not on this machine, and {hub} does not answer (")


# Quickstart: refusals


def refused(folder: Path, *options: str | Path) -> str:
    """The message of a quickstart that stops before it writes anything."""
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", *map(str, options)])
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    message = stopped.value.code
    assert isinstance(message, str)  # which Python prints, and exits with 1
    assert message.startswith("spikebert quickstart: ")
    assert "\n" not in message
    return message


def test_quickstart_leaves_a_folder_with_files_alone(tmp_path, inputs):
    (tmp_path / "notes.txt").write_text("mine")
    message = refused(tmp_path, "--output-dir", tmp_path)
    assert f"{tmp_path} is not empty. Choose another --output-dir" in message
    message = refused(tmp_path, "--output-dir", tmp_path / "notes.txt")
    assert message.endswith("notes.txt is a file. Choose another --output-dir.")


def test_quickstart_starts_again_where_a_run_left_no_result(tmp_path):
    working = tmp_path / "training"
    working.mkdir()
    assert parse_quickstart(["--output-dir", str(tmp_path)])
    (working / LOCK_NAME).touch()
    assert ("training", f"training/{LOCK_NAME}") == WORKING
    assert parse_quickstart(["--output-dir", str(tmp_path)])
    for mine in (working / "notes.txt", tmp_path / "teacher"):  # the end of a run removes the working folder
        mine.touch()
        assert "is not empty" in refused(tmp_path, "--output-dir", tmp_path)
        mine.unlink()


def test_quickstart_refuses_a_folder_before_it_imports_torch(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code = f"""
import sys
from modeling_spikebert.commands import main
try:
    main(["quickstart", "--output-dir", {str(tmp_path)!r}])
except SystemExit as stopped:
    print(stopped.code, "torch" in sys.modules)
"""
    assert run(sys.executable, "-c", code).stdout.endswith("or remove it. False\n")


@pytest.mark.parametrize("option", ["--train-file", "--validation-file"])
def test_quickstart_with_one_file_of_two(tmp_path, inputs, option):
    message = refused(tmp_path, "--output-dir", tmp_path / "run", option, inputs.train)
    assert "Pass both --train-file and --validation-file" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--train-file": "absent.csv"}, "absent.csv: no such file"),
        ({"--validation-file": "absent.parquet"}, "absent.parquet: no such file"),
        ({"--unlabelled-file": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"--text-column": "sentence"}, "Did you mean 'text'? Pass --text-column text, or"),
        ({"--label-column": "mood"}, "no column 'mood'; it has ['text', 'label']. Did you mean 'label'?"),
        ({"--teacher-steps": "0"}, "--teacher-steps must be at least 1, got 0"),
        ({"--batch-size": "-1"}, "--batch-size must be at least 1, got -1"),
        ({"--max-length": "17"}, "17 exceeds the 16 positions"),
        ({"--num-hidden-layers": "0"}, "--num-hidden-layers must be at least 1, got 0"),
    ],
    ids=lambda value: " ".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_quickstart_refuses(tmp_path, inputs, changes, expected):
    options = {
        "--train-file": inputs.train,
        "--validation-file": inputs.validation,
        "--teacher": inputs.teacher,
        "--output-dir": tmp_path / "run",
        "--max-length": "16",
    }
    message = refused(tmp_path, *(part for option in (options | changes).items() for part in option))
    assert expected in message


def test_quickstart_refuses_validation_on_the_training_data(tmp_path, inputs):
    copy = tmp_path / "copy.csv"  # of the rows, in another order
    first, *rows = inputs.train.read_text().splitlines()
    copy.write_text("\n".join([first, *reversed(rows)]))
    for file in (inputs.train, copy):
        options = ["--train-file", inputs.train, "--validation-file", file, "--output-dir", tmp_path / "run"]
        message = refused(tmp_path, *options)
        assert "Training and validation data are the same 64 rows. A model is measured on text" in message


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize("text", ["fine", "fine, or not"])  # the readers see columns of another number
def test_quickstart_says_what_separates_the_columns_of_a_csv(tmp_path, inputs, mark, text):
    file = tmp_path / "train.csv"
    file.write_text(f"text{mark}label\nshort{mark}good\n{text}{mark}bad\n")
    options = ["--train-file", file, "--validation-file", inputs.validation, "--output-dir", tmp_path / "run"]
    message = refused(tmp_path, *options)
    assert str(file) in message
    assert message.endswith(
        ("In a csv, commas separate columns.", "separated by commas. Put texts with commas in quotes.")
    )


# Quickstart: the comparison


def test_comparison_by_hand():
    actual = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    right = {
        NAMES[0]: [1, 0, 1, 0, 1, 0, 1, 0],
        NAMES[1]: [1, 1, 1, 1, 1, 1, 1, 1],
        NAMES[2]: [1, 1, 1, 1, 0, 0, 0, 0],
        NAMES[3]: [1, 1, 1, 1, 1, 1, 0, 0],
    }
    predicted = {name: np.where(np.array(hits) == 1, actual, 1 - actual) for name, hits in right.items()}
    result = compare(predicted, actual)
    assert result["accuracy"] == {NAMES[0]: 0.5, NAMES[1]: 1.0, NAMES[2]: 0.5, NAMES[3]: 0.75}
    # Over the majority the differences are 0 1 0 1 0 1 -1 0: mean 1/4, squares 4, variance (4 - 8/16) / 7 = 1/2.
    majority = result["gain_over_majority"]
    assert majority["gain"] == pytest.approx(0.25)
    assert majority["standard_error"] == pytest.approx((0.5 / 8) ** 0.5)
    assert majority["measurable"] is False
    # Over the student without teacher 0 0 0 0 1 1 0 0: mean 1/4, variance (2 - 8/16) / 7 = 3/14.
    alone = result["gain_over_student_without_teacher"]
    assert alone["gain"] == pytest.approx(0.25)
    assert alone["standard_error"] == pytest.approx((3 / 14 / 8) ** 0.5)
    assert alone["measurable"] is False
    figures = (
        "the majority class: 75.0 % of 8 sentences are right, against 50.0 % (teacher: 100.0 %). That is +25.0 points, "
        "standard error 25.0."
    )
    not_beaten = f"The student does not measurably beat {figures}"
    assert verdict(result, 200, 8).startswith(f"{not_beaten} Use more text. Train longer (--teacher-steps, ")
    assert verdict(result, 20000, 8).startswith(f"{not_beaten} Train longer (--teacher-steps, ")
    beaten = result | {"gain_over_majority": majority | {"measurable": True}}
    assert verdict(beaten, 200, 8) == f"The student beats {figures}"


@pytest.mark.parametrize(("gains", "losses", "measurable"), [(20, 0, True), (20, 19, False), (0, 20, False)])
def test_only_a_gain_of_two_standard_errors_is_measurable(gains, losses, measurable):
    actual = np.zeros(100, dtype=int)
    alone, student = np.zeros(100, dtype=int), np.zeros(100, dtype=int)
    alone[:gains] = 1
    student[gains : gains + losses] = 1
    result = compare(dict(zip(NAMES, (alone, actual, alone, student), strict=True)), actual)
    assert result["gain_over_student_without_teacher"]["gain"] == pytest.approx((gains - losses) / 100)
    assert result["gain_over_student_without_teacher"]["measurable"] is measurable
    json.dumps(result)  # for metrics.json


# Quickstart: a whole run


@dataclass
class QuickstartRun:
    folder: Path
    stdout: str
    stderr: str
    metrics: dict


@pytest.fixture(scope="module")
def quickstart(inputs, tmp_path_factory) -> QuickstartRun:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    foreign = folder.with_name("foreign.csv")
    foreign.write_text("text\n" + "酒店很好 word1\n" * 8)
    options = {
        "--teacher": inputs.teacher,
        "--train-file": inputs.train,
        "--validation-file": inputs.validation,
        "--unlabelled-file": foreign,
        "--output-dir": folder,
        "--num-hidden-layers": "1",
        "--num-time-steps": "2",
        "--max-length": "12",
        "--batch-size": "8",
        "--teacher-steps": "20",
        "--teacher-learning-rate": "0.01",
        "--general-steps": "3",
        "--task-steps": "4",
    }
    flags = [str(part) for option in options.items() for part in option]
    output = run(sys.executable, "-m", "modeling_spikebert", "quickstart", *flags)
    assert output.returncode == 0, output.stdout + output.stderr
    return QuickstartRun(folder, output.stdout, output.stderr, json.loads((folder / "metrics.json").read_text()))


def test_quickstart_writes_a_student_that_loads(quickstart, inputs):
    student = quickstart.folder / "student"
    assert {file.name for file in student.iterdir()} >= CHECKPOINT_FILES
    assert not (student / PROJECTIONS_NAME).exists()
    model, info = AutoModelForSequenceClassification.from_pretrained(student, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert type(model) is SpikeBertForSequenceClassification
    assert model.config.num_hidden_layers == 1
    assert model.config.num_time_steps == 2
    assert model.config.id2label == {0: "bad", 1: "good"}
    teacher_tokenizer = AutoTokenizer.from_pretrained(inputs.teacher)
    assert AutoTokenizer.from_pretrained(student).get_vocab() == teacher_tokenizer.get_vocab()


def test_quickstart_writes_no_pickle_and_prints_lines_that_people_read(quickstart):
    assert list(quickstart.folder.rglob("*.bin")) == []
    printed = quickstart.stdout + quickstart.stderr
    for unwanted in ("{'", "\r", "\x1b", "LOAD REPORT", "it/s"):
        assert unwanted not in printed
    for steps in (20, 7, 3, 4):  # of the teacher, the student without one, and both stages
        assert re.search(rf"^step +\d/{steps}  loss .* sentences/s  \d+ s left$", printed, re.MULTILINE)
        assert f": {steps} steps of 8 sentences on cpu" in printed
    assert "New, and learned now: classifier, norm. The rest is that of " in printed
    assert "random weights" not in printed


def test_quickstart_writes_the_stage_1_student_with_projections(quickstart):
    stage1 = quickstart.folder / "stage1"
    assert {"config.json", "model.safetensors", PROJECTIONS_NAME} <= {file.name for file in stage1.iterdir()}
    assert not any("projections" in name for name in load_file(stage1 / "model.safetensors"))


def test_quickstart_writes_metrics(quickstart):
    metrics = quickstart.metrics
    assert set(metrics["accuracy"]) == set(NAMES)
    assert all(0 <= accuracy <= 1 for accuracy in metrics["accuracy"].values())
    assert metrics["num_validation_sentences"] == 41
    assert metrics["accuracy"][NAMES[0]] == 21 / 41  # good; of the training text each label is half
    for over in ("gain_over_majority", "gain_over_student_without_teacher"):
        assert set(metrics[over]) == {"gain", "standard_error", "measurable"}
    assert metrics["options"]["task_steps"] == 4
    assert metrics["versions"].keys() >= {"python", "torch", "transformers"}
    assert metrics["seconds"] > 0
    steps = {name: max(entry["step"] for entry in log) for name, log in metrics["log_history"].items()}
    assert steps == {"teacher": 20, NAMES[2]: 7, "stage 1": 3, "stage 2": 4}
    logged = set().union(*metrics["log_history"]["stage 2"])
    assert {"loss_hidden_states", "loss_embeddings", "loss_logits"} <= logged


@pytest.mark.parametrize(("folder", "name"), [("teacher", NAMES[1]), ("student", NAMES[3])])
def test_quickstart_accuracy_is_that_of_the_saved_model(quickstart, inputs, folder, name):
    model = AutoModelForSequenceClassification.from_pretrained(quickstart.folder / folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(quickstart.folder / folder)
    rows = [line.split(",") for line in inputs.validation.read_text().splitlines()[1:]]
    answers = []
    for text, _ in rows:
        logits = model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits
        answers.append(model.config.id2label[int(logits.argmax())])
    if folder == "teacher":  # who answers always the same is right as often in any order
        assert len(set(answers)) == 2
    hits = [answer == label for answer, (_, label) in zip(answers, rows, strict=True)]
    assert quickstart.metrics["accuracy"][name] == pytest.approx(sum(hits) / len(rows))


def test_quickstart_writes_a_plot(quickstart):
    content = (quickstart.folder / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert width > height > 300


def test_quickstart_writes_a_card(quickstart, inputs):
    card = ModelCard.load(quickstart.folder / "student" / "README.md")
    assert card.data.license is None  # whose text it is, only its owner can say
    assert card.data.library_name == "transformers"
    count = sum(weight.numel() for weight in load_file(quickstart.folder / "student" / "model.safetensors").values())
    assert f"| 1 | 32 | 2 | {count / 1e6:.3g} M |" in card.content
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy"
    assert result.metric_value == pytest.approx(quickstart.metrics["accuracy"][NAMES[3]], abs=1e-4)
    for name in NAMES[:3]:
        assert f"| {name} |" in card.content
    assert card.data.base_model is None  # a folder on this machine is no name on the Hub
    config = (quickstart.folder / "student" / "config.json").read_text()
    for folder in (inputs.teacher.parent, quickstart.folder.parent):
        assert str(folder) not in card.content + config


def test_quickstart_prints_the_comparison_and_classified_sentences(quickstart, inputs):
    for name, accuracy in quickstart.metrics["accuracy"].items():
        assert re.search(rf"^{name} +{100 * accuracy:.1f} %$", quickstart.stdout, re.MULTILINE)
    gain = 100 * quickstart.metrics["gain_over_student_without_teacher"]["gain"]
    assert f"What the teacher gave: {gain:+.1f} points, standard error " in quickstart.stdout
    shown = quickstart.stdout.split("classified in a fresh process")[1]
    for line in inputs.validation.read_text().splitlines()[1:5]:
        text = line.split(",")[0]
        assert any(row.split()[0] in ("good", "bad") and row.endswith(f"  {text}") for row in shown.splitlines() if row)


def test_quickstart_ends_with_the_verdict_the_files_and_what_is_next(quickstart, inputs, capsys):
    answer, files, following = quickstart.stdout.splitlines()[-3:]
    assert answer == verdict(quickstart.metrics, 64, 41)
    assert quickstart.stdout.count("the majority class") == 1
    assert files.startswith(f"Written to {quickstart.folder}: student/")
    assert following.startswith(f"Next: spikebert energy {quickstart.folder}/student ")
    *_, option = shlex.split(following)
    own = [line.split(",")[0] for line in inputs.validation.read_text().splitlines()[1:5]]
    assert option.removeprefix("--text=") == min(own, key=len)
    main([*shlex.split(following)[2:]])
    assert "\nfor one sentence " in capsys.readouterr().out


def test_quickstart_says_what_it_has_read(quickstart):
    lines = quickstart.stdout.splitlines()
    at = lines.index("Text: 64 sentences for training, 41 for validation")
    assert lines[at + 1] == "Labels: bad (32), good (32)"


def test_quickstart_warns_of_rows_in_both_files_and_of_unknown_tokens(quickstart):
    assert "41 of 41 validation rows are in the training data, too." in quickstart.stderr
    (line,) = (line for line in quickstart.stderr.splitlines() if "unknown" in line)
    assert line.startswith("80 % of the tokens are unknown to the tokenizer (")  # 4 of 5, without [CLS] and [SEP]
    assert line.endswith("Name a teacher for the language of the text.")


def test_quickstart_shows_the_energy_of_student_and_teacher(quickstart):
    shown = quickstart.stdout.split("\nEnergy on 41 validation sentences\n")[1]
    energy = quickstart.metrics["energy"]
    card = ModelCard.load(quickstart.folder / "student" / "README.md").content.split("## Energy")[1]
    for account in ("published", "strict"):
        student, teacher = energy[account]["energy_mj"], energy["teacher"][account]["energy_mj"]
        assert 0 < student < teacher
        for text in (shown, card):
            (line,) = (line for line in text.splitlines() if f"{account}: mJ" in line)
            assert f"{student:.3g}" in line
            assert f"{teacher:.3g}" in line
            assert f"{100 * student / teacher:.1f} %" in line
    assert "latency, ms" in shown
    assert "T x firing rate of the input" in card
    assert "0.9 pJ" in card
    assert "mean over 41 sentences of validation.csv" in card
    assert f"{energy['tokens_per_sentence']:.1f} tokens" in card


# Energy


def energy(*options: object) -> str:
    """The message with which `spikebert energy` stops."""
    with pytest.raises(SystemExit) as stopped:
        main(["energy", *map(str, options)])
    assert isinstance(stopped.value.code, str)
    assert stopped.value.code.startswith("spikebert energy: ")
    return stopped.value.code


def test_energy_of_a_file_beside_a_teacher(quickstart, inputs, tmp_path, capsys):
    student = quickstart.folder / "student"
    options = ["--file", inputs.validation, "--num-sentences", 12, "--teacher", inputs.teacher, "--max-length", 12]
    outputs = ["--json", tmp_path / "energy.json", "--plots", tmp_path / "plots"]
    main(["energy", str(student), *map(str, [*options, *outputs])])
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "energy.json").read_text())
    assert figures["num_sentences"] == figures["teacher"]["num_sentences"] == 12
    assert figures["num_tokens"] == figures["teacher"]["num_tokens"]
    assert (figures["spiking"], figures["teacher"]["spiking"]) == (True, False)
    for account in ("published", "strict"):
        assert figures["ratio"][account] == pytest.approx(
            figures[account]["energy_mj"] / figures["teacher"][account]["energy_mj"]
        )
    for words in ("12 sentences", ".attention.query ", "binary", "published", "strict (45nm-fp32)", "linear layers"):
        assert words in shown
    assert figures["measured"]["latency_ms"] > 0
    assert re.search(
        r"^Measured on cpu, \d+ threads?, one sentence at a time\. Joules (are of|were not measured:) ",
        shown,
        re.MULTILINE,
    )
    assert shown.endswith("\nWhat the words mean, and which figure to trust: docs/energy.md\n")
    pictures = {"energy.png", "firing_rates.png", "raster.png"}
    assert {file.name for file in (tmp_path / "plots").iterdir()} == pictures
    for file in (tmp_path / "plots").iterdir():
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 5000


def test_energy_of_sentences_of_a_published_model(tmp_path, capsys):
    config = SpikeBertConfig.reference(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    SpikeBertModel(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    text = ["--text", "word1 word2 word3", "word4"]
    outputs = ["--json", tmp_path / "energy.json", "--plots", tmp_path / "plots", "--constants", "7nm-int8"]
    main(["energy", str(tmp_path / "model"), *map(str, [*text, *outputs])])
    figures = json.loads((tmp_path / "energy.json").read_text())
    assert figures["num_sentences"] == 2
    assert "teacher" not in figures
    assert figures["constants"]["strict"]["name"] == "7nm-int8"
    assert figures["constants"]["published"]["name"] == "45nm-fp32"
    kinds = {layer["name"]: layer["input_kind"] for layer in figures["layers"]}
    assert kinds["encoder.layer.0.attention.query"] == "binary"
    assert kinds["encoder.layer.1.attention.query"] == "integer"
    shown = capsys.readouterr().out
    assert "Note: Padding takes part in this model" in shown
    assert "name one with --teacher" in shown


def test_energy_of_a_bert_alone_says_that_it_is_not_spiking(inputs, capsys):
    main(["energy", str(inputs.teacher), "--text", "word1 word2"])
    assert "Note: The model is not spiking" in capsys.readouterr().out


def test_energy_pictures_of_a_bert_alone(inputs, tmp_path):
    main(["energy", str(inputs.teacher), "--text", "word1 word2", "--plots", str(tmp_path / "plots")])
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["energy.png"]


def test_energy_says_what_it_cuts(quickstart, capsys):
    text = ["--text", "word1 word2 word3 word4", "word5"]
    main(["energy", str(quickstart.folder / "student"), *text, "--max-length", "4"])
    assert "1 of 2 sentences are cut at 4 tokens (--max-length)" in capsys.readouterr().out


def test_energy_of_a_teacher_with_another_tokenizer_says_so(quickstart, tmp_path, capsys):
    tiny_teacher().save_pretrained(tmp_path)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "##1"])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    main(["energy", str(quickstart.folder / "student"), "--text", "word1 word1", "--teacher", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "cut the same sentences into different numbers of tokens" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("tokens "))
    assert line.split() == ["tokens", "4", "6"]


@pytest.mark.filterwarnings("error")
def test_energy_pictures_of_chinese_text(quickstart, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(quickstart.folder / "student")
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好吃"])}
    tokenizer = BertTokenizerFast(vocab=vocabulary)
    (file,) = save(raster(spikes_of(model, tokenizer, "很好吃")), tmp_path, "raster", ["png"])
    assert file.stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--file", "absent.csv"], "absent.csv: no such file"),
        (["--text", " "], "a sentence is empty"),
        (["--text", "word1", "--constants", "7nm-int7"], "did you mean 7nm-int8?"),
        (
            ["--text", "word1", "--constants", "3nm"],
            "--constants 3nm: neither constants nor a json file; there are 45nm-fp32, ",
        ),
        (["--dataset", "nonsense"], "nonsense: neither a file"),
        (["--text", "word1", "--max-length", "17"], "--max-length 17 exceeds the 16 positions"),
    ],
    ids=["absent file", "empty sentence", "misspelt constants", "unknown constants", "no split", "too long"],
)
def test_energy_refuses(quickstart, options, expected):
    assert expected in energy(quickstart.folder / "student", *options)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", {"num_time_steps": 0}, "`num_time_steps` must be at least 1, got 0."),
        ("config.json", {"hidden_size": 32.5}, "Field 'hidden_size' expected int, got float (value: 32.5)."),
        ("config.json", {"id2label": [1]}, "'list' object has no attribute 'items'."),
        ("tokenizer_config.json", [1], "'list' object has no attribute 'get'."),
    ],
)
def test_energy_of_a_damaged_folder(quickstart, tmp_path, file, content, expected):
    shutil.copytree(quickstart.folder / "student", tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content if isinstance(content, dict) else content))
    message = energy(tmp_path / "model", "--text", "word1")
    assert message.startswith(
        f"spikebert energy: {tmp_path / 'model'} cannot be loaded: {expected} Is each of its files"
    )


@pytest.mark.parametrize(
    "command",
    [
        ["energy", "FOLDER", "--text", "word1"],
        ["show", "FOLDER", "--text", "word1"],
        ["export", "FOLDER", "--format", "onnx", "--output-dir", "out"],
        ["quickstart", "--teacher", "FOLDER", "--output-dir", "out"],
        ["distill", "--stage", "general", "--teacher", "FOLDER", "--train-file", "a.csv", "--output-dir", "out"],
    ],
    ids=lambda words: words[0],
)
def test_the_folder_of_a_run_is_no_model(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "curves.png").touch()
    command = ["run" if word == "FOLDER" else word for word in command]

    def message() -> str:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        return stopped.value.code

    start = f"spikebert {command[0]}: run holds no model: there is no config.json. "
    assert message() == start + "Name the folder of a model."
    for name, meant in (("stage1", "stage1"), ("student", "student"), ("a", "student")):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").touch()
        assert message() == f"{start}Did you mean run/{meant}?"


def test_energy_refuses_what_is_no_encoder(tmp_path):
    GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "needs a SpikeBERT model or a BERT-like encoder, got GPT2Model" in energy(tmp_path, "--text", "word1")


def test_energy_refuses_an_empty_file(quickstart, tmp_path):
    (tmp_path / "empty.csv").write_text("text\n")
    assert "there are no rows" in energy(quickstart.folder / "student", "--file", tmp_path / "empty.csv")


@pytest.mark.parametrize("option", ["--num-sentences", "--batch-size", "--max-length"])
def test_energy_refuses_sizes_of_zero(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["energy", "model", "--text", "word1", option, "0"])
    assert stopped.value.code == 2
    assert f"{option} must be at least" in capsys.readouterr().err


# Distilling


@pytest.fixture(scope="module")
def distilled(inputs, tmp_path_factory) -> Path:
    """Folder with `stage1`, `student`, `resumed` (from the student's step 2 of 3) and `tuned`."""
    folder = tmp_path_factory.mktemp("distilled")
    common = {"per_device_train_batch_size": 8, "max_length": 12, "use_cpu": True, "disable_tqdm": True}
    recipe = {
        "stage": "general",
        "teacher": str(inputs.teacher),
        "student_config": {"num_hidden_layers": 1, "num_time_steps": 2},
        "train_file": str(inputs.train),
        "validation_file": str(inputs.validation),
        "output_dir": "stage1",
        "max_steps": 2,
        "learning_rate": 1e-3,
        **common,
    }
    # A json file is a yaml file as well.
    (folder / "recipe.yaml").write_text("# stage 1\n" + json.dumps(recipe))
    labelled = common | {"train_file": inputs.train, "validation_file": inputs.validation, "max_steps": 3}
    task = labelled | {"stage": "task", "teacher": inputs.teacher, "model_name_or_path": "stage1"}
    output = run(Path(sys.executable).with_name("spikebert"), "distill", "recipe.yaml", folder=folder)
    assert output.returncode == 0, output.stdout + output.stderr
    assert output.stderr == ""
    assert not re.search(r"\{'|[\r\x1b]", output.stdout)
    assert output.stdout.splitlines()[-2].startswith("Written to stage1: ")
    with pytest.MonkeyPatch.context() as patch:  # in this process, which has its imports behind it
        patch.chdir(folder)
        for options in (
            flags(**task, output_dir="student", save_steps=2),
            flags(**task, output_dir="resumed", resume_from_checkpoint="student/checkpoint-2"),
            flags(**labelled, model_name_or_path="student", output_dir="tuned"),
        ):
            main(["distill", *options])
    return folder


def test_distilling_stage_1_from_a_recipe(distilled):
    assert CHECKPOINT_FILES | {PROJECTIONS_NAME} <= {file.name for file in (distilled / "stage1").iterdir()}
    config = json.loads((distilled / "stage1" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_time_steps"]) == (1, 2)
    assert config["architectures"] == ["SpikeBertModel"]
    assert json.loads((distilled / "stage1" / "eval_results.json").read_text())["eval_loss_hidden_states"] > 0


def test_distilling_stage_2_goes_on_from_stage_1(distilled, inputs):
    state = json.loads((distilled / "student" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["max_steps"] == 3
    metrics = json.loads((distilled / "student" / "eval_results.json").read_text())
    assert {"eval_accuracy", "eval_f1", "eval_loss_logits", "eval_loss_hidden_states"} <= metrics.keys()
    config = json.loads((distilled / "student" / "config.json").read_text())
    assert config["architectures"] == ["SpikeBertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert not (distilled / "student" / PROJECTIONS_NAME).exists()
    card = ModelCard.load(distilled / "student" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "f1"}
    assert str(inputs.teacher.parent) not in card.content


@pytest.mark.parametrize("name", ["stage1", "student"])
def test_distilling_ends_with_the_energy_of_student_and_teacher(distilled, name):
    energy = json.loads((distilled / name / "energy.json").read_text())
    assert 0 < energy["ratio"]["strict"] < 1
    card = ModelCard.load(distilled / name / "README.md").content.split("## Energy")[1]
    assert "sentences of validation.csv" in card
    assert f"{energy['strict']['energy_mj']:.3g}" in card


def test_distilling_resumes_to_the_same_weights(distilled):
    whole, resumed = (load_file(distilled / name / "model.safetensors") for name in ("student", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all((resumed[name] == weight).all() for name, weight in whole.items())


def test_distilling_fine_tunes_without_a_teacher(distilled):
    before, after = (load_file(distilled / name / "model.safetensors") for name in ("student", "tuned"))
    assert before.keys() == after.keys()
    assert any((after[name] != weight).any() for name, weight in before.items())
    metrics = json.loads((distilled / "tuned" / "eval_results.json").read_text())
    assert "eval_accuracy" in metrics
    assert not any("logits" in name for name in metrics)
    assert {file.name for file in (distilled / "tuned").iterdir()} >= CHECKPOINT_FILES
