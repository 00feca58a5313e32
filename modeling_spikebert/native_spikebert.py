# SPDX-License-Identifier: Apache-2.0
"""What the operators share: the switch for their fast forms, C++ kernels for the CPU, and a record of what ran.

An operator has a naive form, which is its definition, and fast forms, between which it chooses by device, dtype and
kind of weights. `SPIKEBERT_FAST_FORMS=0` in the environment, or `use_fast_forms(False)`, turns all fast forms off.
`forms_that_ran()` says which form each operator took last, and why.
"""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from ctypes import c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Without gradients kernels are compiled when a process has computed so many values without them. A value takes about
# 20 ns less with them, so that the two seconds of the compiler come back.
WORTH_COMPILING = 2**27

_forms: dict[str, str] = {}
_computed: Counter[str] = Counter()
_enabled = os.environ.get("SPIKEBERT_FAST_FORMS", "1") != "0"


def use_fast_forms(enabled: bool) -> None:
    """Switches the fast forms of all operators on or off, in this process."""
    global _enabled
    _enabled = enabled


def forms_that_ran() -> dict[str, str]:
    """By operator: the form that it took in its last call, and why."""
    return dict(_forms)


def note(operator: str, form: str, reason: str) -> None:
    """Records what an operator takes, for `forms_that_ran`."""
    if not torch.compiler.is_compiling():
        _forms[operator] = f"{form}: {reason}"


def obstacle(x: Tensor) -> str | None:
    """Why fast forms cannot take `x`, or None."""
    if torch.compiler.is_compiling():
        return "an outer compiler traces the operator"
    if not _enabled:
        return "fast forms are switched off"
    if x.is_meta or torch._C._functorch.peek_interpreter_stack() is not None:
        return "there are no values in memory"
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def spike_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the spikes that come of currents of this dtype: under autocast that of matrix products."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def kernels(operator: str, load: Callable[[], Any], values: int, training: bool) -> Any:
    """The C++ kernels of an operator, or None and a note why it takes another form.

    Args:
        operator: its name.
        load: compiles them, or finds them in the compiler's cache on disk; keeps what it returns.
        values: how many values this call computes.
        training: whether gradients are wanted. Trainings are long: they compile at once.
    """
    if not _has_compiler():
        note(operator, "naive", "there is no C++ compiler")
        return None
    _computed[operator] += values
    if not training and _computed[operator] < WORTH_COMPILING and load not in _loaded:
        note(operator, "naive", "this process has not computed enough to compile kernels")
        return None
    _loaded.add(load)
    return load()


_loaded: set[Callable[[], Any]] = set()


@cache
def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def compiled(source: str) -> Any:
    """The C++ source as a `ctypes.CDLL`, or None where it cannot be compiled."""
    logger.info("Compiling kernels for this CPU: a few seconds, once on this machine.")
    try:
        from torch._inductor.codecache import CppCodeCache  # slow to import

        # It compiles loops over vectors by itself, and switches off that the C++ compiler does.
        return CppCodeCache.load(source, extra_flags=("-ftree-loop-vectorize",))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(f"SpikeBERT runs without its C++ kernels, since the compiler failed: {reason}", stacklevel=2)
        return None


def pointers(*tensors: Tensor | None) -> list[c_void_p]:
    """What C++ takes of tensors, which the caller keeps alive; null for None."""
    return [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
