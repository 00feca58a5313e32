"""What exported models take in ONNX Runtime: a SpikeBERT in float32 and int8 beside MiniLM-L6 in float32 and int8.

    spikebert export examples/checkpoints/spikebert-6x384-sst2 --output-dir runs/onnx
    python examples/benchmarks/runtime.py --folder runs/onnx --json runtime.json

`spikebert-int8` has the operators of this package, which pass silent synapses over; `spikebert-standard` is the same
file without them. MiniLM is exported by torch.onnx and rounded by ONNX Runtime's `quantize_dynamic`; its classifier is
untrained. All models take turns in one process. Sentences are real, since random tokens make other neurons fire;
each is repeated or cut to the length. Start-up and memory are those of a process that imports ONNX Runtime alone,
loads a file, and answers one sentence (memory on Linux).
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from comparing import interleaved, print_machine, rows_of, write
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from modeling_spikebert.data import load_unlabelled
from modeling_spikebert.data.bundled import bundled_teacher, bundled_tweets
from modeling_spikebert.runtime.session import open_graph

BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
START_UP = """
import json, re, sys, time
start = time.perf_counter()
import numpy
from modeling_spikebert.runtime.session import open_graph
session = open_graph(sys.argv[1], 2)
ids = numpy.full((1, 25), 2000)
given = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
session.run(None, {tensor.name: given[tensor.name] for tensor in session.get_inputs()})
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())  # of this process alone
print(json.dumps([seconds, int(peak[1]) / 1e3]))
"""


@dataclass
class RuntimeArguments:
    folder: str = field(metadata={"help": "Folder that `spikebert export` wrote."})
    text_file: str | None = field(default=None, metadata={"help": "Sentences (column text). Default: bundled tweets."})
    json: str | None = field(default=None, metadata={"help": "File for the rows."})
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Threads of ONNX Runtime."})
    lengths: list[int] = field(default_factory=lambda: [16, 25, 32, 128], metadata={"help": "Tokens of a sentence."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Sentences of a batch."})
    repeats: int = field(default=15, metadata={"help": "Timed rounds."})


def export_minilm(folder: Path) -> tuple[Path, Path]:
    model = AutoModelForSequenceClassification.from_pretrained(bundled_teacher(), attn_implementation="eager").eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    axes = {name: {0: "batch", 1: "length"} for name in BERT_INPUTS}
    plain, int8 = folder / "minilm.onnx", folder / "minilm_int8.onnx"
    with warnings.catch_warnings():  # of the exporter that needs no further package
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            plain,
            input_names=list(BERT_INPUTS),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    quantize_dynamic(plain, int8, weight_type=QuantType.QInt8)
    return plain, int8


def main(args: RuntimeArguments) -> None:
    machine = print_machine() | {"onnxruntime": onnxruntime.__version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        plain, int8 = export_minilm(Path(temporary))
        folder = Path(args.folder) / "onnx"
        files = {"spikebert": folder / "model.onnx", "spikebert-int8": folder / "model_int8.onnx"}
        files |= {"minilm": plain, "minilm-int8": int8}
        starts = {name: start_up(file) for name, file in files.items()}
        ids = token_ids(args.text_file, folder.parent)
        for name, (seconds, megabytes) in starts.items():
            size = files[name].stat().st_size / 1e6
            print(
                f"{name:14} {size:6.1f} MB on disk, {megabytes:5.0f} MB of memory, first answer after {seconds:.2f} s"
            )
        for threads in args.threads:
            sessions = {name: open_graph(file, threads) for name, file in files.items()}
            sessions["spikebert-standard"] = standard_session(files["spikebert-int8"], threads)
            for size in args.batch_sizes:
                for length in args.lengths:
                    batch = sentences(ids, size, length)
                    runs = {name: partial(run, session, batch) for name, session in sessions.items()}
                    medians = interleaved(runs, args.repeats * (1 if size > 1 else 3))
                    shape = {"threads": threads, "sentences": size, "tokens": length}
                    rows += rows_of(medians, [(name, "minilm-int8") for name in sessions], shape)
    write(args.json, machine, rows, start_up={name: list(values) for name, values in starts.items()})


def token_ids(file: str | None, folder: Path) -> list[list[int]]:
    table = bundled_tweets().validation if file is None else load_unlabelled(file)
    return AutoTokenizer.from_pretrained(folder)(list(table["text"]))["input_ids"]


def sentences(ids: list[list[int]], size: int, length: int) -> np.ndarray:
    """`[size, length]`, without padding: the sentences nearest to the length, repeated or cut."""
    nearest = sorted(ids, key=lambda sentence: abs(len(sentence) - length))[:size]
    return np.stack([np.resize(sentence, length) for sentence in nearest])


def standard_session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(session: Any, ids: np.ndarray) -> None:
    given = dict(zip(BERT_INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
    session.run(None, {tensor.name: given[tensor.name] for tensor in session.get_inputs()})


def start_up(file: Path) -> tuple[float, float]:
    """Seconds to the first answer and megabytes of memory, the median of three processes."""
    command = [sys.executable, "-c", START_UP, str(file)]
    results = sorted(
        tuple(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout))
        for _ in range(3)
    )
    return results[1]


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(RuntimeArguments).parse_args_into_dataclasses()
    main(arguments)
