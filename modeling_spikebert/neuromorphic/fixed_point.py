"""`to_fixed_point`: weights of 8 bits, with which every sum is exact, for a model of the neuromorphic variant.

Norms are folded into the weights, and every weight becomes a whole number times a power of two. The powers are chosen
so that all sums and membranes of any sentence are exact in float32. A simulator may then add in any order, with `>` or
`>=` at the threshold, and comes to the same spikes.

A grid `k` stands for the multiples of `2^-k`. A membrane is finer than its current: each time step divides it by tau.
Shapes: `D` hidden, `I` and `O` inputs and outputs of a Linear.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..configuration_spikebert import SpikeBertConfig
from ..modeling_spikebert import SpikeBertForSequenceClassification

LARGEST_WEIGHT = 127  # of 8 bits
SHORTCUT_GRID = 8  # embeddings spread by 1: a 256th is small beside that
FINEST_GRID = 22  # of membranes; half a step below the threshold 1 is a number in float32 then
MANTISSA = 24  # bits of a whole number in float32


def check_maps(model: Any) -> None:
    """Finds out whether a chip's neurons and synapses can stand for all parts of a model.

    Raises:
        TypeError: it is no `SpikeBertForSequenceClassification`.
        ValueError: some cannot; the message names them, and says what to train instead.
    """
    if not isinstance(model, SpikeBertForSequenceClassification):
        raise TypeError(f"Only a SpikeBertForSequenceClassification goes to a chip, got {type(model).__name__}.")
    config = model.config
    if config.variant != "neuromorphic":
        names = [name for name, _ in model.named_modules()]
        norms = [name for name in names if name.endswith(("LayerNorm", "_neuron")) or name == "norm"]
        attention = [name for name in names if name.endswith(".attention")]
        raise ValueError(
            f"NIR has no node for {len(norms)} LayerNorms (such as {norms[0]}) and {len(attention)} products of "
            f"queries, keys and values (such as {attention[0]}) of this model, which is {config.variant}. Train a "
            "student of the variant neuromorphic: spikebert quickstart --variant neuromorphic, or spikebert distill "
            """--student-config '{"variant": "neuromorphic"}'."""
        )
    if config.v_reset != 0:
        reset = "the soft reset (v_reset None)" if config.v_reset is None else f"v_reset {config.v_reset}"
        raise ValueError(
            f"Simulators that read NIR reset to 0, and the neurons of this model have {reset}. Train with 0."
        )
    if not math.log2(config.tau).is_integer():
        raise ValueError(f"Membranes are exact where tau is a power of two, and it is {config.tau}. Train with tau 2.")
    if any(getattr(module, "weight_scale", None) is not None for module in model.modules()):
        raise ValueError("The weights are int8 already, with scales that are no powers of two. Load the float model.")


@torch.no_grad()
def to_fixed_point(
    model: SpikeBertForSequenceClassification, num_tokens: int, num_time_steps: int
) -> SpikeBertForSequenceClassification:
    """A copy with folded norms and weights of 8 bits; an ordinary checkpoint, in float32.

    Norms behind Linears and embeddings are the identity then. Those that read the shortcut keep a gain of at most 8
    bits, and those in front of gates one of 8 bits. Each row of a Linear has a grid of its own, of which its bias is a
    multiple. Tables are whole 256ths, and the threshold is 1.

    Args:
        model: of the neuromorphic variant.
        num_tokens: of the longest sentence for which sums over tokens are exact.
        num_time_steps: as many are exact; with `tau` 1 a single one, to which all others are equal.

    Raises:
        TypeError, ValueError: as `check_maps`, or the weights spread too far for float32.
    """
    check_maps(model)
    if model.config.tau == 1:  # without memory all steps are alike
        num_time_steps = 1
    rounded = _Rounding(model, num_tokens, num_time_steps).model
    # A variance of 1 and this are 1: norms divide by 1.
    changed = {"v_threshold": 1.0, "layer_norm_eps": 1e-38, "num_time_steps": num_time_steps}
    fields = model.config.to_dict() | changed
    for name in ("auto_map", "dtype"):
        fields.pop(name, None)
    result = SpikeBertForSequenceClassification(SpikeBertConfig(**fields))
    result.load_state_dict(rounded.state_dict())
    return result.eval()


class _Rounding:
    """Goes through a model in the order of its signals, with a bound on what the shortcut carries.

    Args:
        model, num_tokens, num_time_steps: as in `to_fixed_point`.

    Attributes:
        model: a rounded copy, in float64.
        life: how many times a membrane is halved.
        bound: `[D]`.
    """

    def __init__(self, model: SpikeBertForSequenceClassification, num_tokens: int, num_time_steps: int):
        self.model = copy.deepcopy(model).cpu().double().eval()
        self.num_tokens = num_tokens
        config = model.config
        self.threshold = float(config.v_threshold)
        self.life = halvings(config.tau, num_time_steps)
        if self.life + SHORTCUT_GRID > FINEST_GRID:
            raise ValueError(f"Membranes of {num_time_steps} time steps are too fine for float32. Take fewer steps.")
        base: Any = self.model.spikebert
        self.embeddings(base.embeddings)
        for i, block in enumerate(base.encoder.layer):
            name = f"spikebert.encoder.layer.{i}"
            attention, mlp = block.attention, block.mlp
            self.reader(attention.input_neuron.batch_norm, f"{name}.attention.input_neuron")
            for part in ("query", "key", "value"):
                norm = getattr(attention, f"{part}_neuron").batch_norm
                self.linear(getattr(attention, part), norm, f"{name}.attention.{part}")
            self.gate(attention.context_neuron.batch_norm, f"{name}.attention.context_neuron")
            self.branch(attention.output)
            self.reader(mlp.input_neuron.batch_norm, f"{name}.mlp.input_neuron")
            self.linear(mlp.intermediate, mlp.intermediate_neuron.batch_norm, f"{name}.mlp.intermediate")
            self.branch(mlp.output)
        head: Any = self.model
        self.reader(head.norm.batch_norm, "norm")
        classifier = self.model.classifier
        grid = row_grids(classifier.weight)
        classifier.weight.copy_(on_grid(classifier.weight, grid.unsqueeze(1)))
        classifier.bias.copy_(on_grid(classifier.bias, grid))

    def embeddings(self, embeddings: Any) -> None:
        gain, shift = gain_and_shift(embeddings.batch_norm)
        self.bound = torch.zeros_like(gain)
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            if table is not None:
                weight = table.weight * gain + (shift if table is embeddings.position_embeddings else 0)
                table.weight.copy_(on_grid(weight, torch.tensor(SHORTCUT_GRID)))
                self.bound += table.weight.abs().amax(0)
        fill(embeddings.batch_norm, 1, 0)

    def linear(self, linear: Any, norm: Any, name: str) -> None:
        """In front of neurons."""
        gain, shift = self.current_of(norm)
        weight, bias = linear.weight * gain.unsqueeze(1), linear.bias * gain + shift
        grid = torch.minimum(row_grids(weight), self.finest(weight.abs().sum(1) + bias.abs(), name))
        linear.weight.copy_(on_grid(weight, grid.unsqueeze(1)))
        linear.bias.copy_(on_grid(bias, grid))
        fill(norm, 1, 0)

    def branch(self, linear: Any) -> None:
        """What is added to the shortcut."""
        grid = row_grids(linear.weight).clamp(max=SHORTCUT_GRID)
        linear.weight.copy_(on_grid(linear.weight, grid.unsqueeze(1)))
        linear.bias.copy_(on_grid(linear.bias, torch.tensor(SHORTCUT_GRID)))
        self.bound += linear.weight.abs().sum(1) + linear.bias.abs()

    def reader(self, norm: Any, name: str) -> None:
        """A gain and a bias for each channel of the shortcut."""
        gain, shift = self.current_of(norm)
        grid = self.finest(self.bound * gain.abs() + shift.abs(), name) - SHORTCUT_GRID
        grid = torch.minimum(grid, row_grids(gain.unsqueeze(1)))
        fill(norm, on_grid(gain, grid), on_grid(shift, grid + SHORTCUT_GRID))

    def gate(self, norm: Any, name: str) -> None:
        """A weight for each product of a key and a value, and a bias."""
        gain, shift = self.current_of(norm)
        grid = self.finest(self.num_tokens * gain.abs() + shift.abs(), name)
        grid = torch.minimum(grid, row_grids(gain.unsqueeze(1)))
        fill(norm, on_grid(gain, grid), on_grid(shift, grid))

    def current_of(self, norm: Any) -> tuple[Tensor, Tensor]:
        """Gain and shift of a norm, for neurons whose threshold is 1."""
        gain, shift = gain_and_shift(norm)
        return gain / self.threshold, shift / self.threshold

    def finest(self, largest: Tensor, name: str) -> Tensor:
        """The finest grid on which currents up to these and their membranes are exact: `[D]`."""
        # One bit for the difference of current and membrane, and one for what rounding adds.
        grid = MANTISSA - 2 - self.life - torch.log2(largest.clamp_min(1e-30)).ceil()
        if grid.min() < 0:
            raise ValueError(
                f"{name}: currents may reach {largest.max():.3g}, too much for exact sums in float32. Take fewer "
                "tokens or time steps."
            )
        return grid.clamp(max=FINEST_GRID - self.life)


def halvings(tau: float, num_time_steps: int) -> int:
    """How many times the current of the first time step is halved in a membrane.

    A membrane without memory is written as one with tau 2 and the doubled current, for a single step.
    """
    return 1 if tau == 1 else round(num_time_steps * math.log2(tau))


def gain_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation mode computes: `gain * x + shift`, `[D]` each."""
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return gain, norm.bias - norm.running_mean * gain


def fill(norm: Any, gain: Tensor | int, shift: Tensor | int) -> None:
    for tensor, value in ((norm.weight, gain), (norm.bias, shift), (norm.running_mean, 0), (norm.running_var, 1)):
        tensor.copy_(torch.as_tensor(value))


def row_grids(weight: Tensor) -> Tensor:
    """The finest grid on which each row of `[O, I]` has 8 bits: `[O]`."""
    return torch.floor(torch.log2(LARGEST_WEIGHT / weight.abs().amax(1).clamp_min(1e-30))).clamp(max=FINEST_GRID)


def on_grid(x: Tensor, grid: Tensor) -> Tensor:
    """The nearest multiples of `2^-grid`."""
    scale = torch.exp2(grid.to(x.dtype))
    return (x * scale).round() / scale
