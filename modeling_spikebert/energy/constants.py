"""Energy of one operation, by technology and precision, with sources."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

HOROWITZ = "Horowitz, 'Computing's energy problem', ISSCC 2014, 45 nm at 0.9 V"
JOUPPI = "Jouppi et al., 'Ten lessons from three generations shaped Google's TPUv4i', ISCA 2021, 7 nm"


@dataclass(frozen=True)
class EnergyConstants:
    """What one operation costs.

    Args:
        name: technology and precision.
        mac_pj: a multiplication and an addition, in pJ.
        ac_pj: an addition (accumulate) or a comparison, in pJ.
        memory_pj_per_byte: reading or writing one byte, in pJ.
        real_bits: size of a real value, in bits. (A spike takes 1, a ternary spike 2, a spike count 8.)
        source: where the numbers come from.
    """

    name: str
    mac_pj: float
    ac_pj: float
    memory_pj_per_byte: float
    real_bits: int
    source: str

    def __post_init__(self) -> None:
        for name in ("mac_pj", "ac_pj", "memory_pj_per_byte", "real_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} of the energy constants must be a number and not negative, got {value!r}.")

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)

    @classmethod
    def from_file(cls, file: str | Path) -> "EnergyConstants":
        """Reads a json file with the fields of this class.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read as json: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{file}: must be a json object with exactly the keys {sorted(names)}.")
        return cls(**values)


# A MAC is a multiplication and an addition of the same width: 45 nm fp32 is 3.7 + 0.9 pJ. Memory is an on-chip SRAM of
# 1 MB, whose access of 64 bits costs 100 pJ (45 nm) and 14 pJ (7 nm); DRAM costs 1,300 pJ or more in both.
CONSTANTS = {
    constants.name: constants
    for constants in (
        EnergyConstants("45nm-fp32", 4.6, 0.9, 12.5, 32, HOROWITZ),
        EnergyConstants("45nm-fp16", 1.5, 0.4, 12.5, 16, HOROWITZ),
        EnergyConstants("45nm-int8", 0.23, 0.03, 12.5, 8, HOROWITZ),
        EnergyConstants("7nm-fp32", 1.69, 0.38, 1.75, 32, JOUPPI),
        EnergyConstants("7nm-fp16", 0.5, 0.16, 1.75, 16, JOUPPI),
        EnergyConstants("7nm-int8", 0.077, 0.007, 1.75, 8, JOUPPI),
    )
}

# The papers' constants: 4.6 pJ per MAC and 0.9 pJ per AC.
PUBLISHED = CONSTANTS["45nm-fp32"]

FORMULAS = {
    "published": "T x firing rate of the input x MACs of the layer at 0.9 pJ; MACs of real inputs at 4.6 pJ",
    "strict": "every addition and multiplication that happens; an input k is k additions at each synapse",
}
