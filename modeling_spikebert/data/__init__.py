from .metrics import accuracy_metrics
from .streams import stream_text, tokenize_stream
from .tasks import TASKS, Task, load_task, metrics_for
from .texts import DataError, LabelledText, load_labelled, load_unlabelled, match_labels, tokenize

__all__ = [
    "TASKS",
    "DataError",
    "LabelledText",
    "Task",
    "accuracy_metrics",
    "load_labelled",
    "load_task",
    "load_unlabelled",
    "match_labels",
    "metrics_for",
    "stream_text",
    "tokenize",
    "tokenize_stream",
]
