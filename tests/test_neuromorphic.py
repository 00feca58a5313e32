"""The neuromorphic variant, restated sentence by sentence and step by step: outputs, statistics and every gradient."""

import pytest
import torch
from helpers import mask_of, random_ids, tiny_model
from reference_model import linear, neurons
from torch import Tensor

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.export import export_onnx
from modeling_spikebert.modeling_spikebert import SpikeBertBatchNorm

EPS = 1e-5
CLOSE = {"rtol": 0, "atol": 1e-10}
SINGLE = {"rtol": 0, "atol": 1e-7}  # a share of the mean is computed in float32
LENGTHS = (6, 2, 4)


class Restated:
    """Works on lists: of sentences, of time steps, of tensors `[n, D]`."""

    def __init__(self, weights: dict[str, Tensor], training: bool):
        self.weights, self.training = weights, training
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def batch_norm(self, sentences: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        weights = {key: self.weights[f"{name}.batch_norm.{key}"] for key in ("weight", "bias")}
        if self.training:
            rows = torch.cat([x_t for x in sentences for x_t in x])
            mean = rows.sum(0) / len(rows)
            var = ((rows - mean) ** 2).sum(0) / len(rows)
            self.statistics[name] = mean, var
        else:
            mean, var = (self.weights[f"{name}.batch_norm.running_{key}"] for key in ("mean", "var"))
        return [
            [weights["weight"] * (x_t - mean) / torch.sqrt(var + EPS) + weights["bias"] for x_t in x] for x in sentences
        ]

    def fire(self, sentences: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        return [neurons(x, tau=2.0) for x in self.batch_norm(sentences, name)]

    def linear(self, sentences: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        return [[linear(x_t, self.weights, name) for x_t in x] for x in sentences]

    def attention(self, x: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        spikes = self.fire(x, f"{name}.input_neuron")
        q, k, v = (
            self.fire(self.linear(spikes, f"{name}.{part}"), f"{name}.{part}_neuron")
            for part in ("query", "key", "value")
        )
        asked = [
            [sum(k_t[i] * v_t[i] for i in range(len(k_t))).unsqueeze(0) for k_t, v_t in zip(ks, vs, strict=True)]
            for ks, vs in zip(k, v, strict=True)
        ]
        gates = self.fire(asked, f"{name}.context_neuron")
        context = [[q_t * g_t for q_t, g_t in zip(qs, gs, strict=True)] for qs, gs in zip(q, gates, strict=True)]
        return self.linear(context, f"{name}.output")

    def mlp(self, x: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        spikes = self.fire(x, f"{name}.input_neuron")
        inner = self.fire(self.linear(spikes, f"{name}.intermediate"), f"{name}.intermediate_neuron")
        return self.linear(inner, f"{name}.output")

    def logits(self, sentences: list[Tensor], num_layers: int, num_steps: int) -> Tensor:
        """Of token ids, one tensor for each sentence: `[B, C]`."""
        table = "spikebert.embeddings.{}_embeddings.weight"
        words, positions, types = (self.weights[table.format(name)] for name in ("word", "position", "token_type"))
        embeddings = [[words[ids] + positions[: len(ids)] + types[0]] for ids in sentences]
        x = [x * num_steps for x in self.batch_norm(embeddings, "spikebert.embeddings")]
        for layer in range(num_layers):
            for part in (self.attention, self.mlp):
                branch = part(x, f"spikebert.encoder.layer.{layer}.{part.__name__}")
                x = [[a + b for a, b in zip(xs, bs, strict=True)] for xs, bs in zip(x, branch, strict=True)]
        features = [sum(x_t.mean(0) for x_t in x) / num_steps for x in self.fire(x, "norm")]
        return linear(torch.stack(features), self.weights, "classifier")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("num_time_steps", [1, 3])
def test_the_variant_equals_its_restatement(num_time_steps, training):
    model = tiny_model(SpikeBertForSequenceClassification, "neuromorphic", num_time_steps=num_time_steps)
    model.train(training)
    ids, mask = random_ids(3, 6), mask_of(*LENGTHS)
    weights = {
        name: weight.clone().requires_grad_(weight.is_floating_point()) for name, weight in model.state_dict().items()
    }
    restated = Restated(weights, training)
    expected = restated.logits([row[:n] for row, n in zip(ids, LENGTHS, strict=True)], 2, num_time_steps)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = model(ids, mask).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert len(logits.unique()) > 3

    factors = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    (logits * factors).sum().backward()
    (expected * factors).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        assert parameter.grad.abs().max() > 0, name

    assert len(restated.statistics) == (2 * 7 + 2 if training else 0)
    for name, module in model.named_modules():
        if isinstance(module, SpikeBertBatchNorm):
            mean, var = restated.statistics.get(name.removesuffix(".batch_norm"), (None, None))
            expected_mean = before[f"{name}.running_mean"] if mean is None else mean.detach()
            expected_var = before[f"{name}.running_var"] if var is None else var.detach()
            torch.testing.assert_close(module.running_mean, expected_mean, **CLOSE)  # the first batch counts in full
            torch.testing.assert_close(module.running_var, expected_var, **CLOSE)
            assert module.num_batches_tracked == int(training)


def test_statistics_are_means_of_ten_batches_and_then_exponential():
    norm = SpikeBertBatchNorm(tiny_model(SpikeBertForSequenceClassification, "neuromorphic").config, 3).double()
    batches = torch.randn(12, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = batches.mean((1, 2))
    for batch in batches[:10]:
        norm(batch)
    torch.testing.assert_close(norm.running_mean, means[:10].mean(0), **SINGLE)
    torch.testing.assert_close(norm.running_var, batches[:10].var((1, 2), correction=0).mean(0), **SINGLE)
    for batch in batches[10:]:
        norm(batch)
    torch.testing.assert_close(
        norm.running_mean, 0.81 * means[:10].mean(0) + 0.09 * means[10] + 0.1 * means[11], **SINGLE
    )


@torch.no_grad()
def test_attention_sees_all_tokens_of_its_own_sentence():
    model = tiny_model(SpikeBertForSequenceClassification, "neuromorphic")
    ids, mask = random_ids(3, 6), mask_of(*LENGTHS)
    before = model.spikebert(ids, mask).last_hidden_state
    reached = set()
    for seed in range(8):
        other = ids.clone()
        other[0, 5] = random_ids(1, 1, seed=100 + seed)
        change = (model.spikebert(other, mask).last_hidden_state - before).abs().amax(-1)  # [B, L]
        assert not change[1:].any()
        reached |= set(change[0].nonzero().flatten().tolist())
    assert reached == set(range(6))


def test_onnx_files_do_not_hold_the_variant(tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification, "neuromorphic", torch.float32)
    with pytest.raises(ValueError, match="this model is of neuromorphic"):
        export_onnx(model, tmp_path / "export")
    assert not list(tmp_path.iterdir())
