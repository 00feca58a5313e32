"""The Triton kernels, run by Triton's interpreter on the CPU, against `norm_lif_naive`.

How they compile for a GPU is checked too, what they compute there is not.
"""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.dynamic_module_utils import get_imports

from modeling_spikebert import norm_lif_spikebert, spike_attention_spikebert, triton_spikebert
from modeling_spikebert.norm_lif_spikebert import LIF, ATan, norm_lif, norm_lif_naive
from modeling_spikebert.spike_attention_spikebert import Tokens, spike_attention, spike_attention_naive

PATH = Path(triton_spikebert.__file__)
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-4},  # it keeps 8 bits
    torch.float16: {"rtol": 1e-3, "atol": 1e-4},
}
CONSTANTS = {"eps": 1e-5, "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0}

resets = pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard-0.3", "soft"])
norms = pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no-norm"])
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def load_copy() -> ModuleType:
    """The file once more, with kernels of its own."""
    spec = importlib.util.spec_from_file_location("copy_of_triton_spikebert", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


interpreted_copy = cache(load_copy)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy whose kernels are interpreted: this is settled where they are defined."""
    tl = pytest.importorskip("triton.language")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # `tl.sum` was defined without the variable, when something else imported Triton; `tl.reduce` looks each time.
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    return interpreted_copy()


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """What a kernel does not write, or reads though nothing was written there, is NaN then."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_input(shape: tuple[int, ...], dtype: torch.dtype, has_norm: bool = True) -> tuple[Tensor | None, ...]:
    """x, and weight and bias or None."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, bias = 2 * random(*shape) + 1, random(shape[-1]) + 1, random(shape[-1]) + 1
    return (x, weight, bias) if has_norm else (x, None, None)


def oracle(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: dict, alpha: float
) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
    """Spikes, and a function from their gradients to those of x, weight and bias; all in float64."""
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    neurons = LIF(constants["tau"], constants["v_threshold"], constants["v_reset"], ATan(alpha))
    spikes = norm_lif_naive(leaves[0], neurons, *leaves[1:] or (None, None), constants["eps"])

    def backward(grad_spikes: Tensor) -> list[Tensor | None]:
        return [*torch.autograd.grad(spikes, leaves, grad_spikes.double()), None, None][:3]

    return spikes.detach(), backward


def check(
    kernels: ModuleType, x: Tensor, weight: Tensor | None, bias: Tensor | None, alpha: float = 2.0, **changed
) -> Tensor:
    """Spikes and all gradients of the kernels are those of the oracle; returns the spikes."""
    constants = CONSTANTS | changed
    spikes = kernels.norm_lif_forward(x, weight, bias, **constants, spike_dtype=x.dtype)
    grad_spikes = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x.dtype)
    grads = kernels.norm_lif_backward(x, weight, bias, grad_spikes, **constants, alpha=alpha)

    expected_spikes, backward = oracle(x, weight, bias, constants, alpha)
    assert spikes.dtype == x.dtype
    assert torch.equal(spikes.double(), expected_spikes)
    for name, leaf, grad, wanted in zip("xwb", (x, weight, bias), grads, backward(grad_spikes), strict=True):
        if leaf is None:
            assert grad is None
            continue
        assert grad.dtype == leaf.dtype
        wanted = wanted.to(leaf.dtype)
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[x.dtype])
    return spikes


# Spikes and gradients against the oracle


@dtypes
@norms
@pytest.mark.parametrize(
    ("steps", "tau", "v_reset"),  # each pair of values once
    [
        *((1, 1.0, 0.0), (1, 2.0, -0.3), (1, 2.5, None)),
        *((3, 1.0, -0.3), (3, 2.0, None), (3, 2.5, 0.0)),
        *((4, 1.0, None), (4, 2.0, 0.0), (4, 2.5, -0.3)),
    ],
    ids=str,
)
def test_spikes_and_gradients_equal_the_oracle(kernels, steps, tau, v_reset, has_norm, dtype):
    x, weight, bias = random_input((steps, 3, 63), dtype, has_norm)
    spikes = check(kernels, x, weight, bias, alpha=1.7, tau=tau, v_reset=v_reset, v_threshold=0.8, eps=1e-3)
    assert 0.1 < spikes.mean() < 0.9


@dtypes
@norms
@pytest.mark.parametrize(
    "shape", [(3, 3, 1), (4, 37, 5), (3, 2, 3, 63), (4, 2, 3, 384), (1, 3, 700), (16, 1, 2), (2, 7)], ids=str
)
def test_every_shape_equals_the_oracle(kernels, shape, has_norm, dtype):
    """Without LayerNorm, both more and less than the piece of a program."""
    check(kernels, *random_input(shape, dtype, has_norm), v_reset=-0.3)


@norms
def test_programs_that_go_through_many_rows_add_up_all_of_them(kernels, has_norm, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 7)
    check(kernels, *random_input((3, 31, 5), torch.float64, has_norm))  # 7 programs, of 5 or 4 rows


@norms
@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((1, 6, 700), lambda x: x.expand(4, -1, -1)),
        ((3, 8, 800), lambda x: x[..., 50:750]),
        ((3, 16, 300), lambda x: x[:, ::2]),
        ((2, 4, 3, 300), lambda x: x.permute(2, 1, 0, 3)),
        ((3, 300, 8), lambda x: x.transpose(1, 2)),
        ((4, 3, 30), lambda x: x.transpose(0, 1)),
        ((3, 20, 6), lambda x: x[..., ::2]),
        ((3, 20, 6), lambda x: x[..., 2:3]),
    ],
    ids=["expanded", "slice", "rows-apart", "permuted", "transposed", "steps-inside", "columns-apart", "one-column"],
)
def test_memory_layout_does_not_matter(kernels, view, shape, has_norm):
    wide, _, _ = random_input(shape, torch.float64)
    x = view(wide)
    assert not x.is_contiguous()
    _, weight, bias = random_input(x.shape, torch.float64, has_norm)
    check(kernels, x, weight, bias)


@norms
def test_memory_layout_of_weight_and_gradient_does_not_matter(kernels, has_norm):
    x, weight, bias = random_input((3, 8, 5), torch.float64, has_norm)
    ones = torch.ones((), dtype=torch.float64).expand(x.shape)  # what the backward pass of a sum brings
    expected = kernels.norm_lif_backward(x, weight, bias, ones.contiguous(), **CONSTANTS, alpha=2.0)
    turned = [None if leaf is None else leaf.repeat_interleave(2)[::2] for leaf in (weight, bias)]
    for grad, wanted in zip(kernels.norm_lif_backward(x, *turned, ones, **CONSTANTS, alpha=2.0), expected, strict=True):
        assert grad is wanted is None or torch.equal(grad, wanted)


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(kernels, dtype, has_norm):
    x, weight, bias = random_input((4, 9, 63), dtype, has_norm)
    check(kernels, x, weight, bias)
    if has_norm:  # as in mixed precision: current in 16 bits, parameters in 32
        spikes = kernels.norm_lif_forward(x, weight.float(), bias.float(), **CONSTANTS, spike_dtype=dtype)
        grads = kernels.norm_lif_backward(x, weight.float(), bias.float(), spikes, **CONSTANTS, alpha=2.0)
        assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spike_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_spikes_are_the_same_in_every_dtype(kernels, spike_dtype, dtype, has_norm):
    x, weight, bias = random_input((4, 9, 63), dtype, has_norm)
    spikes = kernels.norm_lif_forward(x, weight, bias, **CONSTANTS, spike_dtype=spike_dtype)
    assert spikes.dtype == spike_dtype
    assert torch.equal(spikes.double(), oracle(x, weight, bias, CONSTANTS, 2.0)[0])


@norms
def test_no_tokens_give_no_spikes_and_gradients_of_zero(kernels, has_norm):
    x, weight, bias = random_input((4, 0, 5), torch.float32, has_norm)
    assert kernels.norm_lif_forward(x, weight, bias, **CONSTANTS, spike_dtype=torch.uint8).shape == x.shape
    grads = kernels.norm_lif_backward(x, weight, bias, x, **CONSTANTS, alpha=2.0)
    assert grads[0].shape == x.shape
    assert all(torch.equal(grad, torch.zeros(5)) if has_norm else grad is None for grad in grads[1:])


@norms
@resets
@pytest.mark.parametrize("shape", [(4, 9, 5), (3, 2, 3, 5)], ids=str)
def test_the_operator_hands_its_arguments_to_the_kernels(kernels, monkeypatch, shape, v_reset, has_norm):
    x, weight, bias = random_input(shape, torch.float64, has_norm)
    neurons = LIF(2.5, 0.8, v_reset, ATan(1.7))
    monkeypatch.setattr(norm_lif_spikebert, "_form_for", lambda *args: "triton")
    monkeypatch.setattr(norm_lif_spikebert, "norm_lif_forward", kernels.norm_lif_forward)
    monkeypatch.setattr(norm_lif_spikebert, "norm_lif_backward", kernels.norm_lif_backward)
    results = []
    for form in (norm_lif, norm_lif_naive):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
        spikes = form(leaves[0], neurons, *leaves[1:] or (None, None), 1e-3)
        results.append([spikes.detach(), *torch.autograd.grad((spikes * x).sum(), leaves)])
    torch.testing.assert_close(*results, **TOLERANCE[torch.float64])
    with torch.no_grad():
        spikes = norm_lif(x, neurons, weight, bias, 1e-3, torch.uint8)
    assert torch.equal(spikes, results[0][0].byte())


# Golden values


@pytest.mark.parametrize(
    ("v_reset", "expected"),
    # h = v + (x - (v - r)) / 2 with x = 2, 1, 2: 1 | 0.5 | 1.25 hard and soft; from -0.5: 0.5 | 0.5 | 1
    [(0.0, [1, 0, 1]), (None, [1, 0, 1]), (-0.5, [0, 0, 1])],
    ids=["hard", "soft", "hard-0.5"],
)
def test_membrane_at_the_threshold_fires(kernels, v_reset, expected):
    x = torch.tensor([2.0, 1.0, 2.0]).reshape(3, 1, 1)
    spikes = check(kernels, x, None, None, v_reset=v_reset)
    assert spikes.flatten().tolist() == expected


def test_gradients_of_two_steps_by_hand(kernels):
    """h = 1.5, fires | reset, h = 0.45: the soft reset leaves a path of 1 - 1/tau through time, the hard one none."""
    x = torch.tensor([3.0, 0.9], dtype=torch.float64).reshape(2, 1, 1)
    for v_reset, after_reset in ((0.0, 0.0), (None, 0.5)):
        constants = CONSTANTS | {"v_reset": v_reset}
        second = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(x.shape)
        grad, _, _ = kernels.norm_lif_backward(x, None, None, second, **constants, alpha=2.0)
        derivative = 1 / (1 + (math.pi * (after_reset / 2 + 0.45 - 1)) ** 2)
        through_time = 0.5 if v_reset is None else 0.0
        assert grad.flatten().tolist() == pytest.approx([derivative * through_time / 2, derivative / 2], rel=1e-12)


# The attention products


def random_spikes(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value, and a gradient of their product."""
    generator = torch.Generator().manual_seed(0)
    spikes = [(torch.rand(shape, generator=generator) < rate).to(dtype) for rate in (0.4, 0.3, 0.5)]
    return [*spikes, torch.randn(shape, generator=generator)]


@pytest.mark.parametrize("mask", ["no-mask", "padded", "padded-left"])
@pytest.mark.parametrize(
    ("shape", "heads"),
    # One piece and several, heads of a power of two and others, one token.
    [((2, 3, 5, 16), 2), ((1, 2, 70, 32), 1), ((2, 2, 17, 72), 3), ((3, 1, 1, 8), 1)],
    ids=str,
)
def test_attention_equals_the_oracle(kernels, shape, heads, mask):
    _, batch, length, _ = shape
    tokens = Tokens(batch, length)
    if mask != "no-mask":
        ones = torch.ones(batch, length, dtype=torch.long)
        ones[0, (length + 1) // 2 :] = 0
        tokens = Tokens(batch, length, ones.flip(1) if mask == "padded-left" and length > 1 else ones)
    *spikes, grad = random_spikes(shape, torch.float32)
    leaves = [x.clone().requires_grad_() for x in spikes]
    expected = spike_attention_naive(*(x.flatten(1, 2) for x in leaves), tokens, heads).view(shape)
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    assert torch.equal(kernels.attention_forward(*spikes, tokens.mask, heads), expected)  # whole numbers
    grads = kernels.attention_backward(*spikes, grad, tokens.mask, heads)
    for result, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


def test_attention_in_half_precision_is_exact_forward_and_rounds_gradients(kernels):
    """All channels of a head fire in all tokens: counts up to 64, sums up to 8,320, more than float16 has exactly."""
    shape = (1, 1, 130, 64)
    spikes, grad = [torch.ones(shape, dtype=torch.float16) for _ in range(3)], torch.ones(shape) / 64
    assert kernels.attention_forward(*spikes, None, 1).eq(130 * 64).all()
    for result, want in zip(
        kernels.attention_backward(*spikes, grad, None, 1), (130, 130, 130), strict=True
    ):  # sums over tokens of grad . v, grad . v and counts * grad
        assert result.dtype == torch.float16
        torch.testing.assert_close(result, torch.full(shape, float(want), dtype=torch.float16), rtol=1e-3, atol=0)


def test_the_operator_hands_spikes_to_the_attention_kernels(kernels, monkeypatch):
    for name in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(spike_attention_spikebert, name, getattr(kernels, name))
    monkeypatch.setattr(spike_attention_spikebert, "_form_for", lambda *args: "triton")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    tokens = Tokens(2, 4, mask)
    *spikes, _ = random_spikes((3, 8, 16), torch.float32)
    results = []
    for form in (spike_attention, spike_attention_naive):
        leaves = [x.clone().requires_grad_() for x in spikes]
        context = form(*leaves, tokens, 2)
        results.append([context, *torch.autograd.grad(context.square().sum(), leaves)])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert torch.equal(spike_attention(*spikes, tokens, 2), results[1][0])


# Large tensors


@norms
def test_offsets_may_need_more_than_32_bits(kernels, has_norm):
    """The last rows lie 2**31 elements behind the first ones; what lies between is never touched, and no memory."""
    try:
        torch.use_deterministic_algorithms(False)  # it would fill all of it
        memory = torch.empty(2**31 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space of 4 GiB")
    x, weight, bias = random_input((2, 5, 3), torch.float16, has_norm)
    # Without LayerNorm each step is one row.
    x = x if has_norm else x[:, :1].repeat(3, 1, 1)[:5]
    far = memory.as_strided(x.shape, (8, 2**29, 1) if has_norm else (2**29, 3, 1)).copy_(x)
    spikes = kernels.norm_lif_forward(far, weight, bias, **CONSTANTS, spike_dtype=torch.float32)
    assert torch.equal(spikes, kernels.norm_lif_forward(x, weight, bias, **CONSTANTS, spike_dtype=torch.float32))
    grads = kernels.norm_lif_backward(far, weight, bias, spikes, **CONSTANTS, alpha=2.0)
    assert torch.equal(grads[0], kernels.norm_lif_backward(x, weight, bias, spikes, **CONSTANTS, alpha=2.0)[0])


# Compilation


class OnlyCompiles:
    """In the place of a kernel: a launch goes as far as it can without a GPU."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self.kernel.warmup, grid=grid)


class Device:
    """What Triton asks of a GPU before a launch."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@norms
@pytest.mark.parametrize(
    ("shape", "dtype", "spike_dtype", "v_reset"),
    [
        ((4, 64, 768), torch.bfloat16, torch.bfloat16, 0.0),
        ((2, 64, 5), torch.float32, torch.uint8, None),
        ((2, 64, 5), torch.float64, torch.float64, -0.3),
    ],
    ids=["bfloat16", "float32-uint8", "float64"],
)
@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=["H100", "MI300"])
def test_kernels_compile_for_a_gpu(target, shape, dtype, spike_dtype, v_reset, has_norm, monkeypatch, tmp_path):
    compiler = pytest.importorskip("triton.backends.compiler")
    from triton.backends import backends
    from triton.runtime import driver

    if {"cuda": "nvidia", "hip": "amd"}[target[0]] not in backends:
        pytest.skip(f"this Triton does not compile for {target[0]}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(driver, "_active", Device(compiler.GPUTarget(*target)))
    module = load_copy()
    for name in ("_forward_kernel", "_backward_kernel", "_attention_kernel", "_attention_backward_kernel"):
        setattr(module, name, OnlyCompiles(getattr(module, name)))

    x = torch.empty(shape, dtype=dtype, device="meta")
    weight = torch.empty(shape[-1], device="meta") if has_norm else None
    constants = CONSTANTS | {"v_reset": v_reset}
    module.norm_lif_forward(x, weight, weight, **constants, spike_dtype=spike_dtype)
    module.norm_lif_backward(x, weight, weight, x, **constants, alpha=2.0)
    if dtype != torch.float64:
        spikes = x.unflatten(1, (2, -1))
        mask = torch.ones(2, spikes.shape[2], dtype=torch.long, device="meta") if has_norm else None
        module.attention_forward(spikes, spikes, spikes, mask, 1 if shape[-1] == 5 else 12)
        module.attention_backward(spikes, spikes, spikes, spikes.float(), mask, 1 if shape[-1] == 5 else 12)
    written = list(tmp_path.rglob("*.cubin" if target[0] == "cuda" else "*.hsaco"))
    assert len(written) == (2 if dtype == torch.float64 else 4)


@pytest.mark.parametrize("size", [96, 256])
def test_attention_fits_into_the_memory_of_a_small_gpu(size, monkeypatch, tmp_path):
    """100 KB of shared memory for a program, as an L4 or a 4090 has, forward and backward."""
    compiler = pytest.importorskip("triton.backends.compiler")
    from triton.backends import backends
    from triton.runtime import driver

    if "nvidia" not in backends:
        pytest.skip("this Triton does not compile for cuda")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(driver, "_active", Device(compiler.GPUTarget("cuda", 89, 32)))
    module, compiled = load_copy(), []

    class Remembers(OnlyCompiles):
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **kwargs: compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

    for name in ("_attention_kernel", "_attention_backward_kernel"):
        setattr(module, name, Remembers(getattr(module, name)))
    spikes = torch.empty((1, 2, 128, 2 * size), dtype=torch.bfloat16, device="meta")
    module.attention_forward(spikes, spikes, spikes, None, 2)
    module.attention_backward(spikes, spikes, spikes, spikes.float(), None, 2)
    assert [kernel.metadata.shared <= 99 * 1024 for kernel in compiled] == [True, True]


# Without Triton


def test_file_can_be_imported_without_triton():
    code = f"""
import importlib.util, sys
sys.modules["triton"] = None  # an import of it fails
spec = importlib.util.spec_from_file_location("alone", {str(PATH)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.HAS_TRITON)
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


def test_triton_is_found_where_it_is_installed():
    assert (importlib.util.find_spec("triton") is not None) == triton_spikebert.HAS_TRITON


def test_remote_code_does_not_ask_for_triton():
    assert "torch" in get_imports(PATH)
    assert "triton" not in get_imports(PATH)
