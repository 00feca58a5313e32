"""SpikeBERT: a spiking Transformer for language, taught by BERT in two stages of knowledge distillation."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from .lazy import lazily
from .registration import register

if TYPE_CHECKING:
    from .configuration_spikebert import SpikeBertConfig
    from .distillation import DistillationTrainer, DistillationTrainingArguments
    from .export import export_onnx
    from .modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel

__version__ = version("modeling_spikebert")

__all__ = [
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "SpikeBertConfig",
    "SpikeBertForSequenceClassification",
    "SpikeBertModel",
    "export_onnx",
]

register()

__getattr__ = lazily(
    __name__,
    {
        ".configuration_spikebert": ("SpikeBertConfig",),
        ".distillation": ("DistillationTrainer", "DistillationTrainingArguments"),
        ".export": ("export_onnx",),
        ".modeling_spikebert": ("SpikeBertForSequenceClassification", "SpikeBertModel"),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
