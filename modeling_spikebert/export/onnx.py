"""`export_onnx`: a folder with ONNX files that is laid out as optimum and transformers.js expect it, checked."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..int8_spikebert import round_rows, rounded_modules
from ..modeling_spikebert import SpikeBertForSequenceClassification
from ..runtime.session import open_graph
from .graph import build

FILES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
NUM_SENTENCES = 64
TOLERANCE = 1e-4
# A membrane that lies on its threshold may fire in one runtime and not in the other, and changes a sentence's scores.
MOST_DIFFERING = NUM_SENTENCES // 4


@dataclass
class OnnxCheck:
    """How a file's scores compare with those of the model in PyTorch, in float32, on 64 sentences of random tokens.

    Args:
        file: that was written and checked.
        megabytes: its size.
        nodes: of the graph.
        largest_error: of a score, among sentences that do not differ.
        num_differing: sentences whose scores differ by more than 1e-4: some spike was on its threshold.
        num_other_classes: of these, those with another class.
    """

    file: Path
    megabytes: float
    nodes: int
    largest_error: float
    num_differing: int
    num_other_classes: int


def export_onnx(
    model: SpikeBertForSequenceClassification,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precisions: tuple[str, ...] = ("float32", "int8"),
    with_spikes: bool = False,
) -> dict[str, OnnxCheck]:
    """Writes `onnx/model.onnx` and `onnx/model_int8.onnx` into a folder, with config and tokenizer beside them.

    Inputs are `input_ids` and `attention_mask`, int64 `[B, L]` of any sizes, and `token_type_ids` if the model has
    them; outputs `logits`, `[B, C]`, and with several time steps `logits_per_step`, `[T, B, C]`, the scores after each
    step. Where the config has an `exit_threshold` a sentence takes no more steps than its class needs, and the second
    output is `exit_steps`, `[B]`. In the int8 file the weights of blocks and word embeddings are int8, and all else is
    computed in float32: its scores are those of the float model with rounded weights.

    Args:
        model: a classifier; float weights, or int8 ones, which are then those of both files.
        folder: new, or without `onnx/`.
        tokenizer: is saved beside the model.
        precisions: which files are written.
        with_spikes: an output `spikes`, uint8 `[number of blocks, T, B, L, D]`: what enters each block.

    Returns:
        by precision, what the check of the file found.

    Raises:
        TypeError: the model is no `SpikeBertForSequenceClassification`.
        ValueError: an unknown precision, the neuromorphic variant, a layer of another kind, weights in half precision,
            spikes with early exit, or there are such files already.
        RuntimeError: a file does not compute what the model does; it is removed.
    """
    if not isinstance(model, SpikeBertForSequenceClassification):
        raise TypeError(f"Only a SpikeBertForSequenceClassification is exported, got {type(model).__name__}.")
    if model.config.variant == "neuromorphic":
        raise ValueError("ONNX files hold the variants membrane and published, and this model is of neuromorphic.")
    unknown = set(precisions) - FILES.keys()
    if unknown:
        raise ValueError(f"precisions must be among {', '.join(FILES)}, got {', '.join(sorted(unknown))}.")
    target = Path(folder) / "onnx"
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} has files already. Choose another folder, or remove them.")
    _check_layers(model)
    model = copy.deepcopy(model).cpu().eval()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ValueError(
                f"Only weights in float32 are exported, and {name} has {weight.dtype}. Call model.float()."
            )
    target.mkdir(parents=True, exist_ok=True)
    checks = {name: _write(model, target / FILES[name], name == "int8", with_spikes) for name in precisions}
    config = model.config.to_dict()
    for name in ("quantization_config", "auto_map", "dtype"):
        config.pop(name, None)
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return checks


def _check_layers(model: SpikeBertForSequenceClassification) -> None:
    """The graph is written beside the model file, and knows no other layers than those."""
    with torch.device("meta"):
        plain = dict(SpikeBertForSequenceClassification(model.config).named_modules())
    for name, module in model.named_modules():
        expected = plain.get(name)
        if name and type(module) is not type(expected):
            wanted = "there is none in a SpikeBERT" if expected is None else f"it must be {type(expected).__name__}"
            raise ValueError(
                f"The layer {name} is {type(module).__name__}, which cannot be exported: {wanted}. Merge adapters into "
                "the weights first, and undo what replaces layers."
            )


def _write(model: SpikeBertForSequenceClassification, file: Path, int8: bool, with_spikes: bool) -> OnnxCheck:
    graph = build(model, int8, with_spikes)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, file)
    try:
        return _check(rounded(model) if int8 else with_float_weights(model), file, len(graph.graph.node))
    except Exception:
        file.unlink()
        raise


def with_float_weights(model: PreTrainedModel) -> Any:
    """A copy without int8 weights: their values, in float32."""
    model = copy.deepcopy(model)
    has_int8 = any(getattr(module, "weight_scale", None) is not None for module in model.modules())
    return cast(Any, model).dequantize() if has_int8 else model


def rounded(model: PreTrainedModel) -> Any:
    """A copy whose float weights are those that int8 files hold."""
    model = with_float_weights(model)
    for module in rounded_modules(model):
        weight, scale = round_rows(module.weight.detach())
        module.weight = torch.nn.Parameter(weight * scale.unsqueeze(1), requires_grad=False)
    return model


def _check(model: Any, file: Path, nodes: int) -> OnnxCheck:
    session = open_graph(file)
    results, wanted = [], []
    for inputs in _random_sentences(model.config):
        with torch.inference_mode():
            wanted.append(model(**inputs).logits)
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        results.append(torch.from_numpy(session.run(["logits"], feed)[0]))
    result, want = torch.cat(results), torch.cat(wanted)
    errors = (result - want).abs().amax(-1)
    differs = ~(errors <= TOLERANCE * want.abs().amax(-1).clamp_min(1))
    others = (result.argmax(-1) != want.argmax(-1)) & differs
    found = OnnxCheck(
        file,
        megabytes=file.stat().st_size / 1e6,
        nodes=nodes,
        largest_error=float(errors[~differs].max()) if not differs.all() else float("nan"),
        num_differing=int(differs.sum()),
        num_other_classes=int(others.sum()),
    )
    if found.num_differing > MOST_DIFFERING:
        raise RuntimeError(
            f"{file} does not compute what the model does: {found.num_differing} of {NUM_SENTENCES} sentences have "
            f"other scores, by up to {errors.max():.3g}. Please report it with the config of the model."
        )
    return found


def _random_sentences(config: Any) -> list[dict[str, Tensor]]:
    """64 sentences in batches of several lengths, with padding on the right."""
    generator = np.random.default_rng(0)
    longest = min(64, config.max_position_embeddings)
    batches = []
    for size, length in ((1, 1), (1, longest), (14, longest // 2 or 1), (16, longest), (32, longest // 3 or 1)):
        ids = torch.from_numpy(generator.integers(0, config.vocab_size, (size, length)))
        lengths = torch.from_numpy(generator.integers(1, length + 1, size))
        mask = (torch.arange(length) < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask}
        if config.type_vocab_size:
            batch["token_type_ids"] = torch.from_numpy(generator.integers(0, config.type_vocab_size, (size, length)))
        batches.append(batch)
    return batches
