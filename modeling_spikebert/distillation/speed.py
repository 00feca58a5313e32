"""What training takes of the machine."""

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState


class Stopwatch(TrainerCallback):
    """Measures the seconds of training: from step to step, with their data, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._start()

    def _start(self, first_step: int = 0) -> None:
        self._first_step = first_step
        self._seconds = self._seconds_of_run = 0.0
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or the beginning."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def seconds_left(self, state: TrainerState) -> float:
        """At the mean speed of this run so far."""
        done = max(state.global_step - self._first_step, 1)
        return (state.max_steps - state.global_step) * self._seconds_of_run / done

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._start(state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self._seconds += now - self._last
        self._seconds_of_run += now - self._last
        self._last = now

    def _leave_out(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    on_evaluate = on_predict = on_save = _leave_out  # each comes behind what it tells of


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MB: of tensors on a GPU, of this process on a CPU (not a number on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KiB here
