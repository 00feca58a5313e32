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
