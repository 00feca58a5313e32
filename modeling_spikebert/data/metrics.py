"""Metrics of predictions, computed without a network (`evaluate.load` fetches its scripts from the Hub)."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class _Metric(evaluate.Metric):
    """An `evaluate` metric that needs no download."""

    dtype = "int64"

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self.dtype)
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=datasets.Features({"predictions": value, "references": value}),
        )


class Accuracy(_Metric):
    """Fraction of predictions that equal their reference."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class F1(_Metric):
    """F1, the harmonic mean of precision and recall: of `positive_label`, or as mean over all classes that occur.

    0 for a class that is neither predicted nor there.
    """

    def _compute(self, predictions: Any, references: Any, positive_label: int | None = None) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        labels = np.union1d(predicted, actual) if positive_label is None else [positive_label]
        f1 = []
        for label in labels:
            hits = np.sum((predicted == label) & (actual == label))
            f1.append(2 * hits / max(1, np.sum(predicted == label) + np.sum(actual == label)))
        return {"f1": float(np.mean(f1))}


class MatthewsCorrelation(_Metric):
    """Correlation of predicted and actual classes (Matthews, 1975; for any number of classes Gorodkin, 2004, eq. 8).

    0 if all predictions, or all references, are the same.
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, actual = (
            np.asarray(x)[:, None] == np.union1d(predictions, references) for x in (predictions, references)
        )  # [N, C], one true value a row
        return {"matthews_correlation": _correlation(predicted.astype(float), actual.astype(float))}


class Pearson(_Metric):
    """Linear correlation; 0 if all predictions, or all references, are the same."""

    dtype = "float64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"pearson": _correlation(_unit_range(predictions), _unit_range(references))}


class Spearman(_Metric):
    """Linear correlation of the ranks, where equal values share their mean rank; 0 as for `Pearson`."""

    dtype = "float64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"spearmanr": _correlation(_ranks(predictions), _ranks(references))}


# Each under the name that its result has, as in the GLUE metric of `evaluate`.
METRICS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearmanr": Spearman,
}


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
        metric = METRICS[name](keep_in_memory=True)
        results |= metric.compute(predictions=predictions, references=prediction.label_ids, **options) or {}
    return results


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: accuracy and macro F1 of logits `[N, C]` against class ids `[N]`."""
    return compute_metrics(prediction, ("accuracy", "f1"))


def _unit_range(values: Any) -> np.ndarray:
    """Values divided by the largest magnitude, so that no square overflows."""
    x = np.asarray(values, dtype=np.float64)
    return x / (np.abs(x).max() or 1.0)


def _ranks(values: Any) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the products of deviations from the mean over rows, over the root of both sums of squares; or 0."""
    if not (np.ptp(x, axis=0).any() and np.ptp(y, axis=0).any()):
        return 0.0
    x, y = (values - values.mean(0) for values in (x, y))
    x, y = (values / np.linalg.norm(values) for values in (x, y))
    return float(np.clip(np.sum(x * y), -1, 1))
