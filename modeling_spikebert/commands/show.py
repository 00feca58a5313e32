"""`spikebert show`: pictures of what a model does with a sentence: spikes, words, firing rates, energy, time steps."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..console.loudness import set_loudness
from ..data.texts import labelled_text, read_table, select_columns
from ..energy import EnergyComparison, bert_of_same_shape, estimate_energy
from ..hub.fetching import loading
from .energy import load, num_positions

STEPS = (1, 2, 4, 8)  # of the last picture


def run(args: argparse.Namespace) -> list[Path]:
    """Draws, writes and prints what the pictures say; returns the files."""
    set_loudness(args.verbose)
    # An extra, and before the work, so that nothing is lost without it.
    from ..pictures import energy_by_layer, firing_rates, not_drawable, raster, save, scores_by_steps, spikes_of, words

    options = {} if args.num_time_steps is None else {"num_time_steps": args.num_time_steps}
    model = load(args.model, **options)
    with loading(args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    spikes = spikes_of(model, tokenizer, args.text)
    comparison = _compare(args, model, tokenizer)
    figures = {
        "raster": raster(spikes),
        "words": words(spikes),
        "firing_rates": firing_rates(spikes),
        "energy": energy_by_layer(comparison.student, comparison.teacher),
    }
    if args.file is not None:
        figures["accuracy"] = _accuracy(args, model, tokenizer)
    elif spikes.logits is not None:
        figures["scores"] = scores_by_steps(spikes_of(model, tokenizer, args.text, max(*STEPS, spikes.num_time_steps)))

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for name, figure in figures.items() for file in save(figure, folder, name, args.format)]
    if spikes.answer is not None:
        label, score = spikes.answer
        print(f"{score:.3f}" if spikes.problem_type == "regression" else f"{label} ({100 * score:.1f} %)")
    print(f"{spikes.description}: {100 * spikes.firing_rate:.1f} % of the neurons fire in a time step.\n")
    print(comparison)
    lacking = "".join(sorted(not_drawable(args.text)))
    if lacking:
        print(f"\nNo font here has {lacking}, so boxes are drawn. Install one that has, such as Noto Sans CJK.")
    print(f"\nPictures in {folder}: {', '.join(file.name for file in files)}")
    return files


def _compare(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EnergyComparison:
    """Theoretical energy of the sentence in the model and in a BERT."""
    teacher = bert_of_same_shape(model) if args.teacher is None else load(args.teacher)
    of_teacher = tokenizer
    if args.teacher is not None:
        with loading(args.teacher):
            of_teacher = AutoTokenizer.from_pretrained(args.teacher)
    most = int(min(128, num_positions(model), num_positions(teacher)))
    reports = [
        estimate_energy(each, cut(args.text, truncation=True, max_length=most, return_tensors="pt"))
        for each, cut in ((model, tokenizer), (teacher, of_teacher))
    ]
    return EnergyComparison(*reports)


def _accuracy(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The picture of accuracy, measured on the labelled file."""
    from ..pictures import accuracies_of, accuracy_by_steps

    config: Any = model.config
    names = [config.id2label[i] for i in sorted(config.id2label)]
    table = select_columns(read_table(args.file, ["text"]), args.file, {"text": "text", "label": "label"})
    rows = labelled_text([table, table], [args.file, args.file], label_names=names).validation
    rows = rows.shuffle(seed=0).select(range(min(args.num_sentences, len(rows))))
    print(f"Classifying {len(rows)} sentences with up to {max(STEPS)} time steps.", flush=True)
    results = accuracies_of(model, tokenizer, rows["text"][:], rows["label"][:], STEPS)
    for result in results:
        error = 100 * result.standard_error
        print(f"T {result.num_time_steps}: accuracy {100 * result.accuracy:.1f} %, standard error {error:.1f}")
    return accuracy_by_steps(results, Path(args.file).name)
