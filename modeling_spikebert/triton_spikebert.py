# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and LIF neurons over all time steps in one pass over memory: Triton kernels for GPUs of NVIDIA and AMD.

The oracle is `norm_lif_naive` of `norm_lif_spikebert`, which has the equations. Nothing is kept for the backward pass,
which computes norms and membranes again.

Shapes, once for the whole file: `T` time steps, `N` tokens, `D` columns. A program takes rows, the columns of a token,
through all time steps. Without a LayerNorm columns do not need each other: then rows are pieces of `PIECE` elements of
what is one long row at each time step.
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
PROGRAMS = 512

if HAS_TRITON:
    # Constants are `constexpr`, since Triton rounds other floating point arguments to float32. Tensors and numbers that
    # may be large are walked through by pointers and in int64: an index of int32 would overflow.

    @triton.jit
    @no_type_check
    def _normalise(x, mask, eps: tl.constexpr, width: tl.constexpr):
        """A row without its mean, times the scale that makes its variance 1; mean and scale."""
        mean = tl.sum(x, 0) / width
        centred = tl.where(mask, x - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
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
        block: tl.constexpr,
        dtype: tl.constexpr,
        eps: tl.constexpr,
        inverse_tau: tl.constexpr,
        v_threshold: tl.constexpr,
        rest: tl.constexpr,
        is_soft: tl.constexpr,
    ):
        row = tl.cast(tl.program_id(0), tl.int64)
        columns = tl.arange(0, block)
        mask = columns < (step_size - row * width if weight_ptr is None else width)
        x_row = x_ptr + row * stride_n
        spikes_row = spikes_ptr + row * width
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, mask, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + columns, mask, other=0.0).to(dtype)

        v = tl.full([block], rest, dtype)
        for _t in tl.static_range(steps):
            x = tl.load(x_row + columns, mask, other=0.0).to(dtype)
            if weight_ptr is not None:
                normalised, _mean, _scale = _normalise(x, mask, eps, width)
                x = normalised * weight + bias
            h, v = _step(x, v, inverse_tau, v_threshold, rest, is_soft)
            tl.store(spikes_row + columns, (h >= v_threshold).to(tl.float32), mask)
            x_row += stride_t
            spikes_row += step_size

    @triton.jit(do_not_specialize=["rows"])  # it changes from batch to batch
    @no_type_check
    def _backward_kernel(
        x_ptr,
        weight_ptr,  # None without LayerNorm
        bias_ptr,
        grad_spikes_ptr,
        grad_x_ptr,
        grad_weight_ptr,  # [programs, D]
        grad_bias_ptr,
        rows,
        stride_t,  # of x
        stride_n,
        step_size,  # elements of a time step, N * D
        steps: tl.constexpr,
        width: tl.constexpr,
        block: tl.constexpr,
        dtype: tl.constexpr,
        eps: tl.constexpr,
        inverse_tau: tl.constexpr,
        v_threshold: tl.constexpr,
        rest: tl.constexpr,
        is_soft: tl.constexpr,
        peak: tl.constexpr,  # the surrogate's derivative at distance d is peak / (1 + (slope * d) ** 2)
        slope: tl.constexpr,
    ):
        columns = tl.arange(0, block)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(dtype)
            bias = tl.load(bias_ptr + columns, columns < width, other=0.0).to(dtype)
            grad_weight = tl.full([block], 0.0, dtype)
            grad_bias = tl.full([block], 0.0, dtype)

        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tl.cast(index, tl.int64)
            mask = columns < (step_size - row * width if weight_ptr is None else width)
            x_row = x_ptr + row * stride_n
            place = row * width

            # once more forward, for the membrane; what a time step leaves is kept in registers
            means, scales, charged = (), (), ()
            v = tl.full([block], rest, dtype)
            for _t in tl.static_range(steps):
                x = tl.load(x_row + columns, mask, other=0.0).to(dtype)
                if weight_ptr is not None:
                    normalised, mean, scale = _normalise(x, mask, eps, width)
                    means += (mean,)
                    scales += (scale,)
                    x = normalised * weight + bias
                h, v = _step(x, v, inverse_tau, v_threshold, rest, is_soft)
                charged += (h,)
                x_row += stride_t
                place += step_size

            grad_v = tl.full([block], 0.0, dtype)
            for t in tl.static_range(steps - 1, -1, -1):
                x_row -= stride_t
                place -= step_size
                distance = charged[t] - v_threshold
                if not is_soft:  # a hard reset cuts the path through time
                    grad_v = tl.where(distance < 0, grad_v, 0.0)
                grad_spikes = tl.load(grad_spikes_ptr + place + columns, mask, other=0.0).to(dtype)
                steepness = slope * distance
                grad_h = grad_v + grad_spikes * (peak / (1.0 + steepness * steepness))
                grad = grad_h * inverse_tau
                grad_v = grad_h - grad
                if weight_ptr is not None:
                    normalised = (tl.load(x_row + columns, mask, other=0.0).to(dtype) - means[t]) * scales[t]
                    grad_weight += grad * normalised
                    grad_bias += grad
                    grad *= weight
                    along = tl.sum(grad * normalised, 0) / width
                    grad = scales[t] * (grad - tl.sum(grad, 0) / width - normalised * along)
                tl.store(grad_x_ptr + place + columns, grad, mask)

        if weight_ptr is not None:
            place = tl.cast(tl.program_id(0), tl.int64) * width
            tl.store(grad_weight_ptr + place + columns, grad_weight, columns < width)
            tl.store(grad_bias_ptr + place + columns, grad_bias, columns < width)


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
    rows, shared = _shared_arguments(x, weight, bias, eps, tau, v_threshold, v_reset)
    with torch.cuda.device_of(x):
        _forward_kernel[rows,](spikes_ptr=spikes, **shared)
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
    rows, shared = _shared_arguments(x, weight, bias, eps, tau, v_threshold, v_reset)
    programs, partial = rows, None
    if weight is not None:
        programs = min(rows, PROGRAMS)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(2, programs, *weight.shape, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[programs,](
            grad_spikes_ptr=grad_spikes.contiguous(),
            grad_x_ptr=grad_x,
            grad_weight_ptr=None if partial is None else partial[0],
            grad_bias_ptr=None if partial is None else partial[1],
            rows=rows,
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
) -> tuple[int, dict[str, Any]]:
    """How many rows there are, and the arguments of both kernels."""
    steps, rows, width = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
    step_size = rows * width
    x = x.reshape(steps, rows, width)
    if weight is None:
        x = x.flatten(1)  # [T, N * D]
        rows, width = triton.cdiv(step_size, PIECE), PIECE
    if x.stride(-1) != 1:
        x = x.contiguous()
    stride_n = PIECE if weight is None else x.stride(1)
    block = triton.next_power_of_2(width)
    return rows, {
        "x_ptr": x,
        "weight_ptr": None if weight is None else weight.contiguous(),
        "bias_ptr": None if bias is None else bias.contiguous(),
        "stride_t": x.stride(0),
        "stride_n": stride_n,
        "step_size": step_size,
        "steps": steps,
        "width": width,
        "block": block,
        "dtype": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "eps": eps,
        "inverse_tau": 1 / tau,
        "v_threshold": v_threshold,
        "rest": v_reset or 0.0,
        "is_soft": v_reset is None,
        "enable_fp_fusion": False,  # rounds as torch does
        "num_warps": min(max(block // 256, 1), 16),
    }
