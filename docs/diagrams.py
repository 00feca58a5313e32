"""Draws the diagrams of these pages: `python docs/diagrams.py` (extra `energy`)."""

import sys
from io import StringIO
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from modeling_spikebert.norm_lif_spikebert import LIF, norm_lif_naive

BLUE, ORANGE, GREEN, GREY, PALE, INK = "#0072B2", "#D55E00", "#009E73", "#6B6B6B", "#EFEFEF", "#222222"
FILES = ("block.svg", "graph.svg", "mac_and_sop.svg", "neuron.svg", "stages.svg")


def main(folder: Path) -> None:
    # Text as outlines, and nothing that differs from run to run.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "spikebert", "font.size": 11}):
        for name, figure in zip(FILES, (block(), graph(), mac_and_sop(), neuron(), stages()), strict=True):
            svg = StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None}, facecolor="white")
            lines = [line.rstrip() for line in svg.getvalue().splitlines()]  # as the commit hooks want them
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


# Boxes and arrows


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Coordinates are inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, text: str, width: float = 1.3, height: float = 0.5, color: str = PALE) -> None:
    """Centred at `x`, `y`."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=1))
    axes.text(x, y, text, ha="center", va="center", color="white" if color in (BLUE, GREEN, ORANGE) else INK)


def arrow(axes: Axes, *points: tuple[float, float], color: str = INK) -> None:
    """Through the points; spikes are blue, real values black."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=color, lw=1.5, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def plus(axes: Axes, x: float, y: float) -> None:
    """Where two arrows add up."""
    axes.text(x, y, "+", ha="center", va="center", fontsize=16, zorder=3)
    axes.plot(x, y, "o", ms=20, mfc="white", mec=INK)


def note(axes: Axes, x: float, y: float, text: str, color: str = GREY, **options: str) -> None:
    axes.text(x, y, text, color=color, **{"ha": "center", "va": "center", **options})


# The five


def block() -> Figure:
    """One block of the membrane variant: attention, and an MLP."""
    figure, axes = canvas(9.2, 5.2)
    top, middle = 4.55, 2.6

    # The shortcut
    arrow(axes, (0.2, top), (3.95, top))
    arrow(axes, (4.25, top), (8.35, top))
    arrow(axes, (8.65, top), (9.1, top))
    plus(axes, 4.1, top)
    plus(axes, 8.5, top)
    note(axes, 2.2, top + 0.28, "shortcut: real values")
    note(axes, 6.3, top + 0.28, "shortcut: real values")
    # Attention
    arrow(axes, (0.55, top), (0.55, middle + 0.25))
    box(axes, 0.6, middle, "neurons", 0.9, color=BLUE)
    for y, name in zip((3.5, middle, 1.7), ("query", "key", "value"), strict=True):
        arrow(axes, (1.05, middle), (1.3, middle), (1.3, y), (1.5, y), color=BLUE)
        box(axes, 2.02, y, f"Linear\n{name}", 0.95, 0.6)
        box(axes, 2.02, y - 0.42, "neurons", 0.95, 0.26, BLUE)
        arrow(axes, (2.5, y - 0.42), (2.75, y - 0.42), (2.75, middle), (2.9, middle), color=BLUE)
    box(axes, 3.3, middle, "$(q k^T)\\,v$\ncounts", 0.78, 0.65)
    box(axes, 3.3, middle - 0.85, "neurons", 0.9, color=BLUE)
    arrow(axes, (3.3, middle - 0.33), (3.3, middle - 0.6))
    arrow(axes, (3.75, middle - 0.85), (4.1, middle - 0.85), (4.1, middle - 0.25), color=BLUE)
    box(axes, 4.1, middle, "Linear", 0.7)
    arrow(axes, (4.1, middle + 0.25), (4.1, top - 0.15))
    note(axes, 2.2, 0.75, "attention", INK, weight="bold")
    # MLP
    arrow(axes, (5.1, top), (5.1, middle + 0.25))
    box(axes, 5.15, middle, "neurons", 0.9, color=BLUE)
    arrow(axes, (5.6, middle), (5.75, middle), color=BLUE)
    box(axes, 6.15, middle, "Linear\nD to 4D", 0.8, 0.6)
    arrow(axes, (6.55, middle), (6.75, middle))
    box(axes, 7.2, middle, "neurons", 0.9, color=BLUE)
    arrow(axes, (7.65, middle), (7.85, middle), color=BLUE)
    box(axes, 8.35, middle, "Linear\n4D to D", 0.9, 0.6)
    arrow(axes, (8.5, middle + 0.3), (8.5, top - 0.15))
    note(axes, 6.75, 0.75, "MLP", INK, weight="bold")
    # Legend
    arrow(axes, (5.0, 1.55), (5.5, 1.55), color=BLUE)
    note(axes, 5.6, 1.55, "spikes, 0 or 1", INK, ha="left")
    arrow(axes, (7.0, 1.55), (7.5, 1.55))
    note(axes, 7.6, 1.55, "real values", INK, ha="left")
    note(axes, 4.6, 0.3, "“neurons”: LayerNorm and LIF neurons, over all time steps")
    return figure


