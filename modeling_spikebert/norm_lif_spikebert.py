# SPDX-License-Identifier: Apache-2.0
"""The operator `norm_lif`: LayerNorm and leaky integrate-and-fire (LIF) neurons over all time steps.

The dynamics at step `t`, with `r = v_reset` (0 for the soft reset), are those of the published SpikeBERT
(spikingjelly's `LIFNode` with input decay); `x` is the normalised current:

    charge   h[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau
    fire     s[t] = 1 if h[t] >= v_threshold else 0
    reset    v[t] = r if s[t] else h[t]              (hard reset, v_reset a number)
             v[t] = h[t] - v_threshold * s[t]        (soft reset, v_reset=None)

The step function has no useful derivative: the backward pass uses that of a smooth surrogate at `h[t] - v_threshold`.
The spike inside the reset is detached, as published: no gradient flows through the decision to reset.

`norm_lif_naive` is these equations. The C++ kernels below (CPU) and those of `triton_spikebert` (GPU) read the current
once for all time steps, and keep nothing but it for the backward pass, which computes norms and membranes again.
"""

import math
from ctypes import Structure, c_double, c_int64
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .compiler_spikebert import compiled
from .native_spikebert import kernels, needs_gradient, note, obstacle, pointers, spike_dtype
from .triton_spikebert import HAS_TRITON, norm_lif_backward, norm_lif_forward


class Surrogate(Protocol):
    """A smooth function that replaces the step function in the backward pass. The kernels know `ATan` alone."""

    def primitive(self, x: Tensor) -> Tensor:
        """Rises from 0 to 1; `x` is the distance from the threshold, where it is 0.5. Autograd differentiates it."""
        ...


@dataclass(frozen=True)
class ATan:
    """Arc tangent surrogate (Fang et al., "Incorporating Learnable Membrane Time Constant", ICCV 2021).

    Args:
        alpha: steepness at the threshold; the derivative there is `alpha / 2`. 2.0 in the published SpikeBERT.
    """

    alpha: float = 2.0

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * x) / math.pi + 0.5


@dataclass(frozen=True)
class LIF:
    """The constants of a layer of neurons.

    Args:
        tau: membrane time constant in time steps, at least 1 (1: no memory, the membrane is `v_reset` and the input).
        v_threshold: membrane potential at which a neuron fires; above the resting potential, or 0 with `tau=1`, where
            the neuron is a plain step function.
        v_reset: potential before the first step and after a spike; `None` subtracts `v_threshold` instead (soft reset).
        surrogate: gives the derivative of the step function in the backward pass.
    """

    tau: float = 2.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    surrogate: Surrogate = ATan()


