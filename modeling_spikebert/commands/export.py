"""`spikebert export`: a classifier for ONNX Runtime, servers and browsers, or for neuromorphic hardware."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from ..console.loudness import set_loudness
from ..console.text import number
from ..hub.fetching import load_model, loading
from ..modeling_spikebert import SpikeBertForSequenceClassification

if TYPE_CHECKING:
    from ..export import OnnxCheck


def run(args: argparse.Namespace) -> None:
    set_loudness(args.verbose)
    {"onnx": _onnx, "nir": _nir, "events": _events}[args.format](args)


def _load(args: argparse.Namespace, **options: Any) -> tuple[SpikeBertForSequenceClassification, Any]:
    """The classifier and its tokenizer; options of the config that are None stay as they are."""
    with loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
        if config.model_type != "spikebert":
            raise ValueError(f"{args.model} is a model of type {config.model_type}, and no SpikeBERT.")
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            raise ValueError(f"{args.model} has no classifier. Export a student that stage 2 has taught.")
        given = {name: value for name, value in options.items() if value is not None}
        model = load_model(SpikeBertForSequenceClassification, args.model, **given)
        return model, AutoTokenizer.from_pretrained(args.model)


def _onnx(args: argparse.Namespace) -> None:
    try:
        from ..export import export_onnx
    except ModuleNotFoundError as error:
        raise ImportError(
            'onnx and onnxruntime are missing. Install them with: pip install -c constraints.txt ".[onnx]"'
        ) from error

    model, tokenizer = _load(args, num_time_steps=args.num_time_steps, exit_threshold=args.exit_threshold)
    checks = export_onnx(model, Path(args.output_dir), tokenizer, tuple(args.precision), args.with_spikes)
    for name, found in checks.items():
        print(
            f"{found.file}: {name}, {found.megabytes:.1f} MB, {found.nodes} nodes, T {model.config.num_time_steps}; "
            f"{agreement(found)}"
        )
    print(f"Next: spikebert serve {args.output_dir}")


def agreement(found: "OnnxCheck") -> str:
    """How a file compares with PyTorch, in words."""
    error, count = f"{found.largest_error:.1e}", found.num_differing
    if not count:
        return f"all 64 test sentences agree with PyTorch to {error}"
    threshold = f"in {count} a membrane lies on its threshold (normal)"
    return f"{64 - count} of 64 test sentences agree with PyTorch to {error}; {threshold}"


def _nir(args: argparse.Namespace) -> None:
    from ..neuromorphic import export_nir, shape_of, size_table

    model, tokenizer = _load(args)
    found = export_nir(model, args.output_dir, tokenizer, args.num_tokens, args.num_time_steps)
    tokens, steps = shape_of(found.graph)
    print(f"{found.file}: {found.megabytes:.1f} MB, {len(found.graph.nodes)} nodes, {tokens} tokens, T {steps}")
    print("All its neurons fire as those of the checkpoint next to it, on 64 sentences of random tokens.")
    print(f"Rounding the weights changed the class of {found.num_other_classes} of these. Measure real sentences.\n")
    print(size_table(found.graph))
    print(f'\nNext: spikebert energy {found.file} --text "A sentence."')


def _events(args: argparse.Namespace) -> None:
    from ..neuromorphic import GRAPH_NAME, save_events
    from ..pictures import raster, save, spikes_of

    folder = Path(args.output_dir)
    file = folder / "events.npz"
    if file.exists():
        raise ValueError(f"{file} is there already. Choose another folder, or remove it.")
    model, tokenizer = _load(args)
    seen = [spikes_of(model, tokenizer, text, args.num_time_steps) for text in args.text]
    graph = Path(args.model) / GRAPH_NAME
    if graph.is_file():
        spikes, arrays = _events_of_graph(graph, model, tokenizer, args)
    else:
        blocks = [enumerate(found.spikes) for found in seen]
        spikes = [{f"layer.{i}.{name}": x.mT for i, block in each for name, x in block.items()} for each in blocks]
        arrays = {}
    folder.mkdir(parents=True, exist_ok=True)
    count = save_events(file, args.text, spikes, **arrays)
    sentences = "1 sentence" if len(seen) == 1 else f"{len(seen)} sentences"
    print(f"{file}: {number(count)} spikes of {sentences} in {len(spikes[0])} layers of neurons")
    for i, found in enumerate(seen, 1):
        name = "raster" if len(seen) == 1 else f"raster-{i}"
        print(", ".join(map(str, save(raster(found), folder, name, ["png"]))))


def _events_of_graph(
    file: Path, model: SpikeBertForSequenceClassification, tokenizer: Any, args: argparse.Namespace
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Spikes of each sentence, `[T, channels, L]`, and the currents that go in and come out."""
    from ..neuromorphic import check_pair, input_currents, read_graph, run, shape_of

    graph = read_graph(file)
    check_pair(graph, model, file)
    num_tokens, steps = shape_of(graph)
    if args.num_time_steps not in (None, steps):
        raise ValueError(f"{file} has {steps} time steps. Leave out --num-time-steps, or export it anew.")
    currents = input_currents(model, tokenizer(args.text, padding=True, return_tensors="pt"), num_tokens)
    traces = list(run(graph, currents, steps))
    spikes = [
        {name: torch.stack([trace.spikes[name][i] for trace in traces]) for name in traces[0].spikes}
        for i in range(len(args.text))
    ]
    output = torch.stack([trace.output for trace in traces], dim=1)
    return spikes, {"currents": currents.numpy(), "class_currents": output.numpy()}
