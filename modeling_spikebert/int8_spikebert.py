# SPDX-License-Identifier: Apache-2.0
"""Products of spikes and int8 weights, with one scale for each output.

Spikes, and the spike counts of the published shortcut, are small integers and exact in one byte: only the weights are
rounded. The input needs no calibration and no scale of its own.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .native_spikebert import state_of


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[M, K]` to int8 of the same shape and scales `[M]`; the largest of a row becomes 127 or -127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


@cache
def has_kernels() -> bool:
    """Whether oneDNN is there, for `int8_product`."""
    return torch.backends.mkldnn.is_available()


def dequantized_product(spikes: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor) -> Tensor:
    """The naive form: int8 weights as whole numbers, and each output times its scale."""
    dtype = spikes.dtype if spikes.is_floating_point() else weight_scale.dtype
    sums = torch.nn.functional.linear(spikes.to(dtype), weight.to(dtype))
    sums = sums.to(torch.promote_types(dtype, torch.float32)) * weight_scale
    return (sums if bias is None else sums + bias).to(dtype)


def int8_product(spikes: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor) -> Tensor | None:
    """`[..., K]` to bfloat16 `[..., M]` on a CPU: exact sums of products, rounded once.

    None if the input is not whole numbers from 0 to 255.
    """
    rows = spikes.to(torch.uint8).reshape(math.prod(spikes.shape[:-1]), spikes.shape[-1])
    if spikes.dtype != torch.uint8 and not (rows.view(spikes.shape) == spikes).all():
        return None
    packed = _packed(weight, bias, weight_scale)
    out = torch.ops.onednn.qlinear_pointwise(
        rows,
        1.0,  # scale and zero point of the spikes
        0,
        packed.weight,
        packed.scale,
        packed.zero_point,
        packed.bias,
        1.0,  # scale and zero point of the output
        0,
        torch.bfloat16,
        "none",
        [],
        "",
    )
    return out.view(*spikes.shape[:-1], len(weight))


class _PackedWeight(NamedTuple):
    """int8 weights as oneDNN wants them; `weight` is opaque."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None


class _Held(NamedTuple):
    """What a weight was packed from, beside itself, and what came of it."""

    weight_scale: Tensor
    bias: Tensor | None
    states: list[tuple[Any, ...]]
    packed: _PackedWeight


_HELD: Any = WeakTensorKeyDictionary()


def _packed(weight: Tensor, bias: Tensor | None, weight_scale: Tensor) -> _PackedWeight:
    """Packed once, and again if a tensor was replaced or changed."""
    states = [state_of(tensor) for tensor in (weight, weight_scale, bias) if tensor is not None]
    held = _HELD.get(weight)
    if held is not None and held.weight_scale is weight_scale and held.bias is bias and held.states == states:
        return held.packed
    with torch.inference_mode(False):  # so that it can be used outside of it, too
        packed = _PackedWeight(
            torch.ops.onednn.qlinear_prepack(weight.detach(), None),
            weight_scale.detach().float(),  # the model may be in half precision
            torch.zeros(len(weight), dtype=torch.int64, device=weight.device),
            None if bias is None else bias.detach().float(),
        )
    _HELD[weight] = _Held(weight_scale, bias, states, packed)
    return packed
