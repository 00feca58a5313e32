"""The operator `norm_lif`: by hand, against other libraries, and its C++ kernels against the naive form."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modeling_spikebert.native_spikebert import forms_that_ran
from modeling_spikebert.norm_lif_spikebert import LIF, ATan, norm_lif, norm_lif_naive


def naive(x: Tensor, *args, **kwargs) -> Tensor:
    """With spikes in the type of x, as the operator's."""
    return norm_lif_naive(x, *args, **kwargs).to(x.dtype)


FORMS = {"naive": naive, "c++": norm_lif}
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-4, "atol": 2e-4},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},  # it keeps 8 bits
}

# tau 2 and threshold 1 throughout; every number is a binary fraction, so that equality is exact.
# name: v_reset, current, spikes, membrane after each step
GOLDEN = {
    # h = v + (x - v) / 2
    # 0.5 | 0.5 + 1/2 = 1, at the threshold: fires, 0 | 0 + 2/2 = 1: fires, 0 | 0.25 | 0.25 + 2.75/2 = 1.625: fires, 0 |
    # 0.5
    "hard-reset": (
        0.0,
        [1.0, 1.5, 2.0, 0.5, 3.0, 1.0],
        [0, 1, 1, 0, 1, 0],
        [0.5, 0.0, 0.0, 0.25, 0.0, 0.5],
    ),
    # h = v + (x - v) / 2
    # 1.5: fires, 0.5 | 0.5 - 0.5/2 = 0.25 | 0.25 + 0.75/2 = 0.625 | 0.625 + 1.875/2 = 1.5625: fires, 0.5625 |
    # 0.5625 + 3.4375/2 = 2.28125: fires once, 1.28125 | 1.28125 - 1.28125/2 = 0.640625
    "soft-reset": (
        None,
        [3.0, 0.0, 1.0, 2.5, 4.0, 0.0],
        [1, 0, 0, 1, 1, 0],
        [0.5, 0.25, 0.625, 0.5625, 1.28125, 0.640625],
    ),
    # h = v + (x - (v + 0.5)) / 2, from the resting potential -0.5
    # -0.5 + 1/2 = 0 | 0 + 2.5/2 = 1.25: fires, -0.5 | -0.5 + 4/2 = 1.5: fires, -0.5 | -0.5 + 0/2 = -0.5 |
    # -0.5 + 2/2 = 0.5
    "reset-below-zero": (
        -0.5,
        [1.0, 3.0, 4.0, 0.0, 2.0],
        [0, 1, 1, 0, 0],
        [0.0, -0.5, -0.5, -0.5, 0.5],
    ),
}
golden = pytest.mark.parametrize(("v_reset", "current", "spikes", "membrane"), GOLDEN.values(), ids=GOLDEN)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
norms = pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no-norm"])
resets = pytest.mark.parametrize("v_reset", [0.0, None, -0.3], ids=["hard", "soft", "hard-0.3"])


pytestmark = pytest.mark.usefixtures("kernels_at_once", "nan_in_new_memory")


