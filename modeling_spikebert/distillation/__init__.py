from .arguments import DistillationTrainingArguments
from .trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "DistillationTrainingArguments"]
