# SPDX-License-Identifier: Apache-2.0
"""Leaky integrate-and-fire (LIF) neurons as pure functions of tensors.

State goes in and comes out; nothing is kept between calls. The dynamics at step `t`, with `r = v_reset` (0 for the soft
reset), are those of the published SpikeBERT (spikingjelly's `LIFNode` with input decay):

    charge   h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau
    fire     s[t] = 1 if h[t] >= v_threshold else 0
    reset    v[t] = r if s[t] else h[t]              (hard reset, v_reset a number)
             v[t] = h[t] - v_threshold * s[t]        (soft reset, v_reset=None)

The step function has no useful derivative: the backward pass uses that of a smooth surrogate at `h[t] - v_threshold`.
The spike inside the reset is detached, as published: no gradient flows through the decision to reset.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Surrogate(Protocol):
    """A smooth stand-in for the step function: its `primitive` rises from 0 to 1, its `derivative` is used backward."""

    def primitive(self, x: Tensor) -> Tensor: ...

    def derivative(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ATan:
    """Arc tangent surrogate (Fang et al., "Incorporating Learnable Membrane Time Constant", ICCV 2021).

    Args:
        alpha: steepness at the threshold; the derivative there is `alpha / 2`. 2.0 in the published SpikeBERT.
    """

    alpha: float = 2.0

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * x) / math.pi + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        return (math.pi / 2 * self.alpha * x).square_().add_(1).reciprocal_().mul_(self.alpha / 2)


# A further surrogate needs a class with the two methods above and a line here; its name is then valid in the config.
SURROGATES: dict[str, Callable[[float], Surrogate]] = {"atan": ATan}


class _LIF(torch.autograd.Function):
    """Hand-written backward of the loop. Only the charged membrane `h` is kept: spikes and resets follow from it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, tau: float, v_threshold: float, v_reset: float | None, surrogate: Surrogate
    ) -> tuple[Tensor, Tensor]:
        # Written into tensors made once: new ones at each step would cost more time than the arithmetic.
        charged = torch.empty_like(x) if any(ctx.needs_input_grad) else None
        spikes, v, h = torch.empty_like(x), v.clone(), torch.empty_like(v)
        rest = v.new_tensor(v_reset or 0.0)
        fired = torch.empty_like(v, dtype=torch.bool)
        for t in range(x.shape[0]):
            if charged is not None:
                h = charged[t]
            torch.sub(x[t], v - v_reset if v_reset else v, out=h)
            h.div_(tau).add_(v)
            torch.ge(h, v_threshold, out=fired)
            spikes[t].copy_(fired)
            if v_reset is None:
                torch.sub(h, spikes[t], alpha=v_threshold, out=v)
            else:
                torch.where(fired, rest, h, out=v)
        if charged is not None:
            ctx.save_for_backward(charged)
        ctx.tau, ctx.v_threshold, ctx.v_reset, ctx.surrogate = tau, v_threshold, v_reset, surrogate
        return spikes, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        (charged,) = ctx.saved_tensors
        grad_x, grad_v = torch.empty_like(charged), grad_v.clone()
        distance, grad_h = torch.empty_like(grad_v), torch.empty_like(grad_v)
        for t in range(charged.shape[0] - 1, -1, -1):
            torch.sub(charged[t], ctx.v_threshold, out=distance)
            if ctx.v_reset is not None:  # a hard reset cuts the path through time
                grad_v.mul_(distance < 0)
            torch.addcmul(grad_v, grad_spikes[t], ctx.surrogate.derivative(distance), out=grad_h)
            torch.div(grad_h, ctx.tau, out=grad_x[t])
            torch.sub(grad_h, grad_x[t], out=grad_v)
        return grad_x, grad_v, None, None, None, None


def lif(
    x: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = ATan(),
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs LIF neurons over all time steps of `x`.

    Calling it on `x[:k]` and then, with the returned membrane as `v`, on `x[k:]` gives what one call on `x` gives.

    Args:
        x: input current, shape `[T, ...]`, time steps first, floating point.
        tau: membrane time constant in time steps, at least 1 (1: no memory, the membrane is `v_reset` and the input).
        v_threshold: membrane potential at which a neuron fires; above the resting potential, or 0 with `tau=1`, where
            the neuron is a plain step function.
        v_reset: potential after a spike; `None` subtracts `v_threshold` instead (soft reset).
        surrogate: gives the derivative of the step function in the backward pass.
        v: membrane potential before the first step, shape `[...]`; by default the resting potential.

    Returns:
        `spikes`, 0 or 1 in the dtype and shape of `x`, and `v`, the membrane after the last step, shape `[...]`.

    Raises:
        ValueError: `x` has no time step or is not floating point, `tau < 1`, or `v` does not have the shape of `x[0]`.
    """
    _check(x, tau, v)
    if v is None:
        v = torch.full_like(x[0], 0.0 if v_reset is None else v_reset)
    return _LIF.apply(x, v, tau, v_threshold, v_reset, surrogate)


def lif_loop(
    x: Tensor,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = ATan(),
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle of `lif`: same arguments and results, written as the equations read, differentiated by autograd."""
    _check(x, tau, v)
    rest = 0.0 if v_reset is None else v_reset
    if v is None:
        v = torch.full_like(x[0], rest)
    fired = []
    for x_t in x:
        h = v + (x_t - (v - rest)) / tau
        smooth = surrogate.primitive(h - v_threshold)
        spikes = (h >= v_threshold).to(x.dtype) + (smooth - smooth.detach())  # the step forward, the surrogate backward
        reset = spikes.detach()
        v = h - v_threshold * reset if v_reset is None else torch.where(reset.bool(), v_reset, h)
        fired.append(spikes)
    return torch.stack(fired), v


def _check(x: Tensor, tau: float, v: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"x must have at least one time step in its first dimension, got shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}.")
    if not tau >= 1:
        raise ValueError(f"tau must be at least 1 (time steps), got {tau}.")
    if v is not None and v.shape != x.shape[1:]:
        raise ValueError(f"v must have the shape of one time step of x, {tuple(x.shape[1:])}, got {tuple(v.shape)}.")
