"""A model in fixed point as a NIR graph (Pedersen et al., Nature Communications 2024), written node by node.

The graph is for sentences of at most `L` tokens. Signals are `[channels, L]`, and nodes have the names of the model's
modules. Two channels of the input are not the model's: it has `D + 1` of them, and the last is 1 at padding.

    input [D + 1, L]             currents of the embeddings, the same in each time step, 0 at padding
    output [C, L]                class currents of each token; their mean over tokens and time steps is the score

Only kinds of nodes that snnTorch and spikingjelly read alike are used, with types that NIR checks:

- A Linear is a Conv1d with kernel 1: the weights stand there once, and not for each token.
- A sum over tokens is a Conv1d whose kernel is the sentence, with weights where output and input channel are the same.
  The way back from a gate to all tokens is one with padding `L - 1`.
- Neurons are LIF with `tau = 2 dt`, `r = 1` and a reset to 0. Their threshold lies half a step of the finest grid below
  1, where no membrane can be: NIR fires above a threshold, and this package at it, which is then the same.
- A product of two spikes is such a neuron with two edges of weight 1: it reaches 1 if both fire, and never if one does.
- The shortcut is a Conv1d with weights 1 behind each branch: two edges that add up.
- Padding inhibits all neurons that have a bias, more than any input can excite them. So it is silent.
"""

from enum import Enum
from hashlib import sha256
from typing import Any

import nir
import numpy as np
from torch import Tensor

from ..modeling_spikebert import SpikeBertForSequenceClassification

DT = 1e-4  # seconds in a time step; what readers of NIR take
THRESHOLD = 1 - 2.0**-23
INPUT, OUTPUT = "input", "output"
MAKER = "modeling_spikebert"
MOST_BYTES = 4e9  # of weights, of which most are the zeros of sums over tokens


class Kind(Enum):
    """What a Conv1d of the graph stands for."""

    LINEAR = "linear"
    GAIN = "gain"  # of a norm that reads the shortcut
    SUM = "sum"  # over the tokens of a sentence
    BROADCAST = "broadcast"  # from a gate to all tokens
    SHORTCUT = "shortcut"  # where edges add up, and the embeddings
    PADDING = "padding"  # inhibits


def kind_of(name: str) -> Kind:
    """By the name of its node."""
    ends = {"norm": Kind.GAIN, "sum": Kind.SUM, "broadcast": Kind.BROADCAST, "shortcut": Kind.SHORTCUT}
    ends |= {"embeddings": Kind.SHORTCUT, "padding": Kind.PADDING, "padding_of_intermediate": Kind.PADDING}
    return ends.get(name.rpartition(".")[2], Kind.LINEAR)


def shape_of(graph: nir.NIRGraph) -> tuple[int, int]:
    """Tokens and time steps of a graph."""
    return int(graph.nodes[INPUT].output_type["output"][1]), int(graph.metadata["num_time_steps"])


def digest_of(model: SpikeBertForSequenceClassification) -> str:
    """Tells a graph's own checkpoint from others."""
    digest = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def build(model: SpikeBertForSequenceClassification, num_tokens: int) -> nir.NIRGraph:
    """The graph of a model from `to_fixed_point`, for this many tokens `L`.

    Raises:
        ValueError: there are not so many positions, or the graph would be too large.
    """
    check_size(model, num_tokens)
    return _Graph(model, num_tokens).graph()


def check_size(model: SpikeBertForSequenceClassification, num_tokens: int) -> None:
    config = model.config
    if not 1 <= num_tokens <= config.max_position_embeddings:
        raise ValueError(
            f"A graph has 1 to {config.max_position_embeddings} tokens, the positions of its model, got {num_tokens}."
        )
    size = 4 * config.num_hidden_layers * config.hidden_size**2 * 2 * num_tokens  # sums and their ways back
    if size > MOST_BYTES:
        most = int(num_tokens * MOST_BYTES / size)
        raise ValueError(
            f"The graph of {num_tokens} tokens would have {size / 1e9:.1f} GB of weights for its sums over tokens, "
            f"most of them 0, and {MOST_BYTES / 1e9:g} GB is the limit. Take at most {most} tokens, or a smaller model."
        )


