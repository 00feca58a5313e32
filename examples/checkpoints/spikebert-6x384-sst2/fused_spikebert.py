# SPDX-License-Identifier: Apache-2.0
"""A block of SpikeBERT in few passes over memory: the modules and weights of `modeling_spikebert`, other operations.

What the plain block does step by step and apart is done at once here, without changing a spike:

- LayerNorm and neurons in one pass over all time steps (`kernels_spikebert`);
- one matrix product for query, key and value, and none repeated for time steps with the same input;
- `q (k^T v)` where that is less work than `(q k^T) v`; both are sums of integers;
- on a CPU nothing but attention sees padding: tokens of all sentences lie one behind the other;
- for the backward pass currents are kept and spikes computed again, or kept in one byte (attention);
- on a CPU in float32, silent synapses are passed over (`sparse_spikebert`);
- where weights are int8 (`quantization_spikebert`), spikes stay in one byte from neuron to product.

On a CPU what lies before and behind the attention is compiled, once for all layers, batches and lengths; on a GPU it
runs as it is, with Triton kernels for LayerNorm and neurons.

Shapes: `T` time steps, `B` batch, `L` tokens, `N` tokens of all sentences, `H` heads, `D` hidden, `d = D / H`.
"""

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels_spikebert import LIFConstants, arithmetic_dtype, has_triton, norm_lif, norm_lif_steps
from .quantization_spikebert import PackedLinear, int8_linear, is_int8, pack
from .sparse_spikebert import spike_linear

# From this number of elements in the shortcut on, compiled blocks save in some two hundred training steps what the
# compiler takes. A forward pass alone is often made but once.
WORTH_COMPILING = {"training": 2**18, "evaluation": 2**22}

# By name, because remote code brings copies of its own.
OWN_MODULES = ("SpikeBertSelfAttention", "SpikeBertMLP", "SpikeBertNeuron", "Int8Linear")

# In bfloat16 whole numbers are exact up to here.
EXACT_IN_BFLOAT16 = 256


class Tokens(NamedTuple):
    """Where the `N` tokens stand in a batch.

    Args:
        batch, length: `B` and `L`.
        places: `[N]`, the place of each token among the `B * L`; None if all of them are taken as tokens.
        mask: `[B, L]`, 0 for those that make no keys and values; None if there are none.
    """

    batch: int
    length: int
    places: Tensor | None
    mask: Tensor | None

    def keep(self, sentences: Tensor) -> "tuple[Tensor, Tokens]":
        """Without other sentences than those of the mask `[B]`: which tokens stay, `[N]`, and where they stand."""
        stays = sentences.repeat_interleave(self.length)  # [B * L]
        if self.places is None:
            mask = None if self.mask is None else self.mask[sentences]
            return stays, Tokens(int(sentences.sum()), self.length, None, mask)
        stays = stays[self.places]
        rank = sentences.cumsum(0) - 1  # [B], the new number of each sentence
        old, column = self.places[stays] // self.length, self.places[stays] % self.length
        return stays, Tokens(int(sentences.sum()), self.length, rank[old] * self.length + column, None)


def takes_fused_path(encoder: Any, hidden_states: Tensor) -> bool:
    """The one place that decides between `fused_layer` and the plain modules.

    `config.implementation` "plain" and "fused" are orders. With "auto" there must be what makes it fast (a C++
    compiler, or Triton on a GPU), and on a CPU the compiler must be worth waiting for: for large batches, and for int8
    weights and early exit, which nobody asks for but for speed. Modules that somebody replaced or put hooks on have to
    be called, so they take the plain path.
    """
    config, query = encoder.config, encoder.layer[0].attention.query
    if config.implementation == "plain" or torch.compiler.is_compiling():  # an outer compiler wants the plain code
        return False
    if config.implementation == "auto" and not _pays(encoder, hidden_states):
        return False
    obstacle = None
    if is_int8(query) and (encoder.training or (torch.is_grad_enabled() and hidden_states.requires_grad)):
        obstacle = "bytes have no gradients, and int8 weights no training mode"
    blocks = [block for layer in encoder.layer for block in (layer.attention, layer.mlp)]
    if not all(_is_known(module) for block in blocks for module in (block, *block._modules.values())):
        obstacle = "a module inside the blocks was replaced or has hooks"
    if not all(_has_equal_neurons(layer.attention) for layer in encoder.layer):
        obstacle = "the neurons of query, key and value differ"
    if obstacle is not None and config.implementation == "fused":
        raise ValueError(f"implementation='fused' is not possible: {obstacle}. Set config.implementation to 'auto'.")
    return obstacle is None


