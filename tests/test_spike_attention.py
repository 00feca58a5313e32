"""The operator `spike_attention`: its kernels against the naive form, and that against each sentence by itself."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import mask_of
from torch import Tensor

from modeling_spikebert.native_spikebert import forms_that_ran
from modeling_spikebert.spike_attention_spikebert import Tokens, spike_attention, spike_attention_naive, spike_counts

EXACT = {"rtol": 1e-10, "atol": 1e-10}
MASKS = {
    "no-mask": (2, 5, None),
    "full": (2, 5, mask_of(5, 5)),
    "padded": (3, 6, mask_of(6, 1, 4)),
    "padded-left": (3, 6, mask_of(6, 1, 4).flip(1)),
    "holes": (2, 5, torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])),
    "long": (2, 40, mask_of(40, 37)),  # longer than heads are wide
    "one-token": (1, 1, None),
}
masks = pytest.mark.parametrize("mask", MASKS)


pytestmark = pytest.mark.usefixtures("kernels_at_once", "nan_in_new_memory")


def spikes_of(tokens: Tokens, width: int, steps: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value, `[T, N, D]`."""
    count = tokens.batch * tokens.length if tokens.places is None else len(tokens.places)
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(steps, count, width, generator=generator) < rate).to(dtype) for rate in (0.4, 0.3, 0.5)]


