"""The fused blocks against the plain modules: outputs and every gradient, and when they are taken.

Most tests run the fused code without its compiler (`uncompiled`), which takes half a minute for each kind of model.
"""

import pytest
import torch
from helpers import SIZES, mask_of, random_ids, results_of, tiny_model, tracing
from torch import Tensor, nn

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert import fused_spikebert as fused
from modeling_spikebert.fused_spikebert import Tokens, pack_tokens, takes_fused_path, unpack_tokens

pytestmark = tracing
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


def assert_equal_results(model, ids: Tensor, mask: Tensor | None) -> None:
    expected = results_of(model, "plain", ids, mask)
    results = results_of(model, "fused", ids, mask)
    assert results.keys() == expected.keys()
    assert len(results) > len(list(model.parameters()))
    for name, want in expected.items():
        torch.testing.assert_close(results[name], want, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


# Outputs and gradients


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("batch", MASKS)
@modes
def test_outputs_and_every_gradient_equal_the_plain_modules(mode, batch):
    assert_equal_results(tiny_model(SpikeBertForSequenceClassification, mode), *MASKS[batch])


@pytest.mark.usefixtures("uncompiled")
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
        {"position_embedding_type": "none", "type_vocab_size": 0},
    ],
    ids=str,
)
@modes
def test_each_option_of_the_config_reaches_the_fused_blocks(mode, overrides):
    assert_equal_results(tiny_model(SpikeBertForSequenceClassification, mode, **overrides), *MASKS["padded"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@modes
def test_gradient_checkpointing_gives_the_same_gradients(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode).train()
    expected = results_of(model, "fused", *MASKS["padded"])
    model.gradient_checkpointing_enable()
    results = results_of(model, "fused", *MASKS["padded"])
    for name, want in expected.items():
        torch.testing.assert_close(results[name], want, **EXACT)


@modes
def test_compiled_blocks_equal_the_plain_modules(mode):
    """With the real compiler; a second batch of another size needs no further compilation."""
    torch._dynamo.reset()
    model = tiny_model(SpikeBertForSequenceClassification, mode, num_hidden_layers=2, num_time_steps=2).train()
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_equal_results(model, *MASKS["padded"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_before
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal_results(model, random_ids(2, 9), mask_of(9, 5))


@pytest.mark.usefixtures("uncompiled")
def test_autocast_computes_spikes_in_bfloat16_and_stays_close():
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32).train()
    ids, mask = MASKS["padded"]
    labels = torch.tensor([0, 1, 0])
    losses, gradients = {}, {}
    for implementation in ("plain", "fused"):
        model.config.implementation = implementation
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=implementation == "fused"):
            outputs = model(ids, attention_mask=mask, labels=labels)
        outputs.loss.backward()
        losses[implementation] = outputs.loss.item()
        gradients[implementation] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert losses["fused"] == pytest.approx(losses["plain"], rel=0.1)
    assert torch.cosine_similarity(gradients["fused"], gradients["plain"], dim=0) > 0.9
    assert fused._spike_dtype(model.spikebert.encoder.layer[0].attention.query) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused._spike_dtype(model.spikebert.encoder.layer[0].attention.query) == torch.bfloat16


@pytest.mark.parametrize("length", [3, 11], ids=["short", "long"])
@pytest.mark.parametrize("mask", [None, mask_of(5, 2)], ids=["tokens", "mask"])
def test_attention_and_its_gradients_equal_autograd(length, mask):
    """A mask instead of packed tokens is what a GPU takes."""
    mask = None if mask is None else nn.functional.pad(mask, (0, length), value=1)[:, :length]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randint(0, 2, (2, 2 * length, 3 * 8), generator=generator).double().requires_grad_()
    context = fused._SpikeAttention.apply(qkv, Tokens(2, length, None, mask), 2)

    query, key, value = qkv.view(2, 2, length, 3, 2, 4).permute(3, 0, 1, 4, 2, 5)  # [T, B, H, L, d]
    if mask is not None:
        key, value = key * mask[:, None, :, None], value * mask[:, None, :, None]
    expected = (query @ key.transpose(-1, -2) @ value).transpose(2, 3).reshape(2, 2 * length, 8)
    assert torch.equal(context, expected)
    weights = torch.randn(context.shape, generator=generator, dtype=torch.float64)
    result, want = (torch.autograd.grad((out * weights).sum(), qkv)[0] for out in (context, expected))
    torch.testing.assert_close(result, want, **EXACT)


def test_attention_takes_bfloat16_only_where_rounding_changes_no_spike():
    """Sums above 256 are rounded: they must fire at once, scale * 256 / tau >= v_threshold."""
    for scale, dtype in ((0.125, torch.bfloat16), (1 / 256, torch.bfloat16), (0.9 / 256, torch.float32)):
        config = SpikeBertConfig.reference(**SIZES, attention_scale=scale)
        attention = SpikeBertModel(config).encoder.layer[0].attention
        assert fused._product_dtype(attention, torch.uint8) == dtype, scale
        assert fused._product_dtype(attention, torch.float64) == torch.float64
    for config, why in (
        (SpikeBertConfig.reference(**SIZES, v_reset=None), "a soft reset keeps what was rounded"),
        (SpikeBertConfig(**SIZES), "a norm sees how large a sum is"),
    ):
        attention = SpikeBertModel(config).encoder.layer[0].attention
        assert fused._product_dtype(attention, torch.uint8) == torch.float32, why


# Padding


def test_packing_leaves_out_padding_and_unpacking_puts_zeros_there():
    mask = mask_of(3, 1, 2).double()
    states = torch.arange(1.0, 37.0, dtype=torch.float64).view(2, 3, 3, 2)  # [T, B, L, D]
    x, tokens = pack_tokens(states, mask)
    assert x.shape == (2, 6, 2)
    assert torch.equal(unpack_tokens(x, tokens), states * mask[:, :, None])
    whole, tokens = pack_tokens(states, torch.ones(3, 3))
    assert tokens.places is None
    assert whole.shape == (2, 9, 2)
    assert torch.equal(unpack_tokens(whole, tokens), states)


@pytest.mark.parametrize("mask", [None, mask_of(3, 1, 2, 3)], ids=["all", "padded"])
@pytest.mark.parametrize("kept", [[True, False, True, True], [False, False, False, True]], ids=str)
def test_keeping_some_sentences_equals_packing_them(mask, kept):
    kept = torch.tensor(kept)
    states = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    x, tokens = pack_tokens(states, None if mask is None else mask.float())
    stays, remaining = tokens.keep(kept)
    expected, wanted = pack_tokens(states[:, kept], None if mask is None else mask[kept].float())
    assert torch.equal(x[:, stays], expected)
    assert (remaining.batch, remaining.length) == (wanted.batch, wanted.length)
    assert torch.equal(unpack_tokens(x[:, stays], remaining), unpack_tokens(expected, wanted))


@pytest.mark.usefixtures("uncompiled")
def test_states_at_padding_are_zero():
    model = tiny_model(SpikeBertModel)
    model.config.implementation = "fused"
    ids, mask = MASKS["padded"]
    outputs = model(ids, attention_mask=mask, output_hidden_states=True)
    for state in (outputs.last_hidden_state, *outputs.hidden_states[1:]):
        assert not (state * (1 - mask).unsqueeze(-1)).any()
        assert (state * mask.unsqueeze(-1)).any()


# When they are taken


def encoder_and_states(**overrides):
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, **overrides)
    return model, model.spikebert.encoder, torch.zeros(4, 2, 3, 32)


def test_auto_takes_the_fused_path_where_it_pays(monkeypatch):
    model, encoder, states = encoder_and_states()
    assert not takes_fused_path(encoder, states)
    model.train()
    assert not takes_fused_path(encoder, states), "tiny"
    monkeypatch.setattr(fused, "WORTH_COMPILING", {"training": states.numel(), "evaluation": 4 * states.numel()})
    assert takes_fused_path(encoder, states)
    assert not takes_fused_path(encoder, states[:, :1]), "smaller"
    model.eval()
    assert not takes_fused_path(encoder, states), "no training"
    assert takes_fused_path(encoder, torch.cat(4 * [states])), "larger"
    model.config.exit_threshold = 0.9
    assert takes_fused_path(encoder, states)
    monkeypatch.setattr(fused, "_has_compiler", lambda: False)
    assert not takes_fused_path(encoder, states), "no compiler"


def test_implementation_is_an_order(monkeypatch):
    model, encoder, states = encoder_and_states()
    monkeypatch.setattr(fused, "WORTH_COMPILING", {"training": 0, "evaluation": 0})
    model.train()
    model.config.implementation = "plain"
    assert not takes_fused_path(encoder, states)
    model.eval()
    model.config.implementation = "fused"
    assert takes_fused_path(encoder, states)


class LowRank(nn.Linear):
    """Stands for what an adapter puts in the place of a Linear."""


@pytest.mark.usefixtures("uncompiled")
@modes
def test_dropout_of_branches_reaches_the_fused_blocks(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode).train()
    for module in model.spikebert.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0  # nothing is left to chance: no branch passes
    assert_equal_results(model, *MASKS["padded"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("mode", "overrides", "steps"),
    [("reference", {}, 1), ("reference", {"mask_padding": True}, 1), ("default", {}, 4)],
    ids=["reference", "reference-masked", "default"],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_products_of_the_same_input_at_each_step_are_computed_once(mode, overrides, steps, bf16, monkeypatch):
    model = tiny_model(SpikeBertForSequenceClassification, mode, torch.float32, **overrides)
    model.config.implementation = "fused"
    seen = []
    linear = nn.functional.linear

    def counting(x, weight, *args):
        seen.append(x.shape)
        return linear(x, weight, *args)

    monkeypatch.setattr(nn.functional, "linear", counting)
    monkeypatch.setattr(fused, "spike_linear", counting)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(MASKS["padded"][0], attention_mask=MASKS["padded"][1])
    assert seen[0][0] == steps
    assert {shape[0] for shape in seen[1:8]} == {4}


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.mlp.intermediate.register_forward_hook(lambda *args: None),
        lambda block: block.attention.query_neuron.register_forward_pre_hook(lambda *args: None),
        lambda block: block.attention.register_full_backward_hook(lambda *args: None),
        lambda block: block.mlp.register_full_backward_pre_hook(lambda *args: None),
        lambda block: setattr(block.attention, "key", LowRank(32, 32)),
        lambda block: setattr(block.attention, "key", nn.Linear(32, 32, bias=False)),
        lambda block: setattr(block.mlp.output, "forward", lambda x: x),
        lambda block: setattr(block.attention.key_neuron, "v_threshold", 3.0),
    ],
    ids=["hook", "pre-hook", "backward-hook", "backward-pre-hook", "replaced", "no-bias", "patched", "calibrated"],
)
def test_blocks_that_somebody_changed_are_called_and_not_bypassed(change, monkeypatch):
    model, encoder, states = encoder_and_states()
    monkeypatch.setattr(fused, "WORTH_COMPILING", {"training": 0, "evaluation": 0})
    model.train()
    assert takes_fused_path(encoder, states)
    change(encoder.layer[1])
    assert not takes_fused_path(encoder, states)
    model.config.implementation = "fused"
    with pytest.raises(ValueError, match=r"not possible: .* Set config.implementation to"):
        takes_fused_path(encoder, states)


def test_implementation_is_not_saved_and_can_be_given_when_loading(tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32)
    model.config.implementation = "fused"
    model.save_pretrained(tmp_path)
    assert "implementation" not in (tmp_path / "config.json").read_text()
    load = SpikeBertForSequenceClassification.from_pretrained
    assert load(tmp_path).config.implementation == "auto"
    assert load(tmp_path, implementation="plain").config.implementation == "plain"
