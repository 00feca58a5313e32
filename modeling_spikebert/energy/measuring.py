"""What a model really takes on this machine: seconds, and joules where they can be read."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .counting import check_batches, eval_mode, model_arguments

NOT_READABLE = "not readable here"


@dataclass(frozen=True)
class MeasuredCost:
    """Measured cost of a sentence.

    Args:
        latency_ms: time of a sentence in ms, median over passes through the inputs.
        joules: energy of a sentence, the whole device's with its idle share and other programs; None if not readable.
        source: which counter was read, or why none.
        device: on which device it ran.
        batch_size: sentences in a batch.
        passes: how often the inputs were run.
    """

    latency_ms: float
    joules: float | None
    source: str
    device: str
    batch_size: int
    passes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_cost(model: PreTrainedModel, inputs: Any, seconds: float = 1.0) -> MeasuredCost:
    """Runs the model on the inputs, over and over for at least `seconds`, after one pass that is not measured.

    Joules come from zeus (package `zeus`, extra `energy`): NVML's counter of the GPU that holds the model, or RAPL's of
    the CPU packages.

    Args:
        model: any model of transformers.
        inputs: as in `estimate_energy`.
        seconds: how long to measure, so that counters which tick every 0.1 s can be read.

    Raises:
        ValueError: the inputs are not encoded batches, or there are none, or `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}.")
    batches = [model_arguments(model, batch) for batch in check_batches(inputs)]
    sentences = sum(len(batch["input_ids"]) for batch in batches)
    if not sentences:
        raise ValueError("There are no sentences to measure: the inputs are empty. Pass at least one encoded batch.")
    with eval_mode(model):
        _run(model, batches)
        monitor, source = _monitor(model.device)
        passes: list[float] = []
        if monitor is not None:
            monitor.begin_window(__name__)
        while sum(passes) < seconds:
            passes.append(_run(model, batches))
        joules = None
        if monitor is not None:
            window = monitor.end_window(__name__)
            joules = sum((window.gpu_energy or window.cpu_energy).values()) / (len(passes) * sentences)
    return MeasuredCost(
        latency_ms=1000 * statistics.median(passes) / sentences,
        joules=joules,
        source=source,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        batch_size=max(len(batch["input_ids"]) for batch in batches),
        passes=len(passes),
    )


def _run(model: PreTrainedModel, batches: list[dict[str, Any]]) -> float:
    """Seconds of one pass through the batches."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _monitor(device: torch.device) -> tuple[Any, str]:
    """A zeus monitor of the device's counter and the counter's name, or None and why there is none."""
    try:
        from zeus.device import get_cpus, get_gpus
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, f"{NOT_READABLE}: zeus is not installed (extra `energy`)"
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
        return None, f"{NOT_READABLE}: {error}"
    return None, f"{NOT_READABLE}: no counter for device type {device.type}"
