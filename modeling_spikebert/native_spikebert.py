# SPDX-License-Identifier: Apache-2.0
"""What the operators share: the switch for their fast forms, C++ kernels for the CPU, and a record of what ran.

An operator has a naive form, which is its definition, and fast forms, between which it chooses by device, dtype and
kind of weights. `SPIKEBERT_FAST_FORMS=0` in the environment, or `use_fast_forms(False)`, turns all fast forms off; with
1, or True, kernels are compiled at once and not where it pays. `forms_that_ran()` says which form each operator took
last, and why.
"""

import os
from collections import Counter
from collections.abc import Callable
from ctypes import c_int64, c_void_p, string_at
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .compiler_spikebert import compiled, has_compiler

# Without gradients kernels are compiled when a process has computed so many values without them. A value takes about
# 20 ns less with them, so that the two seconds of the compiler come back.
WORTH_COMPILING = 2**27

_forms: dict[str, str] = {}
_computed: Counter[str] = Counter()
_loaded: set[Callable[[], Any]] = set()
_order = {"0": False, "1": True}.get(os.environ.get("SPIKEBERT_FAST_FORMS", ""))  # None: where they pay


def use_fast_forms(order: bool | None) -> None:
    """Switches the fast forms of all operators in this process on (True), off (False), or on where they pay (None)."""
    global _order
    _order = order


def forms_that_ran() -> dict[str, str]:
    """By operator: the form that it took in its last call, and why."""
    return dict(_forms)


def note(operator: str, form: str, reason: str) -> None:
    """Records what an operator takes, for `forms_that_ran`."""
    if not is_traced():
        _forms[operator] = f"{form}: {reason}"


def is_traced() -> bool:
    """Whether what is computed is written down, to be computed again with other values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why fast forms, which read memory behind torch's back, cannot take the arguments of an operator, or None."""
    if is_traced():
        return "an outer compiler traces the operator"
    if _order is False:
        return "fast forms are switched off"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return "a transform or a dispatch mode has to see each operation"
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(type(x) in (Tensor, Parameter) and x.layout == torch.strided and not x.is_meta for x in given):
        return "a tensor is of another kind, or has no values in memory"
    if len({x.device for x in given}) > 1:
        return "the tensors are on several devices"
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def spike_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the spikes that come of currents of this dtype: under autocast, which leaves float64 alone, its own."""
    if dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)


def kernels(operator: str, load: Callable[[], Any], values: int, training: bool) -> Any:
    """The C++ kernels of an operator, or None and a note why it takes another form.

    Args:
        operator: its name.
        load: compiles them, or finds them in the compiler's cache on disk; keeps what it returns.
        values: how many values this call computes.
        training: whether gradients are wanted. Trainings are long: they compile at once.
    """
    if not has_compiler():
        note(operator, "naive", "there is no C++ compiler")
        return None
    _computed[operator] += values
    worth_it = training or _order is True or load in _loaded or _computed[operator] >= WORTH_COMPILING
    if not worth_it:
        note(operator, "naive", "this process has not computed enough to compile kernels")
        return None
    _loaded.add(load)
    library = load()
    if library is None or bits_library() is None:
        note(operator, "naive", "the C++ compiler failed")
        return None
    return library


def pointers(*tensors: Tensor | None) -> list[c_void_p]:
    """What C++ takes of tensors, which the caller keeps alive; null for None."""
    return [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def state_of(tensor: Tensor) -> tuple[Any, ...]:
    """Another one after the values have changed: in place, or of `.data`, which autograd does not count.

    Of the latter the first bytes are looked at; what changes single values behind them is not seen.
    """
    bytes_left = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    start = string_at(tensor.data_ptr(), min(int(bytes_left), 4096)) if tensor.numel() else b""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, start


# The type of a spike, as C++ sees it, and the bits of 1 in it.
BITS_OF_ONE = {
    torch.uint8: ("uint8_t", 1),
    torch.bfloat16: ("uint16_t", 0x3F80),
    torch.float32: ("uint32_t", 0x3F800000),
    torch.float64: ("uint64_t", 0x3FF0000000000000),
}

BITS_SOURCE = r"""
#include <algorithm>
#include <bit>
#include <cstdint>

