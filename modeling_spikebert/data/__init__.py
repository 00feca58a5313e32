from .metrics import accuracy_metrics
from .streams import TextStream
from .tasks import TASKS, Task, load_task, metrics_for
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