def results_of(form: Callable[..., Tensor], spikes: list[Tensor], tokens: Tokens, heads: int) -> list[Tensor]:
    """The context, and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in spikes]
    context = form(*leaves, tokens, heads)
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).to(context.dtype)
    return [context.detach(), *torch.autograd.grad(context, leaves, grad)]


def assert_close(results: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert torch.equal(results[0], expected[0])  # whole numbers
    for name, result, want in zip(("query", "key", "value"), results[1:], expected[1:], strict=True):
        torch.testing.assert_close(result, want, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or EXACT))


def sentence_by_sentence(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """As the equation reads, of tokens without padding."""
    starts = tokens.starts.tolist()
    width = query.shape[-1] // heads
    context = torch.zeros_like(query)
    for t in range(len(query)):
        for start, end in pairwise(starts):
            for head in range(heads):
                part = (t, slice(start, end), slice(head * width, (head + 1) * width))
                context[part] = (query[part] @ key[part].T) @ value[part]
    return context


# Products and gradients


@masks
def test_naive_form_is_the_equation_sentence_by_sentence(mask):
    tokens = Tokens.of(*MASKS[mask])
    spikes = spikes_of(tokens, 8)
    expected = results_of(sentence_by_sentence, spikes, tokens, 2)
    assert expected[0].any()
    assert_close(results_of(spike_attention_naive, spikes, tokens, 2), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize(("heads", "size"), [(1, 1), (3, 1), (2, 8), (1, 33), (2, 33)], ids=str)
@masks
def test_context_and_every_gradient_equal_the_naive_form(mask, heads, size, dtype):
    tokens = Tokens.of(*MASKS[mask])
    spikes = spikes_of(tokens, heads * size, dtype=dtype)
    results = results_of(spike_attention, spikes, tokens, heads)
    assert forms_that_ran()["spike_attention"].startswith("c++")
    assert [x.dtype for x in results] == [torch.promote_types(dtype, torch.float32), *3 * [dtype]]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    expected = results_of(spike_attention_naive, spikes, tokens, heads)
    assert_close(results, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(spike_attention(*spikes, tokens, heads), results[0])


@masks
def test_padding_that_stays_in_takes_no_part(mask):
    """As on an accelerator and under a compiler: masked instead of left out."""
    batch, length, mask = MASKS[mask]
    packed, masked = Tokens.of(batch, length, mask), Tokens(batch, length, mask)
    noise = [(torch.rand(3, batch * length, 8) < 0.5).double() for _ in range(3)]
    spikes = [x if packed.places is None else x[:, packed.places] for x in noise]
    real = packed.unpack(torch.ones(packed.pack(noise[0].view(-1, length, 8)[:batch]).shape)).flatten(0, 1).double()
    leaves = [x.requires_grad_() for x in noise]
    context = spike_attention(*leaves, masked, 2)
    assert forms_that_ran()["spike_attention"].startswith("naive")
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1)).double() * real
    grads = torch.autograd.grad(context, leaves, grad)
    leaves = [x.detach().requires_grad_() for x in spikes]
    expected = spike_attention(*leaves, packed, 2)
    wanted = torch.autograd.grad(expected, leaves, grad if packed.places is None else grad[:, packed.places])
    for name, result, want in zip("cqkv", (context, *grads), (expected, *wanted), strict=True):
        some = (result * real).flatten(0, 0) if packed.places is None else result[:, packed.places]
        torch.testing.assert_close(some, want, msg=lambda text, name=name: f"{name}: {text}", **EXACT)
        if name != "c":
            assert not (result * (1 - real)).any(), "no gradient reaches padding"


def test_bytes_give_the_same_context():
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 8, dtype=torch.uint8)
    result = spike_attention(*spikes, tokens, 2)
    assert forms_that_ran()["spike_attention"].startswith("c++")
    assert result.dtype == torch.float32
    assert torch.equal(result, spike_attention_naive(*(x.float() for x in spikes), tokens, 2))
    assert torch.equal(result, spike_attention_naive(*spikes, tokens, 2))


def test_counts_above_256_are_exact_in_half_precision():
    tokens = Tokens.of(1, 301, None)
    for dtype in (torch.bfloat16, torch.uint8):
        ones = torch.ones(1, 301, 3, dtype=dtype)
        for form in (spike_attention, spike_attention_naive):
            assert form(ones, ones, ones, tokens, 1).unique().tolist() == [3 * 301]
            with torch.autocast("cpu", torch.bfloat16):
                assert form(ones, ones, ones, tokens, 1).unique().tolist() == [3 * 301]


def test_half_precision_without_kernels_takes_the_naive_form():
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 8, dtype=torch.float16)
    results = results_of(spike_attention, spikes, tokens, 2)
    assert forms_that_ran()["spike_attention"] == "naive: there are no kernels for torch.float16"
    assert [x.dtype for x in results] == [torch.float32] + 3 * [torch.float16]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads):
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 33, steps=1)
    expected = results_of(spike_attention, spikes, tokens, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results = results_of(spike_attention, spikes, tokens, 1)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("sizes", [(0, 2, 3), (3, 0, 3), (3, 2, 0)], ids=["no-steps", "no-sentences", "no-tokens"])
def test_nothing_gives_nothing(sizes):
    steps, *sizes = sizes
    tokens = Tokens.of(*sizes, None)
    results = results_of(spike_attention, spikes_of(tokens, 8, steps), tokens, 2)
    assert forms_that_ran()["spike_attention"].startswith("c++")
    assert {x.shape for x in results} == {(steps, sizes[0] * sizes[1], 8)}


def test_memory_layout_does_not_matter():
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 8)
    leaves = [x.transpose(0, 2).contiguous().requires_grad_() for x in spikes]
    grad = torch.ones((), dtype=torch.float64).expand(spikes[0].shape)
    results, expected = (
        torch.autograd.grad(form(*(x.transpose(0, 2) for x in leaves), tokens, 2), leaves, grad)
        for form in (spike_attention, spike_attention_naive)
    )
    torch.testing.assert_close(results, expected, **EXACT)
    once = spikes[0][:1].expand(3, -1, -1)
    assert torch.equal(spike_attention(once, once, once, tokens, 2), spike_attention_naive(once, once, once, tokens, 2))


@pytest.mark.parametrize("wanted", range(3), ids=["query", "key", "value"])
def test_only_gradients_that_are_wanted(wanted):
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 8)
    spikes[wanted].requires_grad_()
    results, expected = (
        torch.autograd.grad(form(*spikes, tokens, 2).square().sum(), spikes[wanted])[0]
        for form in (spike_attention, spike_attention_naive)
    )
    torch.testing.assert_close(results, expected, **EXACT)


def test_backward_keeps_a_spike_in_one_bit():
    tokens = Tokens.of(2, 4, None)
    spikes = [x.requires_grad_() for x in spikes_of(tokens, 16, steps=2)]
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spike_attention(*spikes, tokens, 2)
    assert sizes == [*3 * [2 * 8 * 16 // 8], 3 * 8]


def test_gradients_of_gradients_are_refused():
    tokens = Tokens.of(2, 4, None)
    query, key, value = (x.requires_grad_() for x in spikes_of(tokens, 16))
    (grad,) = torch.autograd.grad((spike_attention(query, key, value, tokens, 2) ** 2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Input that kernels cannot take


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["float32", "bfloat16", "bytes"])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_input_that_is_no_spikes_takes_the_naive_form(which, dtype):
    """As when a hook scales it."""
    tokens = Tokens.of(*MASKS["padded"])
    spikes = spikes_of(tokens, 8, dtype=dtype)
    spikes[which][-1, -1, -1] = 2
    expected = spike_attention_naive(*spikes, tokens, 2)
    assert torch.equal(spike_attention(*spikes, tokens, 2), expected)
    assert forms_that_ran()["spike_attention"] == "naive: the input is neither 0 nor 1"
    if dtype != torch.uint8:
        results = results_of(spike_attention, spikes, tokens, 2)
        assert forms_that_ran()["spike_attention"] == "naive: the input is neither 0 nor 1"
        assert_close(results, results_of(spike_attention_naive, spikes, tokens, 2), rtol=1e-5, atol=1e-5)


def test_types_that_differ_take_the_naive_form():
    tokens = Tokens.of(*MASKS["padded"])
    query, key, value = spikes_of(tokens, 8, dtype=torch.float32)
    expected = spike_attention(query, key, value, tokens, 2)
    assert torch.equal(spike_attention(query, key.bfloat16(), value.byte(), tokens, 2), expected)
    assert forms_that_ran()["spike_attention"] == "naive: shapes or types do not fit"


@pytest.mark.parametrize(
    ("change", "heads"),
    [
        (lambda q, k, v: (q, k, v), 3),
        (lambda q, k, v: (q, k[..., :6], v), 2),
        (lambda q, k, v: (q[:, 1:], k[:, 1:], v[:, 1:]), 2),
        (lambda q, k, v: (q, k, v[:2]), 2),
    ],
    ids=["heads", "width", "tokens", "steps"],
)
@pytest.mark.parametrize("mask", ["no-mask", "padded"])
def test_what_does_not_fit_is_refused_by_torch(mask, change, heads):
    """And never read by the kernels."""
    tokens = Tokens.of(*MASKS[mask])
    with pytest.raises((RuntimeError, IndexError)):
        spike_attention(*change(*spikes_of(tokens, 8)), tokens, heads)


# Tokens


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("flip", [False, True], ids=["right", "left"])
def test_packing_leaves_out_padding_and_unpacking_puts_zeros_there(flip, dtype):
    mask = mask_of(3, 1, 2)
    mask = mask.flip(1) if flip else mask
    states = torch.arange(1.0, 19.0).view(3, 3, 2)  # [B, L, D]
    tokens = Tokens.of(3, 3, mask.to(dtype))
    packed = tokens.pack(states)
    assert torch.equal(packed, states[mask.bool()])
    assert tokens.starts.tolist() == [0, 3, 4, 6]
    assert torch.equal(tokens.unpack(packed), states * mask.unsqueeze(-1))
    steps = torch.stack([packed, 2 * packed])  # [T, N, D]
    assert torch.equal(tokens.unpack(steps)[1], 2 * states * mask.unsqueeze(-1))
    expected = torch.stack([sentence[real.bool()].mean(0) for sentence, real in zip(states, mask, strict=True)])
    torch.testing.assert_close(tokens.mean(packed), expected)
    torch.testing.assert_close(Tokens(3, 3, mask.to(dtype)).mean(states.flatten(0, 1)), expected)


@pytest.mark.parametrize("mask", [None, mask_of(3, 3)], ids=["no-mask", "full"])
def test_without_padding_nothing_is_copied(mask):
    states = torch.arange(1.0, 13.0).view(2, 3, 2)
    tokens = Tokens.of(2, 3, mask)
    assert tokens.mask is tokens.places is None
    assert tokens.starts.tolist() == [0, 3, 6]
    assert tokens.pack(states).data_ptr() == states.data_ptr()
    assert torch.equal(tokens.unpack(tokens.pack(states)), states)
    assert torch.equal(tokens.mean(tokens.pack(states)), states.mean(1))


def test_gradients_of_packing_reach_tokens_only():
    tokens = Tokens.of(*MASKS["padded"])
    states = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    for through in (tokens.pack, lambda x: tokens.unpack(tokens.pack(x))):
        (grad,) = torch.autograd.grad(through(states).sum(), states)
        assert torch.equal(grad, MASKS["padded"][2].unsqueeze(-1).expand_as(grad).double())


def test_spike_counts_are_means_over_steps_without_padding():
    tokens = Tokens.of(*MASKS["padded"])
    query, key, _ = spikes_of(tokens, 8)
    counts = spike_counts(query, key, tokens, 2)  # [B, H, L, L]
    expected = (query[:, tokens.starts[2] :, 4:] @ key[:, tokens.starts[2] :, 4:].mT).mean(0)
    torch.testing.assert_close(counts[2, 1, :4, :4], expected)
    assert not counts[2, :, 4:].any()
    assert not counts[2, :, :, 4:].any()
