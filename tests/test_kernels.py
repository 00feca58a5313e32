"""LayerNorm and neurons in one pass against `torch.nn.functional.layer_norm` and the plain loop."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_spikebert.kernels_spikebert import LIFConstants, norm_lif, norm_lif_steps
from modeling_spikebert.neurons_spikebert import ATan, lif_loop

EPS = 1e-5
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 2e-4, "atol": 2e-4}}
norms = pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
resets = pytest.mark.parametrize("v_reset", [0.0, None, -0.3], ids=["hard", "soft", "hard-0.3"])


def constants_of(tau=2.0, v_threshold=1.0, v_reset=0.0) -> LIFConstants:
    return LIFConstants(tau, v_threshold, v_reset, ATan(1.7), EPS)


def inputs_of(shape, norm: bool, dtype=torch.float64) -> list[Tensor]:
    """x [T, N, G, D], and weight and bias [G, D]."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    weight = 3 + torch.randn(shape[2:], generator=generator, dtype=torch.float64)
    bias = 1 + torch.randn(shape[2:], generator=generator, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in ((x, weight, bias) if norm else (x,))]


def oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: LIFConstants) -> Tensor:
    tau, v_threshold, v_reset, surrogate, eps = constants
    if weight is not None:
        x = F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias
    return lif_loop(x, tau, v_threshold, v_reset, surrogate)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@norms
@resets
@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(1, 3, 1, 63), (4, 5, 3, 8), (3, 1, 1, 5)], ids=str)
def test_spikes_and_every_gradient_equal_the_oracle(shape, tau, v_reset, norm, dtype):
    constants = constants_of(tau, 0.8, v_reset)
    inputs = inputs_of(shape, norm, dtype)
    affine = inputs[1:] or (None, None)
    spikes, expected = norm_lif(inputs[0], *affine, constants, dtype), oracle(inputs[0], *affine, constants)
    assert torch.equal(spikes, expected)
    assert 0 < spikes.mean() < 1
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    results = torch.autograd.grad((spikes * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for name, result, want in zip(("x", "weight", "bias"), results, wanted, strict=False):
        assert want.abs().max() > 0
        torch.testing.assert_close(result, want, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[dtype])


@norms
@resets
def test_some_steps_and_then_the_others_equal_all_steps_at_once(v_reset, norm):
    constants = constants_of(v_reset=v_reset)
    x, *affine = inputs_of((5, 7, 3, 8), norm)
    affine = affine or (None, None)
    with torch.no_grad():
        whole, last = norm_lif_steps(x, *affine, None, constants, torch.float64)
        first, v = norm_lif_steps(x[:2], *affine, None, constants, torch.float64)
        second, v = norm_lif_steps(x[2:], *affine, v, constants, torch.float64)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v, last)
    assert torch.equal(whole, oracle(x, *affine, constants))


def test_bytes_hold_the_same_spikes():
    x, weight, bias = inputs_of((4, 6, 1, 40), True, torch.float32)
    with torch.no_grad():
        spikes = norm_lif(x, weight, bias, constants_of(), torch.uint8)
        assert spikes.dtype == torch.uint8
        assert torch.equal(spikes.float(), norm_lif(x, weight, bias, constants_of(), torch.float32))


def test_bfloat16_currents_are_computed_in_float32():
    x, weight, bias = inputs_of((4, 6, 1, 40), True, torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    spikes = norm_lif(x, weight, bias, constants_of(), torch.bfloat16)
    assert torch.equal(spikes.float(), norm_lif(x.float(), weight, bias, constants_of(), torch.float32))
    grad_x, grad_weight = torch.autograd.grad(spikes.sum(), (x, weight))
    assert (grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


def test_a_membrane_at_the_threshold_fires():
    """tau 2, threshold 1: 1/2 | 0.5 + 1.5/2 - 0.5/2 = 1, fires | 1/2 | 0.5 + 0.5/2 = 0.75"""
    x = torch.tensor([1.0, 1.5, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    spikes, v = norm_lif_steps(x, None, None, None, constants_of(), torch.float64)
    assert spikes.flatten().tolist() == [0, 1, 0, 0]
    assert v.item() == 0.75
