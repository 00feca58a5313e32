import math

import pytest
import torch
from helpers import tracing
from torch import Tensor

from modeling_spikebert.neurons_spikebert import SURROGATES, ATan, lif, lif_loop

TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}

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
resets = pytest.mark.parametrize("v_reset", [0.0, None, -0.3], ids=["hard", "soft", "hard-0.3"])


def gradients(neuron, x: Tensor, v: Tensor, **constants) -> tuple[Tensor, ...]:
    """Spikes, final membrane and the gradients of a random weighted sum of both, for x and v."""
    x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
    spikes, last = neuron(x, v=v, **constants)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in (spikes, last)]
    grads = torch.autograd.grad((spikes * weights[0]).sum() + (last * weights[1]).sum(), (x, v))
    return spikes.detach(), last.detach(), *grads


# Outputs and gradients against the oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@resets
@pytest.mark.parametrize("tau", [1.0, 2.0, 2.5], ids="tau{}".format)
@pytest.mark.parametrize("shape", [(63,), (5, 1), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 4, 7], ids="T{}".format)
def test_outputs_and_gradients_equal_the_oracle(steps, shape, tau, v_reset, dtype):
    torch.manual_seed(steps)
    x = 2 * torch.randn(steps, *shape, dtype=dtype) + 1
    x[0].view(-1)[0], x[0].view(-1)[1] = 9, -9  # at least one neuron that fires and one that does not
    v = torch.randn(shape, dtype=dtype) / 4
    constants = {"tau": tau, "v_reset": v_reset, "v_threshold": 0.8, "surrogate": ATan(1.7)}
    results = gradients(lif, x, v, **constants)
    expected = gradients(lif_loop, x, v, **constants)
    assert 0 < expected[0].mean() < 1
    assert torch.equal(results[0], expected[0])
    for name, result, wanted in zip(("v", "grad_x", "grad_v"), results[1:], expected[1:], strict=True):
        torch.testing.assert_close(result, wanted, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[dtype])
    assert results[2].abs().min() > 0 or tau == 1  # no gradient is missing
    assert (results[3].abs().max() > 0) == (tau > 1)  # tau = 1 has no memory