def _pays(encoder: Any, hidden_states: Tensor) -> bool:
    attention = encoder.layer[0].attention
    if hidden_states.device.type == "cuda":
        return has_triton(attention.query_neuron.surrogate)
    if hidden_states.device.type != "cpu" or not _has_compiler():
        return False
    if is_int8(attention.query):
        return torch.backends.mkldnn.is_available()
    large = hidden_states.numel() >= WORTH_COMPILING["training" if encoder.training else "evaluation"]
    return large or (encoder.config.exit_threshold is not None and not encoder.training)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what this module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _is_known(module: nn.Module) -> bool:
    """Whether blocks are built from this class, and nothing about it was changed."""
    cls = type(module)
    known = cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity) or cls.__name__ in OWN_MODULES
    return known and not has_hooks(module) and all(type(p) is nn.Parameter for p in module._parameters.values())


def _has_equal_neurons(attention: Any) -> bool:
    neurons = (attention.query_neuron, attention.key_neuron, attention.value_neuron)
    query, key, value = [(n.tau, n.v_threshold, n.v_reset, n.surrogate) for n in neurons]
    return query == key == value


@cache
def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def pack_tokens(hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tokens]:
    """Input of the first block.

    Args:
        hidden_states: `[T, B, L, D]`.
        token_mask: `[B, L]`, 1 for tokens and 0 for padding, or None.

    Returns:
        the same without padding, `[T, N, D]`, and where its tokens stand.
    """
    batch, length = hidden_states.shape[1:3]
    x = hidden_states.flatten(1, 2)  # [T, B * L, D]
    if token_mask is None:
        return x, Tokens(batch, length, None, None)
    if x.device.type != "cpu":  # counting tokens would make the device wait
        return x, Tokens(batch, length, None, token_mask)
    places = token_mask.flatten().nonzero().squeeze(1)
    if len(places) == x.shape[1]:
        return x, Tokens(batch, length, None, None)
    return _once(x, lambda x: x.index_select(1, places)), Tokens(batch, length, places, None)


