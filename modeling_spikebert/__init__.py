"""SpikeBERT: a spiking Transformer for language, taught by BERT in two stages of knowledge distillation."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_spikebert import SpikeBertConfig
from .modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel

if TYPE_CHECKING:
    from .distillation import DistillationTrainer, DistillationTrainingArguments

__version__ = version("modeling_spikebert")

__all__ = [
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "SpikeBertConfig",
    "SpikeBertForSequenceClassification",
    "SpikeBertModel",
]

AutoConfig.register(SpikeBertConfig.model_type, SpikeBertConfig)
AutoModel.register(SpikeBertConfig, SpikeBertModel)
AutoModelForSequenceClassification.register(SpikeBertConfig, SpikeBertForSequenceClassification)


def __getattr__(name: str) -> Any:
    # The trainer brings in accelerate and datasets; who only loads a model does not wait for them.
    if name in ("DistillationTrainer", "DistillationTrainingArguments"):
        from . import distillation

        return getattr(distillation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
