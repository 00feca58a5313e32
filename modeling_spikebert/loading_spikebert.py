# SPDX-License-Identifier: Apache-2.0
"""Checks of `from_pretrained`: the weights are all there, of the type that was saved, and finite.

Spikes hide damage: with a NaN in a single query the model still answers, and the answer looks like any other.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict

HALF_TYPES = (torch.float16, torch.bfloat16)
FLOAT_TYPES = (*HALF_TYPES, torch.float32, torch.float64)
ADVICE = "Copy or download it again"

# What each file holds, by its path: names of tensors, and their types and shapes on the meta device.
Headers = dict[str, dict[str, Tensor]]


def check_headers(model: PreTrainedModel, files: list[str], weight_map: dict[str, str] | None) -> Headers:
    """Reads what the files say that they hold, before their weights are loaded into `model`.

    Args:
        model: with the types that its weights will have: int8 where its config says so.
        files: safetensors files, or those of torch.save.
        weight_map: in which file the shard map says that each tensor is; None without one.

    Raises:
        OSError: a file cannot be read, or the shard map is wrong.
        ValueError: a tensor is of another type than was saved.
    """
    headers = {file: _read_header(file) for file in files}
    if weight_map is not None:
        _check_shard_map(headers, weight_map)
    expected = {_plain(model, name): tensor.dtype for name, tensor in model.state_dict().items()}
    half: Any = getattr(torch, str(_saved_config(headers).get("dtype")), None)
    for file, header in headers.items():
        for name, tensor in header.items():
            dtype, wanted = tensor.dtype, expected.get(_plain(model, name))
            if wanted is None:
                continue
            if dtype not in FLOAT_TYPES if wanted.is_floating_point else dtype != wanted:
                kind = "a float" if wanted.is_floating_point else wanted
                raise ValueError(
                    f"{name} in {file} is {dtype}, but config.json makes it {kind}. {ADVICE}, with its config.json."
                )
            # Only types of one size can be taken for one another, and what is read is finite and wrong.
            if dtype in HALF_TYPES and half in HALF_TYPES and dtype != half:
                raise ValueError(f"{name} in {file} is {dtype}, but the model was saved as {half}. {ADVICE}.")
            half = dtype if dtype in HALF_TYPES else half
    return headers


def check_loaded(model: PreTrainedModel, headers: Headers, missing: set[str], unexpected: set[str]) -> None:
    """After loading: no weight is missing but those of a new head, and all are finite.

    Raises:
        OSError: a weight is missing.
        ValueError: a weight is NaN or infinite.
    """
    place = next(iter(headers)) if len(headers) == 1 else f"{_folder(headers)} ({len(headers)} files)"
    saved_head = type(model).__name__ in (_saved_config(headers).get("architectures") or ())
    whole = saved_head or model.base_model is model
    lost = sorted(name for name in missing if whole or name.startswith(f"{model.base_model_prefix}."))
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        instead = f" It has {min(unexpected)} instead." if unexpected else ""
        raise OSError(
            f"{place} has no {lost[0]}{others}.{instead} {ADVICE}, and load it with the config it was saved with."
        )
    files = {_plain(model, name): file for file, header in headers.items() for name in header}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        wrong = None
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum of finite numbers may overflow
            wrong = f"values that are NaN or infinite as {tensor.dtype}"
        elif name.endswith(".weight_scale") and not (tensor > 0).all():
            wrong = "scales that are not positive"
        if wrong is not None:
            raise ValueError(f"{name} in {files.get(_plain(model, name), place)} has {wrong}. {ADVICE}.")


def _read_header(file: str) -> dict[str, Tensor]:
    try:
        return load_state_dict(file, map_location="meta")
    except Exception as error:  # of safetensors, of torch's unpickler, of the file system
        raise OSError(
            f"{file} cannot be read ({error}). {ADVICE}; if it is a text file of a few lines, run `git lfs pull` in "
            "its folder."
        ) from error


def _check_shard_map(headers: Headers, weight_map: dict[str, str]) -> None:
    found = {(name, Path(file).name) for file, header in headers.items() for name in header}
    wrong = sorted(found ^ {(name, Path(file).name) for name, file in weight_map.items()})
    if wrong:
        name, file = wrong[0]
        has, says = ("has", "says otherwise") if wrong[0] in found else ("has no", "says so")
        raise OSError(
            f"{_folder(headers) / file} {has} {name}, but the shard map beside it (*.index.json) {says}. Copy or "
            "download all files of the model again."
        )


def _plain(model: PreTrainedModel, name: str) -> str:
    """The name of a weight in models with a head and without one."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _folder(headers: Headers) -> Path:
    return Path(next(iter(headers))).parent


def _saved_config(headers: Headers) -> dict[str, Any]:
    """What `save_pretrained` wrote beside the weights; the config of the model may have been changed since."""
    file = _folder(headers) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
