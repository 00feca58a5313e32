"""A SpikeBERT as an ONNX graph, written node by node beside the model file that it follows.

Shapes as there: `T` time steps, `B` batch, `L` tokens, `H` heads, `D` hidden, `d = D / H`, `C` classes. Padding stays
in, and the mask silences it. All operators are of the standard. In the int8 graph spikes are bytes and weights int8,
and what spikes save stands in functions of the domain `modeling_spikebert`: a runtime computes them by their standard
operators, and ONNX Runtime by kernels for them, where those are registered (`runtime/`).
"""

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..int8_spikebert import round_rows
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertNeuron, SpikeLinear
from ..norm_lif_spikebert import LIF

OPSET = 18
DOMAIN = "modeling_spikebert"


class Attribute(str):
    """The name of an attribute of a function, where its body needs the value."""


class Graph:
    """Nodes and constants in the order in which they are written; a value is known by its name.

    Args:
        functions: by name and form, where `call` puts functions; without, it writes out what they compute.
        outer: the graph that this is a branch of, whose constants and values it sees.
    """

    def __init__(self, functions: dict[tuple[str, str], Any] | None = None, outer: "Graph | None" = None) -> None:
        self.nodes: list[Any] = []
        # Constants by their content, so that none is there twice.
        self.constants: dict[bytes, Any] = {} if outer is None else outer.constants
        self.functions: dict[tuple[str, str], Any] | None = functions if outer is None else outer.functions
        self.prefix: str = "" if outer is None else f"{outer.prefix}{len(outer.nodes)}_"

    def op(self, kind: str, *inputs: str, outputs: int = 0, domain: str = "", **attributes: Any) -> Any:
        """Adds a node; the name of its output, or a list of names for so many `outputs`."""
        names = [f"{self.prefix}{kind}_{len(self.nodes)}_{i}" for i in range(outputs or 1)]
        given = {name: value for name, value in attributes.items() if not isinstance(value, Attribute)}
        node = helper.make_node(kind, list(inputs), names, domain=domain, **given)
        for name in attributes.keys() - given.keys():
            node.attribute.append(AttributeProto(name=name, ref_attr_name=attributes[name], type=AttributeProto.FLOAT))
        self.nodes.append(node)
        return names if outputs else names[0]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        array = np.array(value.detach().numpy() if isinstance(value, Tensor) else value, dtype, order="C")
        key = sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"constant_{len(self.constants)}")
        return self.constants[key].name

    def integers(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def cast(self, x: str, to: int) -> str:
        return self.op("Cast", x, to=to)

    def reshape(self, x: str, *shape: int) -> str:
        """0 stands for a size that stays, -1 for what is left."""
        return self.op("Reshape", x, self.integers(*shape))

    def call(self, name: str, write: Callable[..., str], *inputs: str, overload: str = "", **attributes: Any) -> str:
        """What `write(graph, *inputs, **attributes)` computes, as a function of this name, of which it is one form."""
        if self.functions is None:
            return write(self, *inputs, **attributes)
        if (name, overload) not in self.functions:
            body = Body()
            parameters = [f"input_{i}" for i in range(len(inputs))]
            output = write(body, *parameters, **{name: Attribute(name) for name in attributes})
            opsets = [helper.make_opsetid("", OPSET)]
            self.functions[name, overload] = helper.make_function(
                DOMAIN, name, parameters, [output], body.nodes, opsets, attributes=list(attributes), overload=overload
            )
        return self.op(name, *inputs, domain=DOMAIN, overload=overload, **attributes)


class Body(Graph):
    """Of a function: constants are nodes there."""

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        if isinstance(value, Attribute):
            return self.op("Constant", value_float=value)
        return self.op("Constant", value=numpy_helper.from_array(np.array(value, dtype)))


def build(model: SpikeBertForSequenceClassification, int8: bool, with_spikes: bool = False) -> onnx.ModelProto:
    """The graph of a model in evaluation mode, with the time steps of its config.

    Inputs: `input_ids` and `attention_mask`, int64 `[B, L]`, and `token_type_ids` if the model has them. Outputs:
    `logits`, float32 `[B, C]`, and with several time steps `logits_per_step`, `[T, B, C]`: the scores after each step.
    With `config.exit_threshold` there is `exit_steps` instead, int64 `[B]`: the steps that a sentence took. With spikes
    also `spikes`, uint8 `[number of blocks, T, B, L, D]`: what enters each block.

    Raises:
        ValueError: spikes are asked for with early exit, where a sentence has no fixed number of steps.
    """
    if with_spikes and model.config.exit_threshold is not None:
        raise ValueError("A graph gives either spikes or early exit. Set `exit_threshold` to None.")
    config: Any = model.config
    functions: dict[tuple[str, str], Any] = {}
    graph = Graph(functions if int8 else None)
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if config.type_vocab_size else [])]
    given = {name: name for name in inputs}
    if config.exit_threshold is None:
        scores, spikes = _scores_per_step(graph, model, given, config.num_time_steps, int8)
        results = {"logits": graph.op("Gather", scores, graph.constant(-1, np.int64), axis=0)}
        if config.num_time_steps > 1:
            results["logits_per_step"] = scores
        if with_spikes:
            same = graph.integers(1, config.num_time_steps, 1, 1, 1)  # as published the first ones, at each step
            each = [graph.op("Expand", graph.op("Unsqueeze", x, graph.integers(0)), same) for x in spikes]
            results["spikes"] = graph.cast(graph.op("Concat", *each, axis=0), TensorProto.UINT8)
    else:
        results = dict(zip(("logits", "exit_steps"), _cascade(graph, model, given, 1, int8), strict=True))
    for name, value in results.items():
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
    types = {"exit_steps": TensorProto.INT64, "spikes": TensorProto.UINT8}
    steps = config.num_time_steps
    shapes = {"logits": ["batch", config.num_labels], "exit_steps": ["batch"]}
    shapes["logits_per_step"] = [steps, *shapes["logits"]]
    shapes["spikes"] = [config.num_hidden_layers, steps, "batch", "length", config.hidden_size]
    proto = helper.make_graph(
        graph.nodes,
        "SpikeBERT",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shapes[name]) for name in results],
        list(graph.constants.values()),
    )
    return helper.make_model(
        proto,
        functions=list(functions.values()),
        opset_imports=[helper.make_opsetid("", OPSET), *([helper.make_opsetid(DOMAIN, 1)] if functions else [])],
        ir_version=10,
        producer_name="modeling_spikebert",
    )


