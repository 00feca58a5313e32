"""`spikebert energy`: what a model computes for a sentence, in two accounts, and what it really takes.

With --teacher it compares both. All figures are for one sentence, means over those that are given."""

import argparse

from ...energy.constants import CONSTANTS
from . import OptionParser, check_at_least

EXAMPLES = [
    'spikebert energy runs/quickstart/student --teacher runs/quickstart/teacher --text "The crew was great!"',
    "spikebert energy runs/quickstart/student --file reviews.csv --json energy.json --plots pictures-of-energy",
]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert energy",
        takes="MODEL (--text SENTENCE ... | --file FILE | --dataset NAME:SPLIT)",
        description=__doc__,
        examples=EXAMPLES,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or Hub name of a SpikeBERT, or the .nir file of an export"
    )
    sentences = parser.add_argument_group("sentences, in one of three ways")
    text = sentences.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", nargs="+", metavar="SENTENCE", help="sentences to count")
    text.add_argument("--file", help="csv, json lines or parquet file with sentences")
    text.add_argument("--dataset", metavar="NAME:SPLIT", help="split of a data set on the Hub")
    sentences.add_argument("--text-column", default="text", help="column of the text")
    sentences.add_argument("--num-sentences", type=int, default=200, help="how many sentences, drawn at random")
    sentences.add_argument(
        "--max-length", type=int, help="longest sentence, in tokens (default: 128, or a model's positions if fewer)"
    )
    sentences.add_argument("--batch-size", type=int, default=8, help="sentences in a batch")
    accounts = parser.add_argument_group("comparison and prices")
    accounts.add_argument("--teacher", metavar="BERT", help="folder or Hub name of a BERT to compare with")
    accounts.add_argument(
        "--constants",
        default="45nm-fp32",
        metavar="NAME",
        help=f"energy of an operation in the strict account: {', '.join(CONSTANTS)}, or a json file",
    )
    files = parser.add_argument_group("files to write")
    files.add_argument("--json", metavar="FILE", help="everything as json")
    files.add_argument("--plots", metavar="DIR", help="pictures")
    args = parser.parse_args(arguments)
    try:
        check_at_least(1, args, "num_sentences", "batch_size")
        if args.max_length is not None:
            check_at_least(3, args, "max_length")  # two tokens are special ones
    except ValueError as error:
        parser.error(str(error))
    return args
