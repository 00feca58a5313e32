"""`spikebert serve`: a folder of `spikebert export --format onnx` behind HTTP, on ONNX Runtime, without torch.

POST /classify takes {"inputs": "a text"} or {"inputs": ["a text", ...]}; /docs describes everything.
"""

import argparse

from . import OptionParser

# Option: least value, greatest value, default, help.
NUMBERS = {
    "port": (0, 65535, 8000, "port to listen on; 0 takes one that is free"),
    "max-batch": (1, 1024, 16, "most sentences computed at once"),
    "max-wait-ms": (0, 1000, 0, "how long a sentence waits for others while nothing is computed, in ms"),
    "max-queue": (1, 1_000_000, 512, "most sentences accepted and not yet answered; further requests get 503"),
    "max-request-kb": (1, 1_000_000, 1024, "largest body of a request, in KiB"),
    "max-length": (3, 1_000_000, None, "longest sentence, in tokens (default: what the model takes)"),
    "threads": (1, 1024, None, "threads that compute a batch (default: one for each core)"),
}
GROUPS = {
    "model": ("max-length", "threads"),
    "address": ("port",),
    "queue": ("max-batch", "max-wait-ms", "max-queue", "max-request-kb"),
}
EXAMPLES = ["spikebert serve runs/onnx", "spikebert serve runs/onnx --host 0.0.0.0 --port 80 --threads 4"]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="spikebert serve", takes="FOLDER", description=__doc__, examples=EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="folder with config.json, tokenizer.json and onnx/")
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    groups["model"].add_argument(
        "--file", metavar="NAME", help="graph in onnx/ (default: model_int8.onnx, or else model.onnx)"
    )
    groups["address"].add_argument("--host", default="127.0.0.1", help="address to listen on")
    for title, names in GROUPS.items():
        for name in names:
            _, _, default, text = NUMBERS[name]
            groups[title].add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    args = parser.parse_args(arguments)
    for name, (least, most, _, _) in NUMBERS.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} must be between {least} and {most}, got {value}.")
    return args
