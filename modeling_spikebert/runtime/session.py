"""Exported graphs in ONNX Runtime, on the CPU, with operators that pass silent synapses over."""

import os
from pathlib import Path

import onnxruntime

from ..compiler_spikebert import compiled_file, has_compiler

SOURCE = Path(__file__).parent / "spike_operators.cpp"


def spike_operators() -> Path | None:
    """The library of the operators, which is compiled once on a machine, in some seconds; None without a compiler.

    `SPIKEBERT_FAST_FORMS=0` in the environment switches them off, as it does the kernels of the model in PyTorch.
    """
    if os.environ.get("SPIKEBERT_FAST_FORMS") == "0" or not has_compiler():
        return None
    return compiled_file(SOURCE.read_text(encoding="utf-8"))


def open_graph(file: Path, num_threads: int = 0, spinning: bool = True) -> onnxruntime.InferenceSession:
    """A session of a graph that `spikebert export` wrote, or of any other.

    Where there is no compiler, or the graph is in float32, ONNX Runtime computes standard operators.

    Args:
        file: the graph.
        num_threads: that compute one batch; 0 leaves ONNX Runtime the choice, one for each core.
        spinning: whether threads stay busy while they wait, which is faster unless others need the cores.

    Raises:
        ValueError: it is no ONNX file that ONNX Runtime loads.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.enable_mem_pattern = False  # it keeps memory for each shape that it has seen
    options.log_severity_level = 3  # it warns of constants that its own optimisation has left over
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    operators = spike_operators()
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no public base class
        raise ValueError(f"{file} is damaged or no ONNX file: {error}. Export it again.") from error
