"""A spiking model beside a BERT, on the same sentences."""

from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ..console.text import align, number, percent
from .constants import CONSTANTS, FORMULAS, PUBLISHED, EnergyConstants
from .measuring import measure_cost
from .report import NOT_SPIKING, EnergyReport, estimate_energy

ENERGIES = {  # of a report, in mJ
    "published": "published.energy_mj",
    "strict": "strict.energy_mj",
    "memory": "memory_energy_mj",
    "strict_with_memory": "energy_with_memory_mj",
}


@dataclass(repr=False)
class EnergyComparison:
    """Reports of a spiking model and, beside it, of a BERT; printed as a table.

    Args:
        student: report of the spiking model.
        teacher: report of the BERT, if there is one.
    """

    student: EnergyReport
    teacher: EnergyReport | None = None

    @property
    def reports(self) -> list[EnergyReport]:
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    @cached_property
    def teacher_in_int8(self) -> EnergyReport | None:
        """The BERT with all its values in 8 bits, which is less than an int8 model takes: it keeps some in float."""
        technology, _, precision = self.student.constants.name.rpartition("-")
        constants = CONSTANTS.get(f"{technology}-int8")
        if self.teacher is None or constants is None or precision == "int8":
            return None
        return self.teacher.priced(constants)

    def __repr__(self) -> str:
        rows, lines = [self._header("for one sentence"), *self._figures()], []
        measured = self.student.measured
        if measured is not None and all(report.measured for report in self.reports):
            rows += [self._row("measured: latency, ms", "measured.latency_ms")]
            if measured.joules is not None:
                rows += [self._row("measured: joules", "measured.joules")]
            joules = "Joules are of" if measured.joules is not None else "Joules were"
            lines = [f"Measured on {measured.device}, one sentence at a time. {joules} {measured.source}."]
        return "\n".join([*align(rows), *lines, *self._notes()])

    def to_markdown(self, dataset: str | None = None) -> str:
        """The section of a model card: what a sentence takes, figures, and how they come about.

        Args:
            dataset: plain name of what the sentences are from.
        """
        student, constants = self.student, self.student.constants
        sentences = f"{student.num_sentences} sentences" + (f" of {dataset}" if dataset else "")
        rows = [self._header(""), ["---"] * len(self._header("")), *self._figures()]
        lines = [
            self._in_short(),
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            f"Each figure is for one sentence: mean over {sentences} ({student.tokens_per_sentence:.1f} tokens each, "
            f"at most {student.longest}). These energies are counted, not measured on a chip. How they are counted:",
            "",
            f"- published: {FORMULAS['published']} ({PUBLISHED.source}).",
            f"- strict: {FORMULAS['strict']}; {constants.mac_pj} pJ for a multiplication (with an addition), "
            f"{constants.ac_pj} pJ for an addition ({constants.source}).",
            f"- memory traffic: {constants.memory_pj_per_byte} pJ for each byte that is read or written.",
        ]
        if student.firing_rate is not None:
            lines += ["", f"Mean firing rate: {student.firing_rate:.3f} spikes per neuron and time step."]
        notes = [*(f"Note: {flag}" for flag in student.flags), *self._notes()]
        return "\n".join([*lines, *(f"\n{note}" for note in notes)])

    def _in_short(self) -> str:
        student = self.student
        energies = (student.strict.energy_mj, student.energy_with_memory_mj)
        text = "In theory a sentence takes {} mJ for arithmetic, and {} mJ with memory traffic."
        shares = []
        for report, name in ((self.teacher, "the BERT below"), (self.teacher_in_int8, "the same BERT in int8")):
            if report is not None:
                of_teacher = map(percent, energies, (report.strict.energy_mj, report.energy_with_memory_mj))
                shares.append(f"{' and '.join(of_teacher)} of what {name} takes")
        if shares:
            text += f" That is {', and '.join(shares)}."
        return text.format(*map(number, energies))

    def to_dict(self) -> dict[str, Any]:
        """`student.to_dict()`, and with a teacher also `teacher` and `ratio`, the student's energy in the teacher's."""
        figures = self.student.to_dict()
        if self.teacher is not None:
            figures["teacher"] = self.teacher.to_dict()
            figures["ratio"] = self._ratios(self.teacher, ENERGIES)
        int8 = self.teacher_in_int8
        if int8 is not None:
            strict = {name: figure for name, figure in ENERGIES.items() if name != "published"}
            figures["ratio_to_int8"] = self._ratios(int8, strict)
        return figures

    def _ratios(self, teacher: EnergyReport, energies: dict[str, str]) -> dict[str, float | None]:
        ratios = {}
        for name, figure in energies.items():
            mj, of_teacher = (attrgetter(figure)(report) for report in (self.student, teacher))
            ratios[name] = mj / of_teacher if of_teacher else None
        return ratios

    def _notes(self) -> list[str]:
        """On the teacher and the comparison; the student's report has its own."""
        notes = []
        if self.teacher is not None:
            notes += [f"Note on the BERT: {flag}" for flag in self.teacher.flags if flag != NOT_SPIKING]
            if self.teacher.num_tokens != self.student.num_tokens:
                notes.append("Note: the two tokenizers cut the same sentences into different numbers of tokens.")
        return notes

    def _header(self, first: str) -> list[str]:
        header = [first, *(report.description for report in self.reports)]
        if self.teacher is not None:
            header.append("ratio")
        if self.teacher_in_int8 is not None:
            header += ["BERT in int8", "ratio"]
        return header

    def _figures(self) -> list[list[str]]:
        # No ratio of operations: a spiking model's additions stand in the place of a BERT's MACs.
        return [
            self._row("tokens", "tokens_per_sentence", False),
            self._row("dense MACs", "dense_macs"),
            self._row("published: SOPs", "published.synaptic_operations", False),
            self._row("published: MACs", "published.macs", False),
            self._row("published: mJ", "published.energy_mj"),
            self._row("spikes per synapse", "spikes_per_synapse", False),
            self._row("strict: additions", "strict.synaptic_operations", False),
            self._row("strict: MACs", "strict.macs", False),
            self._row("strict: mJ", "strict.energy_mj", in_int8=True),
            self._row("memory traffic, bytes", "memory_bytes", in_int8=True),
            self._row("memory traffic, mJ", "memory_energy_mj", in_int8=True),
            self._row("strict with memory traffic: mJ", "energy_with_memory_mj", in_int8=True),
        ]

    def _row(self, label: str, figure: str, with_ratio: bool = True, in_int8: bool = False) -> list[str]:
        value = attrgetter(figure)
        values = [value(report) for report in self.reports]
        cells = [label, *("-" if x is None else number(x) for x in values)]
        if self.teacher is not None:
            cells.append(percent(*values) if with_ratio and None not in values else "")
        int8 = self.teacher_in_int8
        if int8 is not None:
            cells += [number(value(int8)), percent(values[0], value(int8))] if in_int8 else ["", ""]
        return cells


