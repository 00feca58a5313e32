"""`spikebert serve`: a folder of `spikebert export --format onnx` behind HTTP, on ONNX Runtime, without torch.

POST /classify takes {"inputs": "a text"} or {"inputs": ["a text", ...]}; /docs describes everything.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..serving.classifier import OnnxClassifier


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
        GracefulServer(app, service, greeting(classifier, *socket.getsockname()[:2]), args.verbose).run([socket])
    print(f"Stopped. {service.accepted} requests accepted, {service.answered} answered.", flush=True)


def greeting(classifier: "OnnxClassifier", host: str, port: int) -> str:
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    example = """-d '{"inputs": "A wonderful film."}' -H 'Content-Type: application/json'"""
    return (
        f"{classifier.path} ({', '.join(classifier.labels)}) on {address}\n"
        f"Ask it: curl {address}/classify {example}. Ctrl-C ends it."
    )


def usable_cores() -> int:
    """Cores that this process may use, where the system says that."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
