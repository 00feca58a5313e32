"""What the operators share: the switch, when kernels are compiled, what they never see, and spikes in bits."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import fast_forms
from torch import Tensor
from torch.nn import Parameter

from modeling_spikebert import compiler_spikebert as compiler
from modeling_spikebert import native_spikebert as native
from modeling_spikebert.native_spikebert import BITS_OF_ONE, forms_that_ran, pack_spikes, state_of, unpack_spikes
from modeling_spikebert.norm_lif_spikebert import LIF, norm_lif
from modeling_spikebert.spike_attention_spikebert import Tokens, spike_attention
from modeling_spikebert.spike_linear_spikebert import spike_linear

TOKENS = Tokens.of(2, 80, None)


def inputs_of_operators() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def spikes() -> Tensor:
        return (torch.rand(3, 160, 8, generator=generator) < 0.2).float()

    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    return {
        "norm_lif": [torch.randn(3, 160, 8, generator=generator), weight[0], bias],
        "spike_linear": [spikes(), weight, bias],
        "spike_attention": [spikes(), spikes(), spikes()],
    }


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "norm_lif": lambda x, weight, bias: norm_lif(x, LIF(v_threshold=0.5), weight, bias),
    "spike_linear": spike_linear,
    "spike_attention": lambda query, key, value: spike_attention(query, key, value, TOKENS, 2),
}
INPUTS = inputs_of_operators()
operators = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing computed and nothing loaded yet."""
    monkeypatch.setattr(native, "_computed", type(native._computed)())
    monkeypatch.setattr(native, "_loaded", set())


def form_of(operator: str) -> str:
    return forms_that_ran()[operator]


def is_fast(operator: str) -> bool:
    return form_of(operator).split(":")[0] in ("c++", "sums", "dense")


# When kernels are taken


@operators
def test_switch(operator, kernels_at_once):
    for enabled in (True, False, True):
        with fast_forms(enabled):
            OPERATORS[operator](*INPUTS[operator])
        assert is_fast(operator) == enabled
        assert enabled or form_of(operator) == "naive: fast forms are switched off"


@operators
def test_inference_compiles_when_it_has_computed_enough_and_training_at_once(operator, monkeypatch, fresh_process):
    x, *others = INPUTS[operator]
    values = x.numel()  # as many as outputs, of each operator here
    monkeypatch.setattr(native, "WORTH_COMPILING", 3 * values)
    for _ in range(2):
        OPERATORS[operator](x, *others)
        assert form_of(operator) == "naive: this process has not computed enough to compile kernels"
    OPERATORS[operator](x, *others)
    assert is_fast(operator)
    monkeypatch.setattr(native, "WORTH_COMPILING", 100 * values)
    OPERATORS[operator](x, *others)
    assert is_fast(operator), "what is compiled is taken"

    monkeypatch.setattr(native, "_loaded", set())
    OPERATORS[operator](x, *others)
    assert not is_fast(operator)
    x = x.clone().requires_grad_()
    with torch.no_grad():
        OPERATORS[operator](x, *others)
    assert not is_fast(operator)
    OPERATORS[operator](x, *others)
    assert is_fast(operator)
    assert OPERATORS[operator](x, *others).requires_grad


def test_notes_are_a_copy():
    forms_that_ran().clear()
    OPERATORS["norm_lif"](*INPUTS["norm_lif"])
    assert "norm_lif" in forms_that_ran()


SUBPROCESS = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("always")
import torch
from test_native import INPUTS, OPERATORS, forms_that_ran
for operator, run in OPERATORS.items():
    leaves = [x.clone().requires_grad_() for x in INPUTS[operator]]
    for _ in range(2):
        run(*leaves).sum().backward()
    print(operator, "=", forms_that_ran()[operator])
