"""The operator `spike_linear`: each of its forms against `torch.nn.functional.linear`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from modeling_spikebert import spike_linear_spikebert as module
from modeling_spikebert.int8_spikebert import has_kernels, round_rows
from modeling_spikebert.native_spikebert import forms_that_ran
from modeling_spikebert.spike_linear_spikebert import spike_linear

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
needs_onednn = pytest.mark.skipif(not has_kernels(), reason="this torch has no oneDNN")


pytestmark = pytest.mark.usefixtures("kernels_at_once", "nan_in_new_memory")


@pytest.fixture
def sums_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the firing rate and the number of rows."""
    monkeypatch.setattr(module, "MAX_FIRING_RATE", 1.0)
    monkeypatch.setattr(module, "MIN_ROWS", 0)


def operands(rows: int, inner: int, columns: int, rate: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Spikes, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    spikes = (torch.rand(rows, inner, generator=generator) < rate).to(dtype)
    weight, bias = torch.randn(columns, inner, generator=generator), torch.randn(columns, generator=generator)
    return [spikes, weight.to(dtype), bias.to(dtype)]


def results_of(form: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of spikes, weight and, if it is there, bias."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = form(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    for name, result, want in zip(("output", "spikes", "weight", "bias"), results, expected, strict=False):
        torch.testing.assert_close(
            result, want, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[result.dtype]
        )
    assert len(results) == len(expected)


def form_that_ran() -> str:
    return forms_that_ran()["spike_linear"].split(":")[0]


# Sums


@pytest.mark.usefixtures("sums_always")
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 1, 1), (3, 7, 5), (64, 96, 96), (65, 33, 8), (130, 40, 205), (3, 1025, 97), (2100, 20, 9)],
    ids=str,
)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0], ids=["silent", "sparse", "all"])
def test_sums_and_every_gradient_equal_those_of_a_linear(rows, inner, columns, rate):
    inputs = operands(rows, inner, columns, rate)
    for given in (inputs, inputs[:2]):
        results = results_of(spike_linear, *given)
        assert form_that_ran() == "sums"
        assert_close(results, results_of(linear, *given))
        with torch.no_grad():
            assert_close([spike_linear(*given)], results[:1])
        assert form_that_ran() == "sums"


@pytest.mark.usefixtures("sums_always")
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_sum(threads):
    inputs = operands(200, 50, 110, 0.1)
    expected = results_of(spike_linear, *inputs)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = results_of(spike_linear, *inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[2], expected[2])


VIEWS = {
    "leading-dimensions": lambda x: x.view(2, 3, 4, 10),
    "one-vector": lambda x: x[0],
    "columns-outside": lambda x: x.t().contiguous().t(),
    "transposed-steps": lambda x: x.view(4, 6, 10).transpose(0, 1),
    "rows-apart": lambda x: x[::2],
    "columns-apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(5, 10),
    "no-rows": lambda x: x[:0],
    "no-rows-of-some-steps": lambda x: x[:0].view(4, 0, 10),
}


@pytest.mark.usefixtures("sums_always")
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_shape_and_memory_layout_do_not_matter(view):
    spikes, weight, bias = operands(24, 10, 12, 0.3)
    inputs = [view(spikes), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]]

    def results(form) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = form(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.ones(()).expand(out.shape))]

    assert_close(results(spike_linear), results(linear))
    with torch.no_grad():
        assert_close([spike_linear(*inputs)], [linear(*inputs)])


@pytest.mark.parametrize("shapes", [((5, 0), (7, 0), 7), ((5, 3), (0, 3), 0)], ids=["no-inputs", "no-outputs"])
def test_empty_weights(shapes):
    inputs = [torch.ones(shapes[0]), torch.ones(shapes[1]), torch.ones(shapes[2])]
    assert_close(results_of(spike_linear, *inputs), results_of(linear, *inputs))


@pytest.mark.parametrize(
    ("rows", "rate", "training", "inference"),
    [(128, 0.1, "sums", "sums"), (127, 0.1, "dense", "sums"), (128, 0.5, "dense", "dense")],
    ids=["many-rows", "few-rows", "many-spikes"],
)
def test_sums_are_taken_where_they_pay(rows, rate, training, inference):
    inputs = operands(rows, 30, 10, rate)
    expected = results_of(linear, *inputs)
    assert_close(results_of(spike_linear, *inputs), expected)
    assert form_that_ran() == training
    with torch.no_grad():
        assert_close([spike_linear(*inputs)], expected[:1])
    assert form_that_ran() == inference


