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
from .graph import INPUT, OUTPUT, Kind, kind_of, shape_of
from .interpreter import Trace, input_currents, order_of, run
from .sizes import Bundle, bundles_of


@dataclass
class Traffic:
    """What a graph did for some sentences, summed over them and their time steps.

    Args:
        num_sentences: how many.
        spikes: of each LIF node.
        operations: synaptic operations that end at each population: a spike, and a synapse whose weight is not 0.
        padding_additions, padding_multiplications: what tokens take that are not there: their inhibition, gates that
            reach them, sums, gains, and updates of their silent neurons.
    """

    num_sentences: int = 0
    spikes: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    padding_additions: int = 0
    padding_multiplications: int = 0

    def per_sentence(self, counts: Counter[str]) -> dict[str, float]:
        return {name: count / self.num_sentences for name, count in counts.items()}


def graph_energy(
    graph: nir.NIRGraph, model: Any, inputs: Any, constants: EnergyConstants = CONSTANTS["45nm-fp32"], name: str = ""
) -> tuple[EnergyReport, Traffic]:
    """Runs a graph on given sentences, counts what it does, and prices it.

    Operations are those of the model from which the graph was made (`estimate_energy`), to the last addition: of
    sentences without padding, and with weights that are 0 among the synapses. Memory differs, since weights have 8 bits
    here. `Traffic` has what padding takes, and operations without weights of 0.

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
        self.length, self.steps = shape_of(graph)
        self.width = int(graph.nodes[INPUT].output_type["output"][0]) - 1
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
        self.padding = self.real.numel() - self.tokens
        counts = self.sentences
        counts.num_sentences += self.batch
        counts.num_tokens += self.tokens
        counts.num_padding += ids.numel() - self.tokens
        counts.longest = max(counts.longest, int(self.lengths.max()))
        self.traffic.num_sentences += self.batch
        tables = [x for x in self.model.spikebert.embeddings.children() if isinstance(x, torch.nn.Embedding)]
        self.layer("spikebert.embeddings", "embedding", 1).look_up(len(tables), self.tokens * self.width)
        for step, trace in enumerate(run(self.graph, currents, self.steps)):
            self.step(step, trace)
        classes = self.model.classifier.out_features
        self.layer("pooling", "head", 1).average(self.steps * self.tokens * classes, self.batch * classes)

    def step(self, step: int, trace: Trace) -> None:
        for name, bundles in self.ends.items():
            for bundle in bundles:
                spikes = trace.spikes.get(bundle.source)
                if bundle.kind is Kind.PADDING:
                    self.traffic.padding_additions += self.padding * bundle.channels
                elif spikes is not None:
                    self.transmit(step, bundle, spikes)
                elif bundle.kind is Kind.GAIN:
                    self.scale(step, bundle)
                elif kind_of(bundle.target) is Kind.SHORTCUT:  # from the one before; the branch is added to it
                    self.add(bundle)
            if name in trace.spikes:
                spikes = trace.spikes[name]
                self.layer(name, "neuron").fire(self.signal(step, spikes), 0.0)
                self.traffic.spikes[name] += int(spikes.sum())
                if spikes.shape[2] == self.length:
                    self.traffic.padding_additions += 2 * self.padding * spikes.shape[1]
                    self.traffic.padding_multiplications += self.padding * spikes.shape[1]

    def transmit(self, step: int, bundle: Bundle, spikes: Tensor) -> None:
        per_channel = spikes.sum((0, 2)).numpy()
        self.traffic.operations[bundle.target] += int((per_channel * bundle.fan_out).sum())
        signal, first = self.signal(step, spikes), step == 0
        count = signal.nonzero.total()
        if bundle.kind is Kind.BROADCAST:
            per_sentence = spikes.sum((1, 2))
            self.traffic.padding_additions += int((per_sentence * (self.length - self.lengths)).sum())
            events = int((per_sentence * self.lengths).sum())
            self.layer(bundle.name, "attention").transmit(signal, events, first * self.tokens * bundle.channels)
        elif bundle.kind is Kind.SUM:
            layer = self.layer(bundle.name, "attention")
            layer.transmit(signal, count, first * self.tokens * bundle.channels)
            self.read_weights(layer, first, bundle.channels, bundle.channels)
            layer.traffic["real"] += self.batch * bundle.channels
        elif bundle.kind is Kind.LINEAR and bundle.weight is not None:
            layer = self.layer(bundle.name, "head" if bundle.target == OUTPUT else "linear")
            weights = bundle.weight[:, :, 0].size
            layer.transmit(signal, count * bundle.channels, first * self.tokens * weights)
            self.read_weights(layer, first, weights, bundle.channels)
            layer.traffic["real"] += self.tokens * bundle.channels
        else:  # from neuron to neuron
            layer = self.layer(bundle.target.removesuffix("_neuron"), "attention")
            layer.transmit(signal, count, first * self.tokens * bundle.channels)

    def scale(self, step: int, bundle: Bundle) -> None:
        layer = self.layer(bundle.name, "batch_norm")
        layer.scale(self.tokens * bundle.channels)
        self.read_weights(layer, step == 0, bundle.channels, bundle.channels)
        self.traffic.padding_multiplications += self.padding * bundle.channels

    def add(self, bundle: Bundle) -> None:
        self.layer(bundle.target, "shortcut").add_up(self.tokens * bundle.channels)
        self.traffic.padding_additions += self.padding * bundle.channels

    def read_weights(self, layer: LayerCount, first: bool, weights: int, biases: int) -> None:
        """Once for a sentence: weights of 8 bits, biases of 32."""
        layer.traffic["integer"] += first * self.batch * weights
        layer.traffic["real"] += first * self.batch * biases

    def signal(self, step: int, spikes: Tensor) -> Signal:
        """Of tokens that are there; a gate has none, and counts for its sentence."""
        count = int(spikes.sum())
        vectors = self.tokens if spikes.shape[2] == self.length else self.batch
        entries = Counter(real=vectors * spikes.shape[1])
        return Signal("binary", entries, Counter(real=count), Counter(real=count), Counter({step: count}))

    def layer(self, name: str, part: str, steps: int | None = None) -> LayerCount:
        if name not in self.layers:
            steps = self.steps if steps is None else steps
            self.layers[name] = LayerCount(name=name, part=part, place=len(self.layers), num_time_steps=steps)
        return self.layers[name]
