"""How large a graph is: neurons, synapses, fan-in and fan-out, memory.

Shapes: `L` tokens of the graph.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nir
import numpy as np

from ..console.text import align, number
from .graph import INPUT, OUTPUT
from .interpreter import order_of, sources_of


@dataclass(frozen=True)
class Bundle:
    """The synapses between two populations: a Conv1d, or an edge from neuron to neuron.

    Args:
        name: of the Conv1d, or of the edge.
        source, target: names of populations, or of the graph's input and output.
        channels: of the target.
        length: of the target, in tokens.
        weight: of the Conv1d, `[O, I, K]`; None for an edge.
        bias: of the Conv1d.
        spreads: whether each source reaches all tokens; with a kernel longer than 1 it is the other way around.
    """

    name: str
    source: str
    target: str
    channels: int
    length: int
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    spreads: bool = False

    @property
    def fan_in(self) -> np.ndarray:
        """Synapses at each channel of the target, for one token; those of weight 0 are none."""
        if self.weight is None:
            return np.ones(self.channels, dtype=int)
        taps = self.weight[:, :, :1] if self.spreads else self.weight
        return np.count_nonzero(taps, axis=(1, 2))

    @property
    def fan_out(self) -> np.ndarray:
        """Synapses behind each channel of the source, of one token."""
        if self.weight is None:
            return np.ones(self.channels, dtype=int)
        taps = self.weight if self.spreads else self.weight[:, :, :1]
        return np.count_nonzero(taps, axis=(0, 2))

    @property
    def synapses(self) -> int:
        return int(self.fan_in.sum()) * self.length

    @property
    def is_diagonal(self) -> bool:
        """Whether each channel reaches itself alone."""
        if self.weight is None:
            return True
        outputs, inputs, _ = self.weight.shape
        return outputs == inputs and not (self.weight[:, :, 0] * (1 - np.eye(outputs))).any()

    @property
    def weight_bytes(self) -> int:
        """Weights in 8 bits, once for all tokens, and biases in 32; an edge of weight 1 has none."""
        if self.weight is None or self.bias is None:
            return 0
        weights = self.weight[:, :, 0]
        stored = 0 if (weights[weights != 0] == 1).all() else np.count_nonzero(weights)
        return int(stored + (4 * self.bias.size if self.bias.any() else 0))


@dataclass(frozen=True)
class Population:
    """Neurons of a LIF node, or sums of a shortcut or of class currents.

    Args:
        name: of the node.
        neurons: how many.
        synapses: that end at them, padding's inhibition among them.
        fan_in, fan_out: the most of one neuron.
        weight_bytes: of these synapses and biases, see `Bundle`.
        state_bytes: membranes of 4 bytes. Sums are done anew in each time step.
        fires: False for sums.
    """

    name: str
    neurons: int
    synapses: int
    fan_in: int
    fan_out: int
    weight_bytes: int
    state_bytes: int
    fires: bool


def is_shortcut(name: str) -> bool:
    """Whether a Conv1d is the place where values add up."""
    return name.endswith((".shortcut", ".embeddings"))


def bundles_of(graph: nir.NIRGraph) -> Iterator[Bundle]:
    """All synapses, in the order of the signals."""
    targets: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        targets[source].append(target)
    sources = sources_of(graph)

    def is_synapse(name: str) -> bool:
        return isinstance(graph.nodes[name], nir.Conv1d) and not is_shortcut(name)

    for name in order_of(graph):
        node: Any = graph.nodes[name]
        if is_synapse(name):
            for target in targets[name]:
                channels, length = node.output_type["output"]
                spreads = int(node.padding) > 0
                for source in sources[name]:
                    yield Bundle(name, source, target, int(channels), int(length), node.weight, node.bias, spreads)
        elif not isinstance(node, nir.Input):
            for source in sources[name]:
                if not is_synapse(source) and source != INPUT:  # currents that the host puts in
                    channels, length = node.input_type["input"]
                    yield Bundle(f"{source} to {name}", source, name, int(channels), int(length))


def populations_of(graph: nir.NIRGraph) -> list[Population]:
    """All of a graph, in the order of its signals."""
    bundles = list(bundles_of(graph))
    found = []
    for name in order_of(graph):
        node = graph.nodes[name]
        fires = isinstance(node, nir.LIF)
        if not fires and not is_shortcut(name) and name != OUTPUT:
            continue
        channels, length = node.output_type["output"]
        ends = [bundle for bundle in bundles if bundle.target == name]
        starts = [bundle for bundle in bundles if bundle.source == name]
        found.append(
            Population(
                name=name,
                neurons=int(channels * length),
                synapses=sum(bundle.synapses for bundle in ends),
                fan_in=int(np.max(sum(bundle.fan_in for bundle in ends))),
                fan_out=int(np.max(sum(bundle.fan_out for bundle in starts))),
                weight_bytes=sum(bundle.weight_bytes for bundle in ends if bundle.source != INPUT),
                state_bytes=4 * int(channels * length) * fires,
                fires=fires,
            )
        )
    return found


def size_table(graph: nir.NIRGraph, spikes: dict[str, float] | None = None) -> str:
    """A graph's populations, those of all blocks in one row, and what they add up to.

    Args:
        graph: of any size.
        spikes: of each population in a sentence, for a further column.
    """
    populations = populations_of(graph)
    rows: dict[str, list[Population]] = {}
    for population in populations:
        name = re.sub(r"^.*?\blayer\.\d+", "", population.name).removeprefix("spikebert.")
        rows.setdefault(name, []).append(population)
    header = ["population", "neurons", "synapses", "fan-in", "fan-out", "weights, bytes", "state, bytes"]
    table = [header, *([name, *_sizes(found)] for name, found in rows.items()), ["all", *_sizes(populations)]]
    if spikes is not None:
        header.append("spikes")
        for row, found in zip(table[1:], [*rows.values(), populations], strict=True):
            row.append(number(sum(spikes.get(population.name, 0) for population in found)))
    return "\n".join(align(table))


def _sizes(populations: list[Population]) -> list[str]:
    neurons = sum(population.neurons for population in populations if population.fires)
    synapses, weights, state = (
        sum(getattr(population, name) for population in populations)
        for name in ("synapses", "weight_bytes", "state_bytes")
    )
    fans = [max(getattr(population, name) for population in populations) for name in ("fan_in", "fan_out")]
    return [number(neurons), number(synapses), *map(str, fans), number(weights), number(state)]
