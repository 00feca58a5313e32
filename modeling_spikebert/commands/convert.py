"""`spikebert convert`: a state dict of the published SpikeBERT code becomes a folder that loads with `from_pretrained`.

It reads what github.com/Lvchangze/SpikeBERT saves in predistill_spikformer.py (stage 1) and new_distill_spikformer.py
(stage 2), with or without the `module.` of DataParallel. Such a file holds neither the number of time steps nor tau:
--config states them.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_spikebert import SpikeBertConfig
from ..console.loudness import set_loudness
from ..distillation import PROJECTIONS_NAME
from ..distillation.projections import ATTRIBUTE, FeatureProjections
from ..hub import model_card
from ..hub.fetching import loading
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from .options import check_new_folder
from .options.convert import OPTIONAL, REQUIRED

# Published module to ours, None where it is dropped; `{i}` is the block. Each has a weight and, but for `emb`, a bias.
ENCODER = {
    "emb": "embeddings.word_embeddings",
    "blocks.{i}.attn.q_m": "encoder.layer.{i}.attention.query",
    "blocks.{i}.attn.q_ln": "encoder.layer.{i}.attention.query_neuron",
    "blocks.{i}.attn.k_m": "encoder.layer.{i}.attention.key",
    "blocks.{i}.attn.k_ln": "encoder.layer.{i}.attention.key_neuron",
    "blocks.{i}.attn.v_m": "encoder.layer.{i}.attention.value",
    "blocks.{i}.attn.v_ln": "encoder.layer.{i}.attention.value_neuron",
    "blocks.{i}.attn.last_m": "encoder.layer.{i}.attention.output",
    "blocks.{i}.attn.last_ln": "encoder.layer.{i}.attention.output_neuron",
    "blocks.{i}.mlp.fc1": "encoder.layer.{i}.mlp.intermediate",
    "blocks.{i}.mlp.ln1": "encoder.layer.{i}.mlp.intermediate_neuron",
    "blocks.{i}.mlp.fc2": "encoder.layer.{i}.mlp.output",
    "blocks.{i}.mlp.ln2": "encoder.layer.{i}.mlp.output_neuron",
}
NAMES: dict[str, dict[str, str | None]] = {
    "general": {
        **ENCODER,
        "last_ln": None,  # no loss of stage 1 reaches it: it is as it was initialised
        "transforms.{i}.fc": f"{ATTRIBUTE}.layers.{{i}}.0",
        "transforms.{i}.ln": f"{ATTRIBUTE}.layers.{{i}}.1",
    },
    "task": {
        **{published: f"spikebert.{ours}" for published, ours in ENCODER.items()},
        "last_ln": "norm",
        "transforms.{i}.fc": None,  # projections of the training, which is over
        "transforms.{i}.ln": None,
        "classifier": "classifier",
    },
}
STAGES = {"general": "stage 1, general distillation", "task": "stage 2, task distillation"}


def run(args: argparse.Namespace) -> None:
    """Checks everything, then writes the folder and prints what was stated, inferred and dropped."""
    set_loudness(args.verbose)
    folder = Path(args.output_dir)
    check_new_folder(folder)
    stated = read_config(args.config)
    tensors = read_state_dict(Path(args.file))
    stage = "task" if any(name.startswith("classifier.") for name in tensors) else "general"
    names = match_names(tensors, stage, stated["num_hidden_layers"])
    config = complete_config(stated, tensors, stage)
    model, projections = build(config, stage, tensors, names)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer, config.vocab_size)

    model.save_pretrained(folder)
    if projections is not None:
        safetensors.torch.save_file(projections.state_dict(), folder / PROJECTIONS_NAME)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _write_card(args, model, stage, folder)

    labels = f", {config.num_labels} labels" if stage == "task" else ""
    dropped = ", ".join(published for published, ours in NAMES[stage].items() if ours is None)
    kept = "" if projections is None else f"; projections of the training in {PROJECTIONS_NAME}"
    print(f"Read: {STAGES[stage]}{labels}")
    print(f"Depth {config.num_hidden_layers}, {config.hidden_size} wide, MLP {config.intermediate_size} wide, ", end="")
    print(f"{config.num_attention_heads} heads, vocabulary {config.vocab_size}")
    print(f"As stated, not checkable: T {config.num_time_steps}, tau {config.tau}, threshold {config.v_threshold}")
    print(f"Dropped: {dropped}{kept}")
    print(f"Written: {folder}")
    if tokenizer is None:
        print("No tokenizer: to classify text, convert again with that of the teacher, --tokenizer NAME")
    elif stage == "general":
        print(f"Next, stage 2: spikebert distill --teacher BERT --model-name-or-path {folder} --task NAME ...")
    else:
        print(f'Next: spikebert energy {folder} --text "A sentence."')


def read_config(text: str) -> dict[str, Any]:
    """The fields that `--config` states, from a json object or a json file.

    Raises:
        ValueError: no json object, a field of `REQUIRED` is missing, or one is neither required nor optional.
    """
    source = "--config" if text.lstrip().startswith("{") else text
    try:
        stated = json.loads(text if source == "--config" else Path(text).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no json: {error}.") from error
    if not isinstance(stated, dict):
        raise ValueError(f"{source} must be a json object with {', '.join(REQUIRED)}.")
    missing = [name for name in REQUIRED if name not in stated]
    if missing:
        raise ValueError(
            f"{source} lacks {', '.join(missing)}. The file of weights does not say it: take it from the options of "
            "the training (depths, num_step, tau)."
        )
    unknown = stated.keys() - {*REQUIRED, *OPTIONAL}
    if unknown:
        raise ValueError(f"{source} names {sorted(unknown)}; only {', '.join(REQUIRED + OPTIONAL)} can be stated.")
    return stated


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Tensors by published name, without the `module.` of DataParallel. Never runs code of the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, would run code, or holds anything but finite floating-point tensors of one dtype.
    """
    with file.open("rb"):  # torch's own messages do not always name the file
        pass
    try:
        if file.suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused anyway
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is not None:
            raise ValueError(
                f"{file} is no state dict: to read it would run code ({code[1]}), so it was not read. If it is a whole "
                "model and you trust it, load it with the code that made it, and save its weights alone: "
                "torch.save(model.state_dict(), 'weights.pt')."
            ) from error
        kind = "safetensors" if isinstance(error, SafetensorError) else "torch.save"
        raise ValueError(
            f"{file} is damaged or not a file of {kind}; nothing in it was run. Copy or download it again."
        ) from error

    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        found = f"the entries {_list(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{file} holds {found}, not tensors by name. Save the state dict alone: model.state_dict().")
    tensors = {str(name): tensor for name, tensor in content.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"{file} must hold floating-point tensors of one dtype, got {_list(sorted(map(str, dtypes)))}."
        )
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{file} has NaN or infinite weights in {_list(broken)}. Its training diverged.")
    return tensors


