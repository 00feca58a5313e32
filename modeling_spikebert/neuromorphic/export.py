"""`export_nir`: a folder with a NIR graph, and beside it the checkpoint in fixed point that it transcribes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nir
import torch
from transformers import PreTrainedTokenizerBase

from ..energy.counting import eval_mode
from ..modeling_spikebert import SpikeBertForSequenceClassification
from .fixed_point import check_maps, to_fixed_point
from .graph import MAKER, build, check_size, digest_of, shape_of
from .interpreter import input_currents, run, run_checkpoint

GRAPH_NAME = "model.nir"
NUM_TOKENS = 64
NUM_SENTENCES = 64


@dataclass(frozen=True)
class NirExport:
    """What was written, and how it was checked on 64 sentences of random tokens.

    Args:
        file: the graph.
        megabytes: its size.
        graph: as it was read again.
        num_other_classes: sentences to which the weights of 8 bits give another class than those before.
    """

    file: Path
    megabytes: float
    graph: nir.NIRGraph
    num_other_classes: int


def export_nir(
    model: SpikeBertForSequenceClassification,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_tokens: int | None = None,
    num_time_steps: int | None = None,
) -> NirExport:
    """Writes `model.nir`, and beside it the checkpoint in fixed point that has the same spikes, and its tokenizer.

    Args:
        model: a classifier of the neuromorphic variant.
        folder: new, or without a checkpoint and a graph.
        tokenizer: is saved as well.
        num_tokens: `L` of the graph, its longest sentence; 64, or the positions of the model if fewer.
        num_time_steps: for which sums are exact; those of the model if absent.

    Raises:
        TypeError: the model is no `SpikeBertForSequenceClassification`.
        ValueError: it has parts that do not map, too many tokens, or there is a checkpoint already.
        RuntimeError: the graph does not fire as the checkpoint does; it is removed.
    """
    check_maps(model)
    check_folder(Path(folder))
    if num_tokens is None:
        num_tokens = min(NUM_TOKENS, model.config.max_position_embeddings)
    check_size(model, num_tokens)
    steps = model.config.num_time_steps if num_time_steps is None else num_time_steps
    rounded = to_fixed_point(model, num_tokens, steps)
    file = Path(folder) / GRAPH_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    nir.write(str(file), build(rounded, num_tokens))
    try:
        graph = nir.read(str(file))
        others = _check(model, rounded, graph)
    except Exception:
        file.unlink()
        raise
    rounded.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return NirExport(file, file.stat().st_size / 1e6, graph, others)


def check_folder(folder: Path) -> None:
    """A checkpoint that is there would be lost."""
    for name in (GRAPH_NAME, "config.json"):
        if (folder / name).exists():
            raise ValueError(f"{folder / name} is there already. Choose another folder, or remove this one.")


def read_export(file: str | Path) -> tuple[nir.NIRGraph, SpikeBertForSequenceClassification]:
    """The graph of a file, and the checkpoint next to it.

    Raises:
        FileNotFoundError, ValueError: there is no graph, it is not of `export_nir`, or the checkpoint is another one.
    """
    graph = read_graph(file)
    if not (Path(file).parent / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no checkpoint next to {file}, and the tables for its input are in there. Move the whole folder."
        )
    model = SpikeBertForSequenceClassification.from_pretrained(Path(file).parent).eval()
    check_pair(graph, model, file)
    return graph, model


def check_pair(graph: nir.NIRGraph, model: SpikeBertForSequenceClassification, file: str | Path) -> None:
    if digest_of(model) != _text(graph.metadata["checkpoint"]):
        raise ValueError(f"The checkpoint next to {file} is not the one of that graph. Export both again.")


def read_graph(file: str | Path) -> nir.NIRGraph:
    """The graph of a file, with errors that say what to do."""
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"There is no {file}. Write one with: spikebert export FOLDER --format nir --output-dir DIR."
        )
    try:
        graph = nir.read(str(file))
    except Exception as error:  # h5py and nir raise what they meet
        raise ValueError(f"{file} cannot be read as a NIR graph ({error}). Export it again.") from error
    if _text(graph.metadata.get("made_by", "")) != MAKER:
        raise ValueError(f"{file} was not written by spikebert export. Name a graph of a SpikeBERT.")
    return graph


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _check(model: Any, rounded: Any, graph: nir.NIRGraph) -> int:
    """Compares the spikes of all neurons; returns how many sentences got another class by rounding."""
    num_tokens, steps = shape_of(graph)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (NUM_SENTENCES, num_tokens), generator=generator)
    lengths = torch.randint(1, num_tokens + 1, (NUM_SENTENCES, 1), generator=generator)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(num_tokens) < lengths).long()}
    expected = run_checkpoint(rounded, batch, steps)
    for step, trace in enumerate(run(graph, input_currents(rounded, batch, num_tokens), steps)):
        for name, spikes in expected.items():
            if not torch.equal(trace.spikes[name], spikes[step]):
                raise RuntimeError(
                    f"{name} fires in the graph otherwise than in the checkpoint in time step {step + 1}. Please "
                    "report it."
                )
    device = next(model.parameters()).device
    with torch.no_grad(), eval_mode(model):
        all_steps = {"num_time_steps": steps, "output_firing_rates": True}  # with these it takes all of them
        before = model(**{name: tensor.to(device) for name, tensor in batch.items()}, **all_steps).logits.cpu()
        after = rounded(**batch).logits
    return int((before.argmax(-1) != after.argmax(-1)).sum())
