"""Damaged checkpoints are refused by `from_pretrained`, with the tensor, the file and what to do; sound ones load."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_ids, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel

INT8 = {"quant_method": "spikebert_int8"}
KINDS = ("float", "int8", "dequantize")
QUERY = "spikebert.encoder.layer.1.attention.query"
WORDS = "spikebert.embeddings.word_embeddings"
kinds = pytest.mark.parametrize("kind", KINDS)

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Classifiers of each kind, in one file and in shards, and one in bfloat16."""
    root = tmp_path_factory.mktemp("saved")
    tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, num_labels=3).save_pretrained(root / "float")
    for kind, options in (("int8", INT8), ("dequantize", INT8 | {"dequantize": True})):
        model = SpikeBertForSequenceClassification.from_pretrained(root / "float", quantization_config=options)
        model.save_pretrained(root / kind)
        model.save_pretrained(root / f"{kind}-sharded", max_shard_size="20KB")
    model = SpikeBertForSequenceClassification.from_pretrained(root / "float")
    model.save_pretrained(root / "float-sharded", max_shard_size="50KB")
    model.bfloat16().save_pretrained(root / "bfloat16")
    model.float().spikebert.save_pretrained(root / "base")
    return root


@pytest.fixture
def copy(saved, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


def change(file: Path, edit: Callable[[Weights], Any]) -> None:
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def spoil(name: str, index: Any, value: float) -> Callable[[Weights], None]:
    return lambda weights: weights[name].__setitem__(index, value)


def change_header(file: Path, old: str, new: str) -> None:
    """The header says another type of the same size."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    assert f'"{old}"'.encode() in header
    header = header.replace(f'"{old}"'.encode(), f'"{new}"'.encode()).rstrip().ljust(size)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def file_of(folder: Path, name: str) -> Path:
    """The shard that holds a tensor, or the one file."""
    index = folder / "model.safetensors.index.json"
    return folder / (json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors")


def refused(
    folder: Path, error: type[Exception], *parts: object, cls: Any = AutoModelForSequenceClassification
) -> None:
    """The message has all parts and what to do."""
    with pytest.raises(error) as caught:
        cls.from_pretrained(folder, output_loading_info=True)
    for part in (*parts, "opy or download"):
        assert str(part) in str(caught.value), str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("form", ["", "-sharded"], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("float", f"{QUERY}.weight"),
        ("float", "classifier.bias"),
        ("int8", f"{QUERY}.weight_scale"),
        ("int8", f"{WORDS}.weight"),
        ("dequantize", f"{QUERY}.weight_scale"),
        ("dequantize", f"{WORDS}.weight_scale"),
    ],
)
def test_weights_that_are_not_finite_are_refused(copy, kind, name, form, value):
    folder = copy(kind + form)
    file = file_of(folder, name)
    change(file, spoil(name, -1, value))
    refused(folder, ValueError, name, file, "NaN or infinite")


@pytest.mark.parametrize("value", [0.0, -0.1])
@pytest.mark.parametrize(("kind", "name"), [("int8", QUERY), ("dequantize", WORDS)])
def test_scales_that_are_not_positive_are_refused(copy, kind, name, value):
    folder = copy(kind)
    change(folder / "model.safetensors", spoil(f"{name}.weight_scale", -1, value))
    refused(folder, ValueError, f"{name}.weight_scale", "scales that are not positive")


def test_finite_weights_whose_sum_overflows_are_loaded(copy):
    folder = copy("bfloat16")
    for index, value in enumerate((3e38, 3e38)):
        change(folder / "model.safetensors", spoil(f"{QUERY}.weight", (0, index), value))
    assert SpikeBertForSequenceClassification.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="infinite as torch"):  # the type the user asks for has no such number
        SpikeBertForSequenceClassification.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("kind", "name", "old", "new"),
    [
        ("bfloat16", "", "BF16", "F16"),
        ("float", "", "F32", "I32"),
        ("int8", "", "F32", "U32"),
        ("int8", "weight", "I8", "U8"),
        ("dequantize", "weight", "I8", "BOOL"),
    ],
)
def test_bytes_that_the_header_calls_another_type_are_refused(copy, kind, name, old, new):
    folder = copy(kind)
    change_header(folder / "model.safetensors", old, new)
    refused(folder, ValueError, name, folder / "model.safetensors", " is torch.")


def test_two_half_types_are_refused_without_a_dtype_in_the_config_too(copy):
    folder = copy("bfloat16")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert SpikeBertForSequenceClassification.from_pretrained(folder).dtype == torch.bfloat16
    change(folder / "model.safetensors", lambda weights: weights.update({"norm.bias": weights["norm.bias"].half()}))
    refused(folder, ValueError, folder / "model.safetensors", "is torch.float16, but the model was saved as torch.bfl")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("name", [f"{QUERY}.weight", "norm.bias"])
def test_integers_as_weights_are_refused(copy, name, dtype):
    folder = copy("float")
    change(folder / "model.safetensors", lambda weights: weights.update({name: weights[name].to(dtype)}))
    refused(folder, ValueError, name, folder / "model.safetensors", dtype, "config.json makes it a float")


@pytest.mark.parametrize("form", ["", "-sharded"], ids=["whole", "sharded"])
@pytest.mark.parametrize("kind", ["int8", "dequantize"])
def test_int8_and_its_config_belong_together(copy, kind, form):
    name = f"{QUERY}.weight"
    folder = copy(kind + form)
    file = file_of(folder, name)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, ValueError, ".weight in ", file.parent, "is torch.int8, but config.json makes it a float")
    change(file, lambda weights: weights.update({name: weights[name].float()}))
    options = INT8 | {"dequantize": kind == "dequantize"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    refused(folder, ValueError, name, file, "is torch.float32, but config.json makes it torch.int8")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("float", f"{QUERY}.weight"),
        ("float", "spikebert.embeddings.position_embeddings.weight"),
        ("float", "classifier.weight"),
        ("int8", f"{QUERY}.weight_scale"),
        ("dequantize", f"{WORDS}.weight_scale"),
    ],
)
def test_missing_weights_are_refused(copy, kind, name):
    folder = copy(kind)
    change(folder / "model.safetensors", lambda weights: weights.pop(name))
    refused(folder, OSError, folder / "model.safetensors", f"has no {name}. ")
    if name.startswith("spikebert"):
        refused(folder, OSError, f"has no {name.removeprefix('spikebert.')}. ", cls=AutoModel)


@kinds
def test_a_new_head_on_a_base_checkpoint_is_no_damage(saved, copy, kind):
    folder = saved / "base"
    if kind != "float":
        options = INT8 | {"dequantize": kind == "dequantize"}
        model = SpikeBertModel.from_pretrained(folder, quantization_config=options)
        model.save_pretrained(folder := copy("base"))
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {"norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
    lost = "encoder.layer.0.mlp.output.bias"
    shutil.copytree(folder, copied := copy("float").with_name("copied"))
    change(copied / "model.safetensors", lambda weights: weights.pop(lost))
    refused(copied, OSError, copied / "model.safetensors", f"has no spikebert.{lost}. ")


@kinds
def test_a_shard_map_that_names_the_wrong_file_is_refused(copy, kind):
    folder = copy(f"{kind}-sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = f"{QUERY}.weight"
    right = content["weight_map"][name]
    wrong = min(set(content["weight_map"].values()) - {right})
    content["weight_map"][name] = wrong
    index.write_text(json.dumps(content))
    refused(folder, OSError, name, folder / min(right, wrong), "shard map")
    content["weight_map"] = dict.fromkeys(content["weight_map"], wrong)
    index.write_text(json.dumps(content))
    refused(folder, OSError, folder / wrong, "has no ", "shard map")


@pytest.mark.parametrize("size", [0, 100, 9_000])
@pytest.mark.parametrize("form", ["", "-sharded"], ids=["whole", "sharded"])
@kinds
def test_a_truncated_file_is_named(copy, kind, form, size):
    folder = copy(kind + form)
    file = file_of(folder, f"{WORDS}.weight")
    assert file.stat().st_size > size
    with open(file, "r+b") as content:
        content.truncate(size)
    refused(folder, OSError, file, "cannot be read", "git lfs pull")
    if form:
        file.unlink()
        refused(folder, OSError, file, "cannot be read")


def test_a_truncated_file_of_a_config_without_dtype_is_refused(copy):
    folder = copy("float")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, OSError, folder, "git lfs pull")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["bfloat16", "float", "float-sharded", "int8", "dequantize-sharded"])
@torch.no_grad()
def test_any_float_type_may_be_asked_for(saved, name, dtype):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        saved / name, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values())
    assert model.classifier.weight.dtype == dtype
    assert model(random_ids(1, 4)).logits.isfinite().all()


def test_the_hub_cache_is_checked_as_folders_are(saved, tmp_path):
    name = f"{QUERY}.weight"
    snapshot = tmp_path / "models--me--student" / "snapshots" / ("0" * 40)
    blobs = shutil.copytree(saved / "float-sharded", tmp_path / "models--me--student" / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "models--me--student" / "refs").mkdir()
    (tmp_path / "models--me--student" / "refs" / "main").write_text("0" * 40)

    def from_cache() -> Any:
        return SpikeBertForSequenceClassification.from_pretrained("me/student", cache_dir=tmp_path)

    assert from_cache().dtype == torch.float32
    change(file_of(snapshot, name), spoil(name, 0, float("nan")))
    with pytest.raises(ValueError, match=f"{name} in {file_of(snapshot, name)} has values that are NaN"):
        from_cache()


REMOTE = """
import sys
sys.modules["modeling_spikebert"] = None  # the package must not be needed
from transformers import AutoModel, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    for auto in (AutoModel, AutoModelForSequenceClassification):
        try:
            auto.from_pretrained(folder, trust_remote_code=True)
        except (OSError, ValueError) as error:
            print(type(error).__name__, error)
        else:
            print("loaded", folder)
"""


def test_remote_code_refuses_the_same(saved, copy):
    nan, gone, cut = copy("float"), copy("int8"), copy("dequantize-sharded")
    change(nan / "model.safetensors", spoil(f"{QUERY}.weight", (0, 0), float("nan")))
    change(gone / "model.safetensors", lambda weights: weights.pop(f"{QUERY}.weight_scale"))
    shard = file_of(cut, f"{QUERY}.weight")
    shard.write_bytes(shard.read_bytes()[:-1])
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, (saved / "bfloat16", nan, gone, cut))], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"loaded {saved / 'bfloat16'}"] * 2
    for line, prefix in zip(lines[2:4], ("", "spikebert."), strict=True):
        name = prefix + QUERY.removeprefix("spikebert.")
        assert line.startswith(f"ValueError {name}.weight in {nan / 'model.safetensors'} has values that are NaN")
    assert all(line.startswith("OSError") and "weight_scale" in line for line in lines[4:6])
    assert all(line.startswith(f"OSError {shard} cannot be read") for line in lines[6:8])
    assert len(lines) == 8