def inputs_of(shape: tuple[int, ...], has_norm: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x `[T, ..., D]`, and weight and bias `[D]`."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [2 * random(*shape) + 1, 3 + random(shape[-1]), 1 + random(shape[-1])]
    return [tensor.to(dtype) for tensor in inputs[: 3 if has_norm else 1]]


def results_of(form: Callable[..., Tensor], inputs: list[Tensor], neurons: LIF, view=lambda x: x) -> list[Tensor]:
    """Spikes, and the gradients of x and, if they are there, of weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    spikes = form(view(leaves[0]), neurons, *leaves[1:])
    grad = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(spikes.dtype)
    return [spikes.detach(), *torch.autograd.grad(spikes, leaves, grad)]


def assert_same(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert torch.equal(results[0].double(), expected[0].double())
    for name, result, want in zip(("x", "weight", "bias"), results[1:], expected[1:], strict=False):
        assert result.dtype == want.dtype
        torch.testing.assert_close(result, want, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[dtype])
    assert len(results) == len(expected)


# The kernels against the naive form


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32", "bfloat16"])
@norms
@resets
@pytest.mark.parametrize("tau", [1.0, 2.5], ids="tau{}".format)
@pytest.mark.parametrize("shape", [(1, 3, 63), (2, 5, 1), (5, 2, 3, 7), (2, 1, 33), (4, 6, 40)], ids=str)
def test_spikes_and_every_gradient_equal_the_naive_form(shape, tau, v_reset, has_norm, dtype):
    inputs = inputs_of(shape, has_norm, dtype)
    neurons = LIF(tau, 0.8, v_reset, ATan(1.7))
    results = results_of(norm_lif, inputs, neurons)
    assert forms_that_ran()["norm_lif"].startswith("c++")
    expected = results_of(naive, inputs, neurons)
    assert 0 < expected[0].mean() < 1 or shape[-1] == 1
    assert all(want.abs().max() > 0 for want in expected[2:]) or shape[-1] == 1  # a norm of one column is its bias
    assert results[0].dtype == dtype
    assert_same(results, expected, dtype)
    with torch.no_grad():
        assert torch.equal(norm_lif(inputs[0], neurons, *inputs[1:]), results[0])


@norms
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((1, 6, 5), lambda leaf: leaf.expand(4, 6, 5)),  # as the model does: its gradient is a sum over steps
        ((6, 4, 5), lambda leaf: leaf.transpose(0, 1)),
        ((4, 5, 6), lambda leaf: leaf.transpose(1, 2)),
        ((8, 12, 10), lambda leaf: leaf[::2, ::2, ::2]),
        ((4, 6, 9), lambda leaf: leaf[..., 2:7]),
        ((4, 1, 5), lambda leaf: leaf.expand(4, 6, 5)),
    ],
    ids=["expanded", "steps-inside", "columns-outside", "strided", "slice", "rows-expanded"],
)
def test_memory_layout_of_the_input_does_not_matter(shape, view, has_norm):
    x, *_ = inputs_of(shape)
    inputs = [x, *inputs_of((1, 1, view(x).shape[-1]), has_norm)[1:]]
    assert not view(x).is_contiguous()
    results = results_of(norm_lif, inputs, LIF(), view)
    assert_same(results, results_of(norm_lif_naive, inputs, LIF(), view), torch.float64)


@norms
def test_memory_layout_of_gradient_weight_and_bias_does_not_matter(has_norm):
    x, *affine = inputs_of((3, 4, 6), has_norm)
    affine = [tensor.repeat_interleave(2)[::2] for tensor in affine]
    for grad in (torch.ones((), dtype=torch.float64).expand(x.shape), torch.rand_like(x.mT).mT):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *affine)]
        results, expected = (
            torch.autograd.grad(form(leaves[0], LIF(), *leaves[1:]), leaves, grad) for form in FORMS.values()
        )
        torch.testing.assert_close(results, expected, **TOLERANCE[torch.float64])


@norms
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads, has_norm):
    inputs = inputs_of((3, 4, 33), has_norm)  # fewer rows than threads
    expected = results_of(norm_lif, inputs, LIF())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = [results_of(norm_lif, inputs, LIF()) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], expected, torch.float64)
    assert all(map(torch.equal, *results)), "the same gives the same"


@norms
def test_no_tokens_give_no_spikes_and_gradients_of_zero(has_norm):
    inputs = inputs_of((3, 0, 5), has_norm)
    assert_same(results_of(norm_lif, inputs, LIF()), results_of(norm_lif_naive, inputs, LIF()), torch.float64)


def test_only_gradients_that_are_wanted():
    x, weight, bias = inputs_of((3, 4, 5))
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
        results, expected = (
            torch.autograd.grad(form(x, LIF(), weight, bias).sum(), leaf)[0] for form in FORMS.values()
        )
        torch.testing.assert_close(results, expected, **TOLERANCE[torch.float64])
        leaf.requires_grad_(False)


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_bytes_hold_the_same_spikes(dtype, has_norm):
    x, *affine = inputs_of((4, 6, 40), has_norm, dtype)
    spikes = norm_lif(x, LIF(), *affine or (None, None), dtype=torch.uint8)
    assert forms_that_ran()["norm_lif"].startswith("c++")
    assert spikes.dtype == torch.uint8
    assert torch.equal(spikes, norm_lif_naive(x, LIF(), *affine).byte())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parameters_may_be_of_another_type(dtype):
    x, weight, bias = inputs_of((4, 6, 40), dtype=torch.float32)
    inputs = [x.to(dtype), weight.double(), bias.bfloat16()]
    results = results_of(norm_lif, inputs, LIF())
    assert [grad.dtype for grad in results[1:]] == [dtype, torch.float64, torch.bfloat16]
    expected = results_of(naive, inputs, LIF())
    torch.testing.assert_close(results, expected, **TOLERANCE[torch.bfloat16])


def test_under_autocast_spikes_take_the_type_of_products_but_float64_stays():
    inputs = inputs_of((4, 6, 40), dtype=torch.float32)
    expected = results_of(norm_lif_naive, inputs, LIF())
    with torch.autocast("cpu", torch.bfloat16):
        results = results_of(norm_lif, inputs, LIF())
        assert forms_that_ran()["norm_lif"].startswith("c++")
        assert norm_lif(inputs[0].double(), LIF()).dtype == torch.float64
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(results[0].float(), expected[0])
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1:], expected[1:], rtol=2e-2, atol=2e-2)  # the gradient of spikes was rounded


def test_half_precision_without_kernels_takes_the_naive_form():
    x = inputs_of((4, 6, 40), False, torch.float16)[0].requires_grad_()
    spikes = norm_lif(x, LIF())
    assert forms_that_ran()["norm_lif"] == "naive: there are no kernels for torch.float16 and torch.float16"
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert spikes.dtype == grad.dtype == torch.float16
    assert torch.equal(spikes, norm_lif_naive(x, LIF()).half())


def test_values_that_are_not_finite_give_the_same_spikes():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.0], [1.0, 1.0, 9.0, 9.0]]).unsqueeze(1)
    for v_reset in (0.0, None):
        neurons = LIF(v_reset=v_reset)
        assert torch.equal(norm_lif(x, neurons), norm_lif_naive(x, neurons))


@resets
@forms
def test_no_step_sees_a_later_one_and_nothing_is_kept_between_calls(form, v_reset):
    x, weight, bias = inputs_of((5, 7, 8))
    whole = form(x, LIF(v_reset=v_reset), weight, bias)
    form(9 + x, LIF(v_reset=v_reset), weight, bias)
    assert torch.equal(form(x[:3], LIF(v_reset=v_reset), weight, bias), whole[:3])


# Golden traces


@golden
@forms
def test_golden_trace(form, v_reset, current, spikes, membrane):
    neurons = LIF(tau=2.0, v_threshold=1.0, v_reset=v_reset)
    x = torch.tensor(current, dtype=torch.float64).unsqueeze(1)
    assert form(x, neurons).squeeze(1).tolist() == spikes
    for t, v in enumerate(membrane):  # seen by the smallest current that fires: v + (x - (v - r)) / 2 = 1
        enough = 2 * (1 - v) + v - (v_reset or 0.0)
        for last, fires in ((enough, 1), (enough - 2**-20, 0)):
            assert form(torch.cat([x[: t + 1], torch.full((1, 1), last).double()]), neurons)[-1].item() == fires


@golden
def test_gradients_of_golden_traces_equal_the_naive_form(v_reset, current, spikes, membrane):
    """They hold what random input does not: membranes exactly at the threshold."""
    inputs, neurons = [torch.tensor(current, dtype=torch.float64).unsqueeze(1)], LIF(v_reset=v_reset)
    assert_same(results_of(norm_lif, inputs, neurons), results_of(norm_lif_naive, inputs, neurons), torch.float64)


@forms
def test_norm_is_that_of_torch(form):
    """With tau 1 a neuron sees the current of its step alone."""
    x, weight, bias = inputs_of((3, 4, 9))
    expected = torch.nn.functional.layer_norm(x, (9,), weight, bias, eps=0.1) >= 0.7
    assert torch.equal(form(x, LIF(1.0, 0.7), weight, bias, 0.1).bool(), expected)


# The reset is detached


@pytest.mark.parametrize("tau", [2.0, 4.0], ids="tau{}".format)
@pytest.mark.parametrize("v_reset", [0.0, None], ids=["hard", "soft"])
@forms
def test_no_gradient_flows_through_the_decision_to_reset(form, v_reset, tau):
    """Two steps, a spike at the first: the path through time is 0 (hard) or (1 - 1/tau) (soft), nothing else."""
    x = torch.tensor([[1.5 * tau], [0.9]], dtype=torch.float64, requires_grad=True)  # h[0] = 1.5
    spikes = form(x, LIF(tau, v_reset=v_reset))
    assert spikes.flatten().tolist() == [1, 0]
    (grad,) = torch.autograd.grad(spikes[1].sum(), x)

    after_reset = 0.5 if v_reset is None else 0.0  # 1.5 - 1, or 0
    h = (1 - 1 / tau) * after_reset + 0.9 / tau
    derivative = 1 / (1 + (math.pi * (h - 1)) ** 2)  # ATan with alpha 2
    through_time = (1 - 1 / tau) if v_reset is None else 0.0
    expected = [derivative * through_time / tau, derivative / tau]
    assert grad.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=0)


# The surrogate


@dataclass(frozen=True)
class Triangle:
    """A surrogate without kernels: its derivative is a triangle of this half width."""

    width: float = 2.0

    def primitive(self, x: Tensor) -> Tensor:
        x = (x / self.width).clamp(-1, 1)
        return 0.5 + x - x * x.abs() / 2


# A new one goes here.
SURROGATES = [ATan(0.5), ATan(2.0), ATan(5.0), Triangle()]
surrogates = pytest.mark.parametrize("surrogate", SURROGATES, ids=str)


@surrogates
@forms
def test_surrogate_gives_the_gradient_of_a_spike(form, surrogate):
    """The derivative of its primitive, here by finite differences."""
    h = torch.linspace(-2, 4, 122, dtype=torch.float64).unsqueeze(0).requires_grad_()
    (grad,) = torch.autograd.grad(form(h, LIF(tau=1.0, surrogate=surrogate)).sum(), h)
    distance, step = h.detach() - 1, 1e-5
    difference = (surrogate.primitive(distance + step) - surrogate.primitive(distance - step)) / (2 * step)
    torch.testing.assert_close(grad, difference, rtol=1e-8, atol=1e-8)


@surrogates
def test_surrogate_rises_from_0_to_1(surrogate):
    values = surrogate.primitive(torch.linspace(-5, 5, 101, dtype=torch.float64))
    assert (values.diff() >= 0).all()
    assert values[49] < values[50] < values[51]
    assert values[50] == pytest.approx(0.5)
    ends = surrogate.primitive(torch.tensor([-1e9, 1e9], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0], ids="alpha{}".format)
@forms
def test_surrogate_atan_has_the_published_derivative(form, alpha):
    h = torch.linspace(-2, 4, 121, dtype=torch.float64).unsqueeze(0).requires_grad_()
    (grad,) = torch.autograd.grad(form(h, LIF(tau=1.0, surrogate=ATan(alpha))).sum(), h)
    formula = (alpha / 2) / (1 + (math.pi / 2 * alpha * (h.detach() - 1)) ** 2)
    torch.testing.assert_close(grad, formula, rtol=1e-12, atol=0)


def test_surrogate_without_kernels_takes_the_naive_form():
    inputs, neurons = inputs_of((4, 6, 40)), LIF(surrogate=Triangle())
    results = results_of(norm_lif, inputs, neurons)
    assert forms_that_ran()["norm_lif"] == "naive: there are no kernels for the surrogate Triangle"
    assert_same(results, results_of(norm_lif_naive, inputs, neurons), torch.float64)
    assert not torch.equal(results[1], results_of(norm_lif, inputs, LIF())[1])


# Independent libraries


@pytest.fixture(scope="module")
def snntorch():
    return pytest.importorskip("snntorch", reason="snntorch is not installed (pip install --no-deps snntorch)")


def snntorch_leaky(snntorch, x: Tensor, tau: float, correction: Tensor | None = None, **options) -> Tensor:
    """Spikes of snnTorch's Leaky, whose charge is `beta * mem + input`: beta = 1 - 1/tau, input x / tau."""
    neuron = snntorch.Leaky(beta=1 - 1 / tau, spike_grad=snntorch.surrogate.atan(alpha=2.0), **options)
    mem, fired = torch.zeros_like(x[0]), []
    for t, x_t in enumerate(x):
        spikes, mem = neuron(x_t / tau if correction is None else x_t / tau + correction[t], mem)
        fired.append(spikes)
    return torch.stack(fired)


@pytest.mark.parametrize("tau", [1.5, 2.0, 4.0], ids="tau{}".format)
@pytest.mark.parametrize(("v_reset", "mechanism"), [(0.0, "zero"), (None, "subtract")], ids=["hard", "soft"])
@forms
def test_spikes_and_gradients_agree_with_snntorch(form, snntorch, v_reset, mechanism, tau):
    """snnTorch resets at the start of the next step: "zero" before the decay, as ours, "subtract" after it.

    Its charge is then `beta * h + input - spike`, ours is `beta * (h - spike) + x / tau`, where `spike` is of the step
    before: they are equal if `spike - beta * spike = spike / tau` is added to the input.
    """
    torch.manual_seed(0)
    x = (4 * torch.rand(12, 200)).requires_grad_()
    weights = torch.randn(12, 200)
    spikes = form(x, LIF(tau, v_reset=v_reset))
    before = torch.cat([torch.zeros(1, 200), spikes[:-1].detach()])
    correction = before / tau if mechanism == "subtract" else None
    expected = snntorch_leaky(snntorch, x, tau, correction, reset_mechanism=mechanism)
    assert 0.02 < spikes.mean() < 0.98
    assert torch.equal(spikes, expected)
    (grad,) = torch.autograd.grad((spikes * weights).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.5, 2.0, 4.0], ids="tau{}".format)
