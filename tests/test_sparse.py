"""The Linear that passes over silent synapses, against torch's."""

import pytest
import torch
from helpers import mask_of, random_ids, results_of, tiny_model, tracing
from torch import Tensor, nn

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert import sparse_spikebert as sparse
from modeling_spikebert.sparse_spikebert import spike_linear

pytestmark = tracing


def operands(rows: int, inner: int, columns: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    spikes = (torch.rand(rows, inner, generator=generator) < rate).float()
    weight, bias = torch.randn(columns, inner, generator=generator), torch.randn(columns, generator=generator)
    return spikes, weight, bias


def results_of_linear(linear, spikes: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The output, and the gradients of spikes, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in (spikes, weight, bias)]
    out = linear(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    for name, result, want in zip(("output", "spikes", "weight", "bias"), results, expected, strict=True):
        torch.testing.assert_close(result, want, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-5, atol=1e-4)


@pytest.fixture
def summed(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what was summed; all is, whatever the firing rate."""
    shapes = []
    add = sparse._sum

    def seeing(spikes, weight, bias):
        shapes.append((*spikes.shape, weight.shape[1]))
        return add(spikes, weight, bias)

    monkeypatch.setattr(sparse, "_sum", seeing)
    monkeypatch.setattr(sparse, "MAX_FIRING_RATE", 1.0)
    monkeypatch.setattr(sparse, "MIN_TOKENS", 0)
    return shapes


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 1, 1), (3, 7, 5), (64, 96, 96), (65, 33, 8), (130, 40, 205), (3, 1025, 97), (2100, 20, 9)],
    ids=str,
)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0], ids=["silent", "sparse", "all"])
def test_output_and_every_gradient_equal_those_of_a_linear(rows, inner, columns, rate, summed):
    inputs = operands(rows, inner, columns, rate)
    assert_close(results_of_linear(spike_linear, *inputs), results_of_linear(nn.functional.linear, *inputs))
    assert summed == [(rows, inner, columns), (inner, rows, columns)]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_sum(threads, summed):
    inputs = operands(200, 50, 110, 0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = results_of_linear(spike_linear, *inputs)
    finally:
        torch.set_num_threads(before)
    expected = results_of_linear(spike_linear, *inputs)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[2], expected[2])


def test_leading_dimensions_and_strides(summed):
    spikes, weight, bias = operands(24, 10, 12, 0.3)
    for view in (spikes.view(2, 3, 4, 10), spikes.t().contiguous().t().view(24, 10), spikes[::2], spikes[:0]):
        weight_view, bias_view = weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]
        want = nn.functional.linear(view, weight, bias)
        torch.testing.assert_close(spike_linear(view, weight_view, bias_view), want)
    assert len(summed) == 4


@pytest.mark.parametrize(("rows", "rate", "sums"), [(128, 0.1, True), (127, 0.1, False), (128, 0.5, False)], ids=str)
def test_sums_are_taken_where_they_pay(rows, rate, sums, monkeypatch):
    taken = []
    add = sparse._sum
    monkeypatch.setattr(sparse, "_sum", lambda *args: taken.append(True) or add(*args))
    inputs = operands(rows, 30, 10, rate)
    assert_close(results_of_linear(spike_linear, *inputs), results_of_linear(nn.functional.linear, *inputs))
    assert taken == 2 * [True] * sums


def test_without_a_compiler_it_is_a_product_and_says_so_once(monkeypatch):
    from torch._inductor.codecache import CppCodeCache

    def fail(source):
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    sparse._library.cache_clear()
    inputs = operands(130, 30, 10, 0.1)
    try:
        with pytest.warns(UserWarning, match=r"not passed over, since the compiler failed: no g\+\+$") as seen:
            results = results_of_linear(spike_linear, *inputs)
        assert len(seen) == 1
    finally:
        sparse._library.cache_clear()
    assert_close(results, results_of_linear(nn.functional.linear, *inputs))


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_it_keeps_the_rules_of_custom_operators(rate):
    spikes, weight, bias = (x.requires_grad_() for x in operands(130, 30, 10, rate))
    torch.library.opcheck(sparse._spike_linear, (spikes, weight, bias))
    torch.library.opcheck(sparse._weight_gradient, (spikes.detach(), torch.randn(130, 10)))


BATCH = (random_ids(3, 6), mask_of(6, 1, 4))


def assert_close_results(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        result = results[name]
        torch.testing.assert_close(result, want, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stance", ["force_eager", "default"], ids=["uncompiled", "compiled"])
def test_fused_blocks_in_float32_pass_over_silent_synapses(stance, summed):
    """All four products of a block, forward and for the gradients of the weights; the compiler may repeat some."""
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, num_hidden_layers=2).train()
    expected = results_of(model, "plain", *BATCH)
    assert not summed
    with torch.compiler.set_stance(stance):
        results = results_of(model, "fused", *BATCH)
    assert len(summed) == 2 * 2 * 4 if stance == "force_eager" else len(summed) >= 2 * 2 * 4
    assert_close_results(results, expected)


@pytest.mark.usefixtures("uncompiled")
def test_spike_counts_of_the_published_shortcut_take_products(summed):
    model = tiny_model(SpikeBertForSequenceClassification, "reference", torch.float32, num_hidden_layers=2).train()
    expected, results = results_of(model, "plain", *BATCH), results_of(model, "fused", *BATCH)
    assert not summed
    assert_close_results(results, expected)
