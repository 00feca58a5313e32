"""State dicts of the published code become folders of ours that compute the same."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CODE_FILES, make_neurons_fire, random_ids
from huggingface_hub import ModelCard
from published_model import PublishedSpikeBert
from safetensors.torch import load_file, save_file
from tiny_training import LABELS, VOCABULARY, make_trainer, tiny_teacher, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.commands import main
from modeling_spikebert.commands.convert import NAMES
from modeling_spikebert.distillation import PROJECTIONS_NAME
from modeling_spikebert.distillation.projections import FeatureProjections

SIZES = {"vocabulary": len(VOCABULARY), "width": 32, "depth": 2}
CONFIG = {"num_hidden_layers": 2, "num_time_steps": 4, "tau": 2.0}
STAGES = {"general": None, "task": 3}  # number of labels
EXACT = {"rtol": 0, "atol": 1e-10}


def published(stage: str, dtype: torch.dtype = torch.float64, **options: float) -> PublishedSpikeBert:
    model = (
        PublishedSpikeBert(**SIZES, num_labels=STAGES[stage], **({"steps": 4, "tau": 2.0} | options)).to(dtype).eval()
    )
    make_neurons_fire(model)
    return model


def save(model: PublishedSpikeBert, folder: Path, prefix: str = "", **changes: torch.Tensor | None) -> Path:
    """The state dict as a file; `changes` replace, add or (None) remove tensors."""
    weights = {name: weight for name, weight in (model.state_dict() | changes).items() if weight is not None}
    torch.save({f"{prefix}{name}": weight for name, weight in weights.items()}, folder / "weights.pt")
    return folder / "weights.pt"


def convert(file: Path, folder: Path, config: dict | str | Path = CONFIG, *options: str | Path) -> Path:
    text = json.dumps(config) if isinstance(config, dict) else str(config)
    main(["convert", str(file), "--config", text, "--output-dir", str(folder / "converted"), *map(str, options)])
    return folder / "converted"


def refused(file: Path, folder: Path, config: dict | str | Path = CONFIG, *options: str | Path) -> str:
    """The message of a conversion that stops before it writes anything."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        convert(file, folder, config, *options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    message = stopped.value.code
    assert isinstance(message, str)
    assert message.startswith("spikebert convert: ")
    assert "\n" not in message
    return message


# Parity

SETTINGS = pytest.mark.parametrize(("steps", "tau"), [(4, 2.0), (3, 1.5)], ids=["published", "T3-tau1.5"])
PREFIXES = pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DataParallel"])


