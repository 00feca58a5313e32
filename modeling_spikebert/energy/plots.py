"""Pictures of energy reports and of spikes."""

import re
from pathlib import Path
from typing import Any

import torch
from matplotlib import font_manager, ft2font, rc_context
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .counting import eval_mode, model_arguments
from .report import EnergyReport

# matplotlib's own font has no Chinese; the first of these that is installed is taken for what it lacks.
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "SimHei", "Microsoft YaHei", "PingFang SC")
MOST_TOKENS = 64


def plot_energy(student: EnergyReport, teacher: EnergyReport | None, folder: Path) -> list[Path]:
    """Writes the pictures that follow from reports: firing rates, share by part, and spiking against BERT."""
    files = [_parts(student, folder / "energy_by_part.png")]
    if student.spiking:
        files.append(_firing_rates(student, folder / "firing_rates.png"))
    if teacher is not None:
        files.append(_comparison(student, teacher, folder / "spiking_against_bert.png"))
    return files


def plot_raster(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, file: Path, block: int = -1
) -> Path:
    """Spikes into the MLP of one block while it reads a sentence: tokens across, neurons up, a panel a time step.

    `block` is an index, as of a list; the picture counts from 1. In the published variant this is the sum of spikes,
    and darker means more. A sentence is cut at 64 tokens.
    """
    encoded = tokenizer(sentence, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    seen: list[torch.Tensor] = []
    base: Any = model.base_model
    handle = base.encoder.layer[block].mlp.intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with eval_mode(model), torch.no_grad():
            model(**model_arguments(model, encoded), output_hidden_states=True)  # with these, in all time steps
    finally:
        handle.remove()
    spikes = seen[0].float().cpu()  # [T, L, D]: of one sentence, the tokens of all
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in installed)][:2]
    drawable = _characters(fonts)
    ids = encoded["input_ids"][0].tolist()
    tokens = [
        token if drawable.issuperset(token) else f"id {i}"
        for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    ]
    width = max(2.0, 0.3 * len(tokens))
    with rc_context({"font.family": fonts}):
        figure = Figure(figsize=(1 + width * len(spikes), 8), layout="constrained")
        axes = figure.subplots(1, len(spikes), sharey=True, squeeze=False)[0]
        for t, axis in enumerate(axes):
            image = axis.imshow(
                spikes[t].T.numpy(), aspect="auto", origin="lower", cmap="Greys", vmin=0, interpolation="nearest"
            )
            axis.set(title=f"time step {t + 1}")
            axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
        axes[0].set_ylabel("neuron")
        number = 1 + range(model.config.num_hidden_layers)[block]
        share = 100 * (spikes != 0).float().mean()
        figure.suptitle(f"Spikes into the MLP of block {number}: {share:.1f} % are not 0")
        if spikes.max() > 1:
            figure.colorbar(image, ax=axes, label="spikes")
        return _save(figure, file)


def _firing_rates(report: EnergyReport, file: Path) -> Path:
    neurons = {_shown(layer.name): layer.output for layer in report.layers if layer.output is not None}
    rates = torch.tensor([output.rates_per_step() for output in neurons.values()])  # [N, T]
    figure = Figure(figsize=(3.5 + 0.8 * report.num_time_steps, 1.5 + 0.22 * len(neurons)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(rates.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axis.set(xlabel="time step", title="Firing rate of each layer of neurons, by block")
    axis.set_xticks(range(report.num_time_steps), [str(t + 1) for t in range(report.num_time_steps)])
    axis.set_yticks(range(len(neurons)), list(neurons), fontsize=7)
    if rates.numel() <= 400:
        for row, column in torch.cartesian_prod(torch.arange(len(rates)), torch.arange(rates.shape[1])).tolist():
            value = rates[row, column].item()
            colour = "white" if value < rates.max() / 2 else "black"
            axis.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(image, label="spikes per neuron and time step")
    return _save(figure, file)


def _parts(report: EnergyReport, file: Path) -> Path:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axis = figure.subplots()
    for row, account in enumerate(("strict", "published")):
        energies, left = report.energy_by_part(account), 0.0
        for index, (name, energy) in enumerate(energies.items()):
            share = 100 * energy / sum(energies.values())
            axis.barh(row, share, left=left, color=f"C{index}", label=name if row == 0 else None)
            if share > 4:
                axis.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", fontsize=8)
            left += share
    labels = [f"{account}\n{getattr(report, account).energy_mj:.3g} mJ" for account in ("strict", "published")]
    axis.set(xlabel="share of the energy of a sentence, %", xlim=(0, 100))
    axis.set_yticks((0, 1), labels)
    figure.legend(ncols=4, fontsize=7, loc="outside lower center")
    return _save(figure, file)


def _comparison(student: EnergyReport, teacher: EnergyReport, file: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for offset, report in ((-0.2, student), (0.2, teacher)):
        energies = [report.published.energy_mj, report.strict.energy_mj, report.memory_energy_mj]
        bars = axis.bar([x + offset for x in range(3)], energies, width=0.38, label=report.description)
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
    axis.set(ylabel="energy of a sentence, mJ", title="Theoretical energy")
    axis.set_xticks(range(3), ["published", "strict", "memory traffic"])
    axis.legend()
    return _save(figure, file)


def _shown(name: str) -> str:
    """The name of a layer of neurons in a picture: blocks count from 1, as in the log and in layer maps."""
    return re.sub(r"^.*?\blayer\.(\d+)\.(.*?)_neuron$", lambda match: f"{int(match[1]) + 1} {match[2]}", name)


def _characters(families: list[str]) -> set[str]:
    """What these fonts can draw."""
    fonts = (ft2font.FT2Font(font_manager.findfont(family)) for family in families)
    return {chr(code) for font in fonts for code in font.get_charmap()}


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=120)
    return file
