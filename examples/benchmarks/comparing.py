"""What the benchmarks share: interleaved timing, naive forms, rows and their file. Fast forms compile at once."""

import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from modeling_spikebert.native_spikebert import use_fast_forms

use_fast_forms(True)


def naive(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run with the naive forms of all operators: Python loops over time steps, autograd around them."""

    def run_naively() -> Any:
        use_fast_forms(False)
        try:
            return run()
        finally:
            use_fast_forms(True)

    return run_naively


def int8_bert(bert: Any) -> Any:
    """The BERT with dynamic int8 quantisation."""
    with warnings.catch_warnings():  # deprecated in favour of torchao, and still the fastest in eager mode
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(bert, {nn.Linear}, dtype=torch.qint8)


def print_machine() -> dict[str, Any]:
    """Prints and returns what the figures depend on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    machine = {
        "cpu": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    return machine


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run. All take turns, so that a change of the machine's speed meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def rows_of(medians: dict[str, float], pairs: list[tuple[str, str]], shape: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of `name`, `shape`, `seconds`, `against` and `ratio` for each pair of names, the second held against."""
    rows = []
    for name, against in pairs:
        ratio = medians[name] / medians[against]
        rows.append({"name": name, "shape": shape, "seconds": medians[name], "against": against, "ratio": ratio})
        spelled = ", ".join(f"{key} {value}" for key, value in shape.items())
        print(f"{name:14} {1000 * medians[name]:9.1f} ms  {ratio:6.3f} x {against:14} ({spelled})", flush=True)
    return rows


def write(file: str | None, machine: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    if file is not None:
        Path(file).write_text(json.dumps({"machine": machine, "rows": rows} | more, indent=2))
