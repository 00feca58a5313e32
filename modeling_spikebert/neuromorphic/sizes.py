"""How large a graph is: neurons, synapses, fan-in and fan-out, memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nir
import numpy as np

from ..console.text import align, number
from ..energy.report import without_block
from .graph import INPUT, OUTPUT, Kind, kind_of
from .interpreter import order_of, sources_of


@dataclass(frozen=True)
class Bundle:
    """The synapses between two populations: a Conv1d, or an edge from neuron to neuron.

    Args:
        name: of the Conv1d, or of the edge.
        kind: of the Conv1d; None for an edge.
        source, target: names of populations, or of the graph's input and output.
        channels: of the target.
        length: of the target, in tokens.
        weight: of the Conv1d, `[O, I, K]`; None for an edge, whose weights are 1.
    """

    name: str
    kind: Kind | None
    source: str
    target: str
    channels: int
    length: int
    weight: np.ndarray | None = None

    @cached_property
    def fan_in(self) -> np.ndarray:
        """Synapses at each channel of the target, for one token; those of weight 0 are none."""
        if self.weight is None:
            return np.ones(self.channels, dtype=int)
        taps = self.weight[:, :, :1] if self.kind is Kind.BROADCAST else self.weight
        return np.count_nonzero(taps, axis=(1, 2))

    @cached_property
    def fan_out(self) -> np.ndarray:
        """Synapses behind each channel of the source, of one token."""
        if self.weight is None:
            return np.ones(self.channels, dtype=int)
        taps = self.weight if self.kind is Kind.BROADCAST else self.weight[:, :, :1]
        return np.count_nonzero(taps, axis=(0, 2))

    @property
    def synapses(self) -> int:
        return int(self.fan_in.sum()) * self.length

    @property
    def weight_bytes(self) -> int:
        """Weights of 8 bits, zeros among them, once for all tokens; for each row a byte, its grid, and a bias of 4."""
        if self.weight is None or self.kind in (Kind.BROADCAST, Kind.PADDING):  # all the same
            return 0
        weights = self.weight[:, :, 0].size if self.kind is Kind.LINEAR else self.channels
        return weights + (1 + 4) * self.channels


@dataclass(frozen=True)
class Population:
    """Neurons of a LIF node, or sums of a shortcut or of class currents.

    Args:
        name: of the node.
        neurons: how many, or how many sums.
        synapses: that end at them, padding's inhibition among them; those of weight 0 are none.
        fan_in, fan_out: the most of one neuron.
        weight_bytes: of these synapses, see `Bundle`.
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


def bundles_of(graph: nir.NIRGraph) -> Iterator[Bundle]:
    """All synapses, in the order of the signals."""
    sources = sources_of(graph)
    targets: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        targets[source].append(target)

    def is_synapse(name: str) -> bool:
        return isinstance(graph.nodes[name], nir.Conv1d) and kind_of(name) is not Kind.SHORTCUT

    for name in order_of(graph):
        node: Any = graph.nodes[name]
        if is_synapse(name):
            channels, length = (int(size) for size in node.output_type["output"])
            (source,) = sources[name]
            for target in targets[name]:
                yield Bundle(name, kind_of(name), source, target, channels, length, node.weight)
        elif not isinstance(node, nir.Input):
            channels, length = (int(size) for size in node.input_type["input"])
            for source in sources[name]:
                if not is_synapse(source) and source != INPUT:  # currents that the host puts in
                    yield Bundle(f"{source} to {name}", None, source, name, channels, length)


def populations_of(graph: nir.NIRGraph) -> list[Population]:
    """All of a graph, in the order of its signals."""
    bundles = list(bundles_of(graph))
    found = []
    for name in order_of(graph):
        node: Any = graph.nodes[name]
        fires = isinstance(node, nir.LIF)
        if not fires and name != OUTPUT and kind_of(name) is not Kind.SHORTCUT:
            continue
        channels, length = (int(size) for size in node.output_type["output"])
        ends = [bundle for bundle in bundles if bundle.target == name]
        starts = [bundle for bundle in bundles if bundle.source == name]
        found.append(
            Population(
                name=name,
                neurons=channels * length,
                synapses=sum(bundle.synapses for bundle in ends),
                fan_in=int(np.max(sum(bundle.fan_in for bundle in ends))),
                fan_out=int(np.max(sum(bundle.fan_out for bundle in starts))),
                weight_bytes=sum(bundle.weight_bytes for bundle in ends),
                state_bytes=4 * channels * length * fires,
                fires=fires,
            )
        )
    return found


def size_table(graph: nir.NIRGraph, operations: Mapping[str, float] | None = None) -> str:
    """A graph's populations, those of all blocks in one row, and what they add up to.

    Args:
        graph: of any size.
        operations: synaptic operations that end at each population, for a further column.
    """
    populations = populations_of(graph)
    header = ["population", "neurons", "sums", "synapses", "fan-in", "fan-out", "weights, bytes", "state, bytes"]
    rows = _by_part(populations) | {"all": populations}
    table = [header, *([name, *_sizes(found)] for name, found in rows.items())]
    if operations is not None:
        header.append("operations")
        for row, found in zip(table[1:], rows.values(), strict=True):
            row.append(number(sum(operations.get(population.name, 0) for population in found)))
    return "\n".join(align(table))


def spike_table(graph: nir.NIRGraph, spikes: Mapping[str, float]) -> str:
    """Spikes of each layer of neurons, with a column for each block."""
    parts = _by_part([population for population in populations_of(graph) if population.fires])
    blocks = max(map(len, parts.values()))
    table = [["spikes", *(f"block {i}" for i in range(1, blocks + 1))]]
    for name, found in parts.items():
        counts = [number(spikes[population.name]) for population in found]
        table.append([name, *[""] * (blocks - len(counts)), *counts])  # what stands behind the blocks, below the last
    return "\n".join(align(table))


def _by_part(populations: list[Population]) -> dict[str, list[Population]]:
    parts: dict[str, list[Population]] = {}
    for population in populations:
        parts.setdefault(without_block(population.name), []).append(population)
    return parts


def _sizes(populations: list[Population]) -> list[str]:
    neurons, sums = (
        sum(population.neurons for population in populations if population.fires is fires) for fires in (True, False)
    )
    synapses, weights, state = (
        sum(getattr(population, name) for population in populations)
        for name in ("synapses", "weight_bytes", "state_bytes")
    )
    fans = [max(getattr(population, name) for population in populations) for name in ("fan_in", "fan_out")]
    return [number(neurons), number(sums), number(synapses), *map(str, fans), number(weights), number(state)]
