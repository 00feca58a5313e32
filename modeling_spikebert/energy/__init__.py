from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .comparison import EnergyComparison, bert_of_same_shape, compare_energy, measured_energy
    from .constants import CONSTANTS, EnergyConstants
    from .measuring import MeasuredCost, measure_cost
    from .report import Account, EnergyReport, LayerEnergy, estimate_energy

__all__ = [
    "CONSTANTS",
    "Account",
    "EnergyComparison",
    "EnergyConstants",
    "EnergyReport",
    "LayerEnergy",
    "MeasuredCost",
    "bert_of_same_shape",
    "compare_energy",
    "estimate_energy",
    "measure_cost",
    "measured_energy",
]

__getattr__ = lazily(
    __name__,
    {
        ".comparison": ("EnergyComparison", "bert_of_same_shape", "compare_energy", "measured_energy"),
        ".constants": ("CONSTANTS", "EnergyConstants"),
        ".measuring": ("MeasuredCost", "measure_cost"),
        ".report": ("Account", "EnergyReport", "LayerEnergy", "estimate_energy"),
    },
)
