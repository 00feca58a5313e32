"""`spikebert distill` on every kind of data, in this process, which has its imports behind it."""

import hashlib
import json
import random
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import CODE_FILES, flags
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_training import BERT_SIZES, LABELS, tiny_teacher, tiny_tokenizer
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertTokenizerFast, pipeline

from modeling_spikebert import DistillationTrainingArguments
from modeling_spikebert.commands import main as spikebert
from modeling_spikebert.commands.distill import without_folders
from modeling_spikebert.commands.options.distill import parse
from modeling_spikebert.distillation.checkpoints import last_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES_FOLDER = EXAMPLES / "recipes"
RECIPES = sorted(RECIPES_FOLDER.glob("*/*.yaml"))
# The reader of csv files leaves a file open that is not read to its end.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def distill(*recipe: Path, **options: Any) -> dict[str, Any]:
    """Runs it; what it says of training and evaluation."""
    common = {
        "per_device_train_batch_size": 4,
        "max_length": 12,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    threads = torch.get_num_threads()
    spikebert(["distill", *map(str, recipe), *flags(**(common | options))])
    torch.set_num_threads(threads)
    return json.loads((Path(options["output_dir"]) / "all_results.json").read_text())


def sentence(words: random.Random) -> str:
    return " ".join(f"word{words.randrange(59)}" for _ in range(words.randrange(2, 9)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    tiny_teacher().save_pretrained(folder / "teacher")
    words, names = random.Random(0), list(LABELS["label2id"])
    for name, count in (("train", 24), ("validation", 8)):
        rows = {"text": [sentence(words) for _ in range(count)]}
        rows |= {"text_pair": [sentence(words) for _ in range(count)]}
        rows |= {"label": [names[i % 3] for i in range(count)], "score": [words.random() * 5 for _ in range(count)]}
        Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        "train_file": str(folder / "train.parquet"),
        "validation_file": str(folder / "validation.parquet"),
        "teacher": str(folder / "teacher"),
    }


def test_augmented_copies_are_labelled_by_the_teacher(folder, tmp_path, capsys):
    augmented = tmp_path / "train_augmented.parquet"
    options = ["--train-file", folder / "train.parquet", "--output-file", augmented, "--language", "en"]
    spikebert(["augment", *map(str, options), "--copies", "3"])
    assert f"Written: {augmented}, " in capsys.readouterr().out
    table = Dataset.from_parquet(str(augmented))
    assert len(table) > 24
    assert table["label"][:].count(None) == len(table) - 24
    results = distill(**files(folder) | {"train_file": str(augmented), "output_dir": tmp_path / "student"})
    assert 0 <= results["eval_accuracy"] <= 1
    plain = files(folder) | {"train_file": str(augmented), "model_name_or_path": str(folder / "teacher")}
    del plain["teacher"]
    with pytest.raises(SystemExit, match=r"training rows have no label: they are augmented copies"):
        distill(**plain, output_dir=tmp_path / "plain")


def test_pairs_with_numbers_as_labels(folder, tmp_path):
    """A BERT becomes a teacher of the regression, and teaches a student."""
    columns = {"text_pair_column": "text_pair", "label_column": "score", "regression": True, "max_length": 16}
    options = files(folder) | columns
    teacher = options.pop("teacher")
    results = distill(**options, model_name_or_path=teacher, output_dir=tmp_path / "teacher")
    assert {"eval_pearson", "eval_spearmanr"} <= results.keys()
    config = AutoConfig.from_pretrained(tmp_path / "teacher")
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    results = distill(**options, teacher=tmp_path / "teacher", output_dir=tmp_path / "student")
    assert {"eval_pearson", "eval_spearmanr", "eval_loss_logits"} <= results.keys()
    config = AutoConfig.from_pretrained(tmp_path / "student")
    assert (config.model_type, config.problem_type, config.num_labels) == ("spikebert", "regression", 1)


def test_a_task_by_name_with_files_of_ones_own(tmp_path):
    """MRPC's columns, labels and metrics."""
    words = random.Random(1)
    for name, count in (("train", 16), ("validation", 8)):
        rows = {
            "sentence1": [sentence(words) for _ in range(count)],
            "sentence2": [sentence(words) for _ in range(count)],
        }
        Dataset.from_dict(rows | {"label": [i % 2 for i in range(count)]}).to_parquet(tmp_path / f"{name}.parquet")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    tiny_teacher().save_pretrained(tmp_path / "bert")
    options = {"task": "mrpc", "train_file": tmp_path / "train.parquet", "max_length": 16}
    options |= {"validation_file": tmp_path / "validation.parquet"}
    results = distill(**options, model_name_or_path=tmp_path / "bert", output_dir=tmp_path / "teacher")
    assert {"eval_accuracy", "eval_f1"} <= results.keys()
    assert AutoConfig.from_pretrained(tmp_path / "teacher").id2label == {0: "not_equivalent", 1: "equivalent"}
    results = distill(**options, teacher=tmp_path / "teacher", output_dir=tmp_path / "student")
    assert {"eval_accuracy", "eval_f1"} <= results.keys()


@pytest.mark.parametrize("packing", ["none", "packed"])
def test_a_stream_in_stage_1_is_resumed_where_it_stopped(folder, tmp_path, packing):
    options = {"stage": "general", "teacher": folder / "teacher", "train_file": folder / "*.parquet", "save_steps": 2}
    options |= {"streaming": True, "packing": packing, "shuffle_buffer_size": 8, "lr_scheduler_type": "constant"}
    distill(**options, max_steps=4, output_dir=tmp_path / "whole")
    for steps in (2, 4):  # the first time there is no checkpoint yet
        parts = {"output_dir": tmp_path / "parts", "resume_from_checkpoint": "last"}
        distill(**options, max_steps=steps, **parts)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_fine_tuning_is_resumed_from_its_last_checkpoint(folder, tmp_path, capsys):
    options = files(folder) | {
        "model_name_or_path": folder / "teacher",
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    del options["teacher"]
    distill(**options, max_steps=3, output_dir=tmp_path / "whole", resume_from_checkpoint="last")
    distill(**options, max_steps=2, output_dir=tmp_path / "parts", resume_from_checkpoint="last")
    (tmp_path / "parts" / "checkpoint-9").mkdir()  # killed before its first file was written
    distill(**options, max_steps=3, output_dir=tmp_path / "parts", resume_from_checkpoint="last")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    capsys.readouterr()
    options |= {"output_dir": tmp_path / "parts", "learning_rate": 1e-6, "max_steps": 4}
    run = (tmp_path / "parts" / "run.json").read_bytes()
    with pytest.raises(SystemExit, match="has checkpoints of an earlier training, up to checkpoint-3: pass --resume"):
        distill(**options)
    assert (tmp_path / "parts" / "run.json").read_bytes() == run  # nothing was written over
    distill(**options, resume_from_checkpoint="last")
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry] == [1e-3, 1e-3, 1e-3, 1e-6]
    assert "Resumed with learning_rate 1e-06 (was 0.001), max_steps 4 (was 3)" in capsys.readouterr().out


def test_an_interrupted_training_says_how_to_go_on_and_goes_on(folder, tmp_path):
    """Its console has a line at the start and a line a log."""
    options = files(folder) | {"output_dir": tmp_path, "save_steps": 1, "logging_steps": 1, "report_to": "none"}
    options |= {"lr_scheduler_type": "constant", "max_length": 12, "per_device_train_batch_size": 4, "use_cpu": True}
    command = [sys.executable, "-m", "modeling_spikebert", "distill", *flags(**options, max_steps=100_000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline()]
        while lines[-1] and "3/100,000" not in lines[-1]:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(lines) + errors
    last = last_checkpoint(tmp_path)
    message = f"spikebert distill: interrupted; last checkpoint: {last}. The same command with --resume-from-checkpoint"
    assert errors.splitlines()[-1].startswith(message)
    assert "Traceback" not in errors
    start, *steps = [line.rstrip() for line in lines if line.startswith(("Training", "step"))]
    assert re.fullmatch(
        r"Training student 2 x 32 \(2\d\.\d k parameters\), teacher 2 x 32 \(2\d\.\d k parameters\): "
        r"100,000 steps of 4 sentences on cpu",
        start,
    )
    assert len(steps) == 3
    for i, line in enumerate(steps, start=1):
        assert re.fullmatch(rf"step +{i}/100,000  loss +\S+  +\S+ sentences/s  \S+ (s|min|h \d+ min) left", line)
    done = int(last.name.removeprefix("checkpoint-"))
    distill(**options, max_steps=done + 1, resume_from_checkpoint="last")
    state = json.loads((tmp_path / f"checkpoint-{done + 1}" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, done + 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Pass --train-file, or --task"),
        ({"train_file": "train.csv", "packing": "packed"}, "--packing is for streams"),
        ({"train_file": "train.csv"}, "Pass --validation-file: a model is chosen"),
        ({"task": "imdb"}, "There is no task 'imdb'. There are cola"),
        ({"stage": "general"}, "Pass --train-file, or --task"),
        ({"stage": "general", "task": "mr"}, "needs --train-file: text without labels"),
        ({"stage": "general", "train_file": "train.csv", "streaming": True, "max_steps": -1}, "needs --max-steps"),
        ({"train_file": "train.csv", "streaming": True}, "--streaming is for text without labels"),
        ({"stage": "general", "train_file": "no/*.txt", "streaming": True}, "no/[*].txt: no such file"),
        ({"train_file": "train.csv", "layer_map": "first"}, "layer_map must be one of"),
        (
            {"stage": "general", "train_file": "train.csv", "student_config": '{"num_time_steps": 0}'},
            "^spikebert distill: the config of the model is not valid: `num_time_steps` must be at least 1, got 0.$",
        ),
    ],
)
def test_impossible_options(folder, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        distill(teacher=folder / "teacher", output_dir=tmp_path / "run", **options)


def test_text_that_the_teacher_cannot_read_and_rows_in_both_files(folder, tmp_path, caplog):
    for name in ("train", "validation"):
        rows = {"text": ["酒店很好 word1", f"word2 {name}"], "label": ["bad", "good"]}
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    data = {"train_file": tmp_path / "train.parquet", "validation_file": tmp_path / "validation.parquet"}
    bert = {"model_name_or_path": folder / "teacher"}
    distill(**data, **bert, output_dir=tmp_path / "out", max_steps=1)
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("1 of 2 validation rows are in the training data, too.") for message in messages)
    # [UNK] are four characters and `train`; word1 and word2 are known.
    assert any(message.startswith("71 % of the tokens are unknown") for message in messages)
    with pytest.raises(SystemExit, match="Training and validation data are the same 2 rows"):
        distill(**data | {"validation_file": data["train_file"]}, **bert, output_dir=tmp_path / "no")


def test_options_are_spelled_with_either_mark_and_mistakes_are_one_line(capsys):
    options = ["--teacher", "t", "--train-file=a_b.csv", "--output_dir", "o", "--max-length", "9", "--use_cpu"]
    data = parse(options).data
    assert (data.train_file, data.max_length) == ("a_b.csv", 9)
    for mistake, message in (
        (["--learnign_rate", "1"], "unknown option --learnign_rate; did you mean --learning-rate?"),
        (["--max_length", "long"], "argument --max-length: invalid int value: 'long'"),
        (["--stage", "generl"], "argument --stage: no choice 'generl'; did you mean general?"),
        (["--lr-scheduler-type", "cosin"], "argument --lr-scheduler-type: no choice 'cosin'; did you mean cosine?"),
        (["--packing", "x"], "argument --packing: no choice 'x'; there is none, length, packed."),
    ):
        with pytest.raises(SystemExit) as stopped:
            spikebert(["distill", *options, *mistake])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"spikebert distill: {message}\n"


def test_help_all_has_every_option_of_transformers(capsys):
    options = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            spikebert(["distill", flag])
        assert stopped.value.code == 0
        options[flag] = re.findall(r"^  (?:-\w, )?--([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(options["--help"]) < 60
    assert len(set(options["--help-all"])) == len(options["--help-all"])
    assert set(options["--help"]) < set(options["--help-all"])
    names = {field.name.replace("_", "-") for field in fields(DistillationTrainingArguments)}
    assert names < set(options["--help-all"])


def test_chinese_from_text_to_a_pipeline(tmp_path, capsys):
    """A Chinese vocabulary, augmentation with words that a segmenter finds, a teacher, both stages, and a pipeline."""
    good, bad = "酒店环境不错，服务员态度很好。", "房间很脏，早餐也不好吃，非常失望！"  # noqa: RUF001
    characters = sorted(set(good + bad))
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters])}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    torch.manual_seed(0)
    config = BertConfig(**(BERT_SIZES | {"vocab_size": len(vocabulary), "max_position_embeddings": 32} | names))
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(tmp_path / "bert")
    for name, count in (("train", 12), ("validation", 4)):
        rows = {
            "text": [(good, bad)[i % 2][i // 2 :] for i in range(count)],
            "label": [1 - i % 2 for i in range(count)],
        }
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    train, augmented = tmp_path / "train.parquet", tmp_path / "augmented.parquet"
    options = ["--train-file", train, "--output-file", augmented, "--language", "zh", "--copies", 4]
    spikebert(["augment", *map(str, options)])
    assert Dataset.from_parquet(str(augmented)).num_rows > 12
    task = {"task": "chnsenti", "validation_file": tmp_path / "validation.parquet", "max_length": 24}
    distill(**task, train_file=train, model_name_or_path=tmp_path / "bert", output_dir=tmp_path / "teacher")
    stage1 = {"stage": "general", "train_file": train, "max_length": 24}
    distill(**stage1, teacher=tmp_path / "teacher", output_dir=tmp_path / "stage1")
    stage2 = task | {"train_file": augmented, "model_name_or_path": tmp_path / "stage1"}
    results = distill(**stage2, teacher=tmp_path / "teacher", output_dir=tmp_path / "student")
    assert "eval_accuracy" in results
    classify = pipeline("text-classification", model=str(tmp_path / "student"))
    assert classify(good, truncation=True)[0]["label"] in ("negative", "positive")
    assert classify.tokenizer.tokenize(good) == list(good)


# Recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe.relative_to(RECIPES_FOLDER)))
def test_recipes_are_options_of_distill(recipe):
    options = parse([str(recipe), "--seed", "7", "--output-dir", "elsewhere", "--use-cpu"])
    args = options.training
    assert (args.seed, args.output_dir) == (7, "elsewhere")
    assert args.max_steps > 0 or args.num_train_epochs > 0
    assert options.data.streaming == (args.stage == "general")
    assert options.model.from_scratch == (recipe.stem == "direct")


def test_every_set_has_the_same_recipes():
    recipes = {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in RECIPES_FOLDER.iterdir()}
    sets = {name: files for name, files in recipes.items() if "teacher" in files}
    rows = {"teacher", "student", "direct", "without_stage1", "without_logits", "without_augmentation"}
    expected = dict.fromkeys(("mr", "sst2", "sst5", "subj", "chnsenti", "waimai"), rows)
    assert sets == expected | {"sst2": rows | {"published_weights", "longer"}}


def test_the_recorded_command_names_no_folders_of_the_machine():
    for argument, expected in {
        "/home/me/teacher": "teacher",
        "--teacher=/home/me/teacher": "--teacher=teacher",
        "runs/teacher": "runs/teacher",
        "--learning-rate=1e-3": "--learning-rate=1e-3",
    }.items():
        assert without_folders(argument) == expected


def test_a_recipe_builds_on_another_and_options_go_before_it(folder, tmp_path):
    options = files(folder) | {"student_config": {"num_hidden_layers": 1, "num_time_steps": 2}, "logit_weight": 0}
    (tmp_path / "student.json").write_text(json.dumps(options | {"num_train_epochs": 5, "report_to": "none"}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "direct.yaml").write_text("base: ../student.json\nfrom_scratch: true\nlearning_rate: 1e-3\n")
    results = distill(tmp_path / "sub" / "direct.yaml", output_dir=tmp_path / "out", max_steps=3)
    assert not any("logits" in name for name in results)  # labels alone
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["command"].startswith("spikebert distill direct.yaml")  # no folders of this machine
    assert "--max-steps 3" in run["command"]
    assert str(tmp_path) not in run["command"]
    assert (run["seed"], run["device"]) == (42, "cpu")
    assert run["versions"]["torch"] == version("torch")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.model_type, config.num_hidden_layers, config.num_time_steps) == ("spikebert", 1, 2)
    embeddings = load_file(tmp_path / "out" / "model.safetensors")["spikebert.embeddings.word_embeddings.weight"]
    teacher = load_file(folder / "teacher" / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert not torch.isclose(embeddings, teacher, atol=0.01).all(1).any()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("stage: tsk", "recipe.yaml: stage: no choice 'tsk'; did you mean task[?]"),
        ("learning_rat: 1", "no options of spikebert distill: learning_rat; did you mean learning_rate?"),
        ("- stage", "one option a line"),
        ("stage: [", "no yaml"),
        ("base: absent.yaml", "absent.yaml"),
        ("base: recipe.yaml", "its base recipe.yaml builds on recipe.yaml in turn"),
        ("base: other.yaml", "other.yaml: its base recipe.yaml builds on other.yaml in turn"),
        ("base: 3", "base must name a recipe, such as student.yaml, got 3"),
        ("teacher: t\nmodel_name_or_path: m\nfrom_scratch: true", "--from-scratch takes --teacher"),
    ],
)
def test_a_recipe_that_cannot_be_used(tmp_path, recipe, message):
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "other.yaml").write_text("base: recipe.yaml")
    with pytest.raises(SystemExit, match=message):
        distill(tmp_path / "recipe.yaml", output_dir=tmp_path / "out")


def test_tables_of_results(tmp_path, monkeypatch, capsys):
    runs, data = tmp_path / "runs", tmp_path / "data"
    for split, labels in (("train", [0, 1, 1]), ("validation", [0, 0, 1, 0])):
        (data / "mr").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"label": labels}).to_parquet(data / "mr" / f"{split}.parquet")
    for row, accuracy in {"teacher": 0.8, "student": 0.6, "student-1": 0.7, "student-2": 0.8, "direct": 0.5}.items():
        (runs / "mr" / row).mkdir(parents=True)
        (runs / "mr" / row / "eval_results.json").write_text(json.dumps({"eval_accuracy": accuracy}))
    energy = {"ratio": {"published": 0.02, "strict": 0.04}}
    (runs / "mr" / "student" / "energy.json").write_text(json.dumps(energy))
    (runs / "mr" / "without_logits").mkdir()  # not finished
    monkeypatch.setattr(sys, "argv", ["results.py", str(runs), str(data)])
    runpy.run_path(str(EXAMPLES / "results.py"), run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| majority | | 25.0 | | | | | |",
        "| teacher | 1 | 80.0 | 100.0 |  |  |  | `mr/teacher.yaml` |",
        "| student, labels alone from random weights | 1 | 50.0 | 62.5 |  |  |  | `mr/direct.yaml` |",
        "| student, in full | 3 | 70.0 ± 10.0 | 87.5 |  | 2 | 4 | `mr/student.yaml` |",
    ]


