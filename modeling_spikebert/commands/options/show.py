"""`spikebert show`: pictures of what a model does with a sentence: spikes, words, firing rates, energy, time steps.

Each is a PNG and an SVG. `raster`: spikes of each block and time step, word by word, next to the class. `words`: which
words fired most. `firing_rates`: of each block and layer of neurons. `energy`: of each layer in both accounts, and
memory traffic, next to a BERT. `scores`: of the classes after 1 to 8 time steps, or with --file `accuracy`: with 1, 2,
4 and 8 time steps, with its standard error.
"""

import argparse

from . import OptionParser, check_at_least

EXAMPLES = ['spikebert show examples/checkpoints/spikebert-6x384-sst2 --text "A wonderful film, funny and moving."']


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="spikebert show", takes="FOLDER --text SENTENCE", description=__doc__, examples=EXAMPLES)
    parser.add_argument("model", metavar="FOLDER", help="folder or Hub name of a SpikeBERT")
    sentence = parser.add_argument_group("sentence")
    sentence.add_argument("--text", required=True, metavar="SENTENCE", help="the sentence")
    sentence.add_argument("--num-time-steps", type=int, metavar="T", help="time steps (default: those of the model)")
    sentence.add_argument(
        "--teacher",
        metavar="BERT",
        help="folder or Hub name of a BERT to compare the energy with (default: a BERT of the model's shape)",
    )
    accuracy = parser.add_argument_group("accuracy")
    accuracy.add_argument("--file", help="csv, json lines or parquet file with the columns text and label")
    accuracy.add_argument("--num-sentences", type=int, default=200, help="how many of its sentences, drawn at random")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", default="pictures", metavar="DIR", help="where the pictures go")
    output.add_argument("--format", nargs="+", choices=("png", "svg"), default=["png", "svg"], help="default: both")
    args = parser.parse_args(arguments)
    try:
        check_at_least(1, args, "num_sentences")
        if args.num_time_steps is not None:
            check_at_least(1, args, "num_time_steps")
        if not args.text.strip():
            raise ValueError("--text is empty. Write at least one word.")
    except ValueError as error:
        parser.error(str(error))
    return args
