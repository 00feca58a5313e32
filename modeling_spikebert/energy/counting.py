"""Counts what a model computes on given sentences, layer by layer, with forward hooks, by the rules of
`docs/energy_rules.md`.

Everything is summed over the sentences of all batches and stays a whole number; `report.py` divides and prices it.
Padding counts where the model counts it (the published variant), else a sentence costs what it costs alone.

Shapes: `T` time steps, `B` batch, `L` tokens, `H` heads, `D` hidden; `n` tokens that count in a sentence, `N` those of
all sentences of a batch, or all `B * L`. Spiking blocks compute on `[T, N, D]`, and rules see other tensors so, too:
`[B, L, D]` as `[B * L, D]`.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from ..teacher_spikebert import check_encoder

# What an input can be, from the cheapest to the dearest; a layer has the dearest of what it saw.
INPUT_KINDS = ("binary", "ternary", "integer", "real")

# Parts of a model, in the order of tables and pictures.
PARTS = {
    "linear": "linear layers",
    "attention": "attention products",
    "neuron": "neurons",
    "layer_norm": "LayerNorm",
    "batch_norm": "BatchNorm in front of neurons",
    "activation": "activations",
    "shortcut": "shortcuts",
    "embedding": "embeddings, encoding",
    "head": "pooling, classifier",
    "unknown": "unknown layers",
}

# Encoders of transformers whose attention is softmax(q k^T / sqrt(d)) v and nothing else.
PLAIN_ENCODERS = ("bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta")

# Modules that only call others. (Projections belong to training.)
CONTAINERS = ("ModuleList", "Sequential", "ModuleDict", "FeatureProjections")
# The model's own modules that compute something themselves: an attribute that tells them, and their rule.
SPIKEBERT = {
    "sign": "encoding",
    "neurons": "neuron",
    "num_heads": "spiking_attention",
    "intermediate_neuron": "shortcut",
}
FREE = (nn.Dropout, nn.Identity, nn.Embedding)  # a lookup is memory traffic, which its `embeddings` row has


@dataclass
class Signal:
    """Values that a layer reads or a neuron writes, over all sentences.

    Args:
        kind: one of `INPUT_KINDS`.
        entries: number of values, over "real" tokens and over "padding"; the latter where padding counts, else 0.
        nonzero: how many are not 0, likewise.
        magnitude: sum of their absolute values, likewise; the number of spikes.
        nonzero_per_step: over real tokens, by time step.
    """

    kind: str = "binary"
    entries: Counter[str] = field(default_factory=Counter)
    nonzero: Counter[str] = field(default_factory=Counter)
    magnitude: Counter[str] = field(default_factory=Counter)
    nonzero_per_step: Counter[int] = field(default_factory=Counter)

    def add(self, other: "Signal") -> None:
        self.kind = max(self.kind, other.kind, key=INPUT_KINDS.index)
        for name in ("entries", "nonzero", "magnitude", "nonzero_per_step"):
            getattr(self, name).update(getattr(other, name))

    def firing_rate(self, tokens: str = "real") -> float | None:
        """Fraction of values that are not 0; None for real values and where there are none."""
        return self.nonzero[tokens] / self.entries[tokens] if self.kind != "real" and self.entries[tokens] else None

    def spikes_per_step(self, tokens: str = "real") -> float | None:
        """Mean absolute value; above the firing rate where counts exceed 1."""
        return self.magnitude[tokens] / self.entries[tokens] if self.kind != "real" and self.entries[tokens] else None

    def rates_per_step(self) -> list[float]:
        steps = len(self.nonzero_per_step)
        return [nonzero * steps / self.entries["real"] for nonzero in self.nonzero_per_step.values()]


@dataclass(kw_only=True)
class Layer:
    """A row of the account.

    Args:
        name: path of the module; a product or shortcut inside of it has a further name.
        part: what it is, a key of `PARTS`.
        num_time_steps: how often it runs in a forward pass.
        input: what its synapses read, over all sentences.
        output: spikes, if it is a layer of neurons.
        type_name: of a module that has no rule: it is counted as dense products of real values.
        has_products: whether matrix products were seen in such a module.
    """

    name: str
    part: str
    num_time_steps: int = 1
    input: Signal = field(default_factory=Signal)
    output: Signal | None = None
    type_name: str | None = None
    has_products: bool = False


@dataclass(kw_only=True)
class LayerCount(Layer):
    """What one layer did, over all sentences.

    Args:
        place: of its module in the model.
        dense_macs: products of one time step, as if all inputs were real.
        active_synapses: products whose input is not 0, over all time steps.
        synaptic_events: the same, each counted as often as the input's absolute value says.
        additions: further additions and comparisons.
        multiplications: further multiplications, each with the addition that may follow it.
        traffic: values read and written beside the input, by kind; see `INPUT_KINDS`.
    """

    place: int
    dense_macs: int = 0
    active_synapses: int = 0
    synaptic_events: int = 0
    additions: int = 0
    multiplications: int = 0
    traffic: Counter[str] = field(default_factory=Counter)

    def read_real(self, values: int) -> None:
        self.input.add(Signal("real", Counter(real=values)))

    def transmit(self, spikes: Signal, events: int, dense_macs: int) -> None:
        """Binary spikes through synapses, of which so many were reached."""
        self.input.add(spikes)
        self.dense_macs += dense_macs
        self.active_synapses += events
        self.synaptic_events += events

    def fire(self, spikes: Signal, v_reset: float | None) -> None:
        """LIF neurons, from currents to these spikes."""
        self.output = self.output or Signal()
        self.output.add(spikes)
        self.input.add(Signal("real", spikes.entries))
        updates = spikes.entries.total()
        # h = v + (x - (v - r)) / tau: the factor 1 / tau with its addition; x - v; v - r if r is not 0; the comparison;
        # and one addition for each spike that resets its membrane.
        self.multiplications += updates
        self.additions += updates * (3 if v_reset else 2) + spikes.nonzero.total()
        self.traffic["binary"] += updates
        self.traffic["real"] += 2 * updates  # the membrane, read and written

    def look_up(self, tables: int, values: int) -> None:
        """Rows of so many tables, and their sum of so many values."""
        self.input.kind = "real"  # the rows that ids select
        self.additions += (tables - 1) * values
        self.traffic["real"] += (tables + 1) * values  # rows read, their sum written

    def average(self, values: int, means: int) -> None:
        """Values are added up and divided, to so many means."""
        self.read_real(values)
        self.additions += values
        self.multiplications += means
        self.traffic["real"] += means

    def add_up(self, values: int) -> None:
        """Real values are added to the shortcut."""
        self.read_real(values)
        self.additions += values
        self.traffic["real"] += 2 * values  # the stream, read and written

    def scale(self, values: int) -> None:
        """A gain and a bias for real values."""
        self.read_real(values)
        self.multiplications += values
        self.traffic["real"] += values


@dataclass(kw_only=True)
class Sentences:
    """What was counted.

    Args:
        num_sentences: how many.
        num_tokens: real tokens of all of them.
        num_padding: padding tokens of all of them.
        longest: tokens of the longest sentence.
        padding_counts: whether padding takes part in the model and in the counts.
    """

    num_sentences: int = 0
    num_tokens: int = 0
    num_padding: int = 0
    longest: int = 0
    padding_counts: bool


def count_operations(model: PreTrainedModel, spiking: bool, inputs: Any) -> tuple[Sentences, list[LayerCount]]:
    """Runs the model, a SpikeBERT or a BERT-like encoder, on `inputs` (see `estimate_energy`) and counts."""
    counter = _Counter(model, spiking)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for name, module in model.named_modules():
            rule = counter.rule_for(name, module)
            if rule is not None:
                hook = counter.hook(name, rule)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in check_batches(inputs):
            counter.run(model_arguments(model, batch))
    return counter.sentences, sorted(counter.layers.values(), key=lambda layer: layer.place)


def is_spiking(model: Any) -> bool:
    """Whether it is a SpikeBERT (True) or a BERT-like encoder (False).

    Raises:
        ValueError: it is neither.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "spikebert":
        return True
    try:
        check_encoder(model)
    except ValueError as error:
        raise ValueError(
            f"An energy account needs a SpikeBERT model or a BERT-like encoder, got {type(model).__name__}. Load a "
            "checkpoint with AutoModelForSequenceClassification.from_pretrained."
        ) from error
    return False


