from .constants import CONSTANTS, EnergyConstants
from .measuring import MeasuredCost, measure_cost
from .report import Account, EnergyReport, LayerEnergy, estimate_energy

__all__ = [
    "CONSTANTS",
    "Account",
    "EnergyConstants",
    "EnergyReport",
    "LayerEnergy",
    "MeasuredCost",
    "estimate_energy",
    "measure_cost",
]
