"""`spikebert export`: a classifier as ONNX files, for ONNX Runtime, servers and browsers.

Writes `onnx/model.onnx` (float32) and `onnx/model_int8.onnx`, with `config.json` and tokenizer beside them, and
compares the scores of each file with those of the model. Needs `pip install -c constraints.txt ".[onnx]"` in a clone.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from ..hub.fetching import loading
from ..modeling_spikebert import SpikeBertForSequenceClassification
from .options import OptionParser, check_at_least

EXTRA = 'onnx and onnxruntime are missing. Install them with: pip install -c constraints.txt ".[onnx]"'


def main(arguments: list[str]) -> None:
    run(parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="FOLDER", help="checkpoint of a classifier, or its name on the Hub")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="onnx, the default")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder for the files; must have no onnx/")
    parser.add_argument(
        "--precision", nargs="+", choices=["float32", "int8"], default=["float32", "int8"], help="default: both"
    )
    parser.add_argument("--num-time-steps", type=int, metavar="T", help="of the graph; default: the model's")
    parser.add_argument(
        "--exit-threshold",
        type=float,
        metavar="P",
        help="a sentence takes no more time steps than its class needs to be this probable; default: the model's",
    )
    parser.add_argument("--with-spikes", action="store_true", help="a further output, the spikes that enter each block")
    args = parser.parse_args(arguments)
    try:
        if args.num_time_steps is not None:
            check_at_least(1, args, "num_time_steps")
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    try:
        from ..export import export_onnx
    except ModuleNotFoundError as error:
        raise ImportError(EXTRA) from error
    given = {"num_time_steps": args.num_time_steps, "exit_threshold": args.exit_threshold}
    options = {name: value for name, value in given.items() if value is not None}
    with loading(args.model):
        config = AutoConfig.from_pretrained(args.model)
        if config.model_type != "spikebert":
            raise ValueError(f"{args.model} is a model of type {config.model_type}, and no SpikeBERT.")
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            raise ValueError(f"{args.model} has no classifier. Export a student that stage 2 has taught.")
        model = SpikeBertForSequenceClassification.from_pretrained(args.model, **options)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    checks = export_onnx(model, Path(args.output_dir), tokenizer, tuple(args.precision), args.with_spikes)
    for name, found in checks.items():
        differing = f"{found.num_differing} of 64 sentences differ" if found.num_differing else "64 sentences agree"
        print(
            f"{found.file}: {name}, {found.megabytes:.1f} MB, {found.nodes} nodes, T {model.config.num_time_steps}; "
            f"{differing}, the others to {found.largest_error:.1e}"
        )
