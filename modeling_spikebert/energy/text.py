"""Figures and tables as text."""


def number(value: float) -> str:
    """Three digits, with k, M or G."""
    if value == 0:
        return "0"
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def align(rows: list[list[str]], above: list[str] | None = None) -> list[str]:
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