constexpr int64_t PART = 1024;  // bytes of spikes that stay in the cache

// Eight spikes to a byte and back; values of any type, of which 0 has no bit set, and 1 the bits of `one`. Returns how
// many are 1, or -1 if one is neither.
template <class V>
static int64_t pack(const V* spikes, uint8_t* bytes, int64_t count, int64_t threads, V one) {
  int64_t ones = 0, others = 0;
  #pragma omp parallel for num_threads(threads) reduction(+ : ones, others)
  for (int64_t first = 0; first < count; first += 8 * PART) {
    uint8_t* part = bytes + first / 8;
    const V* x = spikes + first;
    const int64_t size = std::min(count - first, 8 * PART);
    V other = 0;
    for (int64_t i = 0; i < size / 8; ++i) {
      uint8_t byte = 0;
      for (int64_t b = 0; b < 8; ++b) byte |= uint8_t(x[8 * i + b] != 0) << b;
      part[i] = byte;
    }
    if (size % 8) part[size / 8] = 0;
    for (int64_t i = size / 8 * 8; i < size; ++i) part[i / 8] |= (x[i] != 0) << i % 8;
    for (int64_t i = 0; i < size; ++i) other |= V(x[i] != 0) & V(x[i] != one);
    for (int64_t i = 0; i < (size + 7) / 8; ++i) ones += std::popcount(part[i]);
    others += other;
  }
  return others ? -1 : ones;
}

template <class V>
static void unpack(const uint8_t* bytes, V* spikes, int64_t count, int64_t threads, V one) {
  #pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count / 8; ++i)
    for (int64_t b = 0; b < 8; ++b) spikes[8 * i + b] = bytes[i] >> b & 1 ? one : V(0);
  for (int64_t i = count / 8 * 8; i < count; ++i) spikes[i] = bytes[i / 8] >> i % 8 & 1 ? one : V(0);
}

#define PACKING(V, ONE)                                                                                              \
  extern "C" int64_t pack_##V(const V* spikes, uint8_t* bytes, int64_t count, int64_t threads) {                     \
    return pack<V>(spikes, bytes, count, threads, ONE);                                                              \
  }                                                                                                                  \
  extern "C" void unpack_##V(const uint8_t* bytes, V* spikes, int64_t count, int64_t threads) {                      \
    unpack<V>(bytes, spikes, count, threads, ONE);                                                                   \
  }
"""


@cache
def bits_library() -> Any:
    library = compiled(BITS_SOURCE + "".join(f"PACKING({name}, {one})\n" for name, one in BITS_OF_ONE.values()))
    if library is not None:
        for name, _ in BITS_OF_ONE.values():
            getattr(library, f"pack_{name}").restype = c_int64
    return library


def pack_spikes(spikes: Tensor) -> tuple[Tensor, int | None]:
    """Spikes on a CPU, of a type in `BITS_OF_ONE`, to one bit each.

    Returns:
        `[number of values / 8, rounded up]` bytes, and how many values are 1: None if one is neither 0 nor 1.
    """
    spikes = spikes.contiguous()
    count = spikes.numel()
    out = torch.empty((count + 7) // 8, dtype=torch.uint8, device="cpu")
    pack = getattr(bits_library(), f"pack_{BITS_OF_ONE[spikes.dtype][0]}")
    fired = pack(*pointers(spikes, out), c_int64(count), c_int64(torch.get_num_threads()))
    return out, None if fired < 0 else fired


def unpack_spikes(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The way back, to any of these types."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    unpack = getattr(bits_library(), f"unpack_{BITS_OF_ONE[dtype][0]}")
    unpack(*pointers(bits, out), c_int64(out.numel()), c_int64(torch.get_num_threads()))
    return out
