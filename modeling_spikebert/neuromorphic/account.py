"""The energy account of a graph: from its nodes and the spikes in it, by the rules of `docs/energy_rules.md`.

Shapes: `T` time steps, `B` batch, `L` tokens of the graph, `D` hidden; `n` tokens of a sentence.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import nir
import torch
from torch import Tensor

from ..energy import CONSTANTS, EnergyConstants, EnergyReport
from ..energy.counting import LayerCount, Sentences, Signal, check_batches
from ..energy.report import report_of
from .graph import INPUT, OUTPUT
from .interpreter import Trace, input_currents, order_of, run
from .sizes import Bundle, bundles_of, is_shortcut


@dataclass
class Traffic:
    """Spikes that a graph sent for some sentences.

    Args:
        num_sentences: how many.
        spikes: of each LIF node, over all sentences and time steps.
        padding: additions that padding causes: its inhibition, and gates that reach it.
    """

    num_sentences: int = 0
    spikes: Counter[str] = field(default_factory=Counter)
    padding: int = 0


def graph_energy(
    graph: nir.NIRGraph, model: Any, inputs: Any, constants: EnergyConstants = CONSTANTS["45nm-fp32"], name: str = ""
) -> tuple[EnergyReport, Traffic]:
    """Runs a graph on given sentences, counts what it does, and prices it.

    Operations are those of the model from which the graph was made (`estimate_energy`), to the last addition. Memory
    differs: weights have 8 bits here. What padding takes is not part of it; `Traffic` has it.

    Args:
        graph: as `build` makes it.
        model: from `to_fixed_point`; its tables give the currents.
        inputs: as in `estimate_energy`.
        constants: of the strict account.
        name: of the graph.
    """
    account = _Account(graph, model)
    for batch in check_batches(inputs):
        account.run(batch)
    layers = list(account.layers.values())
    return report_of(name, model.config, True, account.sentences, layers, constants), account.traffic


class _Account:
    def __init__(self, graph: nir.NIRGraph, model: Any):
        self.graph, self.model = graph, model
        self.width, self.length = (int(size) for size in graph.nodes[INPUT].output_type["output"])
        self.steps = int(graph.metadata["num_time_steps"])
        self.ends: dict[str, list[Bundle]] = {name: [] for name in order_of(graph)}  # by target
        for bundle in bundles_of(graph):
            self.ends[bundle.target].append(bundle)
        self.sentences, self.traffic = Sentences(padding_counts=False), Traffic()
        self.layers: dict[str, LayerCount] = {}

    def run(self, batch: Any) -> None:
        ids = batch["input_ids"]
        currents = input_currents(self.model, batch, self.length)
        self.real = currents[:, -1] == 0  # [B, L]
        self.lengths = self.real.sum(1)  # [B]
        self.batch, self.tokens = len(ids), int(self.real.sum())
        counts = self.sentences
        counts.num_sentences += self.batch
        counts.num_tokens += self.tokens
        counts.num_padding += ids.numel() - self.tokens
        counts.longest = max(counts.longest, int(self.lengths.max()))
        self.traffic.num_sentences += self.batch
        tables = [x for x in self.model.spikebert.embeddings.children() if isinstance(x, torch.nn.Embedding)]
        values = self.tokens * (self.width - 1)
        layer = self.layer("spikebert.embeddings", "embedding", 1)
        layer.input.kind = "real"
        layer.additions += (len(tables) - 1) * values
        layer.traffic["real"] += (len(tables) + 1) * values
        for step, trace in enumerate(run(self.graph, currents, self.steps)):
            self.step(step, trace)
        classes = self.model.classifier.out_features
        layer = self.layer("pooling", "head", 1)
        layer.read_real(self.steps * self.tokens * classes)
        layer.additions += self.steps * self.tokens * classes
        layer.multiplications += self.batch * classes
        layer.traffic["real"] += self.batch * classes

    def step(self, step: int, trace: Trace) -> None:
        for name, bundles in self.ends.items():
            for bundle in bundles:
                self.count(step, bundle, trace.spikes.get(bundle.source))
            if name in trace.spikes:
                self.layer(name, "neuron").fire(self.signal(step, trace.spikes[name]), 0.0)
                self.traffic.spikes[name] += int(trace.spikes[name].sum())

    def count(self, step: int, bundle: Bundle, spikes: Tensor | None) -> None:
        if bundle.source == INPUT:
            self.traffic.padding += int((~self.real).sum()) * bundle.synapses // bundle.length
        elif spikes is not None:
            self.transmit(step, bundle, spikes)
        elif bundle.weight is not None:
            layer = self.layer(bundle.name, "batch_norm")
            layer.scale(self.tokens * bundle.channels)
            for kind in ("integer", "real"):  # gains and biases
                layer.traffic[kind] += (step == 0) * self.batch * bundle.channels
        elif is_shortcut(bundle.target):  # the edge from the shortcut before, to which the branch is added
            layer = self.layer(bundle.target, "shortcut")
            layer.read_real(self.tokens * bundle.channels)
            layer.additions += self.tokens * bundle.channels
            layer.traffic["real"] += 2 * self.tokens * bundle.channels

    def transmit(self, step: int, bundle: Bundle, spikes: Tensor) -> None:
        count = int(spikes.sum())
        if bundle.weight is None:  # from neuron to neuron
            name, part, fan_out, weights = bundle.target.removesuffix("_neuron"), "attention", 1, 0
        elif bundle.is_diagonal:
            name, part, fan_out, weights = bundle.name, "attention", 1, bundle.channels
        else:
            name, part, fan_out, weights = bundle.name, "linear", bundle.channels, bundle.weight[:, :, 0].size
        layer = self.layer(name, "head" if bundle.target == OUTPUT else part)
        events, vectors = count * fan_out, self.tokens
        if bundle.spreads:
            per_sentence = spikes.sum((1, 2))
            events = int((per_sentence * self.lengths).sum())
            self.traffic.padding += int((per_sentence * (self.length - self.lengths)).sum())
            weights = 0
        dense = weights if part == "linear" else bundle.channels
        layer.transmit(self.signal(step, spikes), events, vectors * dense if step == 0 else 0)
        if weights:
            results = bundle.channels * (self.tokens if part == "linear" else self.batch)
            layer.traffic["integer"] += (step == 0) * self.batch * weights
            layer.traffic["real"] += (step == 0) * self.batch * bundle.channels + results

    def signal(self, step: int, spikes: Tensor) -> Signal:
        """Of real tokens; a gate has none, and counts for its sentence."""
        count = int(spikes.sum())
        vectors = self.tokens if spikes.shape[2] == self.length else self.batch
        return Signal(
            "binary",
            Counter(real=vectors * spikes.shape[1]),
            Counter(real=count),
            Counter(real=count),
            Counter({step: count}),
        )

    def layer(self, name: str, part: str, steps: int | None = None) -> LayerCount:
        if name not in self.layers:
            steps = self.steps if steps is None else steps
            self.layers[name] = LayerCount(name=name, part=part, place=len(self.layers), num_time_steps=steps)
        return self.layers[name]