def check_batches(inputs: Any) -> Iterable[Mapping[str, Any]]:
    """Yields encoded batches, from one batch or from an iterable of them; refuses other things by name."""
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        inputs = [inputs]
    if isinstance(inputs, (str, Tensor)) or not isinstance(inputs, Iterable):
        raise ValueError(
            f"The inputs must be an encoded batch (tokenizer(..., return_tensors='pt')) or an iterable of such, got "
            f"{type(inputs).__name__}."
        )
    empty = True
    for batch in inputs:
        ids = batch.get("input_ids") if hasattr(batch, "get") else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(
                "Each batch must hold input_ids as a tensor [B, L], as tokenizer(..., padding=True, "
                "return_tensors='pt') returns it."
            )
        if len(ids):
            empty = False
            yield batch
    if empty:
        raise ValueError("There are no sentences: the inputs are empty. Pass at least one encoded batch.")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode, and each module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_arguments(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch has for the model, on its device, without labels."""
    taken = set(inspect.signature(model.forward).parameters)
    if "input_ids" not in taken:  # forward(*args, **kwargs)
        taken = set(batch)
    arguments = {name: value for name, value in batch.items() if name in taken - {"labels"}}
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} of a batch must be a tensor, got {type(value).__name__}.")
    return {name: value.to(model.device) for name, value in arguments.items()}


class _Counter:
    """Holds the counts while hooks fill them."""

    def __init__(self, model: PreTrainedModel, spiking: bool):
        self.model = model
        self.config: Any = model.config
        self.spiking = spiking
        self.folds = spiking and self.config.variant == "neuromorphic"
        self.sentences = Sentences(padding_counts=spiking and self.config.variant == "published")
        self.layers: dict[str, LayerCount] = {}
        self.unknown: dict[str, nn.Module] = {}
        self.modules = {name: place for place, (name, _) in enumerate(model.named_modules())}
        self.outputs: dict[str, Tensor] = {}  # of unknown modules, in this pass
        # The last tensor that was looked at: query, key and value read the same one.
        self._last: tuple[Tensor, Signal] | None = None
        # What computes on tokens of all sentences, `[T, N, D]`.
        bases: list[Any] = [module for module in model.modules() if spiking and hasattr(module, "encoding")]
        self.blocks = {m for base in bases for part in (base.encoding, base.encoder) for m in part.modules()}

    def run(self, arguments: dict[str, Tensor]) -> None:
        ids, counts = arguments["input_ids"], self.sentences
        mask = arguments.get("attention_mask", torch.ones_like(ids))
        if mask.shape != ids.shape or not mask.any(1).all():
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, and a token in each row, got "
                f"shape {tuple(mask.shape)}."
            )
        self.real = mask.bool()  # [B, L]
        self.lengths = (torch.ones_like(self.real) if counts.padding_counts else self.real).sum(1)  # [B]
        self.batch = len(ids)
        self.tokens = int(self.lengths.sum())
        num_real = int(self.real.sum())
        self.num_padding = self.real.numel() - num_real
        self.token_pairs = int(self.lengths.square().sum())
        options: dict[str, Any] = dict(arguments)
        if getattr(self.config, "exit_threshold", None) is not None:
            options["output_hidden_states"] = True  # with these, it takes all time steps
        with torch.no_grad():
            if not self.unknown:
                self.model(**options)
            else:
                # The FLOP counter cannot follow weights that ask for gradients and are passed to a module.
                weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
                with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
                    functional_call(self.model, weights, kwargs=options)
                self.count_unknown(flops.get_flop_counts())
        self._last = None
        counts.num_sentences += self.batch
        counts.num_tokens += num_real
        counts.num_padding += self.num_padding
        counts.longest = max(counts.longest, int(self.lengths.max()))

    def hook(self, name: str, rule: Callable[..., None]) -> Callable[..., None]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = ((*args, *kwargs.values()), output)
            if module not in self.blocks:
                tensors = tree_map_only(Tensor, self.join_sentences, tensors)
            rule(name, module, *tensors)

        return call

    def rule_for(self, name: str, module: nn.Module) -> Callable[[str, Any, tuple[Any, ...], Any], None] | None:
        kind = type(module).__name__
        own = any(map(is_own, type(module).__mro__))
        if type(module) is nn.Linear or (is_own(type(module)) and hasattr(module, "weight_scale")):
            return self.linear
        if type(module) is nn.LayerNorm:
            return self.layer_norm
        if module is getattr(self.model.base_model, "embeddings", None):
            return self.embeddings
        if type(module) in FREE or kind in CONTAINERS:
            return None
        if own and not hasattr(module, "weight_scale"):
            if not is_own(type(module)):  # a subclass may compute more than its class
                self.unknown[name] = module
            if not name:
                return self.pooling
            rules = (rule for attribute, rule in SPIKEBERT.items() if hasattr(module, attribute))
            return getattr(self, next(rules, ""), None)
        path = type(module).__module__
        if path.startswith("transformers.models.") and self.config.model_type in PLAIN_ENCODERS and not is_leaf(module):
            if kind.endswith("SelfAttention"):
                return self.softmax_attention
            return self.residual_additions if module is self.model.base_model else None
        if path in ("torch.nn.modules.activation", "transformers.activations") and is_leaf(module):
            return self.activation
        self.unknown[name] = module
        return self.unknown_module

    # Looking at tensors

    def join_sentences(self, x: Tensor) -> Tensor:
        """`[..., B, L, D]` to `[..., B * L, D]`; others stay as they are."""
        return x.flatten(-3, -2) if x.dim() >= 3 and x.shape[-3:-1] == self.real.shape else x

    def has_padding(self, x: Tensor) -> bool:
        return self.num_padding > 0 and x.dim() > 1 and x.shape[-2] == self.real.numel()

    def vectors(self, x: Tensor) -> int:
        """How many vectors of the last dimension count, over all time steps."""
        vectors = x.numel() // x.shape[-1]
        return vectors // self.real.numel() * self.tokens if self.has_padding(x) else vectors

    def look(self, x: Tensor) -> Signal:
        """What `x`, `[T, N, D]` or `[N, D]`, is and how much of it is not 0."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        signal = Signal(kind_of(x) if self.spiking else "real")
        padding = x.numel() // self.real.numel() * self.num_padding if self.has_padding(x) else 0
        signal.entries = Counter(real=x.numel() - padding, padding=padding * self.sentences.padding_counts)
        if signal.kind != "real":
            spikes = x if signal.kind == "binary" else x != 0
            signal.nonzero, signal.nonzero_per_step = self.sums(spikes.sum(-1, dtype=torch.float32), x)
            signal.magnitude = signal.nonzero
            if signal.kind == "integer":
                signal.magnitude, _ = self.sums(x.abs().sum(-1, dtype=torch.int64), x)
        self._last = (x, signal)
        return signal

    def sums(self, values: Tensor, x: Tensor) -> tuple[Counter[str], Counter[int]]:
        """Sums of `values`, `[T, N]` or `[N]`, of the vectors of `x`; and those of real tokens for each time step."""
        of_real = values * self.real.flatten() if self.has_padding(x) else values
        per_step = of_real.sum(-1, dtype=torch.int64).flatten().tolist()
        padding = int(values.sum(dtype=torch.int64)) - sum(per_step) if self.sentences.padding_counts else 0
        return Counter(real=sum(per_step), padding=padding), Counter(dict(enumerate(per_step)))

    def layer(self, name: str, part: str, like: Tensor | None = None, beside: str | None = None) -> LayerCount:
        """The row of a module, or of a computation that stands in the place of the module `beside`.

        Rows of one place keep the order in which they were made.
        """
        if name not in self.layers:
            place = self.modules.get(name if beside is None else beside, len(self.modules))
            self.layers[name] = LayerCount(name=name, part=part, place=place)
        layer = self.layers[name]
        if like is not None:
            layer.num_time_steps = like.shape[0] if self.spiking and like.dim() == 3 else 1
        return layer

    # Rules: name, module, arguments, output

    def linear(self, name: str, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        x, *_ = args
        head = self.model.base_model is not self.model and not name.startswith(self.model.base_model_prefix + ".")
        if head and self.folds:
            return  # its spikes were counted where they came from
        layer = self.layer(name, "head" if head else "linear", x)
        signal = self.look(x)
        layer.input.add(signal)
        layer.dense_macs += self.vectors(x) // layer.num_time_steps * module.weight.numel()
        layer.active_synapses += signal.nonzero.total() * module.out_features
        layer.synaptic_events += signal.magnitude.total() * module.out_features
        outputs, weights = self.vectors(x) * module.out_features, module.weight.numel()
        int8 = not module.weight.is_floating_point()
        if int8:  # each sum is scaled
            layer.multiplications += outputs
        layer.traffic["integer" if int8 else "real"] += self.batch * weights
        layer.traffic["real"] += self.batch * (parameters_of(module) - weights) + outputs

    def layer_norm(self, name: str, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x, *_ = args
        self.count_norm(name, module, x)

    def count_norm(self, name: str, module: Any, x: Tensor, beside: str | None = None) -> None:
        layer, vectors, width = self.layer(name, "layer_norm", x, beside), self.vectors(x), x.shape[-1]
        layer.input.add(self.look(x))
        # Sum, centre, epsilon; then square and sum, two divisions by the width, root, scale, weight and bias.
        layer.additions += vectors * (2 * width + 1)
        layer.multiplications += vectors * ((2 if module.weight is None else 3) * width + 3)
        layer.traffic["real"] += self.batch * parameters_of(module) + vectors * width

    def neuron(self, name: str, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        current, *_ = args
        if module.weight is not None:
            self.count_norm(f"{name}.norm", module, current, beside=name)
        if self.folds and name.endswith(("input_neuron", "norm")):  # nothing in front into which the norm folds
            gains = self.layer(f"{name}.norm", "batch_norm", current, beside=name)
            gains.scale(self.vectors(current) * current.shape[-1])
            gains.traffic["real"] += self.batch * 2 * current.shape[-1]
        self.layer(name, "neuron", current).fire(self.look(output), module.neurons.v_reset)
        if self.folds and name.endswith("context_neuron"):
            self.gates = output
        if self.folds and name == "norm":
            self.spikes_to_classifier(output)

    def encoding(self, name: str, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        embeddings, *_ = args
        if not module.sign:
            return
        layer = self.layer(name, "embedding", embeddings)
        layer.input.add(self.look(embeddings))
        compared = self.vectors(embeddings) * embeddings.shape[-1]
        layer.additions += compared
        layer.traffic["binary"] += compared

    def embeddings(self, name: str, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        layer = self.layer(name, "embedding")
        tables = [table for table in module.children() if isinstance(table, nn.Embedding)]
        layer.look_up(len(tables), self.tokens * output.shape[-1])

    def spikes_to_classifier(self, spikes: Tensor) -> None:
        """Class scores are sums over spikes, and then over tokens and time steps."""
        linear: Any = self.model.classifier
        signal = self.look(spikes)
        layer = self.layer("classifier", "head", spikes)
        vectors = self.vectors(spikes)
        dense = vectors // layer.num_time_steps * linear.weight.numel()
        layer.transmit(signal, signal.nonzero.total() * linear.out_features, dense)
        layer.traffic["real"] += self.batch * parameters_of(linear) + vectors * linear.out_features

    def spiking_attention(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        branch, (_, query, key, value, _) = output
        self.shortcut(name, module, args, (branch, ()))
        _, tokens = args
        if self.folds:
            self.spike_driven_attention(name, query, key, value, output[1][4])
            return
        signals = [self.look(signal) for signal in (query, key, value)]
        kind = max((signal.kind for signal in signals), key=INPUT_KINDS.index)
        # [T, N, D] to [T, B, L, D], with 0 for padding unless it counts
        q, k, v = (tokens.silence_padding(tokens.unpack(signal)).abs() for signal in (query, key, value))
        width, heads = q.shape[-1], module.num_heads
        # The counts are exact in float32, their products in int64.
        q_sums, k_sums = (x.sum(2, dtype=torch.float32) for x in (q, k))  # [T, B, D]
        # Spikes that fall on key j from all queries, and spikes of value j, head by head.
        arriving = (q_sums.unsqueeze(2) * k).unflatten(-1, (heads, -1)).sum(-1)  # [T, B, L, H]
        leaving = v.unflatten(-1, (heads, -1)).sum(-1, dtype=torch.float32)  # [T, B, L, H]
        for product, signal, operand, events in (
            ("scores", signals[0], q, (q_sums.long() * k_sums.long()).sum()),
            ("context", signals[2], v, (arriving.long() * leaving.long()).sum()),
        ):
            layer = self.layer(f"{name}.{product}", "attention", query, beside=f"{name}.value_neuron")
            layer.input.add(signal)
            layer.input.kind = max(layer.input.kind, kind, key=INPUT_KINDS.index)
            layer.dense_macs += self.token_pairs * width
            if signal.kind != "real":
                per_sentence = (operand != 0).sum(-1, dtype=torch.float32).sum((0, 2), dtype=torch.int64)  # [B]
                layer.active_synapses += int((per_sentence * self.lengths).sum())
                layer.synaptic_events += int(events)
        pairs = layer.num_time_steps * heads * self.token_pairs
        scores, context = (self.layers[f"{name}.{product}"] for product in ("scores", "context"))
        results = layer.num_time_steps * self.tokens * width
        scores.traffic["binary"] += results  # keys; queries are the input
        scores.traffic["integer"] += pairs
        context.traffic["integer"] += pairs
        context.traffic["real"] += results
        context.multiplications += results  # attention_scale

    def spike_driven_attention(self, name: str, query: Tensor, key: Tensor, value: Tensor, context: Tensor) -> None:
        """A product of two spikes is a neuron with two synapses; a sum over tokens, and the way back, are synapses."""
        place = f"{name}.value_neuron"
        values = self.tokens * query.shape[-1]
        product = self.look(key * value)
        edges = self.layer(f"{name}.product", "attention", key, place)
        for spikes in (self.look(key), self.look(value)):
            edges.transmit(spikes, spikes.nonzero.total(), values)
        self.layer(f"{name}.product_neuron", "neuron", key, place).fire(product, 0.0)
        sums = self.layer(f"{name}.sum", "attention", key, place)
        sums.transmit(product, product.nonzero.total(), values)
        sums.traffic["real"] += self.batch * query.shape[-1] * (2 + sums.num_time_steps)  # weight, bias, results
        place = f"{name}.context_neuron"
        opened = int((self.gates.sum((0, 2), dtype=torch.int64) * self.lengths).sum())  # a synapse at each token
        self.layer(f"{name}.broadcast", "attention", key, place).transmit(self.look(self.gates), opened, values)
        spikes = self.look(query)
        self.layer(f"{name}.masked", "attention", key, place).transmit(spikes, spikes.nonzero.total(), values)
        self.layer(f"{name}.masked_neuron", "neuron", key, place).fire(self.look(context), 0.0)

    def shortcut(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        branch = output[0]
        layer = self.layer(f"{name}.shortcut", "shortcut", branch, beside=f"{name}.dropout")
        signal = self.look(branch)
        values = signal.entries.total()
        if self.config.variant != "published":
            layer.add_up(values)
            return
        layer.input.add(signal)
        layer.additions += signal.magnitude.total()
        layer.traffic["integer"] += 2 * values  # the stream, read and written

    def pooling(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Mean over time steps and, with a classifier, over tokens."""
        layer = self.layer("pooling", "head", beside="dropout")
        width, steps = self.config.hidden_size, self.config.num_time_steps
        if self.folds and module is not module.base_model:  # of class scores
            classes = module.classifier.out_features
            layer.average(steps * self.tokens * classes, self.batch * classes)
            return
        values = self.tokens * width
        layer.read_real(steps * values)
        layer.additions += steps * values
        layer.multiplications += values
        if module is not module.base_model:
            layer.additions += values
            layer.multiplications += self.batch * width
        layer.traffic["real"] += (self.batch * width) if module is not module.base_model else values

    def softmax_attention(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        values, pairs = self.tokens * width, heads * self.token_pairs
        for product in ("scores", "context"):
            layer = self.layer(f"{name}.{product}", "attention", beside=f"{name}.dropout")
            layer.read_real(values)
            layer.dense_macs += self.token_pairs * width
            layer.traffic["real"] += values + pairs  # the other operand, or the result
        scores = self.layers[f"{name}.scores"]
        # Softmax: greatest, difference, sum; then the scale, the exponential and the division.
        scores.additions += 3 * pairs
        scores.multiplications += 3 * pairs

    def residual_additions(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        layer = self.layer("shortcut", "shortcut", beside=f"{name}.encoder")
        values = 2 * self.config.num_hidden_layers * self.tokens * self.config.hidden_size
        layer.read_real(values)
        layer.additions += values
        layer.traffic["real"] += 2 * values

    def activation(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """One MAC for each value: less than any real one costs."""
        layer = self.layer(name, "activation", output)
        values = self.vectors(output) * output.shape[-1]
        layer.read_real(values)
        layer.multiplications += values
        layer.traffic["real"] += values

    def unknown_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keeps what it returns; `count_unknown` counts it after the pass."""
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors:
            self.outputs[name] = tensors[0]

    def count_unknown(self, flops: dict[str, dict[Any, int]]) -> None:
        """Matrix products that a module without a rule computes itself; those of a container at the padded length.

        A leaf that computes none, as far as torch's counter can see, counts one product for each value it returns.
        """
        root = type(self.model).__name__

        def total(name: str) -> int:
            return sum(flops.get(f"{root}.{name}" if name else root, {}).values())

        def of_children(name: str, module: nn.Module) -> int:
            paths = {f"{name}.{child}".lstrip("."): submodule for child, submodule in module.named_children()}
            # A list of modules is never called itself, so it has no entry.
            return sum(total(path) or of_children(path, submodule) for path, submodule in paths.items())

        for name, module in self.unknown.items():
            output = self.outputs.get(name)
            products = (total(name) - of_children(name, module)) // 2  # FLOPs to MACs
            row = name if is_leaf(module) and output is not None else f"{name}.products".lstrip(".")
            layer = self.layer(row, "unknown", output, beside=name)
            layer.type_name = type(module).__name__
            layer.input.kind = "real"
            layer.has_products |= products > 0
            if is_leaf(module) and output is not None:
                vectors = output.numel() // output.shape[-1]
                products = (products or output.numel()) * self.vectors(output) // vectors  # without padding
            layer.dense_macs += products // layer.num_time_steps
        self.outputs.clear()


def kind_of(x: Tensor) -> str:
    # A few values tell nearly all real-valued tensors apart, without a pass over memory.
    some = x.flatten()[:64] if x.is_contiguous() else x[..., 0]
    if torch.equal(some, some.round()):
        if torch.equal(x, x.square()):
            return "binary"
        if torch.equal(x, x.round()):
            return "ternary" if x.abs().max() <= 1 else "integer"
    return "real"


def is_own(cls: type) -> bool:
    """Whether a class is one of the model's file, also where a checkpoint brought a copy of it."""
    return cls.__module__.rpartition(".")[2] == "modeling_spikebert"


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# torch counts the attention kernels of GPUs, but not the CPU's.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