@pytest.mark.parametrize(("v_reset", "mechanism"), [(0.0, "zero"), (None, "subtract")], ids=["hard", "soft"])
def test_spikes_agree_with_snntorch_without_reset_delay(snntorch, v_reset, mechanism, tau):
    """Without the delay snnTorch resets as ours does, while no membrane is above the threshold after its reset.

    Its gradient is another one: this reset is not detached.
    """
    torch.manual_seed(0)
    x = 1.9 * torch.rand(12, 200)  # the charge, a mean of x and of v < 1, stays below 2
    spikes = norm_lif(x, LIF(tau, v_reset=v_reset))
    assert 0.02 < spikes.mean() < 0.98
    assert torch.equal(spikes, snntorch_leaky(snntorch, x, tau, reset_mechanism=mechanism, reset_delay=False).detach())


@resets
@forms
def test_spikes_and_gradients_agree_with_spikingjelly(form, v_reset):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron", reason="spikingjelly is not installed")
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate", reason="spikingjelly is not installed")
    torch.manual_seed(0)
    x = (2 * torch.randn(7, 200) + 1).requires_grad_()
    weights = torch.randn(7, 200)
    node = neuron.LIFNode(
        tau=2.0, v_reset=v_reset, surrogate_function=surrogate.ATan(2.0), detach_reset=True, step_mode="m"
    )
    expected = node(x)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    # spikingjelly starts at 0 or v_reset, as ours does
    spikes = form(x, LIF(v_reset=v_reset))
    (grad,) = torch.autograd.grad((spikes * weights).sum(), x)
    assert torch.equal(spikes.detach(), expected.detach())
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


