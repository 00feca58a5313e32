"""`spikebert export`: a classifier for ONNX Runtime, servers and browsers, or for neuromorphic hardware.

--format onnx writes `onnx/model.onnx` (float32) and `onnx/model_int8.onnx`, and compares the scores of each file with
those of the model. --format nir writes `model.nir`, a graph of neurons and synapses with weights of 8 bits, and the
checkpoint that has the same spikes, to the last one; the model must be of the variant neuromorphic. Config and
tokenizer stand beside both. --format events writes the spikes of given sentences, `events.npz`, and a picture of each.
Extras of a clone: `pip install -c constraints.txt ".[onnx]"`, or ".[nir]".
"""

import argparse
from typing import Any

from . import OptionParser, check_at_least

EXAMPLES = [
    "spikebert export examples/checkpoints/spikebert-6x384-sst2 --output-dir runs/onnx",
    "spikebert export runs/own/student --format nir --num-tokens 64 --output-dir runs/chip",
    'spikebert export runs/chip --format events --text "A wonderful film." --output-dir runs/events',
]
# Options of one format alone, and their defaults.
ONLY: dict[str, dict[str, Any]] = {
    "onnx": {"precision": ["float32", "int8"], "exit_threshold": None, "with_spikes": False},
    "nir": {"num_tokens": None},
    "events": {"text": None},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert export", takes="FOLDER --output-dir DIR", description=__doc__, examples=EXAMPLES
    )
    parser.add_argument("model", metavar="FOLDER", help="checkpoint of a classifier, or its name on the Hub")
    parser.add_argument("--format", choices=list(ONLY), default="onnx", help="kind of file")
    parser.add_argument("--num-time-steps", type=int, metavar="T", help="time steps (default: those of the model)")
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument("--precision", nargs="+", choices=["float32", "int8"], help="default: both")
    onnx.add_argument(
        "--exit-threshold",
        type=float,
        metavar="P",
        help="a sentence takes no more time steps than its class needs to be this probable (default: the model's)",
    )
    onnx.add_argument(
        "--with-spikes", action="store_true", default=None, help="a further output: the spikes that enter each block"
    )
    graph = parser.add_argument_group("nir")
    graph.add_argument(
        "--num-tokens", type=int, metavar="L", help="longest sentence (default: 64, or the model's positions if fewer)"
    )
    events = parser.add_argument_group("events")
    events.add_argument("--text", nargs="+", metavar="SENTENCE", help="sentences whose spikes are written")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output-dir", required=True, metavar="DIR", help="folder for the files; must not have them yet"
    )
    args = parser.parse_args(arguments)
    try:
        for name, options in ONLY.items():
            for option, default in options.items():
                if name != args.format and getattr(args, option) is not None:
                    flag = option.replace("_", "-")
                    raise ValueError(f"--{flag} belongs to --format {name}. Leave it out, or add --format {name}.")
                if getattr(args, option) is None:
                    setattr(args, option, default)
        for option in ("num_time_steps", "num_tokens"):
            if getattr(args, option) is not None:
                check_at_least(1, args, option)
        if args.format == "events" and not (args.text and all(sentence.strip() for sentence in args.text)):
            raise ValueError("--format events needs --text with at least one sentence, none of them empty.")
    except ValueError as error:
        parser.error(str(error))
    return args
