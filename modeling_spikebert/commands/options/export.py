"""`spikebert export`: a classifier as ONNX files, for ONNX Runtime, servers and browsers.

Writes `onnx/model.onnx` (float32) and `onnx/model_int8.onnx`, with `config.json` and tokenizer beside them, and
compares the scores of each file with those of the model. Needs `pip install -c constraints.txt ".[onnx]"` in a clone.
"""

import argparse

from . import OptionParser, check_at_least

EXAMPLES = ["spikebert export examples/checkpoints/spikebert-6x384-sst2 --output-dir runs/onnx"]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert export", takes="FOLDER --output-dir DIR", description=__doc__, examples=EXAMPLES
    )
    parser.add_argument("model", metavar="FOLDER", help="checkpoint of a classifier, or its name on the Hub")
    graph = parser.add_argument_group("graph")
    graph.add_argument("--format", choices=["onnx"], default="onnx", help="kind of file")
    graph.add_argument(
        "--precision", nargs="+", choices=["float32", "int8"], default=["float32", "int8"], help="default: both"
    )
    graph.add_argument("--num-time-steps", type=int, metavar="T", help="time steps (default: those of the model)")
    graph.add_argument(
        "--exit-threshold",
        type=float,
        metavar="P",
        help="a sentence takes no more time steps than its class needs to be this probable (default: the model's)",
    )
    graph.add_argument("--with-spikes", action="store_true", help="a further output: the spikes that enter each block")
    files = parser.add_argument_group("files")
    files.add_argument("--output-dir", required=True, metavar="DIR", help="folder for the files; must have no onnx/")
    args = parser.parse_args(arguments)
    try:
        if args.num_time_steps is not None:
            check_at_least(1, args, "num_time_steps")
    except ValueError as error:
        parser.error(str(error))
    return args
