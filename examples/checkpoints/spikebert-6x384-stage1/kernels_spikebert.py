# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and LIF neurons over all time steps at once, forward and backward, for compilers.

Step by step, plain modules read and write every tensor a dozen times. The functions below are written so that
`torch.compile` makes one loop of each; on a GPU the Triton kernels of `triton_spikebert` take their place. The backward
pass recomputes the membrane, so that only the input is kept. `torch.nn.LayerNorm` and `neurons_spikebert` are the
oracle.

Shapes, once for the whole file: `x` is `[T, N, G, D]`, `T` time steps, `N` tokens, `G` groups with a LayerNorm each
(query, key and value together: 3; else 1), `D` columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .neurons_spikebert import ATan, Surrogate
from .triton_spikebert import is_available as triton_is_available
from .triton_spikebert import norm_lif_backward as triton_backward
from .triton_spikebert import norm_lif_forward as triton_forward


class LIFConstants(NamedTuple):
    """The constants of a layer of neurons; `eps` is that of the LayerNorm in front of them."""

    tau: float
    v_threshold: float
    v_reset: float | None
    surrogate: Surrogate
    eps: float


def has_triton(surrogate: Surrogate) -> bool:
    """Whether the Triton kernels can run and know this surrogate."""
    return triton_is_available() and isinstance(surrogate, ATan)


def takes_triton(x: Tensor, surrogate: Surrogate) -> bool:
    return x.device.type == "cuda" and has_triton(surrogate)


def norm_lif(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: LIFConstants, spike_dtype: torch.dtype
) -> Tensor:
    """LayerNorm and neurons, with gradients.

    Args:
        x: `[T, N, G, D]`, floating point, columns contiguous; computed in float32 (float64 for float64).
        weight, bias: of the LayerNorm, `[G, D]`; None for no LayerNorm.
        constants: of the neurons.
        spike_dtype: of the spikes, floating point where gradients are wanted.

    Returns:
        spikes, 0 or 1, `[T, N, G, D]`.
    """
    return _NormLIF.apply(x, weight, bias, constants, spike_dtype)


class _NormLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: LIFConstants,
        spike_dtype: torch.dtype,
    ) -> Tensor:
        tau, v_threshold, v_reset, surrogate, eps = constants
        ctx.save_for_backward(x, weight, bias)
        ctx.constants = constants
        if takes_triton(x, surrogate):
            return triton_forward(x, weight, bias, eps, tau, v_threshold, v_reset, spike_dtype)
        return norm_lif_steps(x, weight, bias, None, constants, spike_dtype)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        tau, v_threshold, v_reset, surrogate, eps = ctx.constants
        if takes_triton(x, surrogate):
            grads = triton_backward(x, weight, bias, grad_spikes, eps, tau, v_threshold, v_reset, surrogate.alpha)
        else:
            grads = _backward(x, weight, bias, grad_spikes, ctx.constants)
        return *grads, None, None


def norm_lif_steps(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    v: Any,
    constants: LIFConstants,
    spike_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`norm_lif` without gradients, for some of the time steps.

    Args:
        v: membrane after the steps before, `[N, G, D]`; None before the first step.

    Returns:
        spikes `[T, N, G, D]`, and the membrane after the last step.
    """
    dtype, rest = arithmetic_dtype(x.dtype), constants.v_reset or 0.0
    v = rest if v is None else v
    spikes = []
    for x_t in x.to(dtype):
        if weight is not None and bias is not None:
            x_t = _normalise(x_t, constants.eps)[0] * weight + bias
        _, fired, v = _step(x_t, v, constants)
        spikes.append(fired.to(spike_dtype))
    return torch.stack(spikes), v


def _backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grad_spikes: Tensor, constants: LIFConstants
) -> tuple[Tensor | None, ...]:
    tau, v_threshold, v_reset, surrogate, eps = constants
    dtype = arithmetic_dtype(x.dtype)
    v: Any = v_reset or 0.0
    normalised, scales, distances = [], [], []
    for x_t in x.to(dtype):  # once more forward, for the membrane
        if weight is not None and bias is not None:
            x_t, scale = _normalise(x_t, eps)
            normalised.append(x_t)
            scales.append(scale)
            x_t = x_t * weight + bias
        h, _, v = _step(x_t, v, constants)
        distances.append(h - v_threshold)

    grad_v: Any = 0.0
    grad_weight: Any = 0.0
    grad_bias: Any = 0.0
    grads = []
    for t in range(len(distances) - 1, -1, -1):
        if v_reset is not None:  # a hard reset cuts the path through time
            grad_v = grad_v * (distances[t] < 0).to(dtype)
        grad_h = grad_v + grad_spikes[t].to(dtype) * surrogate.derivative(distances[t])
        grad = grad_h / tau
        grad_v = grad_h - grad
        if weight is not None:
            grad_bias = grad_bias + grad
            grad_weight = grad_weight + grad * normalised[t]
            grad = grad * weight
            grad = scales[t] * (grad - _mean(grad) - normalised[t] * _mean(grad * normalised[t]))
        grads.append(grad.to(x.dtype))
    grad_x = torch.stack(grads[::-1])
    return (grad_x, None, None) if weight is None else (grad_x, grad_weight.sum(0), grad_bias.sum(0))


def _step(x: Tensor, v: Any, constants: LIFConstants) -> tuple[Tensor, Tensor, Tensor]:
    """Charge, fire, reset: the charged membrane, the spikes, and the membrane after the reset."""
    tau, v_threshold, v_reset, *_ = constants
    rest = v_reset or 0.0
    h = v + (x - (v - rest)) / tau
    fired = (h >= v_threshold).to(x.dtype)
    # Arithmetic instead of `where`: the compiler makes slow code of masks.
    return h, fired, h - v_threshold * fired if v_reset is None else (1 - fired) * h + rest * fired


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - _mean(x)
    scale = torch.rsqrt(_mean(centred * centred) + eps)
    return centred * scale, scale


def _mean(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True) / x.shape[-1]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