def _cascade(graph: Graph, model: Any, inputs: dict[str, str], steps: int, int8: bool) -> tuple[str, str]:
    """`SpikeBertForSequenceClassification.exit_early`: with so many steps, and the unsure sentences again with more.

    Returns:
        scores `[B, C]`, and with how many time steps they were computed, `[B]`.
    """
    last, minus_one = graph.constant(-1, np.int64), graph.integers(-1)
    scores = graph.op("Gather", _scores_per_step(graph, model, inputs, steps, int8)[0], last, axis=0)
    shape = graph.op("Shape", scores, start=0, end=1)
    taken = graph.op("Expand", graph.integers(steps), shape)
    if steps == model.config.num_time_steps:
        return scores, taken
    if model.config.problem_type == "multi_label_classification":
        confidence = graph.op("ReduceMin", graph.op("Sigmoid", graph.op("Abs", scores)), minus_one, keepdims=0)
    else:
        confidence = graph.op("ReduceMax", graph.op("Softmax", scores, axis=-1), minus_one, keepdims=0)
    unsure = graph.op("Less", confidence, graph.constant(model.config.exit_threshold))
    rows = graph.op("Transpose", graph.op("NonZero", unsure), perm=[1, 0])  # [n, 1]
    number = graph.op("Squeeze", graph.op("Shape", rows, start=0, end=1), graph.integers(0))

    more = Graph(outer=graph)
    some = {name: more.op("GatherND", value, rows) for name, value in inputs.items()}
    better, exits = _cascade(more, model, some, min(2 * steps, model.config.num_time_steps), int8)
    branch = [more.op("ScatterND", scores, rows, better), more.op("ScatterND", taken, rows, exits)]
    enough = Graph(outer=graph)
    enough.prefix += "enough_"
    as_it_is = [enough.op("Identity", scores), enough.op("Identity", taken)]
    chosen, exit_steps = graph.op(
        "If",
        graph.op("Greater", number, graph.constant(0, np.int64)),
        outputs=2,
        then_branch=_branch(more, branch),
        else_branch=_branch(enough, as_it_is),
    )
    return chosen, exit_steps


