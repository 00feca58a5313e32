# SPDX-License-Identifier: Apache-2.0
"""The operator `spike_linear`: a Linear whose input is spikes.

A spike adds a row of the weights to the output, and a silent neuron adds nothing. `torch.nn.functional.linear` is the
naive form. The fast forms, on a CPU: in float32 silent synapses are passed over, forward and for the gradient of the
weights, which is a sum over the tokens at which a neuron fired; for the backward pass a spike is kept in one bit; int8
weights take bytes. Input that is no spikes, as of an adapter that scales it, takes the naive form.

Shapes: `K` inputs, `M` outputs, `R` rows (tokens and time steps).
"""

import math
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .compiler_spikebert import compiled
from .int8_spikebert import dequantized_product, has_kernels, int8_product
from .native_spikebert import (
    BITS_OF_ONE,
    kernels,
    needs_gradient,
    note,
    obstacle,
    pack_spikes,
    spike_dtype,
    state_of,
    unpack_spikes,
)

# An ordinary product is taken for more spikes per neuron and time step than this, and for fewer rows: it takes longer
# to transpose the weights than to multiply these. Near where the two break even on a CPU with AVX2.
MAX_FIRING_RATE = 0.25
MIN_ROWS = 128


def spike_linear(
    spikes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    binary: bool = True,
) -> Tensor:
    """`torch.nn.functional.linear` of spikes.

    Args:
        spikes: `[..., K]`, 0 or 1, in bytes or floating point.
        weight: `[M, K]`, floating point or int8.
        bias: `[M]`.
        weight_scale: of int8 weights, `[M]`: what an output's weights are multiplied with. Such have no gradients.
        binary: False if the input are spike counts, whole numbers up to 255 (with the published shortcut).

    Returns:
        `[..., M]`, floating point.
    """
    reason = obstacle(spikes, weight, bias, weight_scale)
    if weight_scale is not None:
        if reason is None and (needs_gradient(spikes, bias, weight_scale) or spikes.device.type != "cpu"):
            reason = "gradients pass through int8 weights, or there are no kernels for them"
        if reason is None and has_kernels():
            out = int8_product(spikes, weight, bias, weight_scale)
            if out is not None:
                note("spike_linear", "int8", "int8 weights on a CPU")
                return out
        note("spike_linear", "naive", reason or "the input is no whole numbers, or there are no kernels for int8")
        return dequantized_product(spikes, weight, bias, weight_scale)
    dtype = spike_dtype(weight.dtype, spikes.device.type)
    if dtype != weight.dtype:  # as autocast does for products of its own
        spikes, weight, bias = spikes.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    else:  # bytes, and spikes behind the attention product, which is in float32
        spikes = spikes.to(dtype)
    training = needs_gradient(spikes, weight, bias)
    if reason is None:
        reason = _obstacle(spikes, weight, bias, binary, training)
    if reason is not None:
        note("spike_linear", "naive", reason)
        return nn.functional.linear(spikes, weight, bias)
    rows = math.prod(spikes.shape[:-1])
    library = kernels("spike_linear", _library, rows * len(weight), training)
    if library is None:
        return nn.functional.linear(spikes, weight, bias)
    flat = spikes.reshape(rows, spikes.shape[-1])
    bits, fired = pack_spikes(flat)
    if fired is None:
        note("spike_linear", "naive", "the input is neither 0 nor 1")
        return nn.functional.linear(spikes, weight, bias)
    enough = spikes.dtype == torch.float32 and rows >= (MIN_ROWS if training else 1)
    sums = enough and fired <= MAX_FIRING_RATE * flat.numel()
    if sums:
        note("spike_linear", "sums", "silent synapses are passed over")
    else:
        note("spike_linear", "dense", "many spikes, few tokens, or half precision")
    if training:
        out = _SpikeLinear.apply(flat, weight, bias, bits, sums, library)
    else:
        out = _sums(flat, _transposed(weight), bias, library) if sums else nn.functional.linear(flat, weight, bias)
    return out.view(*spikes.shape[:-1], len(weight))


def _obstacle(spikes: Tensor, weight: Tensor, bias: Tensor | None, binary: bool, training: bool) -> str | None:
    """Why float weights take the naive form, or None."""
    if spikes.device.type != "cpu":
        return f"there are no kernels for {spikes.device.type}"
    if not binary:
        return "spike counts are no spikes"
    if spikes.dtype not in BITS_OF_ONE:
        return f"there are no kernels for {spikes.dtype}"
    if not training and spikes.dtype != torch.float32:
        return f"{spikes.dtype} without gradients"
    fits = spikes.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or any(x is not None and x.dtype != spikes.dtype for x in (weight, bias)):
        return "shapes or types do not fit"  # torch has an error for it
    return None


# By the weight: what it was when it was transposed, and the transposed weight.
_TRANSPOSED: Any = WeakTensorKeyDictionary()


def _transposed(weight: Tensor) -> Tensor:
    """`[M, K]` to `[K, M]`; once, and again after the weight was changed."""
    state = state_of(weight)
    before, transposed = _TRANSPOSED.get(weight, (None, None))
    if before != state:
        transposed = weight.detach().t().contiguous()
        _TRANSPOSED[weight] = state, transposed
    return transposed


