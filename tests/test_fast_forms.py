"""Whole models: the fast forms of all operators together against all naive, and what else must see the same path."""

from collections.abc import Callable

import pytest
import torch
from helpers import fast_forms, mask_of, random_ids, results_of, tiny_model, tracing
from torch import Tensor, nn

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert import spike_linear_spikebert as spike_linear
from modeling_spikebert.modeling_spikebert import SpikeBertNeuron
from modeling_spikebert.native_spikebert import forms_that_ran

pytestmark = [tracing, pytest.mark.usefixtures("kernels_at_once")]
modes = pytest.mark.parametrize("mode", ["default", "reference"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}
MASKS = {
    "no-mask": (random_ids(3, 6), None),
    "full": (random_ids(3, 6), mask_of(6, 6, 6)),
    "padded": (random_ids(3, 6), mask_of(6, 1, 4)),
    "padded-left": (random_ids(3, 6), mask_of(6, 1, 4).flip(1)),
    "longer-than-heads-are-wide": (random_ids(2, 14), mask_of(14, 9)),
    "one-token": (random_ids(1, 1), None),
}


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(
            results[name], want, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or EXACT)
        )


def assert_forms_agree(model: nn.Module, ids: Tensor, mask: Tensor | None, **tolerance: float) -> dict[str, Tensor]:
    expected = results_of(model, False, ids, mask)
    assert all("switched off" in form for form in forms_that_ran().values())
    results = results_of(model, True, ids, mask)
    assert forms_that_ran()["norm_lif"].startswith("c++")
    assert forms_that_ran()["spike_attention"].startswith("c++")
    assert len(results) > len(list(model.parameters()))
    assert_close(results, expected, **tolerance)
    return results


# Outputs and gradients


@pytest.mark.parametrize("batch", MASKS)
@modes
def test_outputs_and_every_gradient_equal_the_naive_forms(mode, batch):
    assert_forms_agree(tiny_model(SpikeBertForSequenceClassification, mode), *MASKS[batch])


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_time_steps": 1},
        {"num_time_steps": 7},
        {"tau": 1.5, "v_threshold": 0.7, "attention_v_threshold": 1.1},
        {"v_reset": None},
        {"v_reset": -0.4},
        {"attention_scale": 0.01},
        {"surrogate_alpha": 5.0},
        {"num_attention_heads": 1},
        {"type_vocab_size": 0},
        {"layer_norm_eps": 0.1},
    ],
    ids=str,
)
@modes
def test_each_option_of_the_config_reaches_the_kernels(mode, overrides):
    results = assert_forms_agree(tiny_model(SpikeBertForSequenceClassification, mode, **overrides), *MASKS["padded"])
    plain = results_of(tiny_model(SpikeBertForSequenceClassification, mode), True, *MASKS["padded"])
    if mode == "reference" or overrides.keys() != {"attention_scale"}:  # otherwise a norm takes it out again
        assert overrides == {"type_vocab_size": 0} or any(
            name in plain and not torch.equal(result, plain[name]) for name, result in results.items()
        )


@modes
def test_sums_over_spikes_give_the_same(mode, monkeypatch):
    """In float32, and for more spikes and fewer tokens than they pay for."""
    monkeypatch.setattr(spike_linear, "MAX_FIRING_RATE", 1.0)
    monkeypatch.setattr(spike_linear, "MIN_ROWS", 0)
    model = tiny_model(SpikeBertForSequenceClassification, mode, torch.float32).train()
    assert_forms_agree(model, *MASKS["padded"], rtol=2e-4, atol=2e-4)
    assert forms_that_ran()["spike_linear"].startswith("sums")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@modes
def test_gradient_checkpointing_gives_the_same_gradients(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode).train()
    expected = results_of(model, True, *MASKS["padded"])
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(options)
        if options["use_reentrant"]:
            model.enable_input_require_grads()
        assert_close(results_of(model, True, *MASKS["padded"]), expected)


def test_autocast_computes_spikes_in_bfloat16_and_stays_close():
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32).train()
    ids, mask = MASKS["padded"]
    seen = []
    model.spikebert.encoder.layer[1].mlp.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses, gradients = [], []
    for fast, bf16 in ((False, False), (True, True), (False, True)):
        model.zero_grad()
        with fast_forms(fast), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 0])).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert [spikes.dtype for spikes in seen] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=0.1)
        assert torch.cosine_similarity(gradient, gradients[0], dim=0) > 0.9


@modes
def test_dropout_falls_on_the_same_places(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode, hidden_dropout_prob=0.3).train()
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        results.append(results_of(model, fast, *MASKS["padded"]))
    assert_close(*results)
    assert not torch.allclose(results[0]["logits"], results_of(model, True, *MASKS["padded"])["logits"])


