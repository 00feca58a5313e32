# SPDX-License-Identifier: Apache-2.0
"""Products of spikes and int8 weights, with one scale for each output.

Spikes, and the spike counts of the published shortcut, are small integers and exact in one byte: only the weights are
rounded. The input needs no calibration and no scale of its own.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .native_spikebert import state_of


def rounded_modules(model: Any) -> list[Any]:
    """Those whose weights an int8 file rounds: the Linears inside the blocks, and last the word embeddings."""
    encoder = model.base_model.encoder
    return [*(module for module in encoder.modules() if hasattr(module, "weight_scale")), model.get_input_embeddings()]


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
    """`[..., K]` to `[..., M]` in float32 on a CPU, or in bfloat16 where scales are in half precision.

    Sums are exact, and rounded once.

    None if the input is not whole numbers from 0 to 255.
    """
    rows = spikes.to(torch.uint8).reshape(math.prod(spikes.shape[:-1]), spikes.shape[-1])
    if spikes.dtype != torch.uint8 and not (rows.view(spikes.shape) == spikes).all():
        return None
    out = torch.ops.onednn.qlinear_pointwise(
        rows,
        1.0,  # scale and zero point of the spikes
        0,
        *_packed(weight, bias, weight_scale),
        1.0,  # scale and zero point of the output
        0,
        torch.float32 if weight_scale.dtype == torch.float32 else torch.bfloat16,
        "none",
        [],
        "",
    )
    return out.view(*spikes.shape[:-1], len(weight))


# Of a weight: its scale and bias, the states of all three, and what they were packed into.
_HELD: Any = WeakTensorKeyDictionary()


def _packed(weight: Tensor, bias: Tensor | None, weight_scale: Tensor) -> tuple[Tensor | None, ...]:
    """The weight as oneDNN wants it, which is opaque; its scale, zero point and bias.

    Packed once, and again if a tensor was replaced or changed.
    """
    states = [state_of(tensor) for tensor in (weight, weight_scale, bias) if tensor is not None]
    held = _HELD.get(weight)
    if held is not None and held[0] is weight_scale and held[1] is bias and held[2] == states:
        return held[3]
    with torch.inference_mode(False):  # so that it can be used outside of it, too
        packed = (
            torch.ops.onednn.qlinear_prepack(weight.detach(), None),
            weight_scale.detach().float(),  # the model may be in half precision
            torch.zeros(len(weight), dtype=torch.int64, device=weight.device),
            None if bias is None else bias.detach().float(),
        )
    _HELD[weight] = (weight_scale, bias, states, packed)
    return packed
