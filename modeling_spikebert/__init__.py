"""SpikeBERT: a spiking Transformer for language, taught by BERT in two stages of knowledge distillation."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

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

# Imported when first used: torch and transformers take seconds, the trainer brings in accelerate and datasets.
_MODULES = {
    "DistillationTrainer": ".distillation",
    "DistillationTrainingArguments": ".distillation",
    "SpikeBertConfig": ".configuration_spikebert",
    "SpikeBertForSequenceClassification": ".modeling_spikebert",
    "SpikeBertModel": ".modeling_spikebert",
    "export_onnx": ".export",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