def match_names(tensors: Mapping[str, Tensor], stage: str, num_hidden_layers: int) -> dict[str, str | None]:
    """Published name to our name (None: dropped) of each tensor, if there are exactly those of the stage and depth.

    Raises:
        ValueError: another depth; missing or unknown names.
    """
    blocks = {int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        raise ValueError(f"The file is not one of the published code: it has no blocks, but {_list(tensors)}.")
    depth = max(blocks) + 1
    if num_hidden_layers != depth:
        raise ValueError(f"--config states num_hidden_layers {num_hidden_layers!r}, but the file has {depth} blocks.")
    names: dict[str, str | None] = {}
    for published, ours in NAMES[stage].items():
        for i in range(depth if "{i}" in published else 1):
            for parameter in ("weight",) if published == "emb" else ("weight", "bias"):
                target = None if ours is None else f"{ours}.{parameter}".format(i=i)
                names[f"{published}.{parameter}".format(i=i)] = target
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        found = [f"lacks {_list(missing)}"] * bool(missing) + [f"has the unknown {_list(unknown)}"] * bool(unknown)
        raise ValueError(
            f"The file is not one of the published code, read as {STAGES[stage]}: it {', and '.join(found)}."
        )
    return names


def complete_config(stated: Mapping[str, Any], tensors: Mapping[str, Tensor], stage: str) -> SpikeBertConfig:
    """The published model with what was stated and with the sizes of the tensors.

    Raises:
        ValueError: a stated size is not that of the tensors, or a value is impossible.
    """
    for name in ("emb.weight", "blocks.0.mlp.fc1.weight", "classifier.weight"):
        if name in tensors and tensors[name].dim() != 2:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, but must have two dimensions.")
    vocab_size, hidden_size = tensors["emb.weight"].shape
    inferred = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": len(tensors["blocks.0.mlp.fc1.weight"]),
    }
    if stage == "task":
        inferred["num_labels"] = len(tensors["classifier.weight"])
    for field, size in inferred.items():
        if stated.get(field, size) != size:
            raise ValueError(f"--config states {field} {stated[field]!r}, but the tensors of the file have {size}.")
    if "id2label" in stated:
        if stage == "general":
            raise ValueError("--config states id2label, but the file has no classifier.")
        expected = [str(i) for i in range(inferred.pop("num_labels"))]
        if not isinstance(stated["id2label"], dict) or sorted(stated["id2label"]) != sorted(expected):
            raise ValueError(
                f"--config: id2label must map {expected} to names, as many as the classifier has, got "
                f"{stated['id2label']!r}."
            )
    try:
        # The published code has one threshold, and half of it behind the attention product.
        attention_v_threshold = stated.get("v_threshold", 1.0) / 2
        return SpikeBertConfig.reference(attention_v_threshold=attention_v_threshold, **{**stated, **inferred})
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"--config: {' '.join(str(error).split())}") from error