def graph() -> Figure:
    """One block of the neuromorphic variant, as a graph of neurons and synapses."""
    figure, axes = canvas(9.2, 4.9)
    top, middle, low = 4.3, 2.75, 1.35

    def neurons(x: float, y: float, name: str, width: float = 0.95) -> None:
        box(axes, x, y, name, width, 0.5, BLUE)

    arrow(axes, (0.1, top), (6.05, top))
    arrow(axes, (6.35, top), (8.6, top))
    arrow(axes, (8.9, top), (9.15, top))
    plus(axes, 6.2, top)
    plus(axes, 8.75, top)
    note(axes, 3.1, top + 0.3, "shortcut: sums of currents")
    # Attention
    arrow(axes, (0.6, top), (0.6, middle + 0.25))
    neurons(0.6, middle, "read", 0.8)
    note(axes, 0.68, 3.6, "gain", fontsize="small", ha="left")
    for y, name in ((3.5, "query"), (middle, "key"), (2.0, "value")):
        arrow(axes, (1.0, middle), (1.2, middle), (1.2, y), (1.4, y), color=GREEN)
        neurons(1.85, y, name, 0.9)
    for y, end in ((middle, middle + 0.12), (2.0, middle - 0.12)):
        arrow(axes, (2.3, y), (2.5, y), (2.5, end), (2.65, end), color=BLUE)
    neurons(3.15, middle, "key\nand value", 1.0)
    arrow(axes, (3.65, middle), (3.95, middle), color=ORANGE)
    neurons(4.4, middle, "gate", 0.9)
    note(axes, 4.4, middle - 0.42, "one for\nall tokens", fontsize="small", va="top")
    arrow(axes, (4.85, middle), (5.45, middle), (5.45, 3.3), (5.7, 3.3), color=ORANGE)
    arrow(axes, (2.3, 3.5), (5.7, 3.5), color=BLUE)
    neurons(6.2, 3.4, "query\nand gate", 1.0)
    arrow(axes, (6.2, 3.65), (6.2, top - 0.16), color=GREEN)
    # MLP
    arrow(axes, (7.0, top), (7.0, middle + 0.25))
    neurons(7.0, middle, "read", 0.8)
    note(axes, 7.08, 3.6, "gain", fontsize="small", ha="left")
    arrow(axes, (7.4, middle), (7.65, middle), color=GREEN)
    neurons(8.3, middle, "intermediate", 1.25)
    arrow(axes, (8.75, middle + 0.25), (8.75, top - 0.16), color=GREEN)
    # Legend
    for x, y, color, text in (
        (0.3, low - 0.25, GREEN, "spikes through a Linear: weights of 8 bits, the same for each token"),
        (0.3, low - 0.65, ORANGE, "spikes of all tokens to one gate, and back to all tokens"),
        (5.6, low - 0.25, BLUE, "spike to neuron, weight 1"),
        (5.6, low - 0.65, INK, "values"),
    ):
        arrow(axes, (x, y), (x + 0.45, y), color=color)
        note(axes, x + 0.55, y, text, INK, ha="left", fontsize="small")
    note(
        axes,
        4.6,
        0.25,
        "Each blue box: LIF neurons, one for each channel and token. An “and” fires if both spikes arrive.",
    )
    return figure


def mac_and_sop() -> Figure:
    """What three inputs of a Linear cost."""
    figure, axes = canvas(9.2, 2.9)
    inputs = (
        (1.6, "0.37", GREY, "a real input", "4 multiplications\nand additions (MACs)", "$0.37 \\cdot w$"),
        (4.6, "1", BLUE, "a spike", "4 additions (SOPs)", "w"),
        (7.6, "0", PALE, "a silent neuron", "nothing", ""),
    )
    for x, value, color, title, cost, weight in inputs:
        note(axes, x, 2.65, title, INK, weight="bold")
        for i in range(4):
            y = 2.2 - 0.42 * i
            silent = not weight
            axes.plot((x - 0.7, x + 0.8), (1.57, y), color=PALE if silent else INK, lw=1.2, ls=":" if silent else "-")
            axes.plot(x + 0.8, y, "o", ms=13, mfc="white", mec=INK)
            note(axes, x + 1.0, y, "" if silent else f"+ {weight}", INK, ha="left", fontsize="small")
        axes.plot(x - 0.7, 1.57, "o", ms=30, mfc=color, mec=INK)
        note(axes, x - 0.7, 1.57, value, INK if color == PALE else "white", weight="bold")
        note(axes, x + 0.1, 0.3, cost, INK)
    return figure


