"""Metrics of predictions, computed without a network (`evaluate.load` fetches its scripts from the Hub)."""

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class AccuracyAndF1(evaluate.Metric):
    """Fraction of right predictions, and F1 as mean over classes, as an `evaluate` metric that needs no download."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of predictions that equal their reference, and macro-averaged F1.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        predicted, actual = np.asarray(predictions), np.asarray(references)
        f1 = []
        for label in np.unique(np.concatenate([predicted, actual])):
            hits = np.sum((predicted == label) & (actual == label))
            f1.append(2 * hits / (np.sum(predicted == label) + np.sum(actual == label)))
        return {"accuracy": float(np.mean(predicted == actual)), "f1": float(np.mean(f1))}


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: accuracy and macro F1 of logits `[N, C]` against class ids `[N]`."""
    metric = AccuracyAndF1(keep_in_memory=True)
    result = metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
    assert result is not None
    return result
