from .arguments import DistillationTrainingArguments
from .callbacks import FiniteLossCallback
from .resuming import ResumableTrainer
from .trainer import PROJECTIONS_NAME, DistillationTrainer

__all__ = [
    "PROJECTIONS_NAME",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "FiniteLossCallback",
    "ResumableTrainer",
]
