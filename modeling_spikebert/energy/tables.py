"""Energy reports as text: tables for the terminal, markdown for model cards."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .constants import FORMULAS, PUBLISHED
from .counting import INPUT_KINDS, PARTS

if TYPE_CHECKING:  # a report prints itself by these tables
    from .report import EnergyReport, LayerEnergy


def layer_table(report: "EnergyReport") -> str:
    """One row for the same layer of all blocks, then the sums by part, the flags and what was measured."""
    header = ["layer", "input", "rate", "spikes", "dense MACs", "SOPs", "MACs", "mJ", "additions", "MACs", "mJ"]
    groups: dict[str, list[LayerEnergy]] = {}
    for layer in report.layers:
        groups.setdefault(_group(layer.name), []).append(layer)
    rows = [_row(name, layers) for name, layers in groups.items()]
    total = ["all", "", "", "", *_figures([report])]
    title = (
        f"{report.model_name}: {'spiking, ' if report.spiking else 'not spiking, '}"
        f"{f'T = {report.num_time_steps}, ' if report.spiking else ''}{report.num_sentences} sentences of "
        f"{report.tokens_per_sentence:.1f} tokens. Figures are for one sentence;\nfrom a row that begins with a dot "
        "there is one in each block, and it shows their sum."
    )
    groups_line = ["", "", "", "", "", "published", "", "", f"strict ({report.constants.name})", "", ""]
    lines = [title, "", *_align([header, *rows, total], above=groups_line), "", *_part_lines(report)]
    lines += [f"Note: {flag}" for flag in report.flags]
    return "\n".join(lines)


def _part_lines(report: "EnergyReport") -> list[str]:
    rows = [["part", "published, mJ", "share", "strict, mJ", "share"]]
    for part, name in PARTS.items():
        layers = [layer for layer in report.layers if layer.part == part]
        if layers:
            published, strict = (
                sum(getattr(x, account).energy_mj for x in layers) for account in ("published", "strict")
            )
            rows.append(
                [
                    name,
                    _number(published),
                    _percent(published, report.published.energy_mj),
                    _number(strict),
                    _percent(strict, report.strict.energy_mj),
                ]
            )
    return _align(rows)


def comparison_table(student: "EnergyReport", teacher: "EnergyReport | None") -> str:
    """Both accounts, memory and measured cost, of a spiking model and, beside it, of a BERT on the same sentences."""
    reports = [student] if teacher is None else [student, teacher]
    rows = [["for one sentence", *(_name(report) for report in reports), *([] if teacher is None else ["ratio"])]]
    for label, values in _comparison(reports):
        rows.append([label, *map(_number, values), *([] if teacher is None else [_ratio(label, values)])])
    for label, name in (("latency, ms", "latency_ms"), ("joules", "joules")):
        measurements = [None if report.measured is None else getattr(report.measured, name) for report in reports]
        shown = ["-" if value is None else _number(value) for value in measurements]
        known = [value for value in measurements if value is not None]
        ratio = [] if teacher is None else [_percent(*known) if len(known) == 2 else "-"]
        rows.append([f"measured: {label}", *shown, *ratio])
    lines = _align(rows)
    measured = student.measured
    if measured is not None:
        lines.append(f"Measured on {measured.device}, batches of {measured.batch_size}; joules: {measured.source}.")
    return "\n".join(lines)


def comparison_markdown(student: "EnergyReport", teacher: "EnergyReport | None", dataset: str | None = None) -> str:
    """The energy section of a model card."""
    reports = [student] if teacher is None else [student, teacher]
    sentences = f"{student.num_sentences} sentences" + (f" of {dataset}" if dataset else "")
    lines = [
        f"Theoretical energy for one sentence, mean over {sentences} ({student.tokens_per_sentence:.1f} tokens each, "
        f"at most {student.longest}), in two accounts:",
        "",
        f"- published: {FORMULAS['published']} ({PUBLISHED.source}).",
        f"- strict: {FORMULAS['strict']}; {student.constants.mac_pj} pJ for a multiplication (with an addition), "
        f"{student.constants.ac_pj} pJ for an addition, {student.constants.memory_pj_per_byte} pJ for a byte of memory "
        f"traffic, a line of its own ({student.constants.source}).",
        "",
        "| | " + " | ".join([_name(report) for report in reports] + (["ratio"] if teacher else [])) + " |",
        "|---|" + "---|" * (len(reports) + (teacher is not None)),
    ]
    for label, values in _comparison(reports):
        cells = [*map(_number, values), *([] if teacher is None else [_ratio(label, values)])]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if student.firing_rate is not None:
        lines += ["", f"Mean firing rate: {student.firing_rate:.3f} spikes per neuron and time step."]
    lines += [f"\nNote: {flag}" for flag in student.flags]
    return "\n".join(lines)


def _comparison(reports: "Sequence[EnergyReport]") -> list[tuple[str, list[float]]]:
    def each(figure: Any) -> list[float]:
        return [figure(report) for report in reports]

    return [
        ("dense MACs", each(lambda r: r.dense_macs)),
        ("published: SOPs", each(lambda r: r.published.synaptic_operations)),
        ("published: MACs", each(lambda r: r.published.macs)),
        ("published: mJ", each(lambda r: r.published.energy_mj)),
        ("strict: additions", each(lambda r: r.strict.synaptic_operations)),
        ("strict: MACs", each(lambda r: r.strict.macs)),
        ("strict: mJ", each(lambda r: r.strict.energy_mj)),
        ("memory traffic, bytes", each(lambda r: r.memory_bytes)),
        ("memory traffic, mJ", each(lambda r: r.memory_energy_mj)),
    ]


def _ratio(label: str, values: list[float]) -> str:
    """Of what can be compared: a spiking model's additions stand in the place of a BERT's MACs."""
    return _percent(*values) if label.endswith(("mJ", "bytes", "dense MACs")) else ""


def _group(name: str) -> str:
    """`.attention.query` for that layer of all blocks."""
    return re.sub(r"^.*?\blayer\.\d+", "", name).removeprefix("spikebert.")


def _name(report: "EnergyReport") -> str:
    return f"spiking (T = {report.num_time_steps})" if report.spiking else "BERT"


def _row(name: str, layers: "list[LayerEnergy]") -> list[str]:
    kind = max((layer.input_kind for layer in layers), key=INPUT_KINDS.index)
    rates = [[getattr(layer, name) for layer in layers] for name in ("firing_rate", "spikes_per_step")]
    means = ["-" if None in values else f"{sum(values) / len(values):.3f}" for values in rates]
    return [name, kind, *means, *_figures(layers)]


def _figures(items: Sequence[Any]) -> list[str]:
    figures = [sum(item.dense_macs for item in items)]
    for account in ("published", "strict"):
        for name in ("synaptic_operations", "macs", "energy_mj"):
            figures.append(sum(getattr(getattr(item, account), name) for item in items))
    return [_number(figure) for figure in figures]


def _number(value: float) -> str:
    """Three digits, with k, M or G."""
    if value == 0:
        return "0"
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _align(rows: list[list[str]], above: list[str] | None = None) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    if above is not None:  # titles that span several columns
        starts = [sum(widths[:i]) + 2 * i for i in range(len(widths))]
        line = ""
        for start, title in zip(starts, above, strict=True):
            line = line.ljust(start) + title if title else line
        lines.append(line)
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