# Memory


def saved_bytes(form: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Of the tensors that the backward pass keeps."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form(inputs[0], LIF(), *inputs[1:])
    return sum(sizes)


def test_backward_keeps_the_current_alone_and_nothing_where_no_gradient_is_wanted():
    inputs = [tensor.requires_grad_() for tensor in inputs_of((4, 2, 5), dtype=torch.float32)]
    assert saved_bytes(norm_lif, *inputs) == (4 * 2 * 5 + 2 * 5) * 4
    assert saved_bytes(norm_lif_naive, *inputs) > 2 * (4 * 2 * 5) * 4  # the hook sees what the naive form keeps
    with torch.no_grad():
        assert saved_bytes(norm_lif, *inputs) == 0


def test_gradients_of_gradients_are_refused():
    x = inputs_of((4, 2, 5))[0].requires_grad_()
    (grad,) = torch.autograd.grad((norm_lif(x, LIF()) * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Bad input


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 3), {}, r"\[T, ..., D\] with at least one time step, got shape \(0, 3\)"),
        (torch.tensor(1.0), {}, r"\[T, ..., D\] with at least one time step, got shape \(\)"),
        (torch.ones(3), {}, r"\[T, ..., D\] with at least one time step, got shape \(3,\)"),
        (torch.ones(4, 3, dtype=torch.long), {}, r"x must be floating point, got torch.int64"),
        (torch.ones(4, 3), {"neurons": LIF(0.5)}, r"tau must be at least 1 \(time steps\), got 0.5"),
        (torch.ones(4, 3), {"neurons": LIF(math.nan)}, r"tau must be at least 1 \(time steps\), got nan"),
        (torch.ones(4, 3), {"weight": torch.ones(3)}, r"both be \(3,\) or both None, got \[\(3,\), None\]"),
        (torch.ones(4, 3), {"bias": torch.ones(3)}, r"both be \(3,\) or both None, got \[None, \(3,\)\]"),
        (torch.ones(4, 3), dict.fromkeys(("weight", "bias"), torch.ones(2)), r"got \[\(2,\), \(2,\)\]"),
    ],
    ids=["no-steps", "no-dimension", "no-columns", "integers", "tau-0.5", "tau-nan", "no-bias", "no-weight", "narrow"],
)
def test_bad_input_raises_with_its_cause(x, options, message):
    with pytest.raises(ValueError, match=message):
        norm_lif(x, **({"neurons": LIF()} | options))
