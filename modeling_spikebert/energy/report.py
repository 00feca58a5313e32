"""`estimate_energy` and its report: counts divided by sentences, priced by two accounts."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel

from ..console.text import align, number, percent
from .constants import CONSTANTS, FORMULAS, PUBLISHED, EnergyConstants
from .counting import INPUT_KINDS, PARTS, Layer, LayerCount, Sentences, count_operations, is_spiking
from .measuring import MeasuredCost

NOT_SPIKING = "The model is not spiking: all its products are of real values, that is, MACs."


@dataclass(frozen=True)
class Account:
    """Operations and their energy, per sentence.

    Args:
        synaptic_operations: additions.
        macs: multiplications, each with an addition.
        energy_mj: both, in mJ.
    """

    synaptic_operations: float
    macs: float
    energy_mj: float

    @classmethod
    def price(cls, synaptic_operations: float, macs: float, constants: EnergyConstants) -> "Account":
        picojoules = synaptic_operations * constants.ac_pj + macs * constants.mac_pj
        return cls(synaptic_operations, macs, picojoules * 1e-9)


@dataclass(kw_only=True)
class LayerEnergy(Layer):
    """One layer; figures are per sentence.

    Args:
        dense_macs: its products in one time step.
        published: the papers' account.
        strict: every operation.
        memory_bytes: read and written.
        memory_energy_mj: the same in mJ.
        real_values: read and written, among them.
    """

    dense_macs: float
    published: Account
    strict: Account
    memory_bytes: float
    memory_energy_mj: float
    real_values: float

    @property
    def input_kind(self) -> str:
        return self.input.kind

    @property
    def firing_rate(self) -> float | None:
        """Fraction of inputs of real tokens that are not 0; None for real-valued inputs."""
        return self.input.firing_rate()

    @property
    def spikes_per_step(self) -> float | None:
        """Mean spike count of a neuron in a time step, over real tokens; above the rate where counts exceed 1."""
        return self.input.spikes_per_step()

    def to_dict(self) -> dict[str, Any]:
        input, output = self.input, self.output
        return {
            "name": self.name,
            "part": self.part,
            "unknown_type": self.type_name,
            "input_kind": input.kind,
            "firing_rate": input.firing_rate(),
            "firing_rate_padding": input.firing_rate("padding"),
            "spikes_per_step": input.spikes_per_step(),
            "spikes_per_step_padding": input.spikes_per_step("padding"),
            "output_firing_rate": None if output is None else output.firing_rate(),
            "output_firing_rate_per_step": None if output is None else output.rates_per_step(),
            "num_time_steps": self.num_time_steps,
            **_accounts(self),
        }


@dataclass(kw_only=True, repr=False)
class EnergyReport(Sentences):
    """What a model computes for a sentence, layer by layer, in two accounts; made by `estimate_energy`.

    Args:
        model_name: name or folder.
        spiking: whether it is a SpikeBERT.
        num_hidden_layers: number of blocks.
        hidden_size: their width.
        num_time_steps: of the model; 1 if it is not spiking.
        exit_threshold: that of the config; the counts are those of all time steps.
        layers: in the order of the model.
        constants: of the strict account; the published one has its own.
        measured: latency and joules, if they were measured.
    """

    model_name: str
    spiking: bool
    num_hidden_layers: int
    hidden_size: int
    num_time_steps: int
    exit_threshold: float | None
    layers: list[LayerEnergy]
    constants: EnergyConstants
    measured: MeasuredCost | None = None

    @property
    def description(self) -> str:
        """Kind and size, such as `spiking 6 x 384, T 4`."""
        size = f"{self.num_hidden_layers} x {self.hidden_size}"
        return f"spiking {size}, T {self.num_time_steps}" if self.spiking else f"BERT {size}"

    def __repr__(self) -> str:
        """One row for the same layer of all blocks, then the sums by part and the flags."""
        blocks: dict[str, list[LayerEnergy]] = {}
        for layer in self.layers:
            blocks.setdefault(without_block(layer.name), []).append(layer)
        above = ["", "", "", "", "", "published", "", "", f"strict ({self.constants.name})", "", ""]
        header = ["layer", "input", "rate", "spikes", "dense MACs", "SOPs", "MACs", "mJ", "additions", "MACs", "mJ"]
        rows = [_row(name, layers) for name, layers in blocks.items()]
        count = f"{self.num_sentences} sentence{'s' if self.num_sentences > 1 else ''}"
        lines = [
            f"{self.model_name}: {self.description}, {count} of {self.tokens_per_sentence:.1f} tokens.",
            "Figures are for one sentence; a row that begins with a dot is the sum over all blocks.",
            "",
            *align([header, *rows, ["all", "", "", "", *_figures([self])]], above),
            "",
            *align([["part", "published, mJ", "share", "strict, mJ", "share"], *self._parts()]),
            *(f"Note: {flag}" for flag in self.flags),
        ]
        return "\n".join(lines)

    def _parts(self) -> list[list[str]]:
        rows = [[name] for name in self.energy_by_part("strict")]
        for account in ("published", "strict"):
            energies = self.energy_by_part(account).values()
            for row, energy in zip(rows, energies, strict=True):
                row += [number(energy), percent(energy, sum(energies))]
        return rows

    def energy_by_part(self, account: str) -> dict[str, float]:
        """Name of a part of the model to its energy in mJ, in the account "published" or "strict"."""
        present = {layer.part for layer in self.layers}
        return {
            name: sum(getattr(layer, account).energy_mj for layer in self.layers if layer.part == part)
            for part, name in PARTS.items()
            if part in present
        }

    @property
    def dense_macs(self) -> float:
        """MACs of one sentence, one time step, as if all inputs were real."""
        return sum(layer.dense_macs for layer in self.layers)

    @property
    def published(self) -> Account:
        return self._sum("published", PUBLISHED)

    @property
    def strict(self) -> Account:
        return self._sum("strict", self.constants)

    def _sum(self, account: str, constants: EnergyConstants) -> Account:
        accounts = [getattr(layer, account) for layer in self.layers]
        return Account.price(sum(a.synaptic_operations for a in accounts), sum(a.macs for a in accounts), constants)

    @property
    def memory_bytes(self) -> float:
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def memory_energy_mj(self) -> float:
        return sum(layer.memory_energy_mj for layer in self.layers)

    @property
    def energy_with_memory_mj(self) -> float:
        """Of the strict account and memory traffic."""
        return self.strict.energy_mj + self.memory_energy_mj

    @property
    def spikes_per_synapse(self) -> float | None:
        """Synaptic operations of a sentence for each synapse that a dense model would use once; None for a BERT."""
        return self.published.synaptic_operations / self.dense_macs if self.spiking else None

    def priced(self, constants: EnergyConstants) -> "EnergyReport":
        """The same operations at another price, and real values of another size."""
        layers = []
        for layer in self.layers:
            saved = layer.real_values * (self.constants.real_bits - constants.real_bits) / 8
            memory_bytes = layer.memory_bytes - saved
            strict = Account.price(layer.strict.synaptic_operations, layer.strict.macs, constants)
            memory = memory_bytes * constants.memory_pj_per_byte * 1e-9
            layers.append(replace(layer, strict=strict, memory_bytes=memory_bytes, memory_energy_mj=memory))
        return replace(self, layers=layers, constants=constants)

    @property
    def firing_rate(self) -> float | None:
        """Spikes of a neuron in a time step, over real tokens and all neurons; None if the model is not spiking."""
        outputs = [layer.output for layer in self.layers if layer.output is not None]
        entries = sum(output.entries["real"] for output in outputs)
        return sum(output.nonzero["real"] for output in outputs) / entries if entries else None

    @property
    def tokens_per_sentence(self) -> float:
        """Tokens that count, mean over sentences."""
        return (self.num_tokens + self.padding_counts * self.num_padding) / self.num_sentences

    @property
    def flags(self) -> list[str]:
        """What a reader must know before comparing."""
        flags = []
        for has_products, counted in (
            (True, "Their matrix products count as dense MACs of real values, their other operations do not count."),
            (False, "No matrix product was seen there: a leaf counts as a dense MAC for each value that it returns."),
        ):
            names: dict[str, str] = {}
            for layer in self.layers:
                if layer.type_name is not None and layer.has_products == has_products:
                    names.setdefault(layer.type_name, layer.name)
            if names:
                listed = ", ".join(f"{kind} ({name})" for kind, name in names.items())
                flags.append(f"There is no rule for modules of type {listed}. {counted}")
        if not self.spiking:
            flags.append(NOT_SPIKING)
        if self.padding_counts and self.num_padding:
            share = self.num_padding / (self.num_padding + self.num_tokens)
            flags.append(
                f"Padding takes part in this model (variant published): {100 * share:.0f} % of the counted tokens are "
                "padding, and the figures depend on the batches."
            )
        if self.exit_threshold is not None:
            flags.append(
                f"Early exit (exit_threshold {self.exit_threshold}) is switched off while counting: the counts are "
                f"those of all {self.num_time_steps} time steps. The measured latency has it."
            )
        return flags

    def to_dict(self) -> dict[str, Any]:
        """All of it, for json; figures are per sentence where no other unit is named."""
        tokens = self.tokens_per_sentence
        totals = _accounts(self)
        return {
            "model": self.model_name,
            "spiking": self.spiking,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_time_steps": self.num_time_steps,
            "num_sentences": self.num_sentences,
            "num_tokens": self.num_tokens,
            "num_padding": self.num_padding,
            "longest_sentence": self.longest,
            "tokens_per_sentence": tokens,
            "padding_counts": self.padding_counts,
            "exit_threshold": self.exit_threshold,
            "firing_rate": self.firing_rate,
            **totals,
            "per_token": _divide(totals, tokens),
            "layers": [layer.to_dict() | {"per_token": _divide(_accounts(layer), tokens)} for layer in self.layers],
            "formulas": FORMULAS,
            "constants": {"published": PUBLISHED.to_dict(), "strict": self.constants.to_dict()},
            "flags": self.flags,
            "measured": None if self.measured is None else self.measured.to_dict(),
        }


def estimate_energy(
    model: PreTrainedModel, inputs: Any, constants: EnergyConstants = CONSTANTS["45nm-fp32"]
) -> EnergyReport:
    """Counts the operations of a model on given sentences and prices them.

    The model runs once over the inputs, in eval mode; its outputs and its state stay as they are. See
    `docs/energy.md` for what is counted and how it compares with published tables.

    Args:
        model: a SpikeBERT, or a BERT-like encoder; with or without a classifier.
        inputs: an encoded batch (`tokenizer(..., return_tensors="pt")`), or an iterable of such batches.
        constants: energy of one operation in the strict account, from `CONSTANTS` or of your own. The published
            account has the papers' constants.

    Returns:
        figures per sentence and per token, for each layer and in all.

    Raises:
        ValueError: the model is neither of both, the inputs are not encoded batches, or there are none.
        TypeError: `constants` are not `EnergyConstants`.
    """
    if not isinstance(constants, EnergyConstants):
        raise TypeError(f"constants must be EnergyConstants, such as CONSTANTS['7nm-int8'], got {constants!r}.")
    spiking = is_spiking(model)
    config: Any = model.config
    name = config.name_or_path or type(model).__name__
    return report_of(name, config, spiking, *count_operations(model, spiking, inputs), constants)


def report_of(
    name: str, config: Any, spiking: bool, sentences: Sentences, layers: list[LayerCount], constants: EnergyConstants
) -> EnergyReport:
    """Prices what was counted in a model with this config."""
    return EnergyReport(
        **vars(sentences),
        model_name=name,
        spiking=spiking,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_time_steps=config.num_time_steps if spiking else 1,
        exit_threshold=config.exit_threshold if spiking else None,
        layers=[_price(layer, sentences.num_sentences, constants) for layer in layers],
        constants=constants,
    )


def without_block(name: str) -> str:
    """What the same layer of all blocks is called; it begins with a dot."""
    return re.sub(r"^.*?\blayer\.\d+", "", name).removeprefix("spikebert.")


def _price(layer: LayerCount, sentences: int, constants: EnergyConstants) -> LayerEnergy:
    dense = layer.dense_macs * layer.num_time_steps if layer.input.kind == "real" else 0
    active, events = (0, 0) if layer.input.kind == "real" else (layer.active_synapses, layer.synaptic_events)
    bits = dict(zip(INPUT_KINDS, (1, 2, 8, constants.real_bits), strict=True))
    memory = layer.input.entries.total() * bits[layer.input.kind] + sum(
        values * bits[kind] for kind, values in layer.traffic.items()
    )
    memory_bytes = memory / 8 / sentences
    return LayerEnergy(
        **{field.name: getattr(layer, field.name) for field in fields(Layer)},
        dense_macs=layer.dense_macs / sentences,
        published=Account.price(active / sentences, dense / sentences, PUBLISHED),
        strict=Account.price(
            (events + layer.additions) / sentences, (dense + layer.multiplications) / sentences, constants
        ),
        memory_bytes=memory_bytes,
        memory_energy_mj=memory_bytes * constants.memory_pj_per_byte * 1e-9,
        real_values=(layer.input.entries.total() * (layer.input.kind == "real") + layer.traffic["real"]) / sentences,
    )


def _accounts(item: LayerEnergy | EnergyReport) -> dict[str, Any]:
    return {
        "dense_macs": item.dense_macs,
        "published": asdict(item.published),
        "strict": asdict(item.strict) | {"memory_bytes": item.memory_bytes, "memory_energy_mj": item.memory_energy_mj},
    }


def _divide(figures: dict[str, Any], by: float) -> dict[str, Any]:
    return {name: _divide(value, by) if isinstance(value, dict) else value / by for name, value in figures.items()}


def _row(name: str, layers: list[LayerEnergy]) -> list[str]:
    kind = max((layer.input_kind for layer in layers), key=INPUT_KINDS.index)
    rates = [[getattr(layer, name) for layer in layers] for name in ("firing_rate", "spikes_per_step")]
    means = ["-" if None in values else f"{sum(values) / len(values):.3f}" for values in rates]
    return [name, kind, *means, *_figures(layers)]


def _figures(items: Sequence[Any]) -> list[str]:
    figures = [sum(item.dense_macs for item in items)]
    for account in ("published", "strict"):
        for name in ("synaptic_operations", "macs", "energy_mj"):
            figures.append(sum(getattr(getattr(item, account), name) for item in items))
    return [number(figure) for figure in figures]
