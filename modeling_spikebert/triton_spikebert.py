# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the operators `norm_lif` and `spike_attention`, for GPUs of NVIDIA and AMD.

The oracles are the naive forms, which have the equations.

LayerNorm and neurons go over all time steps in one pass over memory. Nothing is kept for the backward pass, which
computes norms and membranes again. A program takes rows, the columns of a token, through all time steps. Without a
LayerNorm columns do not need each other: then rows are pieces of `PIECE` elements of what is one long row at each time
step.

The attention products keep the counts `q k^T` of a sentence on the chip. They are whole numbers up to the size of a
head, so that half precision has them exactly.

Shapes, once for the whole file: `T` time steps, `B` sentences, `L` tokens of each, `N` tokens, `H` heads, `D` columns.
"""

import math
from typing import Any, no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True

PIECE = 1024
# Programs of the backward pass with a LayerNorm. Each adds up the gradients of weight and bias over its rows, so there
# should be few, but enough for all processors of a large GPU.
PROGRAMS = 1024
# Values that a program takes at once, and a thread of it: many, so that weights are read once for several rows and many
# reads are under way; few, so that what the backward pass keeps of a time step stays in registers. The best on an H200.
FORWARD_TILE, FORWARD_PER_THREAD = 4096, 32
BACKWARD_TILE, BACKWARD_PER_THREAD = 1024, 16

if HAS_TRITON:
    # Constants are `constexpr`, since Triton rounds other floating point arguments to float32. Where a tile begins is
    # counted in int64, since an index of int32 would overflow; inside a tile int32 is enough.

    @triton.jit
    @no_type_check
    def _normalise(x, mask, eps: tl.constexpr, width: tl.constexpr):
        """Rows without their means, times the scales that make their variances 1; means and scales, `[tile, 1]`."""
        mean = tl.sum(x, 1)[:, None] / width
        centred = tl.where(mask, x - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / width + eps)
        return centred * scale, mean, scale

    @triton.jit
    @no_type_check
    def _step(x, v, inverse_tau: tl.constexpr, v_threshold: tl.constexpr, rest: tl.constexpr, is_soft: tl.constexpr):
        """The charged membrane, and the membrane after the reset."""
        h = v + (x - (v - rest)) * inverse_tau
        return h, tl.where(h >= v_threshold, h - v_threshold if is_soft else rest, h)

    @triton.jit
    @no_type_check
    def _forward_kernel(
        x_ptr,
        weight_ptr,  # None without LayerNorm
        bias_ptr,
        spikes_ptr,
        stride_t,  # of x
        stride_n,
        step_size,  # elements of a time step, N * D
        steps: tl.constexpr,
        width: tl.constexpr,
        tile: tl.constexpr,  # rows of a program
        block: tl.constexpr,  # columns, to the next power of two
        dtype: tl.constexpr,
        eps: tl.constexpr,
        inverse_tau: tl.constexpr,
        v_threshold: tl.constexpr,
        rest: tl.constexpr,
        is_soft: tl.constexpr,
    ):
        rows = tl.arange(0, tile)[:, None]
        columns = tl.arange(0, block)[None, :]
        first = tl.cast(tl.program_id(0), tl.int64) * tile
        mask = (columns < width) & (rows * width + columns < step_size - first * width)
        x_tile = x_ptr + first * stride_n
        spikes_tile = spikes_ptr + first * width
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + columns, columns < width, other=0.0).to(dtype)

        v = tl.full([tile, block], rest, dtype)
        for _t in tl.static_range(steps):
            x = tl.load(x_tile + (rows * stride_n + columns), mask, other=0.0).to(dtype)
            if weight_ptr is not None:
                normalised, _mean, _scale = _normalise(x, mask, eps, width)
                x = normalised * weight + bias
            h, v = _step(x, v, inverse_tau, v_threshold, rest, is_soft)
            tl.store(spikes_tile + (rows * width + columns), (h >= v_threshold).to(tl.float32), mask)
            x_tile += stride_t
            spikes_tile += step_size

    @triton.jit(do_not_specialize=["tiles"])  # it changes from batch to batch
    @no_type_check
    def _backward_kernel(
        x_ptr,
        weight_ptr,  # None without LayerNorm
        bias_ptr,
        grad_spikes_ptr,
        grad_x_ptr,
        grad_weight_ptr,  # [programs, D]
        grad_bias_ptr,
        tiles,
        stride_t,  # of x
        stride_n,
        step_size,  # elements of a time step, N * D
        steps: tl.constexpr,
        width: tl.constexpr,
        tile: tl.constexpr,  # rows that a program takes at once
        block: tl.constexpr,  # columns, to the next power of two
        dtype: tl.constexpr,
        eps: tl.constexpr,
        inverse_tau: tl.constexpr,
        v_threshold: tl.constexpr,
        rest: tl.constexpr,
        is_soft: tl.constexpr,
        peak: tl.constexpr,  # the surrogate's derivative at distance d is peak / (1 + (slope * d) ** 2)
        slope: tl.constexpr,
    ):
        rows = tl.arange(0, tile)[:, None]
        columns = tl.arange(0, block)[None, :]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + columns, columns < width, other=0.0).to(dtype)
            grad_weight = tl.full([tile, block], 0.0, dtype)
            grad_bias = tl.full([tile, block], 0.0, dtype)

        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            first = tl.cast(index, tl.int64) * tile
            mask = (columns < width) & (rows * width + columns < step_size - first * width)
            x_tile = x_ptr + first * stride_n
            place = first * width

            # once more forward, for the membrane; what a time step leaves is kept in registers
            means, scales, charged = (), (), ()
            v = tl.full([tile, block], rest, dtype)
            for _t in tl.static_range(steps):
                x = tl.load(x_tile + (rows * stride_n + columns), mask, other=0.0).to(dtype)
                if weight_ptr is not None:
                    normalised, mean, scale = _normalise(x, mask, eps, width)
                    means += (mean,)
                    scales += (scale,)
                    x = normalised * weight + bias
                h, v = _step(x, v, inverse_tau, v_threshold, rest, is_soft)
                charged += (h,)
                x_tile += stride_t
                place += step_size

            grad_v = tl.full([tile, block], 0.0, dtype)
            for t in tl.static_range(steps - 1, -1, -1):
                x_tile -= stride_t
                place -= step_size
                distance = charged[t] - v_threshold
                if not is_soft:  # a hard reset cuts the path through time
                    grad_v = tl.where(distance < 0, grad_v, 0.0)
                offsets = rows * width + columns
                grad_spikes = tl.load(grad_spikes_ptr + place + offsets, mask, other=0.0).to(dtype)
                steepness = slope * distance
                grad_h = grad_v + grad_spikes * (peak / (1.0 + steepness * steepness))
                grad = grad_h * inverse_tau
                grad_v = grad_h - grad
                if weight_ptr is not None:
                    if t != steps - 1:  # that of the last step is still there
                        x = tl.load(x_tile + (rows * stride_n + columns), mask, other=0.0).to(dtype)
                        normalised = (x - means[t]) * scales[t]
                    grad_weight += grad * normalised
                    grad_bias += grad
                    grad *= weight
                    along = tl.sum(grad * normalised, 1)[:, None] / width
                    grad = scales[t] * (grad - tl.sum(grad, 1)[:, None] / width - normalised * along)
                tl.store(grad_x_ptr + place + offsets, grad, mask)

        if weight_ptr is not None:
            place = tl.cast(tl.program_id(0), tl.int64) * width
            columns = tl.arange(0, block)
            tl.store(grad_weight_ptr + place + columns, tl.sum(grad_weight, 0), columns < width)
            tl.store(grad_bias_ptr + place + columns, tl.sum(grad_bias, 0), columns < width)

    @triton.jit
    @no_type_check
    def _load(ptr, rows, there, width, size: tl.constexpr, block: tl.constexpr):
        """Rows of a head, `[rows, block]`, with zeros for those that are not there."""
        columns = tl.arange(0, block)[None, :]
        return tl.load(ptr + rows[:, None] * width + columns, there[:, None] & (columns < size), other=0.0)

    @triton.jit
    @no_type_check
    def _store(ptr, x, rows, length, width, size: tl.constexpr, block: tl.constexpr):
        columns = tl.arange(0, block)[None, :]
        tl.store(ptr + rows[:, None] * width + columns, x, (rows < length)[:, None] & (columns < size))

    @triton.jit
    @no_type_check
    def _rows(mask_ptr, start, length, tokens: tl.constexpr):
        """Places of tokens in their sentence, and which of them are no padding."""
        rows = start + tl.arange(0, tokens)
        there = rows < length
        if mask_ptr is not None:
            there = there & (tl.load(mask_ptr + rows, there, other=0) != 0)
        return rows, there

    # Programs: (sentence and time step, a piece of its tokens, head); only the first may be many.
    ATTENTION_ARGUMENTS = ["length", "batch"]  # they change from batch to batch

    @triton.jit(do_not_specialize=ATTENTION_ARGUMENTS)
    @no_type_check
    def _attention_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        out_ptr,
        mask_ptr,  # [B, L], or None
        length,
        batch,
        size: tl.constexpr,  # of a head
        block: tl.constexpr,  # to the next power of two
        tokens: tl.constexpr,  # of a piece
        precision: tl.constexpr,
    ):
        width = tl.num_programs(2) * size
        place = tl.cast(tl.program_id(0), tl.int64) * length * width + tl.program_id(2) * size
        if mask_ptr is not None:
            mask_ptr += tl.program_id(0) % batch * length
        rows, there = _rows(mask_ptr, tl.program_id(1) * tokens, length, tokens)
        query = _load(query_ptr + place, rows, there, width, size, block)
        out = tl.full([tokens, block], 0.0, tl.float32)
        for start in range(0, length, tokens):
            others, there = _rows(mask_ptr, start, length, tokens)
            key = _load(key_ptr + place, others, there, width, size, block)
            value = _load(value_ptr + place, others, there, width, size, block)
            counts = tl.dot(query, tl.trans(key), input_precision=precision)
            out += tl.dot(counts.to(value.dtype), value, input_precision=precision)
        _store(out_ptr + place, out, rows, length, width, size, block)

    @triton.jit(do_not_specialize=ATTENTION_ARGUMENTS)
    @no_type_check
    def _attention_backward_kernel(
        query_ptr,
        key_ptr,
        value_ptr,
        grad_ptr,
        grad_query_ptr,
        grad_key_ptr,
        grad_value_ptr,
        mask_ptr,  # [B, L], or None
        length,
        batch,
        size: tl.constexpr,  # of a head
        block: tl.constexpr,  # to the next power of two
        tokens: tl.constexpr,  # of a piece
        precision: tl.constexpr,
    ):
        width = tl.num_programs(2) * size
        place = tl.cast(tl.program_id(0), tl.int64) * length * width + tl.program_id(2) * size
        if mask_ptr is not None:
            mask_ptr += tl.program_id(0) % batch * length
        rows, there = _rows(mask_ptr, tl.program_id(1) * tokens, length, tokens)
        query = _load(query_ptr + place, rows, there, width, size, block)
        key = _load(key_ptr + place, rows, there, width, size, block)
        value = _load(value_ptr + place, rows, there, width, size, block)
        grad = _load(grad_ptr + place, rows, there, width, size, block).to(query.dtype)
        grad_query = tl.full([tokens, block], 0.0, tl.float32)
        grad_key = tl.full([tokens, block], 0.0, tl.float32)
        grad_value = tl.full([tokens, block], 0.0, tl.float32)
        for start in range(0, length, tokens):
            others, other_there = _rows(mask_ptr, start, length, tokens)
            other = _load(value_ptr + place, others, other_there, width, size, block)
            grad_counts = tl.dot(grad, tl.trans(other), input_precision=precision).to(query.dtype)
            other = _load(key_ptr + place, others, other_there, width, size, block)
            grad_query += tl.dot(grad_counts, other, input_precision=precision)
            other = _load(query_ptr + place, others, other_there, width, size, block)
            counts = tl.dot(key, tl.trans(other), input_precision=precision).to(query.dtype)
            other_grad = _load(grad_ptr + place, others, other_there, width, size, block).to(query.dtype)
            grad_counts = tl.dot(value, tl.trans(other_grad), input_precision=precision).to(query.dtype)
            grad_key += tl.dot(grad_counts, other, input_precision=precision)
            grad_value += tl.dot(counts, other_grad, input_precision=precision)
        keep = tl.where(there, 1.0, 0.0)[:, None]  # padding has no gradient
        _store(grad_query_ptr + place, grad_query * keep, rows, length, width, size, block)
        _store(grad_key_ptr + place, grad_key * keep, rows, length, width, size, block)
        _store(grad_value_ptr + place, grad_value * keep, rows, length, width, size, block)


def norm_lif_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    spike_dtype: torch.dtype,
) -> Tensor:
    """LayerNorm and neurons.

    Args:
        x: `[T, ..., D]`, floating point; computed in float32 (float64 for float64).
        weight, bias: of the LayerNorm, `[D]`; None for no LayerNorm.
        eps: of the LayerNorm.
        tau, v_threshold, v_reset: of the neurons; membranes start at `v_reset`, or 0 for None, the soft reset.
        spike_dtype: of the spikes.

    Returns:
        spikes, 0 or 1, `[T, ..., D]`.
    """
    spikes = torch.empty(x.shape, dtype=spike_dtype, device=x.device)
    tiles, shared = _shared_arguments(x, weight, bias, eps, tau, v_threshold, v_reset, FORWARD_TILE, FORWARD_PER_THREAD)
    with torch.cuda.device_of(x):
        _forward_kernel[tiles,](spikes_ptr=spikes, **shared)
    return spikes


def norm_lif_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_spikes: Tensor,
    eps: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    alpha: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of `norm_lif_forward` for the surrogate ATan; the same gives the same, bit by bit.

    Args:
        grad_spikes: `[T, ..., D]`.
        alpha: of the surrogate.

    Returns:
        gradients of x, `[T, ..., D]`, and of weight and bias, `[D]`, or None without LayerNorm.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, shared = _shared_arguments(
        x, weight, bias, eps, tau, v_threshold, v_reset, BACKWARD_TILE, BACKWARD_PER_THREAD
    )
    programs, partial = tiles, None
    if weight is not None:
        programs = min(tiles, PROGRAMS)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(2, programs, *weight.shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[programs,](
            grad_spikes_ptr=grad_spikes.contiguous(),
            grad_x_ptr=grad_x,
            grad_weight_ptr=None if partial is None else partial[0],
            grad_bias_ptr=None if partial is None else partial[1],
            tiles=tiles,
            peak=alpha / 2,
            slope=math.pi / 2 * alpha,
            **shared,
        )
    if weight is None or bias is None or partial is None:
        return grad_x, None, None
    grad_weight, grad_bias = partial.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _shared_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    values: int,  # that a program takes at once
    per_thread: int,
) -> tuple[int, dict[str, Any]]:
    """How many tiles there are, and the arguments of both kernels."""
    steps, rows, width = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
    step_size = rows * width
    x = x.reshape(steps, rows, width)
    if weight is None:
        x = x.flatten(1)  # [T, N * D]
        rows, width = triton.cdiv(step_size, PIECE), PIECE
    block = triton.next_power_of_2(width)
    tile = max(1, values // block)
    if x.stride(-1) != 1 or x.stride(1) * tile >= 2**31:
        x = x.contiguous()
    return triton.cdiv(rows, tile), {
        "x_ptr": x,
        "weight_ptr": None if weight is None else weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "stride_t": x.stride(0),
        "stride_n": PIECE if weight is None else x.stride(1),
        "step_size": step_size,
        "steps": steps,
        "width": width,
        "tile": tile,
        "block": block,
        "dtype": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "eps": eps,
        "inverse_tau": 1 / tau,
        "v_threshold": v_threshold,
        "rest": v_reset or 0.0,
        "is_soft": v_reset is None,
        "enable_fp_fusion": False,  # rounds as torch does
        "num_warps": min(max(tile * block // (32 * per_thread), 1), 16),
    }


def attention_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, num_heads: int) -> Tensor:
    """`(q k^T) v` of spikes, sentence by sentence and head by head.

    Args:
        query, key, value: `[T, B, L, D]`, 0 or 1, floating point but not float64.
        mask: `[B, L]`, 0 for padding, which takes no part; None if there is none.
        num_heads: `H`.

    Returns:
        `[T, B, L, D]`, whole numbers in float32.
    """
    query, key, value = (x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, dtype=torch.float32)
    grid, options = _attention_arguments(query, mask, num_heads)
    with torch.cuda.device_of(query):
        _attention_kernel[grid](query, key, value, out, **options)
    return out


def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, mask: Tensor | None, num_heads: int
) -> list[Tensor]:
    """Gradients of `attention_forward` for query, key and value, in their type."""
    query, key, value, grad = (x.contiguous() for x in (query, key, value, grad))
    grads = [torch.empty_like(query) for _ in range(3)]
    grid, options = _attention_arguments(query, mask, num_heads)
    with torch.cuda.device_of(query):
        _attention_backward_kernel[grid](query, key, value, grad, *grads, **options)
    return grads


def _attention_arguments(
    query: Tensor, mask: Tensor | None, num_heads: int
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid, and the arguments of both kernels."""
    steps, batch, length, width = query.shape
    size = width // num_heads
    block = max(16, triton.next_power_of_2(size))
    # Small enough for the memory of any GPU's processors, about 100 KB, also backward.
    tokens = min(64, max(16, 8192 // (block * query.element_size())), max(16, triton.next_power_of_2(length)))
    return (steps * batch, triton.cdiv(length, tokens), num_heads), {
        "mask_ptr": None if mask is None else mask.contiguous(),
        "length": length,
        "batch": batch,
        "size": size,
        "block": block,
        "tokens": tokens,
        "precision": "ieee",  # gradients in float32 need all of its bits
        "enable_fp_fusion": True,
        "num_stages": 1,  # others keep several tiles of what is read next
    }
