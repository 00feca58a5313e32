"""`spikebert energy`: what a model computes for a sentence, in two accounts, beside what it really takes."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from ..console.loudness import set_loudness
from ..console.text import did_you_mean, number
from ..data import DataError, load_unlabelled, tokenize
from ..energy import CONSTANTS, EnergyComparison, EnergyConstants, EnergyReport, measured_energy
from ..hub.fetching import load_model, loading
from ..teacher_spikebert import first_position_of

WORDS = "\nWhat the words mean, and which figure to trust: docs/energy.md"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts, measures, prints and writes; returns what `--json` holds."""
    set_loudness(args.verbose)
    constants = constants_of(args.constants)
    if args.plots is not None:
        from .. import pictures
    sentences = _sentences(args)
    if args.model.endswith(".nir"):
        return _of_graph(args, sentences, constants)
    names = [args.model] if args.teacher is None else [args.model, args.teacher]
    models = [load(name) for name in names]
    args.max_length = longest_input(args.max_length, dict(zip(names, models, strict=True)))
    reports = [_report(model, name, sentences, args, constants) for name, model in zip(names, models, strict=True)]
    comparison = EnergyComparison(*reports)
    print(f"{reports[0]}\n\n{comparison}")
    figures = comparison.to_dict()
    _write_json(args, figures)
    if args.plots is not None:
        folder = Path(args.plots)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {"energy": pictures.energy_by_layer(comparison.student, comparison.teacher)}
        if comparison.student.spiking:
            spikes = pictures.spikes_of(models[0], AutoTokenizer.from_pretrained(args.model), sentences[0])
            drawn |= {"firing_rates": pictures.firing_rates(comparison.student), "raster": pictures.raster(spikes)}
        files = [file for name, figure in drawn.items() for file in pictures.save(figure, folder, name, ["png"])]
        print(f"\nPictures: {', '.join(map(str, files))}")
    if args.teacher is None:
        print("\nTo compare with a BERT, name one with --teacher.")
    print(WORDS)
    return figures


def _of_graph(args: argparse.Namespace, sentences: list[str], constants: EnergyConstants) -> dict[str, Any]:
    """The account of an exported graph, and its sizes."""
    from ..neuromorphic import graph_energy, read_export, shape_of, size_table, spike_table

    if args.teacher is not None or args.plots is not None:
        raise ValueError("--teacher and --plots are for checkpoints. Leave them out, or name the folder of the graph.")
    graph, model = read_export(args.model)
    most, _ = shape_of(graph)
    if args.max_length is not None and args.max_length > most:
        raise ValueError(f"--max-length {args.max_length} exceeds the {most} tokens of {args.model}. Export with more.")
    args.max_length = most if args.max_length is None else args.max_length
    batches = _batches(str(Path(args.model).parent), sentences, args)
    report, traffic = graph_energy(graph, model, batches, constants, args.model)
    spikes, operations = traffic.per_sentence(traffic.spikes), traffic.per_sentence(traffic.operations)
    print(f"{report}\n\n{spike_table(graph, spikes)}\n\n{size_table(graph, operations)}\n")
    print("Spikes and operations are those of a sentence, and operations are without synapses of weight 0.")
    additions, multiplications = (
        count / traffic.num_sentences for count in (traffic.padding_additions, traffic.padding_multiplications)
    )
    print(
        f"Tokens that are not there take {number(additions)} additions and {number(multiplications)} multiplications "
        f"more. A graph of fewer than {most} tokens has fewer of them."
    )
    padding = {"additions": additions, "multiplications": multiplications}
    figures = report.to_dict() | {"spikes": spikes, "operations": operations, "padding": padding}
    _write_json(args, figures)
    print(WORDS)
    return figures


def _write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
        print(f"\nWritten: {args.json}")


def constants_of(name: str) -> EnergyConstants:
    if name in CONSTANTS:
        return CONSTANTS[name]
    if not Path(name).exists():
        hint = did_you_mean(name, CONSTANTS) or f"; there are {', '.join(CONSTANTS)}."
        raise ValueError(f"--constants {name}: neither constants nor a json file{hint}")
    return EnergyConstants.from_file(name)


def load(name: str, **kwargs: Any) -> PreTrainedModel:
    """A model with its classifier, if the checkpoint has one; `kwargs` are those of `from_pretrained`."""
    with loading(name):
        architectures = AutoConfig.from_pretrained(name).architectures or [""]
        classifies = "ForSequenceClassification" in architectures[0]
        return load_model(AutoModelForSequenceClassification if classifies else AutoModel, name, **kwargs)


def longest_input(max_length: int | None, models: dict[str, PreTrainedModel]) -> int:
    """`max_length`, or 128, within the positions of all models."""
    positions = {name: num_positions(model) for name, model in models.items()}
    for name, most in positions.items():
        if max_length is not None and max_length > most:
            raise ValueError(f"--max-length {max_length} exceeds the {most:g} positions of {name}.")
    return max_length or int(min(128, *positions.values()))


def num_positions(model: PreTrainedModel) -> float:
    base: Any = model.base_model
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    return math.inf if table is None else table.num_embeddings - first_position_of(table)


def _sentences(args: argparse.Namespace) -> list[str]:
    if args.text is not None:
        if not all(sentence.strip() for sentence in args.text):
            raise DataError("--text: a sentence is empty. Write at least one word.")
        return list(args.text)
    table = load_unlabelled(args.file or args.dataset, args.text_column)
    return list(table.shuffle(seed=0).select(range(min(args.num_sentences, len(table))))["text"])


def _report(
    model: PreTrainedModel, name: str, sentences: list[str], args: argparse.Namespace, constants: EnergyConstants
) -> EnergyReport:
    return measured_energy(model, _batches(name, sentences, args), constants)


def _batches(name: str, sentences: list[str], args: argparse.Namespace) -> list[Any]:
    """Sentences as the tokenizer of a model cuts them."""
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    lengths = [len(ids) for ids in tokenizer(sentences, verbose=False)["input_ids"]]
    cut = sum(length > args.max_length for length in lengths)
    if cut:
        print(f"{name}: {cut} of {len(lengths)} sentences are cut at {args.max_length} tokens (--max-length).\n")
    tokens = tokenize(Dataset.from_dict({"text": sentences}), tokenizer, args.max_length)
    return list(DataLoader(tokens, batch_size=args.batch_size, collate_fn=DataCollatorWithPadding(tokenizer)))