# Other types, gradients of some


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_other_types_take_dense_products_and_keep_bits(dtype):
    inputs = operands(130, 30, 10, 0.1, dtype)
    results = results_of(spike_linear, *inputs)
    assert form_that_ran() == "dense"
    expected = results_of(linear, *inputs)
    assert [x.dtype for x in results] == 4 * [dtype]
    assert_close(results, expected)
    with torch.no_grad():
        assert torch.equal(spike_linear(*inputs), expected[0])


@pytest.mark.parametrize("rows", [10, 130], ids=["dense", "sums"])
@pytest.mark.parametrize("wanted", range(3), ids=["spikes", "weight", "bias"])
def test_only_gradients_that_are_wanted(wanted, rows):
    inputs = operands(rows, 30, 10, 0.1)
    inputs[wanted].requires_grad_()
    results, expected = (torch.autograd.grad(form(*inputs).sum(), inputs[wanted])[0] for form in (spike_linear, linear))
    torch.testing.assert_close(results, expected, **TOLERANCE[torch.float32])


def test_spikes_in_bytes_take_the_type_of_the_weights():
    spikes, weight, bias = operands(130, 30, 10, 0.1)
    with torch.no_grad():
        assert_close([spike_linear(spikes.byte(), weight, bias)], [linear(spikes, weight, bias)])
    weight.requires_grad_()
    grads = [torch.autograd.grad(spike_linear(x, weight, bias).sum(), weight)[0] for x in (spikes, spikes.byte())]
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_is_that_of_a_linear(dtype):
    inputs = operands(130, 30, 10, 0.1)
    with torch.autocast("cpu", dtype):
        results, expected = (results_of(form, *inputs) for form in (spike_linear, linear))
        assert [x.dtype for x in results] == [x.dtype for x in expected] == [dtype] + 3 * [torch.float32]
        torch.testing.assert_close(results, expected, rtol=2e-2, atol=2e-2)
        inputs = operands(130, 30, 10, 0.1, torch.float64)  # autocast leaves float64 alone
        assert_close(results_of(spike_linear, *inputs), results_of(linear, *inputs))


