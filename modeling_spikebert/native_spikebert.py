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
from ctypes import c_int64, c_void_p
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


# The type of a spike, as C++ sees it, and the bits of 1 in it.
BITS_OF_ONE = {
    torch.uint8: ("uint8_t", 1),
    torch.bfloat16: ("uint16_t", 0x3F80),
    torch.float32: ("uint32_t", 0x3F800000),
    torch.float64: ("uint64_t", 0x3FF0000000000000),
}

BITS_SOURCE = r"""
#include <cstdint>

// Eight spikes to a byte and back; values of any type, of which 0 has no bit set, and 1 the bits of `one`.
template <class V>
static void pack(const V* spikes, uint8_t* bytes, int64_t count, int64_t threads) {
  #pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count / 8; ++i) {
    uint8_t byte = 0;
    for (int64_t b = 0; b < 8; ++b) byte |= uint8_t(spikes[8 * i + b] != 0) << b;
    bytes[i] = byte;
  }
  for (int64_t i = count / 8 * 8; i < count; ++i) bytes[i / 8] = (i % 8 ? bytes[i / 8] : 0) | (spikes[i] != 0) << i % 8;
}

template <class V>
static void unpack(const uint8_t* bytes, V* spikes, int64_t count, int64_t threads, V one) {
  #pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count / 8; ++i)
    for (int64_t b = 0; b < 8; ++b) spikes[8 * i + b] = bytes[i] >> b & 1 ? one : V(0);
  for (int64_t i = count / 8 * 8; i < count; ++i) spikes[i] = bytes[i / 8] >> i % 8 & 1 ? one : V(0);
}

#define PACKING(V, ONE)                                                                                              \
  extern "C" void pack_##V(const V* spikes, uint8_t* bytes, int64_t count, int64_t threads) {                        \
    pack(spikes, bytes, count, threads);                                                                             \
  }                                                                                                                  \
  extern "C" void unpack_##V(const uint8_t* bytes, V* spikes, int64_t count, int64_t threads) {                      \
    unpack<V>(bytes, spikes, count, threads, ONE);                                                                   \
  }
"""


@cache
def _bits_library() -> Any:
    return compiled(BITS_SOURCE + "".join(f"PACKING({name}, {one})\n" for name, one in BITS_OF_ONE.values()))


def pack_spikes(spikes: Tensor) -> Tensor:
    """Spikes on a CPU, of a type in `BITS_OF_ONE`, to one bit each: `[number of spikes / 8, rounded up]` bytes."""
    spikes = spikes.contiguous()
    count = spikes.numel()
    out = torch.empty((count + 7) // 8, dtype=torch.uint8)
    pack = getattr(_bits_library(), f"pack_{BITS_OF_ONE[spikes.dtype][0]}")
    pack(*pointers(spikes, out), c_int64(count), c_int64(torch.get_num_threads()))
    return out


def unpack_spikes(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The way back, to any of these types."""
    out = torch.empty(shape, dtype=dtype)
    unpack = getattr(_bits_library(), f"unpack_{BITS_OF_ONE[dtype][0]}")
    unpack(*pointers(bits, out), c_int64(out.numel()), c_int64(torch.get_num_threads()))
    return out
