"""Model cards: what a student is, how it was trained and what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from ..configuration_spikebert import SpikeBertConfig

BODY = """---
{metadata}
---

# {name}

A spiking Transformer for language (SpikeBERT, [arXiv 2308.15122](https://arxiv.org/abs/2308.15122)){taught_by}.
It has {num_hidden_layers} layers, {hidden_size} wide, and runs {num_time_steps} time steps of leaky integrate-and-fire
neurons; {shortcut}.

## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", trust_remote_code=True)
classify("One sentence.", truncation=True)
```

## Results

{results}

## Training

{training}

## Limits

It learned from one data set{dataset_sentence} and repeats what is wrong or one-sided in it. Text from elsewhere and
other languages were not tried. Low firing rates save energy on hardware that skips silent synapses; on a CPU or GPU
this model computes more than a BERT of its size.
"""

SHORTCUTS = {
    "membrane": "each linear layer inside its blocks sees binary spikes",
    "spike": "its residual stream is a sum of spikes, as published",
}


def model_card(
    config: SpikeBertConfig,
    name: str,
    *,
    language: str | None = None,
    license: str | None = "apache-2.0",
    base_model: str | None = None,
    dataset: str | None = None,
    dataset_name: str | None = None,
    split: str = "validation",
    metrics: Mapping[str, float] | None = None,
    comparison: Mapping[str, Mapping[str, float]] | None = None,
    training: Mapping[str, Any] | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """A card with metadata that the Hub reads.

    Args:
        config: of the model.
        name: repository id or folder name.
        language: code such as `en`.
        license: identifier.
        base_model: the teacher's Hub id.
        dataset: Hub id of the data set, if it is there.
        dataset_name: its plain name.
        split: the split that was measured.
        metrics: metric name to value, measured on `split`.
        comparison: further rows for the table of results: name to metrics.
        training: option name to value.
        tags: more tags.
    """
    metrics = dict(metrics or {})
    eval_results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset or dataset_name or "unknown",
            dataset_name=dataset_name or dataset or "unknown",
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        metrics=list(metrics) or None,
        tags=["spikebert", "spiking-neural-network", "knowledge-distillation", *(tags or [])],
        model_name=name,
        eval_results=eval_results or None,
    )
    rows = {name: metrics, **(comparison or {})} if metrics else {}
    content = BODY.format(
        metadata=data.to_yaml(),
        name=name,
        taught_by=f", taught by `{base_model}`" if base_model else "",
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_time_steps=config.num_time_steps,
        shortcut=SHORTCUTS[config.shortcut],
        results=_table(rows, dataset_name or dataset, split) if rows else "Not measured.",
        training="\n".join(f"- {key}: {value}" for key, value in (training or {}).items()) or "Not recorded.",
        dataset_sentence=f", {dataset_name or dataset}," if dataset_name or dataset else "",
    )
    return ModelCard(content)


def write_model_card(
    folder: str | Path,
    trainer: Trainer,
    *,
    base_model: str | None = None,
    model_name: str | None = None,
    language: str | None = None,
    license: str | None = "apache-2.0",
    tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    **_: Any,
) -> None:
    """Writes `README.md` into `folder` with the options and the last evaluation of `trainer`.

    The keyword arguments are those of `Trainer.create_model_card`; ones that a student's card has no place for are
    left out.
    """
    evaluations = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    skipped = ("loss", "runtime", "per_second", "preparation_time")
    metrics = {
        key.removeprefix("eval_"): value
        for key, value in (evaluations[-1] if evaluations else {}).items()
        if key.startswith("eval_") and not any(word in key for word in skipped)
    }
    args = trainer.args
    names = (
        "stage",
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "seed",
    )
    training: dict[str, Any] = {name: getattr(args, name) for name in names if hasattr(args, name)}
    training["optimizer steps"] = trainer.state.global_step
    training |= {f"weight of loss {name}": weight for name, weight in getattr(args, "loss_weights", {}).items()}
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    first_dataset = dataset if dataset is None or isinstance(dataset, str) else dataset[0]
    card = model_card(
        model.config,
        model_name or args.hub_model_id or Path(folder).resolve().name,
        language=language,
        license=license,
        base_model=None if base_model is None or Path(base_model).is_dir() else base_model,
        dataset=first_dataset,
        metrics=metrics,
        training=training,
        tags=[tags] if isinstance(tags, str) else tags,
    )
    card.save(Path(folder) / "README.md")


def _table(rows: Mapping[str, Mapping[str, float]], dataset: str | None, split: str) -> str:
    metrics = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    lines = [f"Measured on the {split} split" + (f" of {dataset}." if dataset else "."), ""]
    lines.append("| | " + " | ".join(metrics) + " |")
    lines.append("|---|" + "---|" * len(metrics))
    for name, values in rows.items():
        cells = [f"{values[metric]:.4f}" if metric in values else "" for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