def test_states_at_padding_are_zero():
    model = tiny_model(SpikeBertModel)
    ids, mask = MASKS["padded"]
    outputs = model(ids, attention_mask=mask, output_hidden_states=True)
    for state in (outputs.last_hidden_state, *outputs.hidden_states[1:]):
        assert not (state * (1 - mask).unsqueeze(-1)).any()
        assert (state * mask.unsqueeze(-1)).any()


# Compilers


@modes
def test_compiled_and_exported_models_equal_eager(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode, num_hidden_layers=1, num_time_steps=2)
    ids, mask = MASKS["padded"]
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), {"attention_mask": mask}).module()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids, mask in (MASKS["padded"], (random_ids(3, 6, seed=1), mask_of(2, 6, 3))):
        expected = model(ids, attention_mask=mask)
        torch.testing.assert_close(exported(ids, attention_mask=mask).logits, expected.logits, **EXACT)
        result = compiled(ids, attention_mask=mask)
        torch.testing.assert_close(result.logits, expected.logits, **EXACT)
        results, wanted = (
            torch.autograd.grad(x.logits.square().sum(), model.parameters(), allow_unused=True)
            for x in (result, expected)
        )
        torch.testing.assert_close([x for x in results if x is not None], [x for x in wanted if x is not None], **EXACT)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace", "ignore:.is_gradient_checkpointing"
)
def test_a_trace_holds_the_operations_and_not_what_the_kernels_once_returned():
    model = tiny_model(SpikeBertForSequenceClassification, num_hidden_layers=1, num_time_steps=2, return_dict=False)
    with torch.no_grad():
        traced = torch.jit.trace(model, MASKS["padded"], check_trace=False)
        for ids, mask in (MASKS["padded"], (random_ids(3, 6, seed=1), mask_of(2, 6, 3))):
            torch.testing.assert_close(traced(ids, mask)[0], model(ids, mask)[0], **EXACT)


# Hooks and adapters


class LowRank(nn.Module):
    """As an adapter wraps a Linear."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x.to(self.down.weight.dtype)))


class Scaled(nn.Module):
    """As IA3 does: a factor on the input of a Linear."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, base_layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x * self.factors)


def replace_linears(model: nn.Module, wrap: Callable[[nn.Linear], nn.Module]) -> None:
    torch.manual_seed(1)
    for layer in model.spikebert.encoder.layer:
        for part, names in ((layer.attention, ("query", "value", "output")), (layer.mlp, ("intermediate", "output"))):
            for name in names:
                setattr(part, name, wrap(getattr(part, name)))
    model.double()


@pytest.mark.parametrize("wrap", [LowRank, Scaled, lambda base: nn.Linear(base.in_features, base.out_features)],
                         ids=["low-rank", "scaled", "replaced"])  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True], ids=["all-trained", "adapters-trained"])
@modes
def test_adapters_are_called_on_every_form(mode, frozen, wrap):
    model = tiny_model(SpikeBertForSequenceClassification, mode)
    plain = results_of(model, True, *MASKS["padded"])
    model.requires_grad_(not frozen)
    model.spikebert.embeddings.requires_grad_(True)
    replace_linears(model, wrap)
    results, expected = (results_of(model, fast, *MASKS["padded"]) for fast in (True, False))
    assert_close(results, expected)
    assert not torch.allclose(results["logits"], plain["logits"])


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "naive"])
def test_hooks_of_every_module_are_called(fast):
    model = tiny_model(SpikeBertForSequenceClassification)
    expected = results_of(model, fast, *MASKS["padded"])
    names = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert any(name.endswith("context_neuron") for name in names)
    called: dict[str, set[str]] = {kind: set() for kind in ("pre", "forward", "backward")}
    with_gradients = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *args, name=name: called["pre"].add(name))
        module.register_forward_hook(lambda *args, name=name: called["forward"].add(name))
        if isinstance(module, SpikeBertNeuron | nn.Linear):
            module.register_full_backward_hook(lambda *args, name=name: called["backward"].add(name))
            with_gradients.add(name)
    assert_close(results_of(model, fast, *MASKS["padded"]), expected)
    assert called == {"pre": names, "forward": names, "backward": with_gradients}


@pytest.mark.parametrize("name", ["attention.input_neuron", "attention.query_neuron", "mlp.intermediate_neuron"])
def test_what_a_hook_returns_is_taken_on_every_form(name):
    """A part of a spike is no spike: kernels are not taken for it."""
    model = tiny_model(SpikeBertForSequenceClassification)
    plain = results_of(model, True, *MASKS["padded"])
    module = model.spikebert.encoder.layer[0].get_submodule(name)
    module.register_forward_hook(lambda module, args, output: output * torch.linspace(0.5, 1.5, output.shape[-1]))
    results, expected = (results_of(model, fast, *MASKS["padded"]) for fast in (True, False))
    assert_close(results, expected)
    assert not torch.allclose(results["logits"], plain["logits"])
