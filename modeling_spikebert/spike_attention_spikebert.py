# SPDX-License-Identifier: Apache-2.0
"""The operator `spike_attention`: products of spikes without softmax, and how tokens of sentences lie in memory.

Shapes: `T` time steps, `B` batch, `L` tokens of the longest sentence, `N` tokens of all sentences, `H` heads, `D`
hidden, `d = D / H`.
"""

from collections.abc import Callable
from ctypes import Structure, c_int64
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .compiler_spikebert import compiled
from .native_spikebert import (
    is_traced,
    kernels,
    needs_gradient,
    note,
    obstacle,
    pack_spikes,
    pointers,
    unpack_spikes,
)
from .triton_spikebert import HAS_TRITON, attention_backward, attention_forward

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_HEAD = 256  # bfloat16 has whole numbers up to here


class Tokens(NamedTuple):
    """Where the `N` tokens stand in a batch.

    On a CPU padding is left out. An accelerator would have to wait for the number of tokens, and a compiler does not
    know it: there padding stays in, and the mask keeps it out of keys and values.

    Args:
        batch, length: `B` and `L`.
        mask: `[B, L]`, 1 for tokens and 0 for padding; None if there is no padding.
        places: `[N]`, the place of each token among the `B * L`; None if padding stays in.
        starts: where sentences begin among the `N`, and `N`, `[B + 1]`, in the memory of the CPU; None if padding stays
            in.
    """

    batch: int
    length: int
    mask: Tensor | None = None
    places: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(cls, batch: int, length: int, mask: Tensor | None) -> "Tokens":
        """Of a batch with this mask, of any type."""
        if is_traced() or (mask is not None and mask.device.type != "cpu"):
            return cls(batch, length, mask)
        mask = None if mask is None or mask.all() else mask != 0
        if mask is None:
            return cls(batch, length, starts=torch.arange(batch + 1, device="cpu") * length)
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(batch, length, mask, mask.flatten().nonzero().squeeze(1), starts)

    @property
    def padding(self) -> Tensor | None:
        """`[N]`, 0 for padding that stayed in; None if there is none."""
        return None if self.mask is None or self.places is not None else self.mask.flatten()

    def pack(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[N, D]`."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """`[..., N, D]` to `[..., B, L, D]`, with zeros for padding that was left out."""
        if self.places is not None:
            padded = x.new_zeros(*x.shape[:-2], self.batch * self.length, x.shape[-1])
            x = padded.index_copy(-2, self.places, x)
        return x.unflatten(-2, (self.batch, self.length))

    def silence_padding(self, x: Tensor) -> Tensor:
        """`[..., B, L, D]` with zeros for padding that stayed in."""
        return x if self.mask is None or self.places is not None else x * self.mask.unsqueeze(-1).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """Of the tokens of each sentence: `[N, D]` to `[B, D]`."""
        x = self.unpack(x)  # [B, L, D]
        if self.mask is None:
            return x.mean(1)
        return self.silence_padding(x).sum(1) / self.mask.sum(1, keepdim=True).to(x.dtype)


def spike_attention(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, num_heads: int) -> Tensor:
    """`(q k^T) v` of spikes, sentence by sentence and head by head, without scale and softmax.

    Args:
        query, key, value: `[T, N, D]`, 0 or 1.
        tokens: where the tokens stand; padding takes no part in keys and values.
        num_heads: `H`.

    Returns:
        `[T, N, D]`, whole numbers, in float32 (float64 for float64): half precision rounds those above 256.
    """
    training = needs_gradient(query, key, value)
    form = _form_for(query, key, value, tokens, num_heads, training)
    if form is None:
        return spike_attention_naive(query, key, value, tokens, num_heads)
    if form == "triton":
        query, key, value = (x.unflatten(1, (tokens.batch, tokens.length)) for x in (query, key, value))  # [T, B, L, D]
        run = _TritonAttention.apply if training else attention_forward
        return run(query, key, value, tokens.mask, num_heads).flatten(1, 2)
    if training:
        bits, fired = zip(*(pack_spikes(x) for x in (query, key, value)), strict=True)
        arguments = query, key, value, tokens.starts, num_heads, form, *bits
        out = None if None in fired else _SpikeAttention.apply(*arguments)
    else:
        out = _forward(form, query, key, value, cast(Tensor, tokens.starts), num_heads)
    if out is None:
        note("spike_attention", "naive", "the input is neither 0 nor 1")
        return spike_attention_naive(query, key, value, tokens, num_heads)
    note("spike_attention", "c++", "silent channels are passed over")
    return out


def _form_for(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, num_heads: int, training: bool) -> Any:
    """The C++ library, "triton", or None for the naive form."""
    reason = obstacle(query, key, value)
    if reason is None and not _fit(query, key, value, tokens, num_heads):
        reason = "shapes or types do not fit"  # torch has an error for it
    if reason is None and query.device.type == "cuda" and HAS_TRITON and query.dtype in TRITON_DTYPES:
        if query.shape[2] // num_heads <= MAX_TRITON_HEAD:
            note("spike_attention", "triton", "the spikes are on a GPU")
            return "triton"
        reason = f"a head is wider than {MAX_TRITON_HEAD}"
    if reason is None and (query.device.type != "cpu" or tokens.starts is None):
        reason = f"there are no kernels for {query.device.type}"
    if reason is None and query.dtype not in KERNELS:
        reason = f"there are no kernels for {query.dtype}"
    if reason is not None:
        note("spike_attention", "naive", reason)
        return None
    return kernels("spike_attention", _library, query.numel(), training)


def _fit(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, num_heads: int) -> bool:
    count = tokens.batch * tokens.length if tokens.places is None else len(tokens.places)
    same = all(x.shape == query.shape and x.dtype == query.dtype for x in (key, value))
    return same and query.dim() == 3 and query.shape[1] == count and query.shape[2] % num_heads == 0


def spike_attention_naive(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, num_heads: int) -> Tensor:
    """The naive form of `spike_attention`, differentiated by autograd."""
    query, key, value = (_heads(x, tokens, num_heads) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        # Of a long sentence this order is less work; an exported model takes one order for all lengths.
        if not torch.compiler.is_exporting() and query.shape[-2] > query.shape[-1]:
            context = query @ (key.transpose(-1, -2) @ value)
        else:
            context = (query @ key.transpose(-1, -2)) @ value
    context = context.transpose(2, 3).flatten(3).flatten(1, 2)  # [T, B, H, L, d] -> [T, B * L, D]
    return context if tokens.places is None else context.index_select(1, tokens.places)


def spike_driven_attention(
    query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Spike-driven self-attention: one gate for each channel, open if enough tokens of the sentence ask for it.

        context = query * gate(sum over tokens of key * value)

    Products are those of two spikes, so that a chip needs neurons and sums alone (Yao et al., "Spike-driven
    Transformer", NeurIPS 2023, eq. 7 to 9, with query and value exchanged).

    Args:
        query, key, value: `[T, N, D]`, 0 or 1.
        tokens: where the tokens stand; padding takes no part in the sum.
        gate: neurons, from sums `[T, B, D]` to spikes.

    Returns:
        `[T, N, D]`, 0 or 1.
    """
    asked = tokens.silence_padding(tokens.unpack(key * value))  # [T, B, L, D]
    sums = asked.sum(2, dtype=torch.promote_types(asked.dtype, torch.float32))
    opened = gate(sums).to(query.dtype).unsqueeze(2).expand(-1, -1, tokens.length, -1).flatten(1, 2)  # [T, B * L, D]
    return query * (opened if tokens.places is None else opened.index_select(1, tokens.places))


def spike_counts(query: Tensor, key: Tensor, tokens: Tokens, num_heads: int) -> Tensor:
    """`q k^T`, how many channels fire in a query and a key at once, mean over time steps: `[B, H, L, L]`."""
    query, key = (_heads(x, tokens, num_heads) for x in (query, key))
    return (query @ key.transpose(-1, -2)).mean(0)


def _heads(x: Tensor, tokens: Tokens, num_heads: int) -> Tensor:
    """`[T, N, D]` to `[T, B, H, L, d]`, in the dtype of the products."""
    x = tokens.silence_padding(tokens.unpack(x).to(torch.promote_types(x.dtype, torch.float32)))  # [T, B, L, D]
    return x.unflatten(-1, (num_heads, -1)).transpose(2, 3)


class _SpikeAttention(torch.autograd.Function):
    """The kernels, with gradients; a spike is kept in one bit."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        num_heads: int,
        library: Any,
        *bits: Tensor,  # of query, key and value
    ) -> Tensor | None:
        ctx.num_heads, ctx.library, ctx.dtype = num_heads, library, query.dtype
        ctx.shape = query.shape
        ctx.save_for_backward(*bits, starts)
        return _forward(library, query, key, value, starts, num_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *bits, starts = ctx.saved_tensors
        query, key, value = (unpack_spikes(x, ctx.shape, torch.uint8) for x in bits)
        grads = _backward(ctx.library, query, key, value, grad, starts, ctx.num_heads)
        return *(x.to(ctx.dtype) for x in grads), *[None] * 6


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.num_heads = num_heads
        return attention_forward(query, key, value, mask, num_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        return *attention_backward(query, key, value, grad, mask, ctx.num_heads), None, None


# `q (k^T v)`, each a sum of rows: of `v` over the tokens whose key fires in a channel, and of these sums over the
# channels in which a query fires. The gradients are the same sums, and products where a factor is no spike.
SOURCE = r"""
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <vector>

struct Sizes { int64_t steps, sentences, heads, size, tokens, threads; };  // size: of a head

template <class A, class F>
static void each_head(const int64_t* starts, Sizes z, F f) {
  #pragma omp parallel num_threads(z.threads)
  {
    std::vector<A> room(2 * z.size * z.size + z.size);
    #pragma omp for schedule(dynamic) collapse(3)
    for (int64_t t = 0; t < z.steps; ++t)
      for (int64_t b = 0; b < z.sentences; ++b)
        for (int64_t h = 0; h < z.heads; ++h) {
          const int64_t width = z.heads * z.size;
          f((t * z.tokens + starts[b]) * width + h * z.size, starts[b + 1] - starts[b], width, room.data());
        }
  }
}

// sums[c] = sum of rows[j] over all j with spikes[j, c] != 0
template <class A, class V, class R>
static inline void sum_over_tokens(const V* spikes, const R* rows, A* sums, A* row, int64_t count, int64_t width,
                                   int64_t size) {
  std::fill(sums, sums + size * size, A(0));
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < size; ++i) row[i] = A(rows[j * width + i]);
    for (int64_t c = 0; c < size; ++c)
      if (spikes[j * width + c])
        for (int64_t i = 0; i < size; ++i) sums[c * size + i] += row[i];
  }
}

// out[j] = sum of sums[c] over all c with spikes[j, c] != 0
template <class A, class V>
static inline void sum_over_channels(const V* spikes, const A* sums, A* out, A* row, int64_t count, int64_t width,
                                     int64_t size) {
  for (int64_t j = 0; j < count; ++j) {
    std::fill(row, row + size, A(0));
    for (int64_t c = 0; c < size; ++c)
      if (spikes[j * width + c])
        for (int64_t i = 0; i < size; ++i) row[i] += sums[c * size + i];
    std::copy(row, row + size, out + j * width);
  }
}

// out[j, c] = product of rows[j] and sums[:, c]
template <class A>
static inline void products(const A* rows, const A* sums, A* out, A* row, int64_t count, int64_t width, int64_t size) {
  for (int64_t j = 0; j < count; ++j) {
    std::fill(row, row + size, A(0));
    for (int64_t i = 0; i < size; ++i) {
      const A factor = rows[j * width + i];
      for (int64_t c = 0; c < size; ++c) row[c] += factor * sums[i * size + c];
    }
    std::copy(row, row + size, out + j * width);
  }
}

template <class A>
static inline void transpose(A* square, int64_t size) {
  for (int64_t c = 0; c < size; ++c)
    for (int64_t i = 0; i < c; ++i) std::swap(square[c * size + i], square[i * size + c]);
}

template <class V>
static inline bool are_spikes(const V* x, int64_t count, int64_t width, int64_t size) {
  int others = 0;
  for (int64_t j = 0; j < count; ++j, x += width)
    for (int64_t i = 0; i < size; ++i) others |= (x[i] != 0) & (x[i] != 1);
  return !others;
}

// Returns whether the input is spikes; if not, `out` is not meant.
template <class A, class V>
static int forward(const V* q, const V* k, const V* v, A* out, const int64_t* starts, Sizes z) {
  std::atomic<int> spikes = 1;
  each_head<A>(starts, z, [=, &spikes](int64_t first, int64_t count, int64_t width, A* sums) {
    A* row = sums + 2 * z.size * z.size;
    for (const V* x : {q, k, v})
      if (!are_spikes(x + first, count, width, z.size)) spikes = 0;
    sum_over_tokens(k + first, v + first, sums, row, count, width, z.size);
    sum_over_channels(q + first, sums, out + first, row, count, width, z.size);
  });
  return spikes;
}

template <class A>
static void backward(const uint8_t* q, const uint8_t* k, const uint8_t* v, const A* grad, A* grad_q, A* grad_k,
                     A* grad_v, const int64_t* starts, Sizes z) {
  each_head<A>(starts, z, [=](int64_t first, int64_t count, int64_t width, A* sums) {
    A *grad_sums = sums + z.size * z.size, *row = grad_sums + z.size * z.size;
    sum_over_tokens(k + first, v + first, sums, row, count, width, z.size);
    transpose(sums, z.size);
    products(grad + first, sums, grad_q + first, row, count, width, z.size);
    sum_over_tokens(q + first, grad + first, grad_sums, row, count, width, z.size);
    sum_over_channels(k + first, grad_sums, grad_v + first, row, count, width, z.size);
    transpose(grad_sums, z.size);
    sum_over_channels(v + first, grad_sums, grad_k + first, row, count, width, z.size);
  });
}

#define FORWARD(NAME, A, V)                                                                                          \
  extern "C" int forward_##NAME(const V* q, const V* k, const V* v, A* out, const int64_t* starts, Sizes z) {        \
    return forward(q, k, v, out, starts, z);                                                                         \
  }
#define BACKWARD(A)                                                                                                  \
  extern "C" void backward_##A(const uint8_t* q, const uint8_t* k, const uint8_t* v, const A* grad, A* grad_q,       \
                               A* grad_k, A* grad_v, const int64_t* starts, Sizes z) {                               \
    backward(q, k, v, grad, grad_q, grad_k, grad_v, starts, z);                                                      \
  }
struct bfloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
FORWARD(float32, float, float)
FORWARD(float64, double, double)
FORWARD(bfloat16, float, bfloat16)
FORWARD(uint8, float, uint8_t)
BACKWARD(float)
BACKWARD(double)
"""

KERNELS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.uint8: "uint8"}


class _Sizes(Structure):
    _fields_ = [(name, c_int64) for name in ("steps", "sentences", "heads", "size", "tokens", "threads")]


@cache
def _library() -> Any:
    return compiled(SOURCE)


def _forward(library: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, num_heads: int) -> Tensor | None:
    """None if the input is no spikes."""
    spikes = [x.contiguous() for x in (query, key, value)]
    out = query.new_empty(query.shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    function = getattr(library, f"forward_{KERNELS[query.dtype]}")
    return out if function(*pointers(*spikes, out, starts), _sizes(query, starts, num_heads)) else None


def _backward(
    library: Any, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, starts: Tensor, num_heads: int
) -> list[Tensor]:
    """From spikes in bytes."""
    grad = grad.contiguous()
    grads = [torch.empty_like(grad) for _ in range(3)]
    function = library.backward_double if grad.dtype == torch.float64 else library.backward_float
    function(*pointers(query, key, value, grad, *grads, starts), _sizes(query, starts, num_heads))
    return grads


def _sizes(query: Tensor, starts: Tensor, num_heads: int) -> _Sizes:
    steps, tokens, width = query.shape
    return _Sizes(steps, len(starts) - 1, num_heads, width // num_heads, tokens, torch.get_num_threads())
