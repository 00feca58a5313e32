# SPDX-License-Identifier: Apache-2.0
"""C++ for the CPU of this machine, compiled once and kept in the user's cache. Needs no torch, no transformers."""

import logging
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from ctypes import CDLL
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Rounded as torch rounds; loops over vectors need not care for errors that nobody reads.
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

_failures: list[str] = []  # of the compiler; it is not asked again


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def has_compiler() -> bool:
    return shutil.which(compiler()) is not None


@cache
def compiled(source: str) -> Any:
    """The C++ source as a `ctypes.CDLL`, or None, and a warning, where it cannot be compiled."""
    file = compiled_file(source)
    return None if file is None else CDLL(str(file))


def compiled_file(source: str) -> Path | None:
    """The C++ source as a shared library on disk, or None, and a warning, where it cannot be compiled."""
    if _failures:
        return None
    try:
        library = _library_file(source)
        if not library.is_file():
            logger.info("Compiling kernels for this CPU: a few seconds, once on this machine.")
            _compile(source, library)
        return library
    except (OSError, subprocess.CalledProcessError) as error:
        said = (error.stderr or "").strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        _failures.append(said.splitlines()[0] if said else repr(error))
        warnings.warn(
            f"SpikeBERT runs without its C++ kernels, since the compiler failed: {_failures[0]}", stacklevel=2
        )
        return None


def _library_file(source: str) -> Path:
    """The name follows from the source, the flags and the CPU, whose own instructions are used."""
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith("flags")] if cpu.is_file() else []
    key = "\n".join((source, *FLAGS, compiler(), platform.machine(), platform.processor(), *features[:1]))
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "spikebert" / f"{sha256(key.encode()).hexdigest()[:16]}.so"


def _compile(source: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # so that no other process finds half a file
        new = Path(folder) / library.name
        subprocess.run(
            [compiler(), *FLAGS, "-x", "c++", "-", "-o", str(new)],
            input=source,
            text=True,
            capture_output=True,
            check=True,
        )
        new.replace(library)
