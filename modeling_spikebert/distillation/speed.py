"""What training takes of the machine."""

import sys

import torch


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MB: of tensors on a GPU, of this process on a CPU (not a number on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, KiB here
