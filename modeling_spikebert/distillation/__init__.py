from .arguments import DistillationTrainingArguments
from .callbacks import ConsoleCallback, FiniteLossCallback, use_console
from .resuming import ResumableTrainer
from .trainer import PROJECTIONS_NAME, DistillationTrainer

__all__ = [
    "PROJECTIONS_NAME",
    "ConsoleCallback",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "FiniteLossCallback",
    "ResumableTrainer",
    "use_console",
]
