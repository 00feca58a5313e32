"""What a model really takes on this machine: seconds, and joules where they can be read."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .counting import check_batches, eval_mode, model_arguments

NOT_MEASURED = "not measured"
NUM_SENTENCES = 20


@dataclass(frozen=True)
class MeasuredCost:
    """Measured cost of a sentence.

    Args:
        latency_ms: time of a sentence that comes alone, in ms; median over sentences and repeats.
        joules: energy of a sentence, the whole device's with its idle share and other programs; None if not readable.
        source: which counter was read, or why none.
        device: on which device it ran.
        num_sentences: how many sentences were run.
        repeats: how often each of them was run.
    """

    latency_ms: float
    joules: float | None
    source: str
    device: str
    num_sentences: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_cost(model: PreTrainedModel, inputs: Any, seconds: float = 1.0) -> MeasuredCost:
    """Runs the first 20 sentences of the inputs one at a time, without padding, over and over.

    A first round is not measured. Joules come from zeus (package `zeus`, extra `energy`): NVML's counter of the GPU
    that holds the model, or RAPL's of the CPU packages. For RAPL zeus starts a process of its own, so a script needs
    `if __name__ == "__main__":`.

    Args:
        model: any model of transformers.
        inputs: as in `estimate_energy`.
        seconds: how long to measure at least, so that counters which tick every 0.1 s can be read.

    Raises:
        ValueError: the inputs are not encoded batches, or there are none, or `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}.")
    sentences = _sentences(model, inputs)
    with eval_mode(model):
        _round(model, sentences)
        monitor, source = _monitor(model.device)
        times: list[float] = []
        if monitor is not None:
            monitor.begin_window(__name__)
        while sum(times) < seconds:
            times += _round(model, sentences)
        joules = None
        if monitor is not None:
            window = monitor.end_window(__name__)
            joules = sum((window.gpu_energy or window.cpu_energy).values()) / len(times)
    threads = torch.get_num_threads()
    on_cpu = f"{model.device.type}, {threads} thread{'s' if threads > 1 else ''}"
    return MeasuredCost(
        latency_ms=1000 * statistics.median(times),
        joules=joules,
        source=source,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else on_cpu,
        num_sentences=len(sentences),
        repeats=len(times) // len(sentences),
    )


def _sentences(model: PreTrainedModel, inputs: Any) -> list[dict[str, Tensor]]:
    """The first sentences as batches of one, without their padding."""
    sentences: list[dict[str, Tensor]] = []
    for batch in check_batches(inputs):
        arguments = model_arguments(model, batch)
        ids = arguments["input_ids"]
        real = arguments.get("attention_mask", torch.ones_like(ids)).bool()  # [B, L]
        sentences += [
            {name: x[row : row + 1, real[row]] if x.shape == ids.shape else x for name, x in arguments.items()}
            for row in range(len(ids))
        ]
        if len(sentences) >= NUM_SENTENCES:
            break
    return sentences[:NUM_SENTENCES]


def _round(model: PreTrainedModel, sentences: list[dict[str, Tensor]]) -> list[float]:
    """Seconds of each sentence."""
    times = []
    with torch.inference_mode():
        for arguments in sentences:
            start = time.perf_counter()
            model(**arguments)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(time.perf_counter() - start)
    return times


def _monitor(device: torch.device) -> tuple[Any, str]:
    """A zeus monitor of the device's counter and the counter's name, or None and why there is none."""
    try:
        from zeus.device import get_cpus, get_gpus
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, f"{NOT_MEASURED}: zeus is not installed (extra `energy`)"
    kind = {"cuda": "GPU", "cpu": "CPU"}.get(device.type, f"device ({device.type})")
    try:
        if device.type == "cuda":
            get_gpus()
            return ZeusMonitor(gpu_indices=[device.index or 0], cpu_indices=[]), "NVML, the GPU"
        if device.type == "cpu":
            # Other zones (psys: the whole board) hold the packages once more.
            zones = [str(getattr(getattr(cpu, "rapl_file", None), "name", "package")) for cpu in get_cpus().cpus]
            packages = [index for index, name in enumerate(zones) if name.startswith("package")]
            if packages:
                return ZeusMonitor(gpu_indices=[], cpu_indices=packages), "RAPL, all CPU packages"
    except Exception as error:  # zeus raises errors of many types, from drivers and permissions
        if "permission" in type(error).__name__.lower():
            return None, f"{NOT_MEASURED}: no permission to read the energy counter of this {kind} ({error})"
    return None, f"{NOT_MEASURED}: this {kind} shows no energy counter"
