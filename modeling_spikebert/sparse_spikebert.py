# SPDX-License-Identifier: Apache-2.0
"""A Linear on binary spikes that passes over silent synapses, on a CPU, in float32.

A spike adds a row of the weights to the output, and a silent neuron adds nothing: sums instead of products, and as few
as there are spikes. The gradient of the weights is such a sum, too, over the tokens at which a neuron fired; only that
of the spikes is a product. `torch.nn.functional.linear` is the oracle, and what runs where this does not pay.

Compiled by the compiler behind `torch.compile`, at the first call, in a few seconds; later processes find it in its
cache.
"""

import warnings
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

# An ordinary product is taken for more spikes per neuron and time step than this, and for fewer tokens: it takes longer
# to transpose the weights than to multiply these. Near where the two break even on a CPU with AVX2.
MAX_FIRING_RATE = 0.25
MIN_TOKENS = 128

# out[r] = bias + sum of weight[k] over all k with spikes[r, k] = 1. For each block of rows first the numbers of those
# that fired, then the sums, in registers for 96 columns at once. Of `inner` a part comes after the other, so that the
# rows of `weight` that are added stay in the cache. Strides are in elements.
SOURCE = """
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

extern "C" void spike_mm(const float* spikes, int64_t rows, int64_t inner, int64_t row_stride, int64_t inner_stride,
                         const float* weight, const float* bias, float* out, int64_t columns, int64_t threads) {
  const int64_t parts = std::max<int64_t>(1, (inner + PART - 1) / PART), part = (inner + parts - 1) / parts;
  #pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> fired(ROWS * ROOM);
    int64_t count[ROWS];
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = p * part, end = std::min(inner, begin + part);
      #pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t block = std::min(ROWS, rows - first);
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


def spike_linear(spikes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear` of binary spikes, with gradients.

    Args:
        spikes: `[..., K]`, 0 or 1, float32 on a CPU. What comes of other numbers is not defined.
        weight: `[M, K]`.
        bias: `[M]`.

    Returns:
        `[..., M]`.
    """
    return _spike_linear(spikes.flatten(0, -2), weight, bias).unflatten(0, spikes.shape[:-1])


# Checkpoints bring copies of this file, each of which registers operators of its own; and the compiler's cache on disk
# knows an operator, gradient included, by its name alone. So the name follows from that of the module and its text.
_NAMESPACE = f"spikebert_{crc32(__name__.encode() + Path(__file__).read_bytes()):08x}"


@torch.library.custom_op(f"{_NAMESPACE}::spike_linear", mutates_args=(), device_types="cpu")
def _spike_linear(spikes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[N, K]`, `[M, K]`, `[M]` to `[N, M]`."""
    if _takes_sums(spikes):
        return _sum(spikes, weight.t(), bias)
    return torch.nn.functional.linear(spikes, weight, bias)


@torch.library.custom_op(f"{_NAMESPACE}::weight_gradient", mutates_args=(), device_types="cpu")
def _weight_gradient(spikes: Tensor, grad: Tensor) -> Tensor:
    """`[N, K]`, `[N, M]` to `[M, K]`."""
    if _takes_sums(spikes):
        return _sum(spikes.t(), grad, None).t().contiguous()
    return grad.t() @ spikes


@_spike_linear.register_fake
def _(spikes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return spikes.new_empty(spikes.shape[0], weight.shape[0])


@_weight_gradient.register_fake
def _(spikes: Tensor, grad: Tensor) -> Tensor:
    return spikes.new_empty(grad.shape[1], spikes.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    spikes, weight = ctx.saved_tensors
    needs_spikes, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        grad @ weight if needs_spikes else None,
        _weight_gradient(spikes, grad) if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


_spike_linear.register_autograd(_backward, setup_context=_keep)


def _takes_sums(spikes: Tensor) -> bool:
    """Whether sums pay, for spikes `[N, K]`."""
    pays = len(spikes) >= MIN_TOKENS and bool(spikes.sum() <= MAX_FIRING_RATE * spikes.numel())
    return pays and _library() is not None


def _sum(spikes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`spikes @ weight + bias` of `[N, K]` and `[K, M]`."""
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = weight.new_empty(spikes.shape[0], weight.shape[1])
    _library().spike_mm(
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


@cache
def _library() -> Any:
    """The compiled source, a `ctypes.CDLL`, or None where it cannot be compiled."""
    try:
        from torch._inductor.codecache import CppCodeCache  # slow to import

        library = CppCodeCache.load(SOURCE)
        library.spike_mm.argtypes = [c_void_p, *[c_int64] * 4, c_void_p, c_void_p, c_void_p, c_int64, c_int64]
        library.spike_mm.restype = None
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(f"Silent synapses are not passed over, since the compiler failed: {reason}", stacklevel=2)
        return None
    return library
