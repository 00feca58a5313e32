from .metrics import accuracy_metrics
from .texts import DataError, LabelledText, load_labelled, load_unlabelled, match_labels, tokenize

__all__ = [
    "DataError",
    "LabelledText",
    "accuracy_metrics",
    "load_labelled",
    "load_unlabelled",
    "match_labels",
    "tokenize",
]