def compare_energy(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Any) -> EnergyComparison:
    """Estimates and measures both models on the same inputs, with the default constants.

    Args:
        student: a SpikeBERT.
        teacher: a BERT-like encoder with the same tokenizer.
        inputs: as in `estimate_energy`, but no iterator: they are run through several times.
    """
    return EnergyComparison(measured_energy(student, inputs), measured_energy(teacher, inputs))


def measured_energy(
    model: PreTrainedModel, inputs: Any, constants: EnergyConstants = CONSTANTS["45nm-fp32"]
) -> EnergyReport:
    """`estimate_energy` with the result of `measure_cost` beside it; the inputs must not be an iterator."""
    report = estimate_energy(model, inputs, constants)
    report.measured = measure_cost(model, inputs)
    return report


def bert_of_same_shape(student: PreTrainedModel) -> PreTrainedModel:
    """A BERT with a SpikeBERT's layers, widths, heads and classes, to compare its energy with.

    Its weights are random: what a dense model computes does not depend on them.
    """
    theirs: Any = student.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = AutoConfig.for_model(
        "bert",
        **{name: getattr(theirs, name) for name in names},
        max_position_embeddings=theirs.max_position_embeddings,
        type_vocab_size=max(1, theirs.type_vocab_size),
        num_labels=theirs.num_labels,
    )
    auto = AutoModelForSequenceClassification if hasattr(student, "classifier") else AutoModel
    with torch.random.fork_rng(devices=[]):
        return auto.from_config(config).eval()