@resets
def test_membrane_starts_at_the_resting_potential(v_reset):
    torch.manual_seed(0)
    x = 2 * torch.randn(4, 7, dtype=torch.float64)
    rest = torch.full((7,), v_reset or 0.0, dtype=torch.float64)
    for result, wanted in zip(lif(x, v_reset=v_reset), lif(x, v_reset=v_reset, v=rest), strict=True):
        assert torch.equal(result, wanted)
    for result, wanted in zip(lif(x, v_reset=v_reset), lif_loop(x, v_reset=v_reset), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((1, 6), lambda leaf: leaf.expand(4, 6)),  # as the model does: one map at each step, its gradient is a sum
        ((6, 4), lambda leaf: leaf.t()),
        ((8, 12), lambda leaf: leaf[::2, ::2]),
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_memory_layout_of_the_input_does_not_matter(shape, view):
    torch.manual_seed(0)
    leaf = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(4, 6, dtype=torch.float64)
    assert not view(leaf).is_contiguous()
    spikes, _ = lif(view(leaf))
    expected, _ = lif_loop(view(leaf))
    assert torch.equal(spikes, expected)
    (grad,) = torch.autograd.grad((spikes * weights).sum(), leaf)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), leaf)
    torch.testing.assert_close(grad, expected_grad, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_gives_binary_spikes_and_gradients_of_its_own_type(dtype):
    torch.manual_seed(0)
    x = (2 * torch.randn(4, 50)).to(dtype).requires_grad_()
    spikes, v = lif(x)
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert spikes.dtype == v.dtype == grad.dtype == dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert grad.isfinite().all()


# Golden traces


@golden
@pytest.mark.parametrize("neuron", [lif, lif_loop], ids=["lif", "oracle"])
def test_golden_trace(neuron, v_reset, current, spikes, membrane):
    x = torch.tensor(current, dtype=torch.float64).unsqueeze(1)
    assert neuron(x, v_reset=v_reset)[0].squeeze(1).tolist() == spikes
    trace = [neuron(x[: t + 1], v_reset=v_reset)[1].item() for t in range(len(x))]
    assert trace == membrane


@golden
def test_gradients_of_golden_traces_equal_the_oracle(v_reset, current, spikes, membrane):
    """They hold what random input does not: membranes exactly at the threshold."""
    x = torch.tensor(current, dtype=torch.float64).unsqueeze(1)
    v = torch.full((1,), v_reset or 0.0, dtype=torch.float64)
    expected = gradients(lif_loop, x, v, v_reset=v_reset)
    for result, wanted in zip(gradients(lif, x, v, v_reset=v_reset), expected, strict=True):
        torch.testing.assert_close(result, wanted, **TOLERANCE[torch.float64])


@tracing
def test_golden_trace_under_torch_compile():
    compiled = torch.compile(lif, fullgraph=True)
    v_reset, current, spikes, membrane = GOLDEN["hard-reset"]
    x = torch.tensor(current).unsqueeze(1).requires_grad_()
    result, v = compiled(x, v_reset=v_reset)
    assert result.squeeze(1).tolist() == spikes
    assert v.item() == membrane[-1]
    (grad,) = torch.autograd.grad(result.sum() + v.sum(), x)
    eager, last = lif(x)
    torch.testing.assert_close(grad, torch.autograd.grad(eager.sum() + last.sum(), x)[0], rtol=1e-6, atol=1e-7)


# State


@resets
@pytest.mark.parametrize("first", [1, 3, 6])
def test_two_calls_with_the_state_handed_over_equal_one_call(first, v_reset):
    torch.manual_seed(0)
    x = 2 * torch.randn(7, 63, dtype=torch.float64) + 1
    v = torch.randn(63, dtype=torch.float64) / 4

    def in_two_calls(x, v, **constants):
        head, between = lif(x[:first], v=v, **constants)
        tail, last = lif(x[first:], v=between, **constants)
        return torch.cat([head, tail]), last

    results = gradients(in_two_calls, x, v, v_reset=v_reset)
    for result, wanted in zip(results, gradients(lif, x, v, v_reset=v_reset), strict=True):
        torch.testing.assert_close(result, wanted, **TOLERANCE[torch.float64])
    assert torch.equal(results[0], lif(x, v=v, v_reset=v_reset)[0])


def test_nothing_is_kept_between_calls():
    torch.manual_seed(0)
    x = 2 * torch.randn(4, 63)
    v = torch.zeros(63)
    first = lif(x, v=v)
    lif(9 + x, v=v + 0.9)
    second = lif(x, v=v)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not v.any(), "the state that went in was changed in place"


# The reset is detached


@pytest.mark.parametrize("tau", [2.0, 4.0])
@pytest.mark.parametrize("v_reset", [0.0, None], ids=["hard", "soft"])
@pytest.mark.parametrize("neuron", [lif, lif_loop], ids=["lif", "oracle"])
def test_no_gradient_flows_through_the_decision_to_reset(neuron, v_reset, tau):
    """Two steps, a spike at the first: the path through time is 0 (hard) or (1 - 1/tau) (soft), nothing else."""
    x = torch.tensor([1.5 * tau, 0.9], dtype=torch.float64, requires_grad=True)  # h[0] = 1.5
    spikes, v = neuron(x.unsqueeze(1), tau=tau, v_reset=v_reset)
    assert spikes.flatten().tolist() == [1, 0]
    grad_spike = torch.autograd.grad(spikes[1], x, retain_graph=True)[0].tolist()
    grad_v = torch.autograd.grad(v, x)[0].tolist()

    after_reset = 0.5 if v_reset is None else 0.0  # 1.5 - 1, or 0
    h = (1 - 1 / tau) * after_reset + 0.9 / tau
    derivative = 1 / (1 + (math.pi * (h - 1)) ** 2)  # ATan with alpha 2
    through_time = (1 - 1 / tau) if v_reset is None else 0.0
    assert grad_spike == pytest.approx([derivative * through_time / tau, derivative / tau], rel=1e-12, abs=0)
    assert grad_v == pytest.approx([through_time / tau, 1 / tau], rel=1e-12, abs=0)


# Surrogates


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_surrogate_derivative_is_the_finite_difference_of_its_primitive(surrogate, alpha):
    x = torch.linspace(-3, 3, 121, dtype=torch.float64)
    step = 1e-5
    difference = (surrogate(alpha).primitive(x + step) - surrogate(alpha).primitive(x - step)) / (2 * step)
    torch.testing.assert_close(surrogate(alpha).derivative(x), difference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_surrogate_primitive_rises_from_0_to_1(surrogate):
    primitive = surrogate(2.0).primitive
    values = primitive(torch.linspace(-5, 5, 101, dtype=torch.float64))
    assert (values.diff() > 0).all()
    assert values[50] == pytest.approx(0.5)
    ends = primitive(torch.tensor([-1e9, 1e9], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_gradient_of_a_spike_is_the_published_formula(alpha):
    h = torch.linspace(-2, 4, 61, dtype=torch.float64, requires_grad=True)
    spikes, _ = lif(h.unsqueeze(0), tau=1.0, surrogate=ATan(alpha))
    (grad,) = torch.autograd.grad(spikes.sum(), h)
    expected = [(alpha / 2) / (1 + (math.pi / 2 * alpha * (value - 1)) ** 2) for value in h.tolist()]
    assert grad.tolist() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize("tau", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("v_reset", "mechanism"), [(0.0, "zero"), (None, "subtract")], ids=["hard", "soft"])
def test_spikes_and_gradients_agree_with_snntorch(snntorch, v_reset, mechanism, tau):
    """snnTorch resets at the start of the next step: "zero" before the decay, as ours, "subtract" after it.

    Its charge is then `beta * h + input - spike`, ours is `beta * (h - spike) + x / tau`, where `spike` is of the step
    before: they are equal if `spike - beta * spike = spike / tau` is added to the input.
    """
    torch.manual_seed(0)
    x = (4 * torch.rand(12, 200)).requires_grad_()
    weights = torch.randn(12, 200)
    spikes, _ = lif(x, tau=tau, v_reset=v_reset)
    before = torch.cat([torch.zeros(1, 200), spikes[:-1].detach()])
    correction = before / tau if mechanism == "subtract" else None
    expected = snntorch_leaky(snntorch, x, tau, correction, reset_mechanism=mechanism)
    assert 0.02 < spikes.mean() < 0.98
    assert torch.equal(spikes, expected)
    (grad,) = torch.autograd.grad((spikes * weights).sum(), x)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(("v_reset", "mechanism"), [(0.0, "zero"), (None, "subtract")], ids=["hard", "soft"])
def test_spikes_agree_with_snntorch_without_reset_delay(snntorch, v_reset, mechanism, tau):
    """Without the delay snnTorch resets as ours does, while no membrane is above the threshold after its reset.

    Its gradient is another one: this reset is not detached.
    """
    torch.manual_seed(0)
    x = 1.9 * torch.rand(12, 200)  # the charge, a mean of x and of v < 1, stays below 2
    spikes, _ = lif(x, tau=tau, v_reset=v_reset)
    assert 0.02 < spikes.mean() < 0.98
    assert torch.equal(spikes, snntorch_leaky(snntorch, x, tau, reset_mechanism=mechanism, reset_delay=False).detach())


@resets
def test_spikes_and_gradients_agree_with_spikingjelly(v_reset):
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
    spikes, _ = lif(x, v_reset=v_reset)
    (grad,) = torch.autograd.grad((spikes * weights).sum(), x)
    assert torch.equal(spikes.detach(), expected.detach())
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


# Memory


def saved_bytes(neuron, x: Tensor, v: Tensor | None = None) -> list[int]:
    """Sizes of the tensors that the backward pass keeps."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        neuron(x, v=v)
    return sizes


@pytest.mark.parametrize("v_reset", [0.0, None], ids=["hard", "soft"])
@pytest.mark.parametrize("state", [None, torch.zeros(2, 5)], ids=["no-state", "state"])
def test_backward_keeps_one_tensor_of_the_size_of_the_input(state, v_reset):
    x = torch.randn(4, 2, 5, requires_grad=True)
    assert saved_bytes(lambda x, v: lif(x, v_reset=v_reset, v=v), x, state) == [4 * 2 * 5 * 4]
    assert sum(saved_bytes(lif_loop, x, state)) > 4 * 2 * 5 * 4  # the hook sees what the oracle keeps


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x = torch.randn(4, 2, 5)
    assert saved_bytes(lif, x) == []
    with torch.no_grad():
        assert saved_bytes(lif, x.requires_grad_()) == []


# Bad input


@pytest.mark.parametrize("neuron", [lif, lif_loop], ids=["lif", "oracle"])
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 3), {}, r"at least one time step .* got shape \(0, 3\)"),
        (torch.tensor(1.0), {}, r"at least one time step .* got shape \(\)"),
        (torch.ones(4, 3, dtype=torch.long), {}, r"x must be floating point, got torch.int64"),
        (torch.ones(4, 3), {"tau": 0.5}, r"tau must be at least 1 \(time steps\), got 0.5"),
        (torch.ones(4, 3), {"tau": math.nan}, r"tau must be at least 1 \(time steps\), got nan"),
        (torch.ones(4, 3), {"v": torch.zeros(4, 3)}, r"v must have the shape .* \(3,\), got \(4, 3\)"),
        (torch.ones(4, 3), {"v": torch.zeros(1)}, r"v must have the shape .* \(3,\), got \(1,\)"),
    ],
    ids=["no-steps", "no-dimension", "integers", "tau-below-1", "tau-nan", "v-of-all-steps", "v-that-broadcasts"],
)
def test_bad_input_raises_with_its_cause(neuron, x, options, message):
    with pytest.raises(ValueError, match=message):
        neuron(x, **options)