def _once(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(x)` of `[T, ...]`, computed once if `x` is the same at each time step."""
    return function(x[:1]).expand(len(x), *(-1 for _ in x.shape[1:])) if x.stride(0) == 0 else function(x)


def unpack_tokens(x: Tensor, tokens: Tokens) -> Tensor:
    """`[..., N, D]` to `[..., B, L, D]`, with zeros for padding."""
    if tokens.places is not None:
        padded = x.new_zeros(*x.shape[:-2], tokens.batch * tokens.length, x.shape[-1])
        x = padded.index_copy(-2, tokens.places, x)
    return x.unflatten(-2, (tokens.batch, tokens.length))


def resting_membranes(layer: Any, num_tokens: int) -> list[Tensor]:
    """Membranes of a block before the first time step, `[N, G, D]` for each layer of neurons, in their order."""
    attention, mlp = layer.attention, layer.mlp
    hidden, inner = (1, attention.output.in_features), (1, mlp.intermediate.out_features)
    shapes = [hidden] if _has_membrane_shortcut(layer) else []
    shapes += [(3, hidden[1]), hidden, hidden, inner]
    if not _has_membrane_shortcut(layer):
        shapes.append(hidden)
    weight, rest = attention.query_norm.weight, attention.query_neuron.v_reset or 0.0
    dtype = arithmetic_dtype(weight.dtype)
    return [torch.full((num_tokens, *shape), rest, dtype=dtype, device=weight.device) for shape in shapes]


def fused_layer(
    layer: Any, x: Tensor, tokens: Tokens, output_firing_rates: bool, membranes: list[Tensor] | None = None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """What `SpikeBertLayer` computes.

    Args:
        layer: a `SpikeBertLayer`.
        x: the shortcut `[T, N, D]`.
        tokens: where its tokens stand.
        output_firing_rates: whether to return firing rates.
        membranes: for a part of the time steps, those that `resting_membranes` or the call before returned; without
            gradients. None for all time steps.

    Returns:
        The shortcut behind the block, `[T, N, D]`; the signals of `FIRING_RATE_NAMES` as spikes per neuron and time
        step, `[N, 7]`; and the membranes, if they were asked for.
    """
    attention, mlp = layer.attention, layer.mlp
    packed: tuple[PackedLinear | None, ...] = (None,) * 4
    if is_int8(attention.query) and x.device.type == "cpu":
        side_by_side = ((attention.query, attention.key, attention.value), (attention.output,))
        packed = tuple(pack(linears) for linears in (*side_by_side, (mlp.intermediate,), (mlp.output,)))
    if x.stride(0) == 0 and _has_membrane_shortcut(layer):
        x = x.contiguous()  # a first block that differs would be compiled apart
    split = 2 if _has_membrane_shortcut(layer) else 1
    first, second = (None, None) if membranes is None else (membranes[:split], membranes[split:])

    qkv, rates, first = _run(_before_attention, layer, x, packed[0], first, output_firing_rates)
    context = _SpikeAttention.apply(qkv, tokens, attention.num_heads)
    x, more_rates, second = _run(_behind_attention, layer, x, context, packed[1:], second, output_firing_rates)
    firing_rates = torch.cat([rates, more_rates], dim=-1) if output_firing_rates else None
    return x, firing_rates, first + second


def _has_membrane_shortcut(layer: Any) -> bool:
    return not isinstance(layer.attention.input_neuron, nn.Identity)


def _run(function: Callable[..., Any], layer: Any, *args: Any) -> Any:
    """Calls `function`, on a CPU compiled."""
    if args[0].device.type != "cpu" or not _has_compiler():
        return function(layer, *args)
    for x in args:
        for tensor in x if isinstance(x, list) else [x]:
            if isinstance(tensor, Tensor):  # one compiled function for all numbers of tokens
                torch._dynamo.maybe_mark_dynamic(tensor, 0 if isinstance(x, list) else 1)
    return _compiled(function)(layer, *args)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # By default the compiler gives up after 8 variants, which are a mistake in other code. These vary with dtype,
    # training, number of steps and the like.
    more: dict[str, Any] = (
        {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    )
    return torch.compile(function, backend=_inductor, **more)


def _inductor(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
    """The default backend, but currents are all that is kept for the backward pass: the budget makes it compute spikes
    again. Where it fails (no Python headers, say), the same operations run one by one."""
    try:
        with torch._functorch.config.patch(activation_memory_budget=0.5):
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:
        warnings.warn(
            f"The compiler failed, so that SpikeBERT is slower than it could be: {str(error).splitlines()[0]} Mend its "
            "installation, or set config.implementation to 'plain'.",
            stacklevel=2,
        )
        return graph


def _before_attention(
    layer: Any, x: Tensor, packed: PackedLinear | None, membranes: list[Tensor] | None, output_firing_rates: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """From the shortcut to query, key and value: spikes `[T, N, 3 * D]`, firing rates `[N, 4]`."""
    attention = layer.attention
    dtype = _spike_dtype(attention.query)
    neurons = _Neurons(membranes)
    if _has_membrane_shortcut(layer):
        spikes = neurons(x, attention.input_neuron, dtype, attention.input_norm)
    else:
        spikes = _once(x, lambda x: x.to(dtype))
    current = _linear(layer, spikes, packed, attention.query, attention.key, attention.value)
    norms = (attention.query_norm, attention.key_norm, attention.value_norm)
    qkv = neurons(current, attention.query_neuron, _product_dtype(attention, dtype), *norms)
    rates = _rates(spikes, *qkv.chunk(3, dim=-1)) if output_firing_rates else None
    return qkv, rates, neurons.membranes


def _behind_attention(
    layer: Any,
    x: Tensor,
    context: Tensor,
    packed: tuple[PackedLinear | None, ...],
    membranes: list[Tensor] | None,
    output_firing_rates: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """From shortcut and attention product to the shortcut behind the block, firing rates `[N, 3]`."""
    attention, mlp = layer.attention, layer.mlp
    dtype = _spike_dtype(attention.output)
    neurons = _Neurons(membranes)
    before = _has_membrane_shortcut(layer)

    def add(x: Tensor, current: Tensor, module: Any) -> Tensor:
        branch = current if before else neurons(current, module.output_neuron, dtype, module.output_norm)
        return x + module.dropout(branch.to(x.dtype))

    scaled = context.to(arithmetic_dtype(context.dtype)) * attention.scale
    norms = (attention.context_norm,) if before else ()
    context_spikes = neurons(scaled, attention.context_neuron, dtype, *norms)
    x = add(x, _linear(layer, context_spikes, packed[0], attention.output), attention)
    spikes = neurons(x, mlp.input_neuron, dtype, mlp.input_norm) if before else x.to(dtype)
    current = _linear(layer, spikes, packed[1], mlp.intermediate)
    intermediate = neurons(current, mlp.intermediate_neuron, dtype, mlp.intermediate_norm)
    x = add(x, _linear(layer, intermediate, packed[2], mlp.output), mlp)
    rates = _rates(context_spikes, spikes, intermediate) if output_firing_rates else None
    return x, rates, neurons.membranes


class _Neurons:
    """Calls layers of neurons one after the other, and hands their membranes from one call to the next."""

    def __init__(self, before: list[Tensor] | None):
        self.before = before
        self.membranes: list[Tensor] = []

    def __call__(self, x: Tensor, neuron: Any, dtype: torch.dtype, *norms: nn.LayerNorm) -> Tensor:
        """`[T, N, G * D]` to spikes of this shape; with a LayerNorm for each of `G` groups, or none."""
        weight = torch.stack([norm.weight for norm in norms]) if norms else None
        bias = torch.stack([norm.bias for norm in norms]) if norms else None
        eps = norms[0].eps if norms else 0.0
        constants = LIFConstants(neuron.tau, neuron.v_threshold, neuron.v_reset, neuron.surrogate, eps)
        x = x.unflatten(-1, (len(norms) or 1, -1))
        if self.before is None:
            return norm_lif(x, weight, bias, constants, dtype).flatten(-2)
        v = self.before[len(self.membranes)]
        spikes, v = norm_lif_steps(x, weight, bias, v, constants, dtype)
        self.membranes.append(v)
        return spikes.flatten(-2)


def _linear(layer: Any, spikes: Tensor, packed: PackedLinear | None, *modules: Any) -> Tensor:
    """These Linears on the same spikes, side by side: `[T, N, D]` to `[T, N, sum of out_features]`."""
    if len(spikes) > 1 and spikes.stride(0) == 0:  # as the input of the published model
        return _once(spikes, lambda spikes: _linear(layer, spikes, packed, *modules))
    if packed is not None:
        return int8_linear(spikes, packed)
    if is_int8(modules[0]):
        return torch.cat([module(spikes) for module in modules], dim=-1)
    weight = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
    bias = torch.cat([module.bias for module in modules]) if len(modules) > 1 else modules[0].bias
    weight, bias = weight.to(spikes.dtype), bias.to(spikes.dtype)
    binary = _has_membrane_shortcut(layer)  # the other kind has spike counts, too
    if binary and spikes.dtype == torch.float32 and spikes.device.type == "cpu":
        return spike_linear(spikes, weight, bias)
    return nn.functional.linear(spikes, weight, bias)


def _rates(*signals: Tensor) -> Tensor:
    """Spikes per neuron and time step of each token: `[T, N, D]` each to `[N, number of signals]`."""
    dtype = arithmetic_dtype(signals[0].dtype)
    return torch.stack([signal.mean((0, 2), dtype=dtype) for signal in signals], dim=-1)


class _SpikeAttention(torch.autograd.Function):
    """`(q k^T) v` of spikes, heads apart, unscaled; keeps its input in one byte for the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, tokens: Tokens, num_heads: int) -> Tensor:
        ctx.tokens, ctx.num_heads, ctx.dtype = tokens, num_heads, qkv.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(qkv.to(torch.uint8))
        query, key, value = _heads(qkv, tokens, num_heads, 3)
        with torch.autocast(qkv.device.type, enabled=False):
            if _is_long(query):
                context = query @ (key.transpose(-1, -2) @ value)
            else:
                context = (query @ key.transpose(-1, -2)) @ value
        return _rows([context], tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (spikes,) = ctx.saved_tensors
        query, key, value = _heads(spikes.to(ctx.dtype), ctx.tokens, ctx.num_heads, 3)
        (grad,) = _heads(grad, ctx.tokens, ctx.num_heads, 1)
        if _is_long(query):
            grad_product = query.transpose(-1, -2) @ grad  # [T, B, H, d, d]
            grad_query = grad @ (key.transpose(-1, -2) @ value).transpose(-1, -2)
            grad_key, grad_value = value @ grad_product.transpose(-1, -2), key @ grad_product
        else:
            grad_scores = grad @ value.transpose(-1, -2)  # [T, B, H, L, L]
            grad_query, grad_key = grad_scores @ key, grad_scores.transpose(-1, -2) @ query
            grad_value = key @ (query.transpose(-1, -2) @ grad)
        if ctx.tokens.mask is not None:
            mask = ctx.tokens.mask[:, None, :, None].to(grad.dtype)
            grad_key, grad_value = grad_key * mask, grad_value * mask
        return _rows([grad_query, grad_key, grad_value], ctx.tokens), None, None


def _is_long(query: Tensor) -> bool:
    """Whether sentences are longer than heads are wide: then `q (k^T v)` is less work than `(q k^T) v`."""
    return query.shape[-2] > query.shape[-1]


def _heads(x: Tensor, tokens: Tokens, num_heads: int, parts: int) -> list[Tensor]:
    """`[T, N, parts * D]` to `parts` tensors `[T, B, H, L, d]`; of three, key and value are 0 for padding."""
    x = unpack_tokens(x, tokens).unflatten(-1, (parts, num_heads, -1))  # [T, B, L, parts, H, d]
    query, *rest = x.permute(3, 0, 1, 4, 2, 5)
    if tokens.mask is not None:
        rest = [part * tokens.mask[:, None, :, None].to(part.dtype) for part in rest]
    return [query, *rest]


def _rows(parts: list[Tensor], tokens: Tokens) -> Tensor:
    """The way back: `parts` tensors `[T, B, H, L, d]` to `[T, N, parts * D]`."""
    x = torch.stack([part.transpose(2, 3) for part in parts], dim=3)  # [T, B, L, parts, H, d]
    x = x.flatten(3).flatten(1, 2)
    return x if tokens.places is None else x.index_select(1, tokens.places)


def _spike_dtype(linear: Any) -> torch.dtype:
    """What the matrix products take their spikes in; 0, 1 and counts up to 255 are exact in all of these."""
    weight = linear.weight
    if is_int8(linear):
        return torch.uint8 if weight.device.type == "cpu" else torch.bfloat16
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def _product_dtype(attention: Any, dtype: torch.dtype) -> torch.dtype:
    """What the attention products take their spikes in; they have no int8 kernels.

    bfloat16 rounds sums above 256. Without a norm behind the product that changes no spike if such a current makes its
    neuron fire either way, and a hard reset forgets by how much.
    """
    if dtype not in (torch.uint8, torch.bfloat16):
        return dtype
    neuron = attention.context_neuron
    normed = not isinstance(attention.context_norm, nn.Identity)
    if (
        normed
        or neuron.v_reset is None
        or EXACT_IN_BFLOAT16 * attention.scale < neuron.tau * (neuron.v_threshold - neuron.v_reset)
    ):
        return torch.float32
    return torch.bfloat16