def build(
    config: SpikeBertConfig, stage: str, tensors: Mapping[str, Tensor], names: Mapping[str, str | None]
) -> tuple[SpikeBertModel | SpikeBertForSequenceClassification, FeatureProjections | None]:
    """The model with these weights, and in stage 1 its projections, in the dtype of the file.

    Raises:
        ValueError: a tensor has another shape than the model's.
    """
    projections = None
    with torch.device("meta"):  # no random weights: all are replaced
        model = (SpikeBertForSequenceClassification if stage == "task" else SpikeBertModel)(config)
        if stage == "general":
            sizes = [config.hidden_size] * 3  # published projections keep the width
            projections = FeatureProjections(config.num_hidden_layers, *sizes)
            projections.attach(model)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    weights = {}
    for published, ours in names.items():
        if ours is None:
            continue
        shape = tuple(tensors[published].shape)
        if shape != expected[ours]:
            raise ValueError(f"{published} has the shape {shape}, but must have {expected[ours]}.")
        # A copy of its own: tensors of one file may share memory, which safetensors refuses.
        weights[ours] = tensors[published].detach().clone(memory_format=torch.contiguous_format)
    model.load_state_dict(weights, assign=True)
    return model.eval(), projections


def load_tokenizer(name: str, vocab_size: int) -> PreTrainedTokenizerBase:
    with loading(name, tokenizer_alone=True):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) != vocab_size:  # as many, for the published code sizes the embeddings by it
        raise ValueError(
            f"--tokenizer {name} has {len(tokenizer)} tokens, but the model has {vocab_size} word embeddings. Pass the "
            "tokenizer of the teacher."
        )
    return tokenizer


def _write_card(args: argparse.Namespace, model: Any, stage: str, folder: Path) -> None:
    config = model.config
    training: dict[str, Any] = {
        "converted from": f"`{Path(args.file).name}`, a state dict of the published code "
        "([Lvchangze/SpikeBERT](https://github.com/Lvchangze/SpikeBERT)), by `spikebert convert`",
        "stage": STAGES[stage],
        "time steps and tau": f"{config.num_time_steps} and {config.tau}, stated at the conversion: a state dict does "
        "not hold them",
        "padding": "takes part in the result, as published: pad to the length of the training",
    }
    if args.tokenizer is None:
        training["tokenizer"] = "not in this folder; it is that of the teacher"
    card = model_card(model, folder.resolve().name, license=None, base_model=args.base_model, training=training)
    card.save(folder / "README.md")


def _list(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
