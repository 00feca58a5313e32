"""Runs a NIR graph of this package, step by step, with every spike at hand.

Shapes: `T` time steps, `B` batch, `L` tokens of the graph, `D` hidden, `C` classes.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import nir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..energy.counting import eval_mode
from .graph import DT, INPUT, OUTPUT


@dataclass
class Trace:
    """What the nodes of a graph did in one time step.

    Args:
        spikes: of each LIF node, by name, bool `[B, channels, L]` (`L` is 1 for gates).
        output: class currents, `[B, C, L]`.
    """

    spikes: dict[str, Tensor]
    output: Tensor


def run(graph: nir.NIRGraph, currents: Tensor, num_time_steps: int) -> Iterator[Trace]:
    """Each time step of a graph on the same input, `[B, D + 1, L]`, from the resting potential on."""
    sources, order = sources_of(graph), order_of(graph)
    weights = {name: tensors_of(node, currents.dtype) for name, node in graph.nodes.items()}
    membranes: dict[str, Any] = {}
    for _ in range(num_time_steps):
        values: dict[str, Any] = {}
        spikes = {}
        for name in order:
            node = graph.nodes[name]
            x: Any = currents if name == INPUT else sum(values[source] for source in sources[name])
            if isinstance(node, nir.Conv1d):
                weight, bias = weights[name]
                x = F.conv1d(x, weight, bias, padding=int(node.padding))
            elif isinstance(node, nir.LIF):
                rate, threshold = weights[name]
                v = membranes.get(name, 0.0)
                v = v + (x - v) * rate  # Euler's step of tau dv/dt = v_leak - v + r x, with v_leak 0 and r 1
                spikes[name] = v > threshold
                membranes[name] = v.masked_fill(spikes[name], 0)
                x = spikes[name].to(x.dtype)
            values[name] = x
        yield Trace(spikes, values[OUTPUT])


def tensors_of(node: Any, dtype: torch.dtype) -> list[Tensor]:
    """Weight and bias of a Conv1d; of neurons, how much of the way to its current a membrane goes, and threshold."""
    arrays = []
    if isinstance(node, nir.Conv1d):
        arrays = [node.weight, node.bias]
    elif isinstance(node, nir.LIF):
        arrays = [DT / node.tau, node.v_threshold]
    return [torch.from_numpy(array).to(dtype) for array in arrays]


def sources_of(graph: nir.NIRGraph) -> dict[str, list[str]]:
    """Where the edges to each node come from."""
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    return sources


def order_of(graph: nir.NIRGraph) -> list[str]:
    """Names of nodes, each behind those that it needs."""
    return list(TopologicalSorter(sources_of(graph)).static_order())


def input_currents(model: Any, batch: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """What goes into the graph: sums of the tables' rows `[B, D + 1, L]`, 0 at padding, and a channel that is 1 there.

    Args:
        model: from `to_fixed_point`.
        batch: `input_ids` `[B, n]`, and `attention_mask` and `token_type_ids` if they are not 1 and 0; padding may
            stand anywhere.
        num_tokens: `L` of the graph, at least `n`.
    """
    ids = batch["input_ids"]
    if "attention_mask" in batch and not batch["attention_mask"].any(1).all():
        raise ValueError("attention_mask must have a token in each row.")
    if ids.shape[1] > num_tokens:
        raise ValueError(
            f"The graph takes {num_tokens} tokens, and the longest sentence has {ids.shape[1]}. Shorten it, or export "
            "with a larger --num-tokens."
        )
    mask = batch.get("attention_mask", torch.ones_like(ids)).unsqueeze(-1)
    with torch.no_grad():
        embeddings = model.spikebert.embeddings(ids, batch.get("token_type_ids"), None, None, None)  # [B, n, D]
    currents = torch.cat([embeddings * mask, 1 - mask.to(embeddings.dtype)], dim=-1).transpose(1, 2)
    padding = torch.zeros(*currents.shape[:2], num_tokens - ids.shape[1], dtype=currents.dtype)
    padding[:, -1] = 1
    return torch.cat([currents, padding], dim=2)


@torch.no_grad()
def run_checkpoint(model: Any, batch: Mapping[str, Tensor], num_time_steps: int) -> dict[str, Tensor]:
    """What the neurons of a checkpoint fire in PyTorch, by the names of the graph's nodes.

    Args:
        model: a classifier of the neuromorphic variant.
        batch: as in `input_currents`.
        num_time_steps: `T`.

    Returns:
        bool `[T, B, channels, n]`, of gates `[T, B, channels, 1]`; silent at padding.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()  # [B, n]
    found: dict[str, Tensor] = {}

    def keep(name: str, spikes: Tensor) -> None:
        if name.endswith("context_neuron"):  # [T, B, D]
            found[name] = spikes.unsqueeze(-1) != 0
        elif spikes.dim() == 4:  # [T, B, n, D]
            found[name] = ((spikes != 0) & mask.unsqueeze(-1)).mT
        else:  # [T, N, D] of tokens alone
            padded = torch.zeros(len(spikes), *mask.shape, spikes.shape[-1], dtype=torch.bool)
            padded[:, mask] = spikes != 0
            found[name] = padded.mT

    def hook_of(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                keep(name, output)
            else:
                _, (_, _, key, value, context) = output
                keep(f"{name}.product_neuron", key * value)
                keep(f"{name}.masked_neuron", context)

        return hook

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for name, module in model.named_modules():
            if (hasattr(module, "batch_norm") and hasattr(module, "neurons")) or hasattr(module, "spike_driven"):
                stack.callback(module.register_forward_hook(hook_of(name)).remove)
        model(**batch, num_time_steps=num_time_steps)
    return found
