from .arguments import DistillationTrainingArguments
from .resuming import ResumableTrainer
from .trainer import PROJECTIONS_NAME, DistillationTrainer

__all__ = ["PROJECTIONS_NAME", "DistillationTrainer", "DistillationTrainingArguments", "ResumableTrainer"]