@pytest.mark.parametrize("rows", [10, 130], ids=["dense", "sums"])
def test_backward_keeps_a_spike_in_one_bit(rows):
    spikes, weight, bias = (x.requires_grad_() for x in operands(rows, 32, 10, 0.1))
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spike_linear(spikes, weight, bias)
    assert sizes == [rows * 32 // 8, weight.numel() * 4]


def test_gradients_of_gradients_are_refused():
    spikes, weight, bias = (x.requires_grad_() for x in operands(10, 30, 10, 0.1))
    (grad,) = torch.autograd.grad((spike_linear(spikes, weight, bias) ** 2).sum(), spikes, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Input that is no spikes


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")], ids=str)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_input_that_is_no_spikes_takes_the_naive_form(value, place):
    """As when an adapter scales the input, or a hook writes another one."""
    inputs = operands(131, 31, 10, 0.1)
    inputs[0].view(-1)[place] = value
    expected = results_of(linear, *inputs)
    results = results_of(spike_linear, *inputs)
    assert forms_that_ran()["spike_linear"] == "naive: the input is neither 0 nor 1"
    torch.testing.assert_close(results, expected, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(spike_linear(*inputs), expected[0], equal_nan=True)


def test_spike_counts_take_the_naive_form():
    spikes, *affine = operands(130, 30, 10, 0.1)
    assert torch.equal(spike_linear(3 * spikes, *affine, binary=False), linear(3 * spikes, *affine))
    assert forms_that_ran()["spike_linear"] == "naive: spike counts are no spikes"


@pytest.mark.parametrize(
    "change",
    [
        lambda spikes, weight, bias: (spikes, weight.double(), bias),
        lambda spikes, weight, bias: (spikes, weight, bias.double()),
        lambda spikes, weight, bias: (spikes[:, 1:], weight, bias),
        lambda spikes, weight, bias: (spikes, weight, bias[1:]),
    ],
    ids=["weight-float64", "bias-float64", "width", "bias-width"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_what_does_not_fit_is_refused_by_torch(change, training):
    """And never read by the kernels."""
    inputs = change(*operands(130, 30, 10, 0.1))
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError):
        spike_linear(*[x.requires_grad_() for x in inputs])


# Weights that change


CHANGES = {
    "in-place": lambda weight: weight.mul_(2),
    "one-value": lambda weight: weight[-1, -1].add_(1),
    "data": lambda weight: weight.data.mul_(2),
    "data-copied": lambda weight: weight.data.copy_(weight.flip(0)),
    "data-replaced": lambda weight: setattr(weight, "data", weight + 1),
    "half-and-back": lambda weight: setattr(weight, "data", weight.data.bfloat16().float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_transposed_weights_follow_changes(change, inference):
    spikes, weight, bias = operands(10, 30, 64, 0.1)
    weight = Parameter(weight)
    with inference():
        spike_linear(spikes, weight, bias)
        spike_linear(spikes, weight, bias)
        assert form_that_ran() == "sums"
    with torch.no_grad():
        change(weight)
    with inference():
        assert_close([spike_linear(spikes, weight, bias)], [linear(spikes, weight, bias)])
        assert form_that_ran() == "sums"
    spike_linear(spikes, weight, bias).sum().backward()  # what inference left serves a training
    assert_close([weight.grad], [spikes.sum(0).expand_as(weight)])


def test_transposed_weights_are_made_once_and_go_with_the_weight():
    weight = operands(10, 30, 64, 0.1)[1]
    before = len(module._TRANSPOSED)
    assert module._transposed(weight) is module._transposed(weight)
    assert len(module._TRANSPOSED) == before + 1
    del weight
    assert len(module._TRANSPOSED) == before


@torch.inference_mode()
def test_weights_made_in_inference_mode():
    inputs = operands(10, 30, 64, 0.1)
    for _ in range(2):
        assert_close([spike_linear(*inputs)], [linear(*inputs)])
        inputs[1] += 1


# int8 weights


def int8_operands(has_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    spikes, weight, bias = operands(130, 30, 10, 0.3)
    weight, scale = round_rows(weight)
    return spikes.byte(), weight, bias if has_bias else None, scale


def dequantized(spikes: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    return linear(
        spikes.double(), weight.double() * scale.double().unsqueeze(1), None if bias is None else bias.double()
    )


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=["bytes", "float32", "bfloat16"])
@needs_onednn
@torch.no_grad()
def test_int8_weights_are_whole_numbers_times_a_scale(dtype, has_bias):
    spikes, *rest = int8_operands(has_bias)
    expected = dequantized(spikes, *rest)
    for counts in (1, 9):  # spikes, and the counts of the published shortcut
        result = spike_linear(counts * spikes.to(dtype), *rest)
        assert form_that_ran() == "int8"
        assert result.dtype == torch.float32
        bias = 0 if rest[1] is None else rest[1]
        torch.testing.assert_close(result.double(), counts * (expected - bias) + bias, rtol=1e-5, atol=1e-6)
    for shape in ((2, 5, 13, 30), (0, 30), (4, 0, 30), (30,)):
        some = spikes[: torch.Size(shape[:-1]).numel()].view(shape)
        torch.testing.assert_close(spike_linear(some, *rest).double(), dequantized(some, *rest), rtol=1e-5, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("value", [0.5, -1.0, 256.0], ids=str)
@torch.no_grad()
def test_int8_weights_take_input_that_is_no_byte_in_the_naive_form(value):
    spikes, *rest = int8_operands()
    spikes = spikes.float()
    spikes[0, 0] = value
    torch.testing.assert_close(spike_linear(spikes, *rest).double(), dequantized(spikes, *rest), rtol=1e-4, atol=1e-4)
    assert form_that_ran() == "naive"


def test_gradients_pass_through_int8_weights():
    """To what stands in front of them, and to their bias."""
    spikes, weight, bias, scale = int8_operands()
    spikes = spikes.float().requires_grad_()
    bias.requires_grad_()
    out = spike_linear(spikes, weight, bias, scale)
    torch.testing.assert_close(out.double(), dequantized(spikes, weight, bias, scale), rtol=1e-4, atol=1e-4)
    grad_spikes, grad_bias = torch.autograd.grad(out.sum(), (spikes, bias))
    torch.testing.assert_close(grad_spikes, (weight * scale.unsqueeze(1)).sum(0).expand_as(spikes))
    assert torch.equal(grad_bias, torch.full((10,), 130.0))
    assert spike_linear(spikes.detach().byte(), weight, bias, scale).requires_grad


@needs_onednn
@pytest.mark.parametrize("which", [0, 1, 2], ids=["weight", "bias", "scale"])
@pytest.mark.parametrize("change", ["in-place", "data", "replaced"])
@torch.no_grad()
def test_packed_weights_follow_changes(change, which):
    spikes, *rest = int8_operands()
    spike_linear(spikes, *rest)
    if change == "replaced":
        rest[which] = rest[which].flip(0).contiguous()
    elif change == "data":
        rest[which].data.copy_(rest[which].flip(0))
    else:
        rest[which].copy_(rest[which].flip(0))
    result = spike_linear(spikes, *rest)
    assert form_that_ran() == "int8"
    torch.testing.assert_close(result.double(), dequantized(spikes, *rest), rtol=2**-8, atol=1e-6)
