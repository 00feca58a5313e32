"""`spikebert serve`: a folder of `spikebert export --format onnx` behind HTTP, on ONNX Runtime, without torch.

POST /classify takes {"inputs": "a text"} or {"inputs": ["a text", ...]}; /docs describes everything.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .options import OptionParser

if TYPE_CHECKING:
    from ..serving.classifier import OnnxClassifier

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


def main(arguments: list[str]) -> None:
    run(parse(arguments))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="spikebert serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with config.json, tokenizer.json and onnx/")
    parser.add_argument("--file", metavar="NAME", help="graph in onnx/ (default: model_int8.onnx, or else model.onnx)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, (_, _, default, text) in NUMBERS.items():
        shown = text if default is None else f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=shown)
    args = parser.parse_args(arguments)
    for name, (least, most, _, _) in NUMBERS.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} must be between {least} and {most}, got {value}.")
    return args


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        from ..serving.app import Service, create_app
        from ..serving.classifier import OnnxClassifier
        from ..serving.server import GracefulServer, bind
    except ImportError as error:  # an extra
        raise ImportError(f'{error}. Install what serves: pip install -c constraints.txt ".[serve]".') from error
    with bind(args.host, args.port) as socket:  # first of all: it fails at once
        classifier = OnnxClassifier(Path(args.folder), args.file, args.threads or usable_cores(), args.max_length)
        service = Service(classifier, args.max_batch, args.max_wait_ms / 1000, args.max_queue)
        app = create_app(service, args.max_request_kb * 1024)
        gc.freeze()  # what is loaded stays; looking through it for garbage would stop all answers for 50 ms
        GracefulServer(app, service, greeting(classifier, *socket.getsockname()[:2])).run([socket])
    print(f"Stopped. {service.accepted} requests accepted, {service.answered} answered.", flush=True)


def greeting(classifier: "OnnxClassifier", host: str, port: int) -> str:
    address = f"[{host}]" if ":" in host else host
    return f"{classifier.path} ({', '.join(classifier.labels)}) on http://{address}:{port}"


def usable_cores() -> int:
    """Cores that this process may use, where the system says that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
