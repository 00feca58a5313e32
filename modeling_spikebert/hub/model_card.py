"""Model cards: what a student is, how it was trained and what was measured."""

import json
import math
import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, Trainer

TEMPLATE = Path(__file__).with_suffix(".md")
# Of the training, what a card lists.
OPTIONS = (
    "stage",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "seed",
)


def model_card(
    model: PreTrainedModel,
    name: str,
    *,
    repository: str | None = None,
    language: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    dataset_name: str | None = None,
    split: str = "validation",
    num_sentences: int | None = None,
    metrics: Mapping[str, float] | None = None,
    comparison: Mapping[str, Mapping[str, float]] | None = None,
    examples: Sequence[str] = (),
    energy: str | None = None,
    training: Mapping[str, Any] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """A card with metadata that the Hub reads.

    Args:
        model: a student, with or without classifier.
        name: its title.
        repository: its id on the Hub, if it goes there.
        language: code such as `en`.
        license: identifier, from who may say it: it depends on the teacher and on the training data.
        base_model: the teacher's Hub id. The Hub knows four relations to it; the nearest for a student is `finetune`.
        dataset: Hub id of the data set, if it is there.
        dataset_name: its plain name.
        split: the split that was measured.
        num_sentences: how many it has, for the standard error of an accuracy.
        metrics: metric name to value, measured on `split`.
        comparison: further rows for the table of results: name to metrics on the same sentences.
        examples: sentences to try, for the Hub's widget; the first is in the code, too.
        energy: what `EnergyComparison.to_markdown` returns.
        training: option name to value.
        tags: more tags.
    """
    config: Any = model.config
    of_training = model._keys_to_ignore_on_save or ()  # projections that are attached, and not saved
    saved = sum(weight.numel() for name, weight in model.named_parameters() if name not in of_training)
    metrics = dict(metrics or {})
    shown = dataset_name or dataset
    classifies = "ForSequenceClassification" in type(model).__name__  # by name: remote code brings classes of its own
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-classification" if classifies else "feature-extraction",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset] if dataset else None,
        metrics=list(metrics) or None,
        tags=["spikebert", "spiking-neural-network", "knowledge-distillation", *(tags or [])],
        model_name=name if metrics else None,  # of the results
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset or _identifier(shown or "unknown"),
                dataset_name=shown or "unknown",
                dataset_split=split,
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in metrics.items()
        ]
        or None,
        widget=[{"text": text} for text in examples] or None,
    )
    return ModelCard.from_template(
        data,
        str(TEMPLATE),
        name=name,
        config=config,
        classifies=classifies,
        location=repository or ".",  # `.` is the folder of the card, where there is no repository
        parameters=f"{saved / 1e6:.3g} M",
        example=json.dumps(examples[0] if examples else "One sentence.", ensure_ascii=False),
        results=_table({name: metrics, **(comparison or {})}, num_sentences) if metrics else None,
        dataset=shown,
        split=split,
        num_sentences=num_sentences,
        energy=energy,
        training=training or {},
    )


def write_model_card(
    folder: str | Path,
    trainer: Trainer,
    *,
    base_model: str | None = None,
    model_name: str | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    energy: str | None = None,
    **_: Any,
) -> None:
    """Writes `README.md` into `folder` with the options of `trainer` and the evaluation of the weights that it holds.

    The keyword arguments are those of `Trainer.create_model_card`, among them `dataset_tags` (id on the Hub) and
    `dataset` (plain name); ones that a student's card has no place for are left out. `energy` is a text for the card,
    from `EnergyComparison.to_markdown`.
    """
    args, state = trainer.args, trainer.state
    training: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    training["optimizer steps"] = state.global_step
    training |= {f"weight of loss {name}": weight for name, weight in getattr(args, "loss_weights", {}).items()}
    if getattr(args, "firing_rate_weight", 0):
        training["target_firing_rate"] = getattr(args, "target_firing_rate", None)
    metrics = _evaluation(trainer)
    card = model_card(
        trainer.accelerator.unwrap_model(trainer.model),
        model_name or Path(folder).resolve().name,
        repository=trainer.hub_model_id if args.push_to_hub else None,
        language=language,
        license=license,
        base_model=None if base_model is None or Path(base_model).is_dir() else base_model,
        dataset=_first(dataset_tags),
        dataset_name=_first(dataset),
        num_sentences=len(trainer.eval_dataset) if metrics and isinstance(trainer.eval_dataset, Sized) else None,
        metrics=metrics,
        energy=energy,
        training=training,
        tags=[tags] if isinstance(tags, str) else tags,
    )
    card.save(Path(folder) / "README.md")


def _table(results: Mapping[str, Mapping[str, float]], num_sentences: int | None) -> list[list[str]]:
    """The cells of the table of results; behind an accuracy stands its standard error, if the number is known."""
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    table = [["", *metrics], *([name, *map(_cell, map(values.get, metrics))] for name, values in results.items())]
    if num_sentences and "accuracy" in metrics:
        place = metrics.index("accuracy") + 2
        table[0].insert(place, "standard error")
        for row, values in zip(table[1:], results.values(), strict=True):
            p = values.get("accuracy")
            row.insert(place, _cell(p if p is None else math.sqrt(p * (1 - p) / num_sentences)))
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _evaluation(trainer: Trainer) -> dict[str, float]:
    """The metrics of the last evaluation, or, if the best weights were loaded after it, of the best one."""
    history = trainer.state.log_history
    evaluations = [i for i, entry in enumerate(history) if any(key.startswith("eval_") for key in entry)]
    if not evaluations:
        return {}
    entry = history[evaluations[-1]]
    ended = [i for i, entry in enumerate(history) if "train_runtime" in entry]
    if trainer.args.load_best_model_at_end and ended and evaluations[-1] < ended[-1]:
        best = [history[i] for i in evaluations if history[i]["step"] == trainer.state.best_global_step]
        entry = best[-1] if best else entry
    skipped = ("loss", "firing_rate", "runtime", "per_second", "preparation_time")
    return {
        key.removeprefix("eval_"): value
        for key, value in entry.items()
        if key.startswith("eval_")
        and not any(word in key for word in skipped)
        and isinstance(value, (int, float))
        and math.isfinite(value)
    }


def _first(value: str | list[str] | None) -> str | None:
    if isinstance(value, list):
        return value[0] if value else None
    return value


def _identifier(name: str) -> str:
    """The Hub takes letters, digits, `_`, `.` and `-` as type of a data set."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower()
