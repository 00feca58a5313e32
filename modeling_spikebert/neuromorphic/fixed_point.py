"""`to_fixed_point`: weights of 8 bits, with which every sum is exact, for a model of the neuromorphic variant.

Norms are folded into the weights, and every weight becomes a whole number times a power of two. The powers are chosen
so that all sums and membranes of any sentence are exact in float32. A simulator may then add in any order, with `>` or
`>=` at the threshold, and comes to the same spikes.

A grid `k` stands for the multiples of `2^-k`. float32 has those up to `2^(24 - k)`. A membrane is finer than its
current: each time step divides it by tau. Shapes: `D` hidden, `I` and `O` inputs and outputs of a Linear.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..configuration_spikebert import SpikeBertConfig
from ..modeling_spikebert import SpikeBertForSequenceClassification

LARGEST_WEIGHT = 127  # of 8 bits
FINEST_GRID = 22  # of membranes; half a step below the threshold 1 is a number in float32 then
MANTISSA = 24  # bits of a whole number in float32
# Of the shortcut, best first. Embeddings spread by 1, beside which a 256th is small; gains need what bits are left.
SHORTCUT_GRIDS = (8, 7, 6, 5, 4)
GOOD_ERROR, MOST_ERROR = 1 / 32, 1 / 8  # of a gain


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
    multiple. The shortcut, and with it the tables, has the finest grid of 1/256 to 1/16 that leaves its readers' gains
    bits enough. The threshold is 1.

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
    rounded = _round(model, num_tokens, num_time_steps)
    # A variance of 1 and this are 1: norms divide by 1.
    changed = {"v_threshold": 1.0, "layer_norm_eps": 1e-38, "num_time_steps": num_time_steps, "exit_threshold": None}
    fields = model.config.to_dict() | changed
    for name in ("auto_map", "dtype"):
        fields.pop(name, None)
    result = SpikeBertForSequenceClassification(SpikeBertConfig(**fields))
    result.load_state_dict(rounded.state_dict())
    return result.eval()


def _round(model: SpikeBertForSequenceClassification, num_tokens: int, num_time_steps: int) -> Any:
    tried, refusal = [], None
    for grid in SHORTCUT_GRIDS:
        try:
            rounding = _Rounding(model, num_tokens, num_time_steps, grid)
        except ValueError as error:  # a coarser one may do
            refusal = error
            continue
        if rounding.gain_error <= GOOD_ERROR:
            return rounding.model
        tried.append(rounding)
    if not tried and refusal is not None:
        raise refusal
    best = min(tried, key=lambda rounding: rounding.gain_error)
    if best.gain_error > MOST_ERROR:
        raise ValueError(
            f"{best.worst}: the shortcut may reach {best.reach:.3g}, and in float32 its gains would be off by "
            f"{100 * best.gain_error:.0f} %. Take fewer time steps, or train with fewer blocks."
        )
    return best.model


class _Rounding:
    """Goes through a model in the order of its signals, with bounds on what the shortcut carries.

    Args:
        model, num_tokens, num_time_steps: as in `to_fixed_point`.
        shortcut_grid: of what is added to the shortcut.

    Attributes:
        model: a rounded copy, in float64.
        life: how many times a membrane is halved.
        low, high: what the shortcut's channels may reach, `[D]`.
        gain_error: the largest relative error of a reader's gain; `worst` is its norm and `reach` the shortcut there.
    """

    def __init__(
        self, model: SpikeBertForSequenceClassification, num_tokens: int, num_time_steps: int, shortcut_grid: int
    ):
        self.model = copy.deepcopy(model).cpu().double().eval()
        self.num_tokens, self.shortcut_grid = num_tokens, shortcut_grid
        config = model.config
        self.threshold = float(config.v_threshold)
        self.life = halvings(config.tau, num_time_steps)
        if self.life + shortcut_grid > FINEST_GRID:
            raise ValueError(f"Membranes of {num_time_steps} time steps are too fine for float32. Take fewer steps.")
        self.gain_error, self.worst, self.reach = 0.0, "", 0.0
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
            self.branch(attention.output, f"{name}.attention.output")
            self.reader(mlp.input_neuron.batch_norm, f"{name}.mlp.input_neuron")
            self.linear(mlp.intermediate, mlp.intermediate_neuron.batch_norm, f"{name}.mlp.intermediate")
            self.branch(mlp.output, f"{name}.mlp.output")
        head: Any = self.model
        self.reader(head.norm.batch_norm, "norm")
        self.fill_linear(head.classifier, head.classifier.weight, head.classifier.bias, 0, "classifier")

    def embeddings(self, embeddings: Any) -> None:
        gain, shift = gain_and_shift(embeddings.batch_norm)
        self.low, self.high = torch.zeros_like(gain), torch.zeros_like(gain)
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            if table is not None:
                weight = table.weight * gain + (shift if table is embeddings.position_embeddings else 0)
                table.weight.copy_(on_grid(weight, torch.tensor(self.shortcut_grid)))
                self.low += table.weight.amin(0)
                self.high += table.weight.amax(0)
        fill(embeddings.batch_norm, 1, 0)
        self.check_shortcut("spikebert.embeddings")

    def linear(self, linear: Any, norm: Any, name: str) -> None:
        """In front of neurons."""
        gain, shift = self.current_of(norm)
        self.fill_linear(linear, linear.weight * gain.unsqueeze(1), linear.bias * gain + shift, self.life, name)
        fill(norm, 1, 0)

    def fill_linear(self, linear: Any, weight: Tensor, bias: Tensor, life: int, name: str) -> None:
        high = weight.clamp(min=0).sum(1) + bias.clamp(min=0)
        low = weight.clamp(max=0).sum(1) + bias.clamp(max=0)
        rounding = weight.shape[1] + 1  # half a step each would do
        grid = torch.minimum(row_grids(weight), self.finest(torch.maximum(high, -low), rounding, life, name))
        linear.weight.copy_(on_grid(weight, grid.unsqueeze(1)))
        linear.bias.copy_(on_grid(bias, grid))

    def branch(self, linear: Any, name: str) -> None:
        """What is added to the shortcut."""
        grid = row_grids(linear.weight).clamp(max=self.shortcut_grid)
        linear.weight.copy_(on_grid(linear.weight, grid.unsqueeze(1)))
        linear.bias.copy_(on_grid(linear.bias, torch.tensor(self.shortcut_grid)))
        self.low += linear.weight.clamp(max=0).sum(1) + linear.bias.clamp(max=0)
        self.high += linear.weight.clamp(min=0).sum(1) + linear.bias.clamp(min=0)
        self.check_shortcut(name)

    def check_shortcut(self, name: str) -> None:
        reach = self.bound.max()
        if reach * 2.0**self.shortcut_grid > 2**MANTISSA:
            raise ValueError(f"{name}: the shortcut may reach {reach:.3g}, too much for exact sums in float32.")

    @property
    def bound(self) -> Tensor:
        return torch.maximum(self.high, -self.low)

    def reader(self, norm: Any, name: str) -> None:
        """A gain and a bias for each channel of the shortcut."""
        gain, shift = self.current_of(norm)
        reach = self.bound * gain.abs() + shift.abs()
        # Rounding the gain moves its current by up to half a step of the gain at the bound.
        rounding = self.bound * 2.0**self.shortcut_grid + 1
        grid = self.finest(reach, rounding, self.life, name) - self.shortcut_grid
        grid = torch.minimum(grid, row_grids(gain.unsqueeze(1)))
        rounded = on_grid(gain, grid)
        fill(norm, rounded, on_grid(shift, grid + self.shortcut_grid))
        # Of the current at the bound, or of the threshold if that is more.
        error = ((rounded - gain).abs() * self.bound / (gain.abs() * self.bound).clamp_min(1)).max().item()
        if error > self.gain_error:
            self.gain_error, self.worst, self.reach = error, name, self.bound.max().item()

    def gate(self, norm: Any, name: str) -> None:
        """A weight for each product of a key and a value, and a bias."""
        gain, shift = self.current_of(norm)
        reach = self.num_tokens * gain.abs() + shift.abs()
        grid = torch.minimum(self.finest(reach, self.num_tokens + 1, self.life, name), row_grids(gain.unsqueeze(1)))
        fill(norm, on_grid(gain, grid), on_grid(shift, grid))

    def current_of(self, norm: Any) -> tuple[Tensor, Tensor]:
        """Gain and shift of a norm, for neurons whose threshold is 1."""
        gain, shift = gain_and_shift(norm)
        return gain / self.threshold, shift / self.threshold

    def finest(self, reach: Tensor, rounding: Tensor | int, life: int, name: str) -> Tensor:
        """The finest grid on which currents up to these, and their membranes, are exact: `[D]`.

        Args:
            reach: the largest current before rounding.
            rounding: how many steps of the grid rounding may add to it.
            life: halvings of the membrane. (The difference of current and membrane is twice as large, a step before.)
            name: for the message.
        """
        # (reach + rounding 2^-k) 2^(k + life) <= 2^24
        room = 2.0 ** (MANTISSA - life) - torch.as_tensor(rounding, dtype=torch.float64)
        grid = torch.log2(room / reach.clamp_min(1e-30)).floor()
        if (room <= 0).any() or grid.min() < 0:
            raise ValueError(
                f"{name}: currents may reach {reach.max():.3g}, too much for exact sums in float32. Take fewer tokens "
                "or time steps."
            )
        return grid.clamp(max=FINEST_GRID - life)


def halvings(tau: float, num_time_steps: int) -> int:
    """How many times the current of the first time step is halved in a membrane."""
    return round(num_time_steps * math.log2(tau))


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
