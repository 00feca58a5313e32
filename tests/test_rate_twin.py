"""`examples/rate_twin.py`: its neurons against a neuron of many time steps, and what a model makes of them."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import fast_forms, make_neurons_fire, random_ids
from torch import Tensor

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.modeling_spikebert import SpikeBertNeuron

EXAMPLES = Path(__file__).parent.parent / "examples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)  # as Python does for a script
    EXAMPLE = runpy.run_path(str(EXAMPLES / "rate_twin.py"))
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def twin(**fields: object) -> SpikeBertForSequenceClassification:
    torch.manual_seed(0)
    config = SpikeBertConfig(**(SIZES | {"num_time_steps": 1, "tau": 1.0} | fields))
    model = SpikeBertForSequenceClassification(config).eval()
    make_neurons_fire(model)
    return EXAMPLE["rate_twin"](model)


def rate_of_spikes(current: Tensor, v_threshold: float, steps: int) -> Tensor:
    """Of a neuron without leak and with soft reset, step by step."""
    membrane, fired = torch.full_like(current, v_threshold / 2), torch.zeros_like(current)
    for _ in range(steps):
        membrane = membrane + current
        spikes = (membrane >= v_threshold).to(current.dtype)
        membrane, fired = membrane - v_threshold * spikes, fired + spikes
    return fired / steps


def test_a_neuron_is_the_limit_of_many_time_steps():
    neuron = twin().spikebert.encoder.layer[0].attention.query_neuron
    assert neuron.neurons.v_threshold > 0
    current = torch.randn(1, 50, 16)
    normed = F.layer_norm(current, (16,), neuron.weight, neuron.bias, neuron.eps)
    rates = neuron(current)
    assert {0.0, 1.0} < set(rates.unique().tolist())  # both ends, and what lies between
    for steps in (10, 1000):
        expected = rate_of_spikes(normed, neuron.neurons.v_threshold, steps)
        torch.testing.assert_close(rates, expected, rtol=0, atol=0.51 / steps + 1e-5)


def test_padding_takes_no_part_and_fast_forms_give_way():
    model, ids, mask = twin(), random_ids(2, 6, vocab_size=40), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    results = []
    for fast in (False, True):
        with fast_forms(fast):
            results.append(model(ids, attention_mask=mask).logits)
            torch.testing.assert_close(results[-1][1:], model(ids[1:, :3]).logits)
    torch.testing.assert_close(*results)


def test_all_neurons_are_exchanged_and_have_real_gradients():
    model = twin()
    neurons = [module for module in model.modules() if isinstance(module, SpikeBertNeuron)]
    assert {type(neuron).__name__ for neuron in neurons} == {"RateNeuron"}
    model = model.double().train()
    ids = random_ids(1, 4, vocab_size=40)
    weight = model.spikebert.encoder.layer[0].mlp.output.weight
    model(ids).logits.sum().backward()
    with torch.no_grad():
        before, weight[3, 5] = model(ids).logits.sum(), weight[3, 5] + 1e-4
        slope = (model(ids).logits.sum() - before) / 1e-4
    assert weight.grad is not None
    assert weight.grad[3, 5] == pytest.approx(slope.item(), rel=0.02)
    assert slope != 0


def test_others_are_refused():
    for fields in ({"num_time_steps": 2}, {"variant": "neuromorphic"}):
        with pytest.raises(ValueError, match="variant membrane with num_time_steps 1"):
            twin(**fields)
