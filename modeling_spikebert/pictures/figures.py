"""The pictures. Each function returns a matplotlib figure, which `save` writes and a notebook shows."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from torch import Tensor

from ..console.text import percent
from ..energy import EnergyReport
from .spikes import SentenceSpikes, StepAccuracy, word_starts
from .style import BLUE, GREEN, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, new_figure, shortened, style

MOST_COLUMNS = 36  # of words or tokens: what stays legible
MOST_CLASSES = 6
MOST_LETTERS = 13  # of a word
ROWS = 24  # of neurons in a cell of a raster; twice as many where a cell is narrow
INCHES = 5.8  # of all columns, about
MARK = 0.045  # inches of a spike
LINE_HEIGHT = 0.36  # inches of a class and its bar
LETTER = 0.085  # inches of a letter, about
RATE = "neurons that fire\nin a time step, %"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
LINE = "#C8C8C8"
SIGNALS = {"mlp_input": "MLP\ninput", "intermediate": "MLP\nintermediate", "mlp_output": "MLP\noutput"}

# Figures of a layer and of a report, in mJ.
ENERGIES = {
    "Published formula": "published.energy_mj",
    "Strict: every operation": "strict.energy_mj",
    "Memory traffic": "memory_energy_mj",
}
EMBEDDINGS, HEAD, SENTENCE = "embeddings", "classifier", "whole sentence"


def raster(spikes: SentenceSpikes) -> Figure:
    """The spikes of a part of each block's neurons while the model reads a sentence, and the class that follows.

    Words run from left to right and blocks from the bottom to the top. A word has a cell for each of its tokens and
    time steps. A neuron has the same place in all cells of its block: those that are drawn lie in equal distances over
    all its layers of neurons. Special tokens are left out, and so are words for which there is no room.
    """
    shown, num_columns = _shown(spikes)
    num_blocks, steps = len(spikes.spikes), spikes.num_time_steps
    across = max(1, int(INCHES / (num_columns * steps) / MARK))  # neurons in a row of a cell
    rows = ROWS if across > 1 else 2 * ROWS
    blocks = [torch.cat(list(block.values()), dim=-1) for block in spikes.spikes]  # [T, L, N]
    num_neurons = blocks[0].shape[-1]
    across = min(across, math.ceil(num_neurons / rows))
    drawn = min(num_neurons, across * rows)
    chosen = torch.arange(drawn) * num_neurons // drawn
    tokens = [token for start, stop in shown for token in range(start, stop)]
    fired = torch.stack([block[:, tokens][..., chosen] for block in blocks])  # [blocks, T, tokens, drawn]

    pitch, width, height = 0.86 / steps, 0.81 / steps, 0.9  # of cells: one token is 1 wide, one block is 1 high
    cells = [
        (column + step * pitch, band, width, height)
        for column in range(num_columns)
        for step in range(steps)
        for band in range(num_blocks)
    ]
    w, h = width / across, height / rows  # of a neuron
    marks = [
        (column + step * pitch + w * (neuron % across + 0.1), band + h * (neuron // across + 0.1), 0.8 * w, 0.8 * h)
        for band, step, column, neuron in fired.nonzero().tolist()
    ]
    of_time = "" if steps == 1 else f"A word has {steps} cells, its time steps from left to right. "
    caption = (
        f"{of_time}Each mark is a spike; {drawn:,} of the {num_neurons:,} neurons of a block are drawn. "
        f"{100 * spikes.firing_rate:.0f} % of all neurons fire in a time step.{_left_out(spikes, shown)}"
    )
    with style():
        figure = new_figure(shortened(spikes.text, 62), caption, height=min(10.0, max(3.5, 1.5 + 0.5 * num_blocks)))
        ratios = [5] if spikes.scores is None else [5, 1]
        axis, *others = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
        axis.add_patch(PathPatch(_rectangles(cells), facecolor=PALE, linewidth=0))
        axis.add_patch(PathPatch(_rectangles(marks), facecolor=BLUE, linewidth=0))
        axis.set(xlim=(-0.05, num_columns), ylim=(-0.15, num_blocks))
        places = [tokens.index(start) for start, _ in shown]
        ends = [place + stop - start - 0.19 for place, (start, stop) in zip(places, shown, strict=True)]
        axis.hlines(
            [-0.1] * len(places), places, ends, color=LINE, linewidth=1.5
        )  # holds the tokens of a word together
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_yticks([band + height / 2 for band in range(num_blocks)], _block_names(num_blocks))
        _word_ticks(axis, spikes, [(a + b) / 2 for a, b in zip(places, ends, strict=True)], INCHES / num_columns)
        if others:
            others[0].set_axis_off()
            figure.draw_without_rendering()  # lays it out
            _class_bars(others[0], spikes, others[0].get_window_extent().height / figure.dpi / LINE_HEIGHT)
    return figure


def words(spikes: SentenceSpikes) -> Figure:
    """How much fires for each word: mean over all neurons, and over those of each block."""
    shown = word_starts(spikes)[:MOST_COLUMNS]
    rates = 100 * spikes.word_rates[: len(shown)]
    tokens = torch.stack(
        [torch.cat([layer.float() for layer in block.values()], dim=-1).mean((0, 2)) for block in spikes.spikes]
    )  # [blocks, L]
    by_block = 100 * torch.stack([tokens[:, start:stop].mean(1) for start, stop in shown], dim=1)  # [blocks, words]
    most = set(rates.topk(min(3, len(rates))).indices.tolist())
    places = [float(i) for i in range(len(rates))]
    caption = (
        f"Mean over the neurons, tokens and time steps of a word. Red: the highest three.{_left_out(spikes, shown)}"
    )
    with style():
        figure = new_figure("Which words fired most", caption, height=3.4 + 0.2 * len(by_block))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 0.2 * len(by_block)))
        bars = top.bar(
            places, rates.tolist(), width=0.8, color=[VERMILLION if i in most else SKY for i in range(len(rates))]
        )
        if len(rates) <= 16:
            top.bar_label(bars, [f"{rate:.1f}" for rate in rates], fontsize=9, padding=1)
        top.set(ylabel=RATE, xlim=(-0.6, len(rates) - 0.4))
        top.tick_params(axis="x", length=0, labelbottom=False)
        image = bottom.imshow(by_block.numpy(), aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
        bottom.spines[:].set_visible(False)
        bottom.tick_params(length=0)
        bottom.set_yticks(range(len(by_block)), _block_names(len(by_block)))
        _word_ticks(bottom, spikes, places, INCHES / len(rates))
        figure.colorbar(image, ax=bottom, pad=0.01, label="by block, %")
    return figure


def firing_rates(source: SentenceSpikes | EnergyReport) -> Figure:
    """Firing rate of each block and layer of neurons: of a sentence, or as mean over the sentences of a report."""
    names, rates = _rates(source)
    rates = 100 * rates
    with style():
        figure = new_figure(
            "Firing rate by block and layer of neurons", _subject(source), height=1.9 + 0.34 * len(rates)
        )
        axis = figure.subplots()
        image = axis.imshow(rates.numpy(), aspect="auto", origin="lower", cmap="viridis", vmin=0)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks(range(len(names)), [SIGNALS.get(name, name.replace("_", "\n")) for name in names])
        axis.set_yticks(range(len(rates)), _block_names(len(rates)))
        dark = 0.6 * float(rates.max())
        for block, row in enumerate(rates.tolist()):
            for place, rate in enumerate(row):
                colour = "white" if rate < dark else INK
                axis.text(place, block, f"{rate:.1f}", ha="center", va="center", color=colour)
        figure.colorbar(image, pad=0.01, label=RATE)
    return figure


def energy_by_layer(student: EnergyReport, teacher: EnergyReport | None = None) -> Figure:
    """Theoretical energy of a sentence by layer in both accounts, and memory traffic, next to a BERT's.

    The scale is logarithmic. A layer without a point takes nothing in that account.
    """
    reports = [student] if teacher is None else [student, teacher]
    names = [EMBEDDINGS, *_block_names(max(report.num_hidden_layers for report in reports)), HEAD, SENTENCE]
    places = {name: float(place) for place, name in enumerate(names)}
    places[SENTENCE] += 0.5  # a line lies between
    caption = (
        f"Theory, for {student.num_sentences:,} sentences of {student.tokens_per_sentence:.0f} tokens"
        if student.num_sentences > 1
        else f"Theory, for a sentence of {student.tokens_per_sentence:.0f} tokens"
    ) + f"; constants {student.constants.name}. Strict with memory traffic: "
    caption += _totals([1e-3 * report.energy_with_memory_mj for report in reports]) + "."
    with style():
        figure = new_figure("Energy of one sentence by layer", caption, height=2.2 + 0.24 * len(names))
        axes = figure.subplots(1, len(ENERGIES), sharey=True)
        for axis, (title, name) in zip(axes, ENERGIES.items(), strict=True):
            energies = [_energies(report, name) for report in reports]
            _dots(axis, energies, [report.description for report in reports], places)
            axis.set_title(f"{title}\n{_totals([energy[SENTENCE] for energy in energies])}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", ncols=2, bbox_to_anchor=(1, 1))
    return figure


def _dots(axis: Axes, energies: list[dict[str, float]], names: list[str], places: dict[str, float]) -> None:
    """A row for each layer with a point for each model, joules to the right."""
    for layer, y in places.items():
        ends = [energy[layer] for energy in energies if energy.get(layer)]
        axis.plot(ends, [y] * len(ends), color=LINE, linewidth=2, zorder=1)
    looks = ((BLUE, "o", 6.5, 3), (VERMILLION, "s", 8.5, 2))
    for energy, name, (colour, marker, size, order) in zip(energies, names, looks, strict=False):
        points = [(joules, places[layer]) for layer, joules in energy.items() if joules]
        (line,) = axis.plot(*zip(*points, strict=True), marker, label=name, markersize=size, zorder=order)
        line.set(markerfacecolor=colour, markeredgecolor="white")
    axis.axhline(places[SENTENCE] - 0.75, color=LINE, linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(numticks=4))
    axis.xaxis.set_major_formatter(EngFormatter("J"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color=PALE)
    axis.set_axisbelow(True)
    axis.set_yticks(list(places.values()), list(places))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.margins(x=0.15)


def accuracy_by_steps(results: Sequence[StepAccuracy], subject: str = "") -> Figure:
    """Accuracy with each number of time steps, with its standard error; `subject` says on which sentences."""
    steps = [result.num_time_steps for result in results]
    values, errors = ([100 * getattr(result, name) for result in results] for name in ("accuracy", "standard_error"))
    sentences = f"{results[0].num_sentences:,} sentences" + (f" of {shortened(subject, 50)}" if subject else "")
    with style():
        figure = new_figure("Accuracy by number of time steps", f"{sentences}. Bars: one standard error to each side.")
        axis = figure.subplots()
        axis.errorbar(steps, values, errors, color=BLUE, marker="o", markersize=7, capsize=4, linewidth=1.5)
        for step, value, error in zip(steps, values, errors, strict=True):
            axis.annotate(f"{value:.1f}", (step, value + error), (0, 5), textcoords="offset points", ha="center")
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="time steps", ylabel="accuracy, %")
        axis.margins(x=0.08, y=0.25)
    return figure


def scores_by_steps(spikes: SentenceSpikes) -> Figure:
    """Class scores of a sentence after each time step.

    Raises:
        ValueError: the model has no classifier.
    """
    if spikes.scores is None:
        raise ValueError("The model has no classifier, so there are no class scores. Name a fine-tuned one.")
    regression = spikes.problem_type == "regression"
    scores = spikes.scores if regression else 100 * spikes.scores
    steps = list(range(1, len(scores) + 1))
    chosen = scores[-1].topk(min(MOST_CLASSES, scores.shape[1])).indices.tolist()
    with style():
        figure = new_figure("Class scores after each time step", _subject(spikes))
        axis = figure.subplots()
        for index, colour, marker in zip(chosen, COLOURS, MARKERS, strict=False):
            label = f"{shortened(spikes.labels[index], 24)}: {scores[-1, index]:.1f}{'' if regression else ' %'}"
            axis.plot(steps, scores[:, index].tolist(), color=colour, marker=marker, label=label, clip_on=False)
        axis.set_xticks(steps if len(steps) <= 16 else steps[:: math.ceil(len(steps) / 16)])
        axis.set_xlabel("time steps")
        axis.set_ylabel("output" if regression else "probability of the class, %")
        if not regression:
            axis.set_ylim(0, 100)
        figure.legend(loc="outside right center", title=f"after {len(steps)} time step{'s' * (len(steps) > 1)}")
    return figure


def _class_bars(axis: Axes, spikes: SentenceSpikes, room: float) -> None:
    """The class, and under it bars of the likeliest ones, in the middle of `room` lines; one unit up is one line."""
    assert spikes.scores is not None
    assert spikes.answer is not None
    scores = spikes.scores[-1]
    label, score = spikes.answer
    regression = spikes.problem_type == "regression"
    count = 0 if regression else min(MOST_CLASSES, len(scores), max(1, int(room - 1.2)))
    middle = count / 2
    axis.set(xlim=(0, 1), ylim=(-room / 2 - 0.4, room / 2 - 0.4))
    title = shortened(f"{score:.2f}" if regression else label, MOST_LETTERS)
    axis.text(0, middle + 0.3, title, fontsize=14, weight="bold")
    for place, index in enumerate(scores.topk(count).indices.tolist()):
        share, y = float(scores[index]), middle - place - 0.5
        axis.text(0, y, shortened(spikes.labels[index], MOST_LETTERS - 3), fontsize=9)
        axis.text(1, y, f"{100 * share:.1f} %", fontsize=9, ha="right")
        axis.barh(y - 0.22, 1, height=0.2, color=PALE)
        axis.barh(y - 0.22, share, height=0.2, color=SKY if place else VERMILLION)


def _shown(spikes: SentenceSpikes) -> tuple[list[tuple[int, int]], int]:
    """First token of each word for which there is room and the one behind its last; and the number of tokens."""
    shown: list[tuple[int, int]] = []
    columns = 0
    for start, stop in word_starts(spikes):
        if shown and columns + stop - start > MOST_COLUMNS:
            break
        shown.append((start, stop))
        columns += stop - start
    return shown, columns


def _left_out(spikes: SentenceSpikes, shown: list[tuple[int, int]]) -> str:
    return f" The first {len(shown)} of {len(spikes.words)} words are shown." if len(shown) < len(spikes.words) else ""


def _rectangles(corners: Sequence[tuple[float, float, float, float]]) -> Path:
    """One path of rectangles `(x, y, width, height)`: small as SVG."""
    x, y, width, height = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4).T
    polygons = torch.stack(
        [torch.stack(corner, -1) for corner in ((x, y), (x + width, y), (x + width, y + height), (x, y + height))], 1
    )  # [N, 4, 2]
    return Path.make_compound_path_from_polys(polygons.numpy())


def _block_names(count: int) -> list[str]:
    return [f"block {number}" for number in range(1, count + 1)]


def _word_ticks(axis: Axes, spikes: SentenceSpikes, centres: list[float], inches: float) -> None:
    """Words under their columns, of so many inches each; upright where they would touch."""
    labels = [shortened(word, MOST_LETTERS) for word in spikes.words[: len(centres)]]
    neighbours = zip(pairwise(centres), pairwise(labels), strict=True)
    upright = any(
        LETTER * (len(word) + len(after)) / 2 + 0.08 > (right - left) * inches
        for (left, right), (word, after) in neighbours
    )
    axis.set_xticks(centres, labels, rotation=90 if upright else 0)


def _rates(source: SentenceSpikes | EnergyReport) -> tuple[list[str], Tensor]:
    """Names of the layers of neurons of a block, and their rates `[blocks, names]`."""
    if isinstance(source, SentenceSpikes):
        return list(source.spikes[0]), source.rates
    blocks: dict[int, dict[str, float]] = {}
    for layer in source.layers:
        place = re.search(r"\blayer\.(\d+)\.(\w+)\.(\w+)_neuron$", layer.name)
        if place and layer.output is not None:
            block, part, neuron = int(place[1]), place[2], place[3]
            name = f"{part}_{neuron}" if neuron in ("input", "output") else neuron
            blocks.setdefault(block, {})[name] = layer.output.firing_rate() or 0.0
    return list(blocks[0]), torch.tensor([list(block.values()) for block in blocks.values()])


def _subject(source: SentenceSpikes | EnergyReport) -> str:
    if isinstance(source, SentenceSpikes):
        return f"{shortened(source.text, 180)} ({source.description})"
    sentences = f"{source.num_sentences:,} sentences of {source.tokens_per_sentence:.0f} tokens"
    return f"Mean over {sentences} ({source.description})."


def _energies(report: EnergyReport, figure: str) -> dict[str, float]:
    """Joules of each layer, and of all of them."""
    value = attrgetter(figure)
    energies: dict[str, float] = {}
    for layer in report.layers:
        block = re.search(r"\blayers?\.(\d+)\.", layer.name)
        name = f"block {int(block[1]) + 1}" if block else EMBEDDINGS if "embeddings" in layer.name else HEAD
        energies[name] = energies.get(name, 0.0) + 1e-3 * value(layer)
    return energies | {SENTENCE: 1e-3 * value(report)}


def _totals(joules: list[float]) -> str:
    """Energies of one model or of two; then also how much the first is of the second."""
    text = " / ".join(_joules(value) for value in joules)
    return f"{text} = {percent(*joules)}" if len(joules) == 2 else text


def _joules(value: float) -> str:
    places = 2 - (math.floor(math.log10(value)) % 3 if value else 2)  # three digits
    return str(EngFormatter("J", places=places)(value))