def neuron() -> Figure:
    """A neuron over 12 time steps: what it gets, its membrane, its spikes. Computed by the package."""
    currents = [0.9, 0.9, 0.9, 1.6, 1.6, 1.6, 0.2, 0.0, 2.4, 2.4, 0.6, 0.6]
    constants = LIF(tau=2.0, v_threshold=1.0, v_reset=0.0)
    spikes = norm_lif_naive(torch.tensor(currents, dtype=torch.float64)[:, None], constants)[:, 0].tolist()
    charged, membrane = [], 0.0
    for current, spike in zip(currents, spikes, strict=True):
        charged.append(membrane + (current - membrane) / constants.tau)
        membrane = 0.0 if spike else charged[-1]

    figure = Figure(figsize=(9.2, 3.9), layout="constrained")
    top, center, bottom = figure.subplots(3, sharex=True, height_ratios=(2, 3, 1))
    steps = range(1, len(currents) + 1)
    top.bar(steps, currents, color=GREY, width=0.6)
    top.set(ylabel="input")
    center.axhline(constants.v_threshold, color=ORANGE, ls="--")
    center.text(0.45, constants.v_threshold + 0.07, "threshold", color=ORANGE)
    before = [0.0]
    for step, height, spike in zip(steps, charged, spikes, strict=True):
        center.plot((step - 1 + 0.3, step - 0.3), (before[-1], before[-1]), color=INK)
        center.plot((step - 0.3, step), (before[-1], height), color=INK)
        before.append(0.0 if spike else height)
        center.plot((step, step + 0.3), (height, before[-1]), color=BLUE if spike else INK, ls=":" if spike else "-")
        center.plot(step, height, "o", color=BLUE if spike else INK, ms=6)
    center.set(ylabel="membrane", ylim=(-0.15, 1.55))
    bottom.vlines([step for step, spike in zip(steps, spikes, strict=True) if spike], 0, 1, color=BLUE, lw=3)
    bottom.set(ylabel="spikes", xlabel="time step", yticks=(), ylim=(0, 1.1), xticks=list(steps))
    for axes in (top, center, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def stages() -> Figure:
    """The two stages of distillation."""
    figure, axes = canvas(9.2, 3.7)
    halves = (
        (0.0, "stage 1: general", "any text, no labels", ("hidden states", "embeddings"), False),
        (4.7, "stage 2: task", "text of the task", ("answers (logits)", "hidden states", "embeddings"), True),
    )
    for left, title, text, losses, fine_tuned in halves:
        note(axes, left + 2.2, 3.45, title, INK, weight="bold", fontsize="large")
        box(axes, left + 2.2, 0.4, text, 2.2, 0.45)
        arrow(axes, (left + 1.6, 0.63), (left + 0.85, 0.95))
        arrow(axes, (left + 2.8, 0.63), (left + 3.6, 0.95))
        for x, name, color in ((left + 0.85, "BERT", GREEN), (left + 3.6, "SpikeBERT", BLUE)):
            box(axes, x, 1.85, "", 1.2, 1.8, PALE)
            for i in range(4):
                box(axes, x, 1.2 + 0.35 * i, "", 1.0, 0.25, color)
            note(axes, x, 2.6, name, INK)
        for y, name in zip((2.6, 1.9, 1.2) if fine_tuned else (1.9, 1.2), losses, strict=True):
            arrow(axes, (left + 1.5, y), (left + 2.95, y), color=ORANGE)
            note(axes, left + 2.22, y + 0.15, name, ORANGE, fontsize="small")
        note(axes, left + 0.85, 2.95, "fine-tuned, frozen" if fine_tuned else "frozen", fontsize="small")
        note(axes, left + 3.6, 2.95, "learns", fontsize="small")
    arrow(axes, (3.6, 3.06), (3.6, 3.2), (8.3, 3.2), (8.3, 3.06), color=BLUE)
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "pictures")