def norm_lif(
    x: Tensor,
    neurons: LIF,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalises the current of each time step and runs the neurons on it.

    Args:
        x: input current `[T, ..., D]`, time steps first, floating point; computed in float32 (float64 for float64).
        neurons: their constants.
        weight, bias: of the LayerNorm over `D`; None for no LayerNorm.
        eps: of the LayerNorm.
        dtype: of the spikes where no gradients are wanted; by default, and where they are, that of `x`, under autocast
            that of matrix products.

    Returns:
        spikes, 0 or 1, in the shape of `x`. Every call starts from the resting potential.

    Raises:
        ValueError: `x` has no time step, no `D` or is not floating point, weight or bias is missing or not `[D]`, or
            `tau < 1`.
    """
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, ..., D] with at least one time step, got shape {tuple(x.shape)}.")
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (weight, bias)]
    if shapes not in ([None, None], 2 * [tuple(x.shape[-1:])]):
        raise ValueError(f"weight and bias must both be {tuple(x.shape[-1:])} or both None, got {shapes}.")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}.")
    if not neurons.tau >= 1:
        raise ValueError(f"tau must be at least 1 (time steps), got {neurons.tau}.")
    training = needs_gradient(x, weight, bias)
    if training or dtype is None:
        dtype = spike_dtype(x.dtype, x.device.type)
    form = _form_for(x, weight, bias, neurons, training, dtype)
    if form is None:
        return norm_lif_naive(x, neurons, weight, bias, eps).to(dtype)
    if training:
        return _NormLIF.apply(x, weight, bias, neurons, eps, dtype, form)
    return _run(form, x, weight, bias, neurons, eps, dtype)


def norm_lif_naive(
    x: Tensor, neurons: LIF, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The naive form of `norm_lif`: the equations as they read, differentiated by autograd."""
    x = x.to(arithmetic_dtype(x.dtype))
    if weight is not None and bias is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    rest = neurons.v_reset or 0.0
    v: Any = rest
    fired = []
    for x_t in x:
        h = v + (x_t - (v - rest)) / neurons.tau
        spikes = (h >= neurons.v_threshold).to(x.dtype)
        v = h - neurons.v_threshold * spikes if neurons.v_reset is None else torch.where(spikes.bool(), rest, h)
        if h.requires_grad:  # the step forward, the surrogate backward
            smooth = neurons.surrogate.primitive(h - neurons.v_threshold)
            spikes = spikes + (smooth - smooth.detach())
        fired.append(spikes)
    return torch.stack(fired)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _form_for(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, neurons: LIF, training: bool, dtype: torch.dtype
) -> Any:
    """The C++ library, "triton", or None for the naive form."""
    reason = obstacle(x, weight, bias)
    if reason is None and not isinstance(neurons.surrogate, ATan):
        reason = f"there are no kernels for the surrogate {type(neurons.surrogate).__name__}"
    if reason is None and x.device.type == "cuda" and HAS_TRITON:
        note("norm_lif", "triton", "the current is on a GPU")
        return "triton"
    if reason is None and x.device.type != "cpu":
        reason = f"there are no kernels for {x.device.type}"
    if reason is None and (x.dtype, dtype) not in KERNELS:
        reason = f"there are no kernels for {x.dtype} and {dtype}"
    if reason is not None:
        note("norm_lif", "naive", reason)
        return None
    library = kernels("norm_lif", _library, x.numel(), training)
    if library is not None:
        note("norm_lif", "c++", f"{x.dtype} on a CPU")
    return library


def _run(
    form: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, neurons: LIF, eps: float, dtype: torch.dtype
) -> Tensor:
    if form == "triton":
        return norm_lif_forward(x, weight, bias, eps, neurons.tau, neurons.v_threshold, neurons.v_reset, dtype)
    return _forward(form, x, weight, bias, neurons, eps, dtype)


class _NormLIF(torch.autograd.Function):
    """The fast forms: the current is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        neurons: LIF,
        eps: float,
        dtype: torch.dtype,
        form: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.neurons, ctx.eps, ctx.form = neurons, eps, form
        return _run(form, x, weight, bias, neurons, eps, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        neurons, eps = ctx.neurons, ctx.eps
        if ctx.form == "triton":
            constants = (neurons.tau, neurons.v_threshold, neurons.v_reset, neurons.surrogate.alpha)
            grads = norm_lif_backward(x, weight, bias, grad_spikes, eps, *constants)
        else:
            grads = _backward(ctx.form, x, weight, bias, grad_spikes, neurons, eps)
        return *grads, None, None, None, None


# The C++ kernels. A row, the columns of a token, is taken through all time steps while it is in the cache. Gradients
# of weight and bias are summed over equal parts of the rows, one for each thread: the same gives the same.
SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bfloat16 { uint16_t bits; };

static inline float read(float x) { return x; }
static inline double read(double x) { return x; }
static inline float read(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class A> static inline void write(A& place, A value) { place = value; }
template <class A> static inline void write(uint8_t& place, A value) { place = uint8_t(value); }
static inline void write(bfloat16& place, float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  place.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Sizes { int64_t steps, rows, width, stride, threads; };  // stride: from one time step of x to the next
struct Neurons { double tau, v_threshold, rest, soft, alpha, eps; };

// Writes a row with mean 0 and variance 1; returns what it was multiplied with.
template <class A, class X>
static inline A normalise(const X* x, A* out, int64_t width, A eps) {
  A sum = 0, squares = 0;
  #pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += out[i] = read(x[i]);
  const A mean = sum / width;
  #pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    out[i] -= mean;
    squares += out[i] * out[i];
  }
  const A scale = 1 / std::sqrt(squares / width + eps);
  #pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] *= scale;
  return scale;
}

template <class A, class X>
static inline A read_row(const X* x, A* out, int64_t width, A eps, bool norm) {
  if (norm) return normalise(x, out, width, eps);
  for (int64_t i = 0; i < width; ++i) out[i] = read(x[i]);
  return 1;
}

template <class A, class X, class S>
static void forward(const X* x, const A* weight, const A* bias, S* spikes, Sizes z, Neurons n) {
  const A tau = n.tau, threshold = n.v_threshold, rest = n.rest, eps = n.eps;
  const bool soft = n.soft;
  #pragma omp parallel num_threads(z.threads)
  {
    std::vector<A> room(2 * z.width);
    A *v = room.data(), *current = v + z.width;
    #pragma omp for schedule(static)
    for (int64_t row = 0; row < z.rows; ++row) {
      std::fill(v, v + z.width, rest);
      for (int64_t t = 0; t < z.steps; ++t) {
        S* out = spikes + (t * z.rows + row) * z.width;
        read_row(x + t * z.stride + row * z.width, current, z.width, eps, weight);
        #pragma omp simd
        for (int64_t i = 0; i < z.width; ++i) {
          const A in = weight ? current[i] * weight[i] + bias[i] : current[i];
          const A h = v[i] + (in - (v[i] - rest)) / tau;
          const bool fires = h >= threshold;
          write(out[i], fires ? A(1) : A(0));
          v[i] = fires ? (soft ? h - threshold : rest) : h;
        }
      }
    }
  }
}

template <class A, class X, class S>
static void backward(const X* x, const A* weight, const A* bias, const S* grad_spikes, X* grad_x, A* grad_norm, Sizes z,
                     Neurons n) {
  const A tau = n.tau, threshold = n.v_threshold, rest = n.rest, eps = n.eps;
  const A peak = n.alpha / 2, slope = 3.14159265358979323846 / 2 * n.alpha;
  const bool soft = n.soft;
  const int64_t width = z.width, part = (z.rows + z.threads - 1) / z.threads;
  #pragma omp parallel num_threads(z.threads)
  {
    std::vector<A> room((2 * z.steps + 3) * width), scales(z.steps);
    A *normalised = room.data(), *distances = normalised + z.steps * width;
    A *v = distances + z.steps * width, *grad_v = v + width, *grad = grad_v + width;
    #pragma omp for schedule(static)
    for (int64_t p = 0; p < z.threads; ++p) {
      A *grad_weight = grad_norm + p * 2 * width, *grad_bias = grad_weight + width;
      for (int64_t row = p * part; row < std::min(z.rows, (p + 1) * part); ++row) {
        std::fill(v, v + width, rest);
        for (int64_t t = 0; t < z.steps; ++t) {  // once more forward, for the membrane
          A *current = normalised + t * width, *distance = distances + t * width;
          scales[t] = read_row(x + t * z.stride + row * width, current, width, eps, weight);
          #pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const A in = weight ? current[i] * weight[i] + bias[i] : current[i];
            const A h = v[i] + (in - (v[i] - rest)) / tau;
            distance[i] = h - threshold;
            v[i] = h >= threshold ? (soft ? h - threshold : rest) : h;
          }
        }
        std::fill(grad_v, grad_v + width, A(0));
        for (int64_t t = z.steps - 1; t >= 0; --t) {
          const A *current = normalised + t * width, *distance = distances + t * width;
          const S* above = grad_spikes + (t * z.rows + row) * width;
          X* out = grad_x + (t * z.rows + row) * width;
          A sum = 0, along = 0;
          #pragma omp simd
          for (int64_t i = 0; i < width; ++i) {  // a hard reset cuts the path through time
            const A steepness = slope * distance[i];
            const A through_time = soft || distance[i] < 0 ? grad_v[i] : A(0);
            const A grad_h = through_time + read(above[i]) * (peak / (1 + steepness * steepness));
            grad[i] = grad_h / tau;
            grad_v[i] = grad_h - grad[i];
          }
          if (weight) {
            #pragma omp simd reduction(+ : sum, along)
            for (int64_t i = 0; i < width; ++i) {
              grad_weight[i] += grad[i] * current[i];
              grad_bias[i] += grad[i];
              grad[i] *= weight[i];
              sum += grad[i];
              along += grad[i] * current[i];
            }
            const A mean = sum / width, slant = along / width;
            #pragma omp simd
            for (int64_t i = 0; i < width; ++i) grad[i] = scales[t] * (grad[i] - mean - current[i] * slant);
          }
          for (int64_t i = 0; i < width; ++i) write(out[i], grad[i]);
        }
      }
    }
  }
}

#define FORWARD(A, X, S)                                                                                             \
  extern "C" void forward_##X##_##S(const X* x, const A* weight, const A* bias, S* spikes, Sizes z, Neurons n) {     \
    forward(x, weight, bias, spikes, z, n);                                                                          \
  }
#define BOTH(A, X, S)                                                                                                \
  FORWARD(A, X, S)                                                                                                   \
  extern "C" void backward_##X##_##S(const X* x, const A* weight, const A* bias, const S* grad_spikes, X* grad_x,    \
                                     A* grad_norm, Sizes z, Neurons n) {                                             \
    backward(x, weight, bias, grad_spikes, grad_x, grad_norm, z, n);                                                 \
  }
BOTH(double, double, double)
BOTH(float, float, float)
BOTH(float, float, bfloat16)
BOTH(float, bfloat16, bfloat16)
FORWARD(float, float, uint8_t)
FORWARD(float, bfloat16, uint8_t)
"""

# Of currents and spikes, for which there are kernels; without gradients spikes may be bytes.
KERNELS = {
    (torch.float64, torch.float64): "double_double",
    (torch.float32, torch.float32): "float_float",
    (torch.float32, torch.bfloat16): "float_bfloat16",
    (torch.bfloat16, torch.bfloat16): "bfloat16_bfloat16",
    (torch.float32, torch.uint8): "float_uint8_t",
    (torch.bfloat16, torch.uint8): "bfloat16_uint8_t",
}


class _Sizes(Structure):
    _fields_ = [(name, c_int64) for name in ("steps", "rows", "width", "stride", "threads")]


class _Neurons(Structure):
    _fields_ = [(name, c_double) for name in ("tau", "v_threshold", "rest", "soft", "alpha", "eps")]


@cache
def _library() -> Any:
    return compiled(SOURCE)


def _forward(
    library: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, neurons: LIF, eps: float, dtype: torch.dtype
) -> Tensor:
    x, weight, bias, constants = _arguments(x, weight, bias, neurons, eps)
    spikes = x.new_empty(x.shape, dtype=dtype)
    function = getattr(library, f"forward_{KERNELS[x.dtype, dtype]}")
    function(*pointers(x, weight, bias, spikes), *constants)
    return spikes


def _backward(
    library: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_spikes: Tensor,
    neurons: LIF,
    eps: float,
) -> tuple[Tensor | None, ...]:
    dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    x, weight, bias, constants = _arguments(x, weight, bias, neurons, eps)
    grad_spikes = grad_spikes.contiguous()
    grad_x = x.new_empty(x.shape)
    parts = constants[0].threads
    grad_norm = x.new_zeros(parts, 2, x.shape[-1], dtype=arithmetic_dtype(x.dtype))
    function = getattr(library, f"backward_{KERNELS[x.dtype, grad_spikes.dtype]}")
    function(*pointers(x, weight, bias, grad_spikes, grad_x, grad_norm), *constants)
    if weight is None:
        return grad_x, None, None
    return grad_x, *(grad.to(dtype) for grad, dtype in zip(grad_norm.sum(0), dtypes, strict=True))


def _arguments(x: Tensor, weight: Tensor | None, bias: Tensor | None, neurons: LIF, eps: float) -> tuple[Any, ...]:
    """The tensors as the kernels take them, and sizes and constants."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    dtype = arithmetic_dtype(x.dtype)
    weight, bias = (None if tensor is None else tensor.to(dtype).contiguous() for tensor in (weight, bias))
    steps, width = x.shape[0], x.shape[-1]
    sizes = _Sizes(steps, x[0].numel() // max(width, 1), width, x.stride(0), torch.get_num_threads())
    soft, rest = neurons.v_reset is None, neurons.v_reset or 0.0
    assert isinstance(neurons.surrogate, ATan)  # `_form_for` sees to it
    constants = _Neurons(neurons.tau, neurons.v_threshold, rest, soft, neurons.surrogate.alpha, eps)
    return x, weight, bias, (sizes, constants)