def _branch(graph: Graph, outputs: list[str]) -> onnx.GraphProto:
    types = (TensorProto.FLOAT, TensorProto.INT64)
    infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, types, strict=True)]
    return helper.make_graph(graph.nodes, "branch", [], infos)


def _scores_per_step(graph: Graph, model: Any, inputs: dict[str, str], steps: int, int8: bool) -> tuple[str, list[str]]:
    """The scores after each step, `[T, B, C]`, and the spikes that enter each block, `[T, B, L, D]`."""
    published = model.config.variant == "published"
    mask = None if published else graph.cast(inputs["attention_mask"], TensorProto.BOOL)  # published: padding counts
    embeddings = _embeddings(graph, model.spikebert.embeddings, inputs, int8)  # [B, L, D]
    x = graph.op("Unsqueeze", embeddings, graph.integers(0))  # [1, B, L, D], the same at each step
    if published:
        sign = graph.op("GreaterOrEqual", x, graph.constant(0.0))
        x = graph.cast(sign, TensorProto.FLOAT)
    seen = []
    for layer in model.spikebert.encoder.layer:
        seen.append(_before(graph, x, layer.attention.input_neuron, steps))
        x = graph.op("Add", x, _attention(graph, seen[-1], mask, layer.attention, steps, int8))
        x = graph.op("Add", x, _mlp(graph, x, layer.mlp, steps, int8))
    return _head(graph, model, x, inputs["attention_mask"], steps, published), seen


def _embeddings(graph: Graph, module: Any, inputs: dict[str, str], int8: bool) -> str:
    ids = inputs["input_ids"]
    words = module.word_embeddings.weight
    if int8:
        weight, scale = round_rows(words.detach())
        rows = graph.cast(graph.op("Gather", graph.constant(weight, np.int8), ids), TensorProto.FLOAT)
        scales = graph.op("Gather", graph.constant(scale.unsqueeze(1)), ids)  # [B, L, 1]
        x = graph.op("Mul", rows, scales)
    else:
        x = graph.op("Gather", graph.constant(words), ids)
    if module.position_embeddings is not None:
        length = graph.op("Shape", ids, start=1, end=2)
        table = graph.constant(module.position_embeddings.weight)
        x = graph.op("Add", x, graph.op("Slice", table, graph.integers(0), length, graph.integers(0)))
    if module.token_type_embeddings is not None:
        x = graph.op(
            "Add", x, graph.op("Gather", graph.constant(module.token_type_embeddings.weight), inputs["token_type_ids"])
        )
    return x if isinstance(module.LayerNorm, nn.Identity) else _norm(graph, x, module.LayerNorm)


def _norm(graph: Graph, x: str, norm: Any) -> str:
    scale, bias = graph.constant(norm.weight), graph.constant(norm.bias)
    return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.eps)


def _attention(graph: Graph, spikes: str, mask: str | None, module: Any, steps: int, int8: bool) -> str:
    """What is added to the shortcut, `[T, B, L, D]`."""
    heads, width = module.num_heads, module.output.out_features
    linears = [module.query, module.key, module.value]
    neurons = [module.query_neuron, module.key_neuron, module.value_neuron]
    currents = graph.reshape(_linear(graph, spikes, linears, int8), 0, 0, 0, 3, width)  # one product for all three
    spikes = _neuron(graph, currents, neurons, steps)
    product = partial(_attention_product, num_heads=heads, width=width)
    context = graph.call("SpikeAttention", product, spikes, *([] if mask is None else [mask]), heads=heads)
    spikes = _neuron(graph, context, [module.context_neuron], steps, factor=module.scale)
    return _behind(graph, _linear(graph, spikes, [module.output], int8), module.output_neuron, steps)


