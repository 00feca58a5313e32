import ast
from pathlib import Path

import pytest
import torch
from helpers import mask_of, random_ids, tiny_model
from reference_model import cross_entropy, reference_forward

from modeling_spikebert import SpikeBertForSequenceClassification

REFERENCE = {"num_attention_heads": 8, "num_labels": 3}  # heads as published
TOLERANCE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module", params=[(4, 2.0), (3, 1.5), (1, 2.0)], ids=["published", "T3-tau1.5", "T1"])
def comparison(request):
    """The model, its outputs and loss, and what the restated equations give for the same weights."""
    steps, tau = request.param
    model = tiny_model(SpikeBertForSequenceClassification, "reference", num_time_steps=steps, tau=tau, **REFERENCE)
    ids, labels = random_ids(3, 7), torch.tensor([0, 2, 1])
    outputs = model(ids, labels=labels, output_hidden_states=True)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    expected = reference_forward(weights, ids, model.config.num_hidden_layers, steps, tau)
    return model, ids, labels, outputs, weights, expected


def test_the_published_constants_are_the_reference_config():
    config = tiny_model(SpikeBertForSequenceClassification, "reference", num_attention_heads=8).config
    assert (config.num_time_steps, config.tau, config.v_threshold, config.attention_v_threshold) == (4, 2.0, 1.0, 0.5)
    assert (config.attention_scale, config.v_reset, config.surrogate_alpha) == (0.125, 0.0, 2.0)
    assert type(config).reference().num_attention_heads == 8
    assert config.variant == "published"


def test_the_restated_equations_share_no_code_with_the_package():
    tree = ast.parse(Path(__file__).with_name("reference_model.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names | {node.module for node in imports if isinstance(node, ast.ImportFrom)} == {"math", "torch"}


def test_neurons_fire_neither_always_nor_never(comparison):
    *_, (_, _, signals) = comparison
    rates = {name: torch.stack(spikes).mean().item() for name, spikes in signals.items()}
    assert len(rates) == 1 + 2 * 7
    assert {name: rate for name, rate in rates.items() if not 0.02 < rate < 0.98} == {}


def test_logits_and_loss_equal_the_published_equations(comparison):
    _, _, labels, outputs, _, (logits, _, _) = comparison
    torch.testing.assert_close(outputs.logits, logits, **TOLERANCE)
    torch.testing.assert_close(outputs.loss, cross_entropy(logits, labels), **TOLERANCE)
    assert logits.std() > 1e-3


def test_every_hidden_state_equals_the_published_equations(comparison):
    model, ids, _, outputs, weights, (_, blocks, _) = comparison
    assert len(outputs.hidden_states) == len(blocks) == 1 + model.config.num_hidden_layers
    assert torch.equal(outputs.hidden_states[0], weights["spikebert.embeddings.word_embeddings.weight"][ids])
    for state, block in zip(outputs.hidden_states[1:], blocks[1:], strict=True):
        torch.testing.assert_close(state, torch.stack(block).mean(0), **TOLERANCE)
    per_step = model.spikebert(ids).hidden_states_per_step
    assert torch.equal(per_step, torch.stack(blocks[-1]))


def test_gradient_of_every_parameter_equals_the_published_equations(comparison):
    model, _, labels, outputs, weights, (logits, _, _) = comparison
    outputs.loss.backward()
    cross_entropy(logits, labels).backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(
            parameter.grad, weights[name].grad, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE
        )


def test_reference_counts_padding():
    model = tiny_model(SpikeBertForSequenceClassification, "reference", **REFERENCE)
    ids, mask = random_ids(2, 6), mask_of(6, 4)
    ids[1, 4:] = 0
    with torch.no_grad():
        masked, unmasked = model(ids, attention_mask=mask).logits, model(ids).logits
        alone = model(ids[1:, :4]).logits
    assert torch.equal(masked, unmasked)
    assert not torch.allclose(masked[1:], alone, atol=1e-4)


def test_default_does_not_count_padding():
    model = tiny_model(SpikeBertForSequenceClassification, num_labels=3)
    ids, mask = random_ids(2, 6), mask_of(6, 4)
    with torch.no_grad():
        masked, unmasked = model(ids, attention_mask=mask).logits, model(ids).logits
        alone = model(ids[1:, :4]).logits
    torch.testing.assert_close(masked[1:], alone, **TOLERANCE)
    assert not torch.allclose(masked[1], unmasked[1], atol=1e-4)
