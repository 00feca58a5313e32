from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .known_tasks import TASKS, Task
    from .metrics import accuracy_metrics
    from .streams import TextStream
    from .tasks import load_task, metrics_for
    from .texts import DataError, LabelledText, load_labelled, load_unlabelled, match_labels, tokenize

__all__ = [
    "TASKS",
    "DataError",
    "LabelledText",
    "Task",
    "TextStream",
    "accuracy_metrics",
    "load_labelled",
    "load_task",
    "load_unlabelled",
    "match_labels",
    "metrics_for",
    "tokenize",
]

__getattr__ = lazily(
    __name__,
    {
        ".known_tasks": ("TASKS", "Task"),
        ".metrics": ("accuracy_metrics",),
        ".streams": ("TextStream",),
        ".tasks": ("load_task", "metrics_for"),
        ".texts": ("DataError", "LabelledText", "load_labelled", "load_unlabelled", "match_labels", "tokenize"),
    },
)
