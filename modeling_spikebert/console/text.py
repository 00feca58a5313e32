"""Figures, tables and sentences as text."""

from collections.abc import Iterable
from difflib import get_close_matches


def number(value: float) -> str:
    """Three digits, with k, M or G."""
    if value == 0:
        return "0"
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:  # which rounds to it
            return f"{value / factor:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def speed(value: float) -> str:
    """Three digits, zeros at the end as well, in six columns."""
    return f"{number(value) if value >= 999.5 else f'{value:#.3g}'.rstrip('.'):>6}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def figure(value: float) -> str:
    """Four digits: a loss or a metric."""
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: what is most like it or begins so, if anything does."""
    names = list(known)
    close = get_close_matches(name, names, n=1) or [other for other in names if other.startswith(name)]
    return f"; did you mean {close[0]}?" if close else ""


def align(rows: list[list[str]], above: list[str] | None = None) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right.

    Args:
        rows: of cells, each as long as the first.
        above: a line of titles that span several columns, as long as a row, empty where a title goes on.
    """
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
