"""SpikeBERT as a graph for neuromorphic hardware: weights of 8 bits, NIR, sizes, energy and events."""

try:
    import nir  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Graphs for neuromorphic hardware need nir, which is not installed. Install the extra: "
        "pip install -c constraints.txt '.[nir]'."
    ) from error

from .account import Traffic, graph_energy
from .events import save_events
from .export import GRAPH_NAME, NirExport, check_pair, export_nir, read_export, read_graph
from .fixed_point import to_fixed_point
from .graph import build, shape_of
from .interpreter import Trace, input_currents, run, run_checkpoint
from .sizes import Population, populations_of, size_table, spike_table

__all__ = [
    "GRAPH_NAME",
    "NirExport",
    "Population",
    "Trace",
    "Traffic",
    "build",
    "check_pair",
    "export_nir",
    "graph_energy",
    "input_currents",
    "populations_of",
    "read_export",
    "read_graph",
    "run",
    "run_checkpoint",
    "save_events",
    "shape_of",
    "size_table",
    "spike_table",
    "to_fixed_point",
]