def _attention_product(
    graph: Graph, spikes: str, mask: str | None = None, *, num_heads: int, width: int, **_: Any
) -> str:
    """`q (k^T v)` of `[T, B, L, 3, D]` and a mask `[B, L]`: `[T, B, L, D]`."""
    if mask is not None:  # a silent key and value take no part
        spikes = graph.op("And", spikes, graph.op("Unsqueeze", mask, graph.integers(2, 3)))  # [B, L, 1, 1]
    apart = graph.reshape(spikes, 0, 0, 0, 3, num_heads, width // num_heads)
    apart = graph.cast(graph.op("Transpose", apart, perm=[3, 0, 1, 4, 2, 5]), TensorProto.FLOAT)  # [3, T, B, H, L, d]
    query, key, value = (graph.op("Gather", apart, graph.constant(i, np.int64), axis=0) for i in range(3))
    sums = graph.op("MatMul", graph.op("Transpose", key, perm=[0, 1, 2, 4, 3]), value)  # [T, B, H, d, d]
    context = graph.op("Transpose", graph.op("MatMul", query, sums), perm=[0, 1, 3, 2, 4])
    return graph.reshape(context, 0, 0, 0, width)


def _mlp(graph: Graph, x: str, module: Any, steps: int, int8: bool) -> str:
    spikes = _before(graph, x, module.input_neuron, steps)
    spikes = _neuron(graph, _linear(graph, spikes, [module.intermediate], int8), [module.intermediate_neuron], steps)
    return _behind(graph, _linear(graph, spikes, [module.output], int8), module.output_neuron, steps)


def _before(graph: Graph, x: str, neuron: Any, steps: int) -> str:
    """The spikes that a branch sees; as published the shortcut is a sum of spikes itself, at most 255."""
    return graph.cast(x, TensorProto.UINT8) if isinstance(neuron, nn.Identity) else _neuron(graph, x, [neuron], steps)


def _behind(graph: Graph, current: str, neuron: Any, steps: int) -> str:
    """As published neurons stand behind a branch, and the shortcut is a sum of spikes."""
    if isinstance(neuron, nn.Identity):
        return current
    return graph.cast(_neuron(graph, current, [neuron], steps), TensorProto.FLOAT)


def _linear(graph: Graph, spikes: str, linears: list[SpikeLinear], int8: bool) -> str:
    """`spike_linear` of spikes or, as published, spike counts; the outputs of several side by side."""
    bias = graph.constant(np.concatenate([linear.bias.detach().numpy() for linear in linears]))
    if not int8:
        weight = np.concatenate([_float_weight(linear) for linear in linears])  # [M, K]
        spikes = graph.cast(spikes, TensorProto.FLOAT)
        return graph.op("Add", graph.op("MatMul", spikes, graph.constant(weight.T)), bias)
    rounded = [_int8_weight(linear) for linear in linears]
    values = np.concatenate([values for values, _ in rounded]).T  # [K, M]
    scales = np.concatenate([scale for _, scale in rounded])
    return graph.call(
        "SpikeLinear", _int8_product, spikes, graph.constant(values, np.int8), graph.constant(scales), bias
    )


def _int8_product(graph: Graph, spikes: str, weight: str, scale: str, bias: str) -> str:
    """Runtimes know this form, and multiply bytes: `MatMulIntegerToFloat` in ONNX Runtime."""
    spikes = graph.op("DequantizeLinear", graph.cast(spikes, TensorProto.UINT8), graph.constant(1.0))
    weight = graph.op("DequantizeLinear", weight, scale, axis=1)
    return graph.op("Add", graph.op("MatMul", spikes, weight), bias)


def _float_weight(linear: SpikeLinear) -> np.ndarray:
    weight = linear.weight.detach().float()
    if linear.weight_scale is not None:
        weight = weight * linear.weight_scale.detach().unsqueeze(1)
    return weight.numpy()


def _int8_weight(linear: SpikeLinear) -> tuple[np.ndarray, np.ndarray]:
    if linear.weight_scale is not None:
        return linear.weight.detach().numpy(), linear.weight_scale.detach().numpy()
    weight, scale = round_rows(linear.weight.detach())
    return weight.numpy(), scale.numpy()


def _neuron(graph: Graph, x: str, neurons: list[SpikeBertNeuron], steps: int, factor: float = 1.0) -> str:
    """`norm_lif` of the current `[T or 1, ..., D]` times `factor`: bools `[T, ..., D]`.

    Several neurons share the work where `x` is `[..., 3, D]`. With `u = v - rest` a step is
    `h = u * (1 - 1 / tau) + x / tau`, which fires at `v_threshold - rest`; `1 / tau` is in the weights of the norm.
    """
    lif: LIF = neurons[0].neurons
    threshold = lif.v_threshold - (lif.v_reset or 0.0)
    soft = lif.v_reset is None
    dynamics = {"threshold": threshold, "keep": 1 - 1 / lif.tau, "drop": lif.v_threshold if soft else 0.0}
    if neurons[0].weight is None:
        return _fire(graph, graph.op("Mul", x, graph.constant(factor / lif.tau)), steps, soft, 4, **dynamics)
    weight, bias = (
        np.stack([getattr(neuron, name).detach().numpy() for neuron in neurons]) / lif.tau
        for name in ("weight", "bias")
    )
    several = len(neurons) > 1
    inputs = [x, *map(graph.constant, (weight, bias) if several else (weight[0], bias[0]))]
    return graph.call(
        "SpikeNeurons" if several else "SpikeNeuron",
        partial(_norm_and_fire, num_steps=steps, soft=soft, width=weight.shape[1], several=several),
        *inputs,
        epsilon=neurons[0].eps / factor**2,  # else a norm does not see the factor
        overload=f"{steps} steps",
        steps=steps,
        **dynamics,
    )


def _norm_and_fire(
    graph: Graph,
    x: str,
    weight: str,
    bias: str,
    *,
    num_steps: int,
    soft: bool,
    width: int,
    several: bool,
    epsilon: float,
    steps: Any,
    **dynamics: float,
) -> str:
    if several:
        x = graph.op("LayerNormalization", x, graph.constant(np.ones(width)), axis=-1, epsilon=epsilon)
        x = graph.op("Add", graph.op("Mul", x, weight), bias)
    else:
        x = graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)
    return _fire(graph, x, num_steps, soft, 5 if several else 4, **dynamics)