def test_the_published_model_shares_no_code_with_the_package():
    tree = ast.parse(Path(__file__).with_name("published_model.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names | {node.module for node in imports if isinstance(node, ast.ImportFrom)} == {"torch"}


@SETTINGS
def test_published_neurons_fire_neither_always_nor_never(steps, tau):
    *_, signals = published("task", steps=steps, tau=tau)(random_ids(3, 7))
    rates = [signal.mean().item() for signal in signals]
    assert len(rates) == 1 + 2 * 7
    assert [rate for rate in rates if not 0.02 < rate < 0.98] == []


@PREFIXES
@SETTINGS
def test_stage_2_gives_the_same_logits_and_hidden_states(tmp_path, steps, tau, prefix):
    source = published("task", steps=steps, tau=tau)
    folder = convert(save(source, tmp_path, prefix), tmp_path, CONFIG | {"num_time_steps": steps, "tau": tau})
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is SpikeBertForSequenceClassification
    assert model.dtype == torch.float64  # as in the file
    ids = random_ids(3, 7)
    logits, states, *_ = source(ids)
    outputs = model(ids, output_hidden_states=True)
    assert logits.std() > 1e-2
    torch.testing.assert_close(outputs.logits, logits, **EXACT)
    for ours, theirs in zip(outputs.hidden_states[1:], states, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@PREFIXES
@SETTINGS
def test_stage_1_gives_the_same_hidden_states_and_projections(tmp_path, steps, tau, prefix):
    source = published("general", steps=steps, tau=tau)
    folder = convert(save(source, tmp_path, prefix), tmp_path, CONFIG | {"num_time_steps": steps, "tau": tau})
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is SpikeBertModel
    ids = random_ids(3, 7)
    _, states, projected, _ = source(ids)
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    projections = FeatureProjections(2, 32, 32, 32).double()
    projections.load_state_dict(load_file(folder / PROJECTIONS_NAME))
    ours = projections(hidden_states[1:], hidden_states[0])[1:]
    for i in range(2):
        torch.testing.assert_close(hidden_states[i + 1], states[i], **EXACT)
        torch.testing.assert_close(ours[i], projected[i], **EXACT)


def test_float32_gives_close_logits(tmp_path):
    source = published("task", torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(convert(save(source, tmp_path), tmp_path))
    assert model.dtype == torch.float32
    logits, *_ = source(random_ids(3, 7))
    torch.testing.assert_close(model(random_ids(3, 7)).logits, logits, rtol=0, atol=1e-4)


def test_other_heads_and_threshold(tmp_path):
    source = published("task", heads=4, threshold=0.7)
    config = CONFIG | {"num_attention_heads": 4, "v_threshold": 0.7}
    model = AutoModelForSequenceClassification.from_pretrained(convert(save(source, tmp_path), tmp_path, config))
    assert model.config.attention_v_threshold == 0.35
    torch.testing.assert_close(model(random_ids(3, 7)).logits, source(random_ids(3, 7))[0], **EXACT)


@pytest.mark.parametrize("change", [{"num_time_steps": 5}, {"tau": 3.0}, {"num_attention_heads": 4}], ids=str)
def test_what_is_stated_decides_the_logits(tmp_path, change):
    source = published("task")
    model = AutoModelForSequenceClassification.from_pretrained(
        convert(save(source, tmp_path), tmp_path, CONFIG | change)
    )
    assert (model(random_ids(3, 7)).logits - source(random_ids(3, 7))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_two_swapped_entries_of_the_table_change_the_result(tmp_path, monkeypatch, stage):
    """Query and key have the same shapes: only the values can tell."""
    table, (q, k) = NAMES[stage], ("blocks.{i}.attn.q_m", "blocks.{i}.attn.k_m")
    monkeypatch.setitem(NAMES, stage, table | {q: table[k], k: table[q]})
    source = published(stage)
    folder = convert(save(source, tmp_path), tmp_path)
    model = AutoModel.from_pretrained(folder)
    assert (model(random_ids(3, 7)).last_hidden_state - source(random_ids(3, 7))[1][-1]).abs().max() > 0.1


# The folder


def test_folder_is_laid_out_like_a_repository(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"id2label": {"0": "bad", "1": "fair", "2": "good"}}))
    options = ("--tokenizer", tmp_path / "tokenizer", "--base-model", "google-bert/bert-base-cased")
    folder = convert(save(published("task"), tmp_path), tmp_path, tmp_path / "config.json", *options)
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {file.name for file in folder.iterdir()} == CODE_FILES | files
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["auto_map"].keys() >= {"AutoConfig", "AutoModelForSequenceClassification"}
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()
    printed = capsys.readouterr().out
    assert "stage 2, task distillation, 3 labels" in printed
    assert "Depth 2, 32 wide, MLP 128 wide, 8 heads, vocabulary 64" in printed
    assert "T 4, tau 2.0, threshold 1.0" in printed
    assert "Dropped: transforms.{i}.fc, transforms.{i}.ln\n" in printed


def test_card_says_where_the_weights_come_from_and_that_nothing_was_measured(tmp_path):
    folder = convert(save(published("task"), tmp_path), tmp_path, CONFIG, "--base-model", "google-bert/bert-base-cased")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "google-bert/bert-base-cased"
    assert card.data.license is None
    assert card.data.eval_results is None
    for text in ("`weights.pt`, a state dict of the published code", "stage 2", "4 and 2.0, stated", "Not measured."):
        assert text in card.content
    assert str(tmp_path) not in card.content


def test_stage_1_folder_has_projections_and_no_classifier(tmp_path, capsys):
    folder = convert(save(published("general"), tmp_path), tmp_path)
    assert {file.name for file in folder.iterdir()} == CODE_FILES | {
        "config.json",
        "model.safetensors",
        "README.md",
        PROJECTIONS_NAME,
    }
    assert not any("projections" in name or "classifier" in name for name in load_file(folder / "model.safetensors"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None
    assert card.data.pipeline_tag == "feature-extraction"
    printed = capsys.readouterr().out
    assert "stage 1, general distillation\n" in printed
    assert f"Dropped: last_ln; projections of the training in {PROJECTIONS_NAME}" in printed
    assert "No tokenizer" in printed


def test_stage_2_goes_on_from_a_converted_stage_1(tmp_path):
    source = published("general", torch.float32)
    folder = convert(save(source, tmp_path), tmp_path)
    student = SpikeBertForSequenceClassification.from_pretrained(folder, **LABELS)
    trainer = make_trainer(tmp_path / "run", "task", (student, tiny_teacher()), initial_projections=str(folder))
    assert torch.equal(student.spikebert.encoder.layer[1].mlp.output.weight, source.blocks[1].mlp.fc2.weight)
    assert torch.equal(trainer.projections.layers[1][0].weight, source.transforms[1].fc.weight)
    # What was dropped would have been no other: a fresh norm is what the published one is, untrained.
    assert torch.equal(student.norm.weight, torch.ones(32))
    assert torch.equal(student.norm.bias, torch.zeros(32))


def test_safetensors_are_read_too(tmp_path):
    source = published("task")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(convert(tmp_path / "weights.safetensors", tmp_path))
    torch.testing.assert_close(model(random_ids(3, 7)).logits, source(random_ids(3, 7))[0], **EXACT)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    source = published("task")
    source.blocks[1].attn.k_m.weight = source.blocks[1].attn.q_m.weight
    model = AutoModelForSequenceClassification.from_pretrained(convert(save(source, tmp_path), tmp_path))
    torch.testing.assert_close(model(random_ids(3, 7)).logits, source(random_ids(3, 7))[0], **EXACT)


def test_converted_folder_brings_its_code(tmp_path, capsys):
    source = published("task")
    folder = convert(save(source, tmp_path), tmp_path)
    assert capsys.readouterr().err == ""
    code = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_spikebert" not in sys.modules
print(model(torch.tensor([[5, 6, 7]])).logits.tolist())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, folder]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    expected, *_ = source(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(torch.tensor(json.loads(output.stdout), dtype=torch.float64), expected, **EXACT)


# Refusals


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("task", "blocks.1.attn.q_ln.bias"),
        ("task", "classifier.bias"),
        ("task", "transforms.0.fc.weight"),
        ("general", "blocks.0.mlp.fc2.weight"),
        ("general", "last_ln.bias"),
        ("general", "emb.weight"),
    ],
)
@PREFIXES
def test_a_missing_tensor_is_named(tmp_path, stage, name, prefix):
    message = refused(save(published(stage), tmp_path, prefix, **{name: None}), tmp_path)
    assert f"it lacks {name}." in message


@pytest.mark.parametrize("name", ["blocks.0.attn.q_lif.v", "blocks.1.mlp.fc3.weight", "module.emb.weight", "emb.bias"])
def test_an_unknown_tensor_is_named(tmp_path, name):
    message = refused(save(published("task"), tmp_path, **{name: torch.zeros(1, dtype=torch.float64)}), tmp_path)
    assert f"it has the unknown {name}." in message


def test_missing_and_unknown_tensors_are_both_named(tmp_path):
    changes = {"emb.weight": None, "embedding.weight": torch.zeros(64, 32, dtype=torch.float64)}
    message = refused(save(published("task"), tmp_path, **changes), tmp_path)
    assert "it lacks emb.weight, and has the unknown embedding.weight." in message


def test_another_model_is_refused(tmp_path):
    torch.save(tiny_teacher(BertModel).state_dict(), tmp_path / "bert.pt")
    assert "it has no blocks, but embeddings.word_embeddings.weight, " in refused(tmp_path / "bert.pt", tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.1.attn.q_m.weight", (32, 31), "(32, 31), but must have (32, 32)"),
        ("blocks.0.mlp.fc2.weight", (32, 64), "(32, 64), but must have (32, 128)"),
        ("classifier.bias", (4,), "(4,), but must have (3,)"),
        ("emb.weight", (64,), "(64,), but must have two dimensions"),
    ],
)
def test_a_wrong_shape_is_named_beside_the_right_one(tmp_path, name, shape, expected):
    message = refused(save(published("task"), tmp_path, **{name: torch.zeros(shape, dtype=torch.float64)}), tmp_path)
    assert f"{name} has the shape {expected}." in message


def test_projections_of_another_width_are_named(tmp_path):
    wide = torch.zeros(48, 32, dtype=torch.float64)
    message = refused(save(published("general"), tmp_path, **{"transforms.1.fc.weight": wide}), tmp_path)
    assert "transforms.1.fc.weight has the shape (48, 32), but must have (32, 32)." in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "lacks num_hidden_layers, num_time_steps, tau."),
        ({"num_hidden_layers": 2, "tau": 2.0}, "lacks num_time_steps."),
        (CONFIG | {"num_hidden_layers": 3}, "num_hidden_layers 3, but the file has 2 blocks"),
        (CONFIG | {"hidden_size": 768}, "hidden_size 768, but the tensors of the file have 32"),
        (CONFIG | {"vocab_size": 30522}, "vocab_size 30522, but the tensors of the file have 64"),
        (CONFIG | {"intermediate_size": 64}, "intermediate_size 64, but the tensors of the file have 128"),
        (CONFIG | {"id2label": {"0": "bad", "1": "good"}}, "id2label must map ['0', '1', '2'] to names"),
        (CONFIG | {"id2label": ["bad", "fair", "good"]}, "id2label must map ['0', '1', '2'] to names"),
        (CONFIG | {"num_attention_heads": 5}, "`num_attention_heads` (5) must divide `hidden_size` (32)"),
        (CONFIG | {"tau": 0.5}, "`tau` must be at least 1"),
        (CONFIG | {"tau": "2"}, "'tau' with value '2'"),
        (CONFIG | {"v_threshold": "1"}, "--config: "),
        (CONFIG | {"num_time_steps": 4.5}, "'num_time_steps' expected int"),
        (CONFIG | {"shortcut": "membrane"}, "names ['shortcut']; only num_hidden_layers"),
        ("{4, 2}", "--config is no json"),
        ("absent.json", "absent.json"),
    ],
    ids=str,
)
def test_a_config_that_is_incomplete_or_contradicted_is_refused(tmp_path, config, expected):
    assert expected in refused(save(published("task"), tmp_path), tmp_path, config)


