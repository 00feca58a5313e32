# SPDX-License-Identifier: Apache-2.0
"""int8 weights for the Linears inside the blocks, asked for as the ecosystem asks for quantisation.

    AutoModelForSequenceClassification.from_pretrained(folder, quantization_config={"quant_method": "spikebert_int8"})

The weights are rounded to 8 bits with one scale for each output; what the spikes do with them is `int8_spikebert`'s.

With `"dequantize": True` the weights are int8 in the file only, word embeddings as well: a quarter of the size to store
and send, and a float model, which trains, when it is loaded.

Imported when int8 weights are asked for, and not before: it extends transformers by a method of quantisation.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8_spikebert import round_rows, rounded_modules

QUANT_METHOD = "spikebert_int8"


class SpikeBertInt8Config(QuantizationConfigMixin):
    """`quantization_config` of `from_pretrained`.

    Args:
        dequantize: whether weights are int8 in the file alone, with those of word embeddings. The model that is
            quantised has the rounded weights in floating point, and so has the one that is loaded from the file.
    """

    def __init__(self, quant_method: str = QUANT_METHOD, dequantize: bool = False):
        self.quant_method: Any = quant_method
        self.dequantize = dequantize


class SpikeBertInt8Quantizer(HfQuantizer):
    """Gives the Linears inside the blocks int8 weights, before or after the weights are loaded."""

    quantization_config: SpikeBertInt8Config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            for module in self._rounded_modules(model):
                weight = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
                _set_weight(module, weight, torch.empty(len(weight), dtype=torch.float32, device="meta"))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            for module in self._rounded_modules(model):
                _set_weight(module, *round_rows(module.weight))
        if self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)  # not `model.dtype`: scales stay in float32
        else:
            _give_bytes(model, torch.uint8)

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        for module in self._rounded_modules(model):
            if module.weight_scale is not None:
                weight = module.weight.detach() * module.weight_scale.unsqueeze(1)
                _set_weight(module, weight.to(dtype or torch.float32), None)
        _give_bytes(model, None)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is saved in place of the model's own weights: these, in int8, where it is so in the file alone."""
        if not self.quantization_config.dequantize:
            return None, {}
        weights = model.state_dict()
        names = {module: name for name, module in model.named_modules()}
        for module in self._rounded_modules(model):
            name = names[module]
            weights[f"{name}.weight"], weights[f"{name}.weight_scale"] = round_rows(module.weight)
        return weights, {}

    def _rounded_modules(self, model: PreTrainedModel) -> list[Any]:
        *linears, words = rounded_modules(model)
        return [*linears, words] if self.quantization_config.dequantize else linears

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _set_weight(module: Any, weight: Tensor, weight_scale: Tensor | None) -> None:
    """Float weights with no scale, or int8 weights and their scales `[M]`; the latter are not trained."""
    module.weight = nn.Parameter(weight, requires_grad=weight_scale is None)
    module.weight_scale = None if weight_scale is None else nn.Parameter(weight_scale, requires_grad=False)
    for parameter in module.parameters():
        parameter.requires_grad_(weight_scale is None)


def _give_bytes(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Which type spikes have in front of Linears; those of query, key and value meet each other."""
    base: Any = model.base_model
    for layer in base.encoder.layer:
        attention, mlp = layer.attention, layer.mlp
        for neuron in (attention.input_neuron, attention.context_neuron, mlp.input_neuron, mlp.intermediate_neuron):
            neuron.dtype = dtype


def register() -> None:
    """Makes `QUANT_METHOD` known to transformers; a second copy of this file finds it known."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SpikeBertInt8Config)
        register_quantizer(QUANT_METHOD)(SpikeBertInt8Quantizer)
