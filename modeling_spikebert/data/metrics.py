"""Metrics of predictions, computed without a network (`evaluate.load` fetches its scripts from the Hub)."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


def accuracy(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Fraction of predictions that equal their reference."""
    return float(np.mean(predicted == actual))


def f1(predicted: np.ndarray, actual: np.ndarray, positive_label: int | None = None) -> float:
    """F1, the harmonic mean of precision and recall: of `positive_label`, or as mean over all classes that occur.

    0 for a class that is neither predicted nor there.
    """
    scores = []
    for label in np.union1d(predicted, actual) if positive_label is None else [positive_label]:
        hits = np.sum((predicted == label) & (actual == label))
        scores.append(2 * hits / max(1, np.sum(predicted == label) + np.sum(actual == label)))
    return float(np.mean(scores))


def matthews_correlation(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Correlation of predicted and actual classes (Matthews, 1975; for any number of classes Gorodkin, 2004, eq. 8).

    0 if all predictions, or all references, are the same.
    """
    classes = np.union1d(predicted, actual)
    x, y = ((ids[:, None] == classes).astype(float) for ids in (predicted, actual))  # [N, C], a single 1 in each row
    return _correlation(x, y)


def pearson(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Linear correlation; 0 if all predictions, or all references, are the same."""
    # Divided by the largest magnitude, so that no square overflows.
    x, y = (values / (np.abs(values).max() or 1.0) for values in (predicted, actual))
    return _correlation(x, y)


def spearmanr(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Linear correlation of the ranks, where equal values share their mean rank; 0 as for `pearson`."""
    return _correlation(_ranks(predicted), _ranks(actual))


# Each under the name that its result has, as in the GLUE metric of `evaluate`, and the type of what it compares.
METRICS: dict[str, tuple[Callable[..., float], str]] = {
    "accuracy": (accuracy, "int64"),
    "f1": (f1, "int64"),
    "matthews_correlation": (matthews_correlation, "int64"),
    "pearson": (pearson, "float64"),
    "spearmanr": (spearmanr, "float64"),
}


class LocalMetric(evaluate.Metric):
    """One of `METRICS` as a metric of `evaluate` that needs no download."""

    def _info(self) -> evaluate.MetricInfo:
        function, dtype = METRICS[self.config_name]
        columns = {"predictions": datasets.Value(dtype), "references": datasets.Value(dtype)}
        return evaluate.MetricInfo(description=function.__doc__ or "", citation="", features=datasets.Features(columns))

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        function, _ = METRICS[self.config_name]
        return {self.config_name: function(np.asarray(predictions), np.asarray(references), **options)}


def compute_metrics(
    prediction: EvalPrediction, names: Sequence[str], positive_label: int | None = None
) -> dict[str, float]:
    """The metrics of these names, of logits `[N, C]` against class ids `[N]`, or of numbers `[N, 1]` against `[N]`.

    Args:
        prediction: of a `Trainer`.
        names: keys of `METRICS`.
        positive_label: the class whose F1 is wanted; mean over classes without it.
    """
    outputs = np.asarray(prediction.predictions)
    predictions = outputs[:, 0] if outputs.shape[-1] == 1 else outputs.argmax(-1)
    results: dict[str, float] = {}
    for name in names:
        options = {"positive_label": positive_label} if name == "f1" else {}
        metric = LocalMetric(name, keep_in_memory=True)
        results |= metric.compute(predictions=predictions, references=prediction.label_ids, **options) or {}
    return results


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: accuracy and macro F1 of logits `[N, C]` against class ids `[N]`."""
    return compute_metrics(prediction, ("accuracy", "f1"))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the products of deviations from the mean over rows, over the root of both sums of squares; or 0."""
    if not (np.ptp(x, axis=0).any() and np.ptp(y, axis=0).any()):
        return 0.0
    x, y = (values - values.mean(0) for values in (x, y))
    x, y = (values / np.linalg.norm(values) for values in (x, y))
    return float(np.clip(np.sum(x * y), -1, 1))
