"""What the benchmarks share: interleaved timing, the plain model with loops, rows and their file."""

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
from torch import Tensor, nn

from modeling_spikebert.modeling_spikebert import SpikeBertNeuron


class Spike(torch.autograd.Function):
    """The step function, and backward its surrogate's derivative."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, surrogate: Any) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.surrogate = surrogate
        return (distance >= 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.surrogate.derivative(ctx.saved_tensors[0]), None


class LoopNeuron(nn.Module):
    """Neurons as published code computes them: a Python loop over time steps (hard reset to 0), autograd around it."""

    def __init__(self, neuron: SpikeBertNeuron):
        super().__init__()
        self.neuron = neuron

    def forward(self, current: Tensor) -> Tensor:
        v, fired = torch.zeros_like(current[0]), []
        for x in current:
            h = v + (x - v) / self.neuron.tau
            spikes = Spike.apply(h - self.neuron.v_threshold, self.neuron.surrogate)
            v = h * (1 - spikes.detach())
            fired.append(spikes)
        return torch.stack(fired)


def with_loops(model: Any) -> Any:
    """The model with a `LoopNeuron` for each of its neurons; it takes the plain path."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SpikeBertNeuron):
            model.set_submodule(name, LoopNeuron(module))
    return model


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