def test_a_config_file_must_hold_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[2, 4, 2.0]")
    message = refused(save(published("task"), tmp_path), tmp_path, tmp_path / "config.json")
    assert "config.json must be a json object with num_hidden_layers, num_time_steps, tau" in message


def test_label_names_without_a_classifier_are_refused(tmp_path):
    config = CONFIG | {"id2label": {"0": "bad", "1": "good"}}
    assert "no classifier" in refused(save(published("general"), tmp_path), tmp_path, config)


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, form):
    (tmp_path / "other").mkdir()
    trap, file = tmp_path / "other" / "trap", tmp_path / "weights.pt"
    if form.startswith("pickle"):
        file.write_bytes(pickle.dumps({"emb.weight": Malicious(trap)}, protocol=int(form[-1])))
    else:
        torch.save({"emb.weight": Malicious(trap)}, file, _use_new_zipfile_serialization=form == "zip")
    message = refused(file, tmp_path)
    assert str(file) in message
    assert ("nothing in it was run" if form == "pickle 4" else "to read it would run code") in message
    assert not trap.exists()
    torch.load(file, weights_only=False) if form in ("zip", "legacy") else pickle.loads(file.read_bytes())
    assert trap.exists()  # what reading it otherwise does


def test_a_whole_model_is_refused_with_the_way_to_its_state_dict(tmp_path):
    torch.save(published("task"), tmp_path / "model.pt")
    message = refused(tmp_path / "model.pt", tmp_path)
    assert "would run code (published_model.PublishedSpikeBert)" in message
    assert "torch.save(model.state_dict(), 'weights.pt')" in message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, part, legacy):
    torch.save(published("task").state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(content[: int(part * len(content)) if part < 1 else part])
    assert f"{tmp_path / 'weights.pt'} is damaged or not a file of torch.save" in refused(
        tmp_path / "weights.pt", tmp_path
    )


def test_truncated_safetensors_are_named(tmp_path):
    save_file(published("task").state_dict(), tmp_path / "weights.safetensors")
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(content[:-9])
    assert "weights.safetensors is damaged or not a file of safetensors" in refused(
        tmp_path / "weights.safetensors", tmp_path
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "state_dict": {}}, "holds the entries epoch, state_dict, not tensors by name"),
        ([torch.zeros(2)], "holds list, not tensors by name"),
        ({"emb.weight": torch.zeros(2, dtype=torch.long)}, "floating-point tensors of one dtype, got torch.int64"),
    ],
    ids=["checkpoint", "list", "integers"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, expected):
    torch.save(content, tmp_path / "weights.pt")
    assert expected in refused(tmp_path / "weights.pt", tmp_path)


def test_weights_of_a_diverged_training_are_named(tmp_path):
    nan = torch.full((32,), float("nan"), dtype=torch.float64)
    message = refused(save(published("task"), tmp_path, **{"blocks.1.attn.k_ln.bias": nan}), tmp_path)
    assert "NaN or infinite weights in blocks.1.attn.k_ln.bias" in message


def test_an_absent_file_is_named(tmp_path):
    assert "absent.pt" in refused(tmp_path / "absent.pt", tmp_path)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    file = save(published("task"), tmp_path, **{"emb.weight": torch.ones(70, 32, dtype=torch.float64)})
    message = refused(file, tmp_path, CONFIG, "--tokenizer", tmp_path / "tokenizer")
    assert "has 64 tokens, but the model has 70 word embeddings" in message


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "notes.txt").write_text("mine")
    message = refused(save(published("task"), tmp_path), tmp_path)
    assert f"{tmp_path / 'converted'} is not empty. Choose another --output-dir" in message