def _fire(graph: Graph, x: str, steps: int, soft: bool, rank: int, threshold: float, keep: float, drop: float) -> str:
    """The dynamics of currents `[T or 1, ...]`, which are `x / tau`: bools `[T, ...]`.

    A step is `h = u * keep + current`. A neuron fires at the threshold, and `u` becomes `h - drop` in a soft
    reset, else 0.
    """
    level = graph.constant(threshold)
    if steps == 1:
        return graph.op("GreaterOrEqual", x, level)
    x = graph.op("Expand", x, graph.integers(steps, *[1] * (rank - 1)))  # in the first block all steps see the same
    u, fired = None, []
    for current in graph.op("Split", x, outputs=steps, axis=0, num_outputs=steps):
        h = current if u is None else graph.op("Add", graph.op("Mul", u, graph.constant(keep)), current)
        spikes = graph.op("GreaterOrEqual", h, level)
        fired.append(spikes)
        lower = graph.op("Sub", h, graph.constant(drop)) if soft else graph.constant(0.0)
        u = graph.op("Where", spikes, lower, h)
    return graph.op("Concat", *fired, axis=0)


def _head(graph: Graph, model: Any, x: str, attention_mask: str, steps: int, published: bool) -> str:
    """LayerNorm, mean over tokens, classifier, and the mean over the time steps up to each: `[T, B, C]`."""
    features = _norm(graph, x, model.norm)  # [T, B, L, D]
    if published:
        pooled = graph.op("ReduceMean", features, graph.integers(2), keepdims=0)  # [T, B, D]
    else:
        mask = graph.cast(attention_mask, TensorProto.FLOAT)
        tokens = graph.op("ReduceSum", mask, graph.integers(1), keepdims=1)  # [B, 1]
        kept = graph.op("Mul", features, graph.op("Unsqueeze", mask, graph.integers(2)))
        pooled = graph.op("Div", graph.op("ReduceSum", kept, graph.integers(2), keepdims=0), tokens)
    weight, bias = model.classifier.weight.detach().numpy(), graph.constant(model.classifier.bias)
    scores = graph.op("Add", graph.op("MatMul", pooled, graph.constant(weight.T)), bias)
    if steps == 1:
        return scores
    so_far = graph.constant(np.arange(1, steps + 1).reshape(steps, 1, 1))
    return graph.op("Div", graph.op("CumSum", scores, graph.constant(0, np.int64)), so_far)