class _SpikeLinear(torch.autograd.Function):
    """With gradients; keeps a spike in one bit."""

    @staticmethod
    def forward(
        ctx: Any, spikes: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, sums: bool, library: Any
    ) -> Tensor:
        ctx.sums, ctx.library, ctx.shape, ctx.dtype = sums, library, spikes.shape, spikes.dtype
        ctx.save_for_backward(bits, weight)
        return _sums(spikes, weight.t(), bias, library) if sums else nn.functional.linear(spikes, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bits, weight = ctx.saved_tensors
        needs_spikes, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_weight = None
        if needs_weight:
            spikes = unpack_spikes(bits, ctx.shape, ctx.dtype)
            grad_weight = _sums(spikes.t(), grad, None, ctx.library).t() if ctx.sums else grad.t() @ spikes
        return (
            grad @ weight if needs_spikes else None,
            None if grad_weight is None else grad_weight.contiguous(),
            grad.sum(0) if needs_bias else None,
            *[None] * 3,
        )


# sum_spikes: out[r] = bias + sum of weight[k] over all k with spikes[r, k] = 1. For each block of rows first the places
# of those that fired, then the sums, in registers for 96 columns at once. Of `inner` a part comes after the other, so
# that the rows of `weight` that are added stay in the cache. Strides are in elements.
SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

constexpr int64_t ROWS = 64, PART = 1024, LANES = 8, WIDE = 12;
constexpr int64_t ROOM = PART + 1;  // a silent neuron is written, too, and then written over
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

template <int64_t V>
static void sum_rows(const int32_t* fired, int64_t count, const float* weight, int64_t columns, const float* start,
                     float* out) {
  lanes sum[V];
  for (int64_t i = 0; i < V; ++i) sum[i] = start ? *(const lanes*)(start + LANES * i) : lanes{};
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < V; ++i) sum[i] += *(const lanes*)(weight + fired[j] * columns + LANES * i);
  for (int64_t i = 0; i < V; ++i) *(lanes*)(out + LANES * i) = sum[i];
}

extern "C" void sum_spikes(const float* spikes, int64_t rows, int64_t inner, int64_t row_stride, int64_t inner_stride,
                           const float* weight, const float* bias, float* out, int64_t columns, int64_t threads) {
  const int64_t parts = std::max<int64_t>(1, (inner + PART - 1) / PART), part = (inner + parts - 1) / parts;
  // Of few rows each thread takes some.
  const int64_t most = std::clamp<int64_t>((rows + threads - 1) / threads, 1, ROWS);
  #pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> fired(ROWS * ROOM);
    int64_t count[ROWS];
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = p * part, end = std::min(inner, begin + part);
      #pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < rows; first += most) {
        const int64_t block = std::min(most, rows - first);
        std::fill(count, count + block, 0);
        auto see = [&](int64_t r, int64_t k) {
          fired[r * ROOM + count[r]] = k;
          count[r] += spikes[(first + r) * row_stride + k * inner_stride] != 0;
        };
        if (row_stride < inner_stride)
          for (int64_t k = begin; k < end; ++k)
            for (int64_t r = 0; r < block; ++r) see(r, k);
        else
          for (int64_t r = 0; r < block; ++r)
            for (int64_t k = begin; k < end; ++k) see(r, k);
        auto sum = [&](auto width, int64_t c) {
          for (int64_t r = 0; r < block; ++r) {
            float* place = out + (first + r) * columns + c;
            const float* start = p ? place : bias ? bias + c : nullptr;
            sum_rows<width>(&fired[r * ROOM], count[r], weight + c, columns, start, place);
          }
        };
        int64_t c = 0;
        for (; c + LANES * WIDE <= columns; c += LANES * WIDE) sum(std::integral_constant<int64_t, WIDE>(), c);
        for (; c + LANES <= columns; c += LANES) sum(std::integral_constant<int64_t, 1>(), c);
        for (; c < columns; ++c)
          for (int64_t r = 0; r < block; ++r) {
            float& place = out[(first + r) * columns + c];
            float one = p ? place : bias ? bias[c] : 0;
            for (int64_t j = 0; j < count[r]; ++j) one += weight[fired[r * ROOM + j] * columns + c];
            place = one;
          }
      }
    }
  }
}
"""


@cache
def _library() -> Any:
    library = compiled(SOURCE)
    if library is not None:
        library.sum_spikes.argtypes = [c_void_p, *[c_int64] * 4, c_void_p, c_void_p, c_void_p, c_int64, c_int64]
    return library


def _sums(spikes: Tensor, weight: Tensor, bias: Tensor | None, library: Any) -> Tensor:
    """`spikes @ weight + bias` of `[R, K]` and `[K, M]`."""
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = weight.new_empty(spikes.shape[0], weight.shape[1])
    library.sum_spikes(
        spikes.data_ptr(),
        *spikes.shape,
        *spikes.stride(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        weight.shape[1],
        torch.get_num_threads(),
    )
    return out
