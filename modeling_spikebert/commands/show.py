"""`spikebert show`: pictures of what a model does with a sentence: spikes, words, firing rates, energy, time steps."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.texts import has_text, labelled_text, read_table, select_columns
from ..energy import EnergyComparison, bert_of_same_shape, estimate_energy
from ..hub.fetching import loading
from .energy import load, num_positions
from .options import OptionParser, check_at_least

STEPS = (1, 2, 4, 8)  # of the last picture
EXAMPLE = """\
example:
  spikebert show examples/checkpoints/spikebert-6x384-sst2 --text "A wonderful film, funny and moving."

pictures, each as PNG and SVG:
  raster           spikes of each block and time step, word by word, next to the class
  words            which words fired most
  firing_rates     firing rate of each block and layer of neurons
  energy           energy of each layer in both accounts, and memory traffic, next to a BERT
  scores           class scores after 1 to 8 time steps, or with --file:
  accuracy         accuracy with 1, 2, 4 and 8 time steps, with its standard error
"""


def main(arguments: list[str]) -> None:
    run(parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert show",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER", help="folder or Hub name of a SpikeBERT")
    parser.add_argument("--text", required=True, metavar="SENTENCE", help="the sentence")
    parser.add_argument("--num-time-steps", type=int, metavar="T", help="time steps (default: those of the model)")
    parser.add_argument(
        "--teacher",
        metavar="BERT",
        help="folder or Hub name of a BERT to compare the energy with (default: a BERT of the model's shape)",
    )
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--file", help="csv, json lines or parquet file with the columns text and label")
    accuracy.add_argument(
        "--num-sentences",
        type=int,
        default=200,
        metavar="N",
        help="how many of its sentences, drawn at random (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir", default="pictures", metavar="DIR", help="where the pictures go (default: %(default)s)"
    )
    output.add_argument(
        "--format", nargs="+", choices=("png", "svg"), default=["png", "svg"], help="file types (default: png svg)"
    )
    args = parser.parse_args(arguments)
    try:
        check_at_least(1, args, "num_sentences")
        if args.num_time_steps is not None:
            check_at_least(1, args, "num_time_steps")
        if not has_text(args.text):
            raise ValueError("--text is empty. Write at least one word.")
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> list[Path]:
    """Draws, writes and prints what the pictures say; returns the files."""
    # An extra, and before the work, so that nothing is lost without it.
    from ..pictures import energy_by_layer, firing_rates, not_drawable, raster, save, scores_by_steps, spikes_of, words

    logging.disable_progress_bar()
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