"""


def forms_in_a_subprocess(**environment: str) -> tuple[dict[str, str], str]:
    """The form of each operator in a training there, and what stands on stderr."""
    code = SUBPROCESS.format(tests=os.path.dirname(__file__))
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return dict(line.split(" = ") for line in result.stdout.splitlines()), result.stderr


def test_environment_variable_switches_fast_forms_off():
    forms, errors = forms_in_a_subprocess(SPIKEBERT_FAST_FORMS="0")
    assert forms == dict.fromkeys(OPERATORS, "naive: fast forms are switched off")
    assert "Warning" not in errors


def test_without_a_compiler_all_is_naive(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    compiler.has_compiler.cache_clear()
    try:
        for operator, (x, *others) in INPUTS.items():
            OPERATORS[operator](x.clone().requires_grad_(), *others).sum().backward()
            assert form_of(operator) == "naive: there is no C++ compiler"
    finally:
        compiler.has_compiler.cache_clear()


def test_a_compiler_that_fails_is_asked_once_and_all_is_naive(tmp_path):
    script = tmp_path / "g++"
    script.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho no space left >&2\nexit 1\n")
    script.chmod(0o755)
    forms, errors = forms_in_a_subprocess(CXX=str(script), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert forms == dict.fromkeys(OPERATORS, "naive: the C++ compiler failed")
    assert errors.count("SpikeBERT runs without its C++ kernels, since the compiler failed: no space left") == 1
    assert (tmp_path / "asked").read_text().splitlines() == ["asked"]


@operators
def test_without_the_kernels_for_bits_all_is_naive(operator, monkeypatch):
    """The others came from the cache on disk, and then the compiler failed."""
    monkeypatch.setattr(native, "bits_library", lambda: None)
    x, *others = INPUTS[operator]
    OPERATORS[operator](x.clone().requires_grad_(), *others).sum().backward()
    assert form_of(operator) == "naive: the C++ compiler failed"


# What kernels never see


def expected_of(operator: str, *inputs: Tensor) -> Tensor:
    with fast_forms(False):
        return OPERATORS[operator](*inputs)


@operators
def test_transforms_take_the_naive_form(operator, kernels_at_once):
    inputs = INPUTS[operator]
    expected = expected_of(operator, *inputs)
    result = torch.func.vmap(lambda x: OPERATORS[operator](x, *inputs[1:]))(inputs[0].expand(2, -1, -1, -1))
    assert not is_fast(operator)
    torch.testing.assert_close(result, torch.stack(2 * [expected]))
    grad = torch.func.grad(lambda x: OPERATORS[operator](x, *inputs[1:]).sum())(inputs[0])
    leaf = inputs[0].clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(expected_of(operator, leaf, *inputs[1:]).sum(), leaf)[0])


@operators
def test_dispatch_modes_see_each_operation(operator, kernels_at_once):
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    inputs = INPUTS[operator]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = OPERATORS[operator](*[mode.from_tensor(x) for x in inputs])
    assert result.shape == inputs[0].shape
    assert not is_fast(operator)
    OPERATORS[operator](*[mode.from_tensor(x) for x in inputs])  # outside of the mode they are no ordinary tensors
    assert not is_fast(operator)
    with FlopCounterMode(display=False) as counter:
        OPERATORS[operator](*inputs)
    assert (counter.get_total_flops() > 0) == (operator != "norm_lif")


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [lambda x: x.as_subclass(Subclass), lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.to_mkldnn()],
    ids=["subclass", "meta", "sparse", "mkldnn"],
)
def test_tensors_without_ordinary_memory_are_an_obstacle(change):
    x = torch.ones(2, 3)
    assert native.obstacle(x, None, x) is None
    assert native.obstacle(x, None, change(x)) is not None
    assert native.obstacle(change(x)) == "a tensor is of another kind, or has no values in memory"


@operators
def test_parameters_of_another_kind_take_the_naive_form(operator, kernels_at_once):
    x, *others = INPUTS[operator]
    result = OPERATORS[operator](x, *(tensor.as_subclass(Subclass) for tensor in others))
    assert not is_fast(operator)
    torch.testing.assert_close(result.as_subclass(Tensor), expected_of(operator, x, *others))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@operators
def test_results_lie_where_the_inputs_do_whatever_the_default_device(operator, training, kernels_at_once):
    inputs = [x.clone().requires_grad_(training) for x in INPUTS[operator]]
    expected = expected_of(operator, *inputs)
    with torch.device("meta"):
        tokens = Tokens.of(2, 80, None)
        result = OPERATORS[operator](*inputs)
        assert is_fast(operator)
        if training:
            assert all(grad.device.type == "cpu" for grad in torch.autograd.grad(result.sum(), inputs))
    assert tokens.starts.tolist() == [0, 80, 160]
    torch.testing.assert_close(result, expected)


def test_forked_workers_run_the_kernels_after_they_ran_on_several_threads(kernels_at_once):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = run_all()
    finally:
        torch.set_num_threads(before)
    loader = torch.utils.data.DataLoader(range(2), num_workers=1, multiprocessing_context="fork", collate_fn=run_all)
    for results in loader:
        torch.testing.assert_close(results, expected)


def run_all(_: object = None) -> list[Tensor]:
    results = []
    for operator, run in OPERATORS.items():
        leaves = [x.clone().requires_grad_() for x in INPUTS[operator]]
        out = run(*leaves)
        results += [out.detach(), *torch.autograd.grad(out.sum(), leaves)]
        assert is_fast(operator)
    return results


@pytest.mark.parametrize("count", [2, 5])
def test_threads_of_one_process_run_the_kernels_at_once(count, kernels_at_once):
    from concurrent.futures import ThreadPoolExecutor

    expected = run_all()
    with ThreadPoolExecutor(count) as pool:
        for results in pool.map(run_all, range(4 * count)):
            torch.testing.assert_close(results, expected)


# States of weights


def test_state_changes_with_values_and_with_nothing_else():
    weight = Parameter(torch.randn(4, 6))
    state = state_of(weight)
    assert state_of(weight) == state
    (weight * 2).sum().backward()
    assert state_of(weight) == state
    for change in (lambda: weight.add_(1), lambda: weight.data.add_(1), lambda: setattr(weight, "data", weight * 2)):
        with torch.no_grad():
            change()
        assert state_of(weight) != state
        state = state_of(weight)
    for tensor in (torch.empty(0), torch.ones(1).expand(5000, 5000), weight.detach()[3, 5:], torch.ones(3)[3:]):
        assert state_of(tensor) == state_of(tensor)


# Spikes in bits


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 8191, 8192, 8193, 20_001])
@pytest.mark.parametrize("dtype", BITS_OF_ONE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_bits_hold_spikes_of_any_type_and_count(dtype, count, threads):
    spikes = (torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.3).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        bits, fired = pack_spikes(spikes)
        back = {other: unpack_spikes(bits, spikes.shape, other) for other in BITS_OF_ONE}
    finally:
        torch.set_num_threads(before)
    assert (bits.dtype, len(bits)) == (torch.uint8, (count + 7) // 8)
    assert fired == spikes.sum()
    for other, result in back.items():
        assert result.dtype == other
        assert torch.equal(result, spikes.to(other))
    for place in {0, count - 1} if count else ():
        spikes[place] = 3
        assert pack_spikes(spikes)[1] is None


def test_bits_of_what_is_not_contiguous():
    spikes = (torch.rand(5, 7, 3) < 0.5).float()
    for view in (spikes.transpose(0, 2), spikes[:, ::2], spikes[:1].expand(4, 7, 3)):
        bits, fired = pack_spikes(view)
        assert torch.equal(unpack_spikes(bits, view.shape, view.dtype), view)
        assert fired == view.sum()