def test_a_run_becomes_a_folder_to_give_away(folder, tmp_path, monkeypatch, capsys):
    options = files(folder) | {"student_config": '{"num_hidden_layers": 2, "num_time_steps": 2}'}
    distill(**options, output_dir=tmp_path / "run")
    release = {
        "run": tmp_path / "run",
        "folder": tmp_path / "release",
        "teacher": folder / "teacher",
        "validation_file": folder / "validation.parquet",
        "max_length": 12,
        "max_shard_size": "20KB",
        "license": "mit",
        "notes": tmp_path / "notes.md",
    }
    (tmp_path / "notes.md").write_text("## Data\n\nOf no one.\n")
    monkeypatch.setattr(sys, "argv", ["release.py", *flags(**release), "--labels", "worst", "middling", "best"])
    runpy.run_path(str(EXAMPLES / "release.py"), run_name="__main__")
    printed = capsys.readouterr().out
    shards = sorted((tmp_path / "release").glob("*.safetensors"))
    assert len(shards) > 1
    for path in shards:
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header <= 20_000
    for line in (tmp_path / "release" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / "release" / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in (tmp_path / "release").iterdir()} > CODE_FILES | {"run.json", "tokenizer.json"}

    classify = pipeline("text-classification", model=str(tmp_path / "release"))
    text = Dataset.from_parquet(str(folder / "validation.parquet"))
    names = list(LABELS["label2id"])
    predicted = [("worst", "middling", "best").index(row["label"]) for row in classify(text["text"][:])]
    right = sum(names[label] == expected for label, expected in zip(predicted, text["label"][:], strict=True))
    card = ModelCard.load(tmp_path / "release" / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(right / len(text), abs=1e-4)
    assert card.data.license == "mit"
    assert f"| {right / len(text):.4f} |" in printed
    assert card.content.rstrip().endswith("Of no one.")
    assert "sentences of validation.parquet" in card.content
    with pytest.raises(SystemExit, match="exists already"):
        runpy.run_path(str(EXAMPLES / "release.py"), run_name="__main__")
