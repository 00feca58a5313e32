# SPDX-License-Identifier: Apache-2.0
"""int8 weights for the Linears inside the blocks, asked for as the ecosystem asks for quantisation.

    AutoModelForSequenceClassification.from_pretrained(folder, quantization_config={"quant_method": "spikebert_int8"})

Spikes, and the spike counts of the published shortcut, are small integers and exact in one byte: only the weights are
rounded, to 8 bits with one scale for each output. The input needs no calibration and no scale of its own.

With `"dequantize": True` the weights are int8 in the file only, word embeddings as well: a quarter of the size to store
and send, and a float model, which trains, when it is loaded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "spikebert_int8"


class Int8Linear(nn.Module):
    """A Linear with int8 weights `[out_features, in_features]` and a float32 scale for each output. Not trainable."""

    def __init__(self, in_features: int, out_features: int, device: Any = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = _frozen(out_features, in_features, dtype=torch.int8, device=device)
        self.weight_scale = _frozen(out_features, device=device)
        self.bias = _frozen(out_features, device=device)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Rounds the weights of `linear`: the largest of each output becomes 127 or -127."""
        self = cls(linear.in_features, linear.out_features, linear.weight.device)
        _round_rows(linear.weight, self.weight, self.weight_scale)
        self.bias.copy_(linear.bias.detach())
        return self

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The Linear of the rounded weights."""
        linear = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight * self.weight_scale.unsqueeze(1))
            linear.bias.copy_(self.bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        sums = nn.functional.linear(x, self.weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        return (sums * self.weight_scale + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Embedding(nn.Module):
    """An Embedding with int8 weights `[num_embeddings, embedding_dim]` and a float32 scale for each row."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any = None):
        super().__init__()
        self.weight = _frozen(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.weight_scale = _frozen(num_embeddings, device=device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "Int8Embedding":
        self = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.weight.device)
        _round_rows(embedding.weight, self.weight, self.weight_scale)
        return self

    def to_embedding(self, dtype: torch.dtype) -> nn.Embedding:
        """The Embedding of the rounded weights."""
        return nn.Embedding.from_pretrained((self.weight * self.weight_scale.unsqueeze(1)).to(dtype), freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.weight_scale[ids].unsqueeze(-1)


def _frozen(*shape: int, dtype: torch.dtype = torch.float32, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _round_rows(weight: Tensor, rounded: Tensor, scale: Tensor) -> None:
    weight = weight.detach().float()
    scale.copy_(weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127)
    rounded.copy_((weight / scale.unsqueeze(1)).round())


class PackedLinear(NamedTuple):
    """Linears side by side as oneDNN wants them; `weight` is opaque."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor


# By the first of the Linears: what they held when they were packed, and the packed weights.
_PACKED: WeakKeyDictionary[nn.Module, tuple[list[Any], PackedLinear]] = WeakKeyDictionary()


def is_int8(linear: Any) -> bool:
    """Whether this is an `Int8Linear`, perhaps of another copy of this file."""
    return not linear.weight.is_floating_point()


def pack(modules: Sequence[Any]) -> PackedLinear:
    """`Int8Linear`s that share their input, packed side by side.

    Packed once, and again if a tensor was replaced or changed in place. Not seen are changes that autograd does not
    count either: those of `.data`, and of weights that were made in inference mode.
    """
    held = [
        (tensor, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for module in modules
        for tensor in (module.weight, module.weight_scale, module.bias)
    ]
    before, packed = _PACKED.get(modules[0], ([], None))
    same = len(before) == len(held) and all(
        old is new and old_state == new_state for (old, *old_state), (new, *new_state) in zip(before, held, strict=True)
    )
    if packed is not None and same:
        return packed
    with torch.inference_mode(False):  # so that they can be used outside of it, too
        weight = torch.cat([module.weight for module in modules])
        packed = PackedLinear(
            torch.ops.onednn.qlinear_prepack(weight, None),
            torch.cat([module.weight_scale for module in modules]).float(),  # the model may be in half precision
            torch.zeros(len(weight), dtype=torch.int64),
            torch.cat([module.bias for module in modules]).float(),
        )
    _PACKED[modules[0]] = held, packed
    return packed


def int8_linear(spikes: Tensor, packed: PackedLinear) -> Tensor:
    """uint8 `[..., in_features]` to bfloat16 `[..., out_features]`: exact sums of products, rounded once."""
    rows = _int8_product(spikes.flatten(0, -2), packed.weight, packed.scale, packed.zero_point, packed.bias)
    return rows.unflatten(0, spikes.shape[:-1])


# An operator of its own, because the compiler knows oneDNN's only with constant weights.
@torch.library.custom_op("spikebert::int8_product", mutates_args=())
def _int8_product(spikes: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        spikes, 1.0, 0, weight, scale, zero_point, bias, 1.0, 0, torch.bfloat16, "none", [], ""
    )


@_int8_product.register_fake
def _(spikes: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor) -> Tensor:
    return spikes.new_empty(spikes.shape[0], scale.shape[0], dtype=torch.bfloat16)


class SpikeBertInt8Config(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`.

    Args:
        dequantize: whether weights are int8 in the file alone. Quantising with it also rounds the word embeddings; what
            is saved then loads as a float model.
    """

    def __init__(self, quant_method: str = QUANT_METHOD, dequantize: bool = False):
        self.quant_method: Any = quant_method
        self.dequantize = dequantize


class SpikeBertInt8Quantizer(HfQuantizer):
    """Puts int8 modules in place of the Linears inside the blocks, before or after the weights are loaded."""

    quantization_config: SpikeBertInt8Config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        _replace(model, nn.Linear, lambda linear: Int8Linear(linear.in_features, linear.out_features, "meta"))
        if self.quantization_config.dequantize:
            words: Any = model.get_input_embeddings()
            model.set_input_embeddings(Int8Embedding(words.num_embeddings, words.embedding_dim, "meta"))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            _replace(model, nn.Linear, Int8Linear.from_linear)
            if self.quantization_config.dequantize:
                words: Any = model.get_input_embeddings()
                model.set_input_embeddings(Int8Embedding.from_embedding(words))
        elif self.quantization_config.dequantize:
            dtype: Any = model.config.dtype  # not `model.dtype`: scales stay in float32
            self._dequantize(model, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        _replace(model, Int8Linear, lambda linear: linear.to_linear(dtype or torch.float32))
        words: Any = model.get_input_embeddings()
        if type(words).__name__ == Int8Embedding.__name__:
            model.set_input_embeddings(words.to_embedding(dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _replace(model: PreTrainedModel, kind: type, build: Any) -> None:
    blocks: Any = model.base_model.encoder
    for name, module in list(blocks.named_modules()):
        if type(module).__name__ == kind.__name__:  # by name: a second copy of this file has classes of its own
            blocks.set_submodule(name, build(module))


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second copy of this file, in the folder of another checkpoint
    register_quantization_config(QUANT_METHOD)(SpikeBertInt8Config)
    register_quantizer(QUANT_METHOD)(SpikeBertInt8Quantizer)
