from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .arguments import DistillationTrainingArguments
    from .resuming import ResumableTrainer
    from .trainer import PROJECTIONS_NAME, DistillationTrainer

__all__ = [
    "PROJECTIONS_NAME",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "ResumableTrainer",
]

__getattr__ = lazily(
    __name__,
    {
        ".arguments": ("DistillationTrainingArguments",),
        ".resuming": ("ResumableTrainer",),
        ".trainer": ("PROJECTIONS_NAME", "DistillationTrainer"),
    },
)