class _Graph:
    def __init__(self, model: SpikeBertForSequenceClassification, num_tokens: int):
        self.model: Any = model
        self.config = model.config
        self.length = num_tokens
        # Without a leak there is nothing to remember: a step of neurons with a leak, and twice the current.
        self.gain = 2.0 if self.config.tau == 1 else 1.0
        self.tau = 2.0 if self.config.tau == 1 else float(self.config.tau)
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []

    def graph(self) -> nir.NIRGraph:
        width = self.config.hidden_size
        self.nodes[INPUT] = nir.Input(np.array([width + 1, self.length]))
        for name, outputs in (("padding", width), ("padding_of_intermediate", self.config.intermediate_size)):
            weight = np.zeros((outputs, width + 1))
            weight[:, -1] = -(2.0**22)
            self.conv(name, weight, [INPUT])
        shortcut = self.conv("spikebert.embeddings", np.eye(width, width + 1), [INPUT])
        for i, block in enumerate(self.model.spikebert.encoder.layer):
            name = f"spikebert.encoder.layer.{i}"
            branch = self.attention(f"{name}.attention", block.attention, shortcut)
            shortcut = self.conv(f"{name}.attention.shortcut", np.eye(width), [shortcut, branch])
            branch = self.mlp(f"{name}.mlp", block.mlp, shortcut)
            shortcut = self.conv(f"{name}.mlp.shortcut", np.eye(width), [shortcut, branch])
        spikes = self.reader("norm", self.model.norm, shortcut)
        self.edges.append((self.linear("classifier", self.model.classifier, spikes, 1.0), OUTPUT))
        self.nodes[OUTPUT] = nir.Output(np.array([self.config.num_labels, self.length]))
        metadata = {
            "made_by": MAKER,
            "checkpoint": digest_of(self.model),
            "num_time_steps": self.config.num_time_steps,
            "dt": DT,
        }
        return nir.NIRGraph(self.nodes, self.edges, metadata=metadata)

    def attention(self, name: str, attention: Any, shortcut: str) -> str:
        spikes = self.reader(f"{name}.input_neuron", attention.input_neuron, shortcut)
        query, key, value = (
            self.neurons(f"{name}.{part}_neuron", [self.linear(f"{name}.{part}", getattr(attention, part), spikes)])
            for part in ("query", "key", "value")
        )
        product = self.product(f"{name}.product_neuron", [key, value])
        norm = attention.context_neuron.batch_norm
        diagonal = np.eye(self.config.hidden_size)[:, :, None]
        summed = self.conv(
            f"{name}.sum",
            diagonal * np.ones(self.length) * array(norm.weight)[:, None, None],
            [product],
            array(norm.bias),
            self.gain,
        )
        gate = self.lif(f"{name}.context_neuron", self.config.hidden_size, 1, self.tau, [summed])
        opened = self.conv(f"{name}.broadcast", diagonal * np.ones(self.length), [gate], padding=self.length - 1)
        context = self.product(f"{name}.masked_neuron", [query, opened])
        return self.linear(f"{name}.output", attention.output, context, 1.0)

    def mlp(self, name: str, mlp: Any, shortcut: str) -> str:
        spikes = self.reader(f"{name}.input_neuron", mlp.input_neuron, shortcut)
        current = self.linear(f"{name}.intermediate", mlp.intermediate, spikes)
        intermediate = self.neurons(f"{name}.intermediate_neuron", [current])
        return self.linear(f"{name}.output", mlp.output, intermediate, 1.0)

    def reader(self, name: str, neuron: Any, shortcut: str) -> str:
        """Neurons that read the shortcut through a gain and a bias."""
        norm = neuron.batch_norm
        current = self.conv(f"{name}.norm", np.diag(array(norm.weight)), [shortcut], array(norm.bias), self.gain)
        return self.neurons(name, [current])

    def neurons(self, name: str, sources: list[str]) -> str:
        """Neurons with a bias, which padding silences."""
        width = len(self.nodes[sources[0]].weight)
        padding = "padding" if width == self.config.hidden_size else "padding_of_intermediate"
        return self.lif(name, width, self.length, self.tau, [*sources, padding])

    def product(self, name: str, sources: list[str]) -> str:
        """Neurons that fire where both of two spikes arrive."""
        return self.lif(name, self.config.hidden_size, self.length, 2.0, sources)

    def linear(self, name: str, linear: Any, source: str, gain: float | None = None) -> str:
        return self.conv(name, array(linear.weight), [source], array(linear.bias), self.gain if gain is None else gain)

    def conv(
        self,
        name: str,
        weight: np.ndarray,
        sources: list[str],
        bias: np.ndarray | None = None,
        gain: float = 1.0,
        padding: int = 0,
    ) -> str:
        """`[O, I]` or `[O, I, K]`."""
        weight = weight if weight.ndim == 3 else weight[:, :, None]
        bias = np.zeros(len(weight)) if bias is None else bias
        length = 1 if padding else self.length
        weight, bias = ((gain * x).astype(np.float32) for x in (weight, bias))
        self.nodes[name] = nir.Conv1d(length, weight, 1, padding, 1, 1, bias)
        self.edges += [(source, name) for source in sources]
        return name

    def lif(self, name: str, width: int, length: int, tau: float, sources: list[str]) -> str:
        # In float64: readers divide tau by dt.
        self.nodes[name] = nir.LIF(*(np.full((width, length), x) for x in (tau * DT, 1.0, 0.0, THRESHOLD)))
        self.edges += [(source, name) for source in sources]
        return name


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
