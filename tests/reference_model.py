"""The published SpikeBERT (arXiv 2308.15122), restated step by step from its equations, slow and plain.

It shares nothing with the package but the names of the weights: loops over time, sentences and heads, and its own step
function. The constants are the published ones and stand here as numbers.
"""

import math

import torch
from torch import Tensor

HEADS = 8
SCALE = 0.125
THRESHOLD = 1.0
ATTENTION_THRESHOLD = 0.5
LAYER_NORM_EPS = 1e-5


class Step(torch.autograd.Function):
    """1 where x >= 0, else 0; backward the ATan surrogate with alpha 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        alpha = 2.0
        return grad * (alpha / 2) / (1 + (math.pi / 2 * alpha * x) ** 2)


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return weights[f"{name}.weight"] * centred / torch.sqrt(variance + LAYER_NORM_EPS) + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]


def neurons(currents: list[Tensor], tau: float, threshold: float = THRESHOLD) -> list[Tensor]:
    """LIF with input decay, from 0, hard reset to 0; the reset is detached."""
    v = torch.zeros_like(currents[0])
    spikes = []
    for x in currents:
        h = v + (x - v) / tau
        s = Step.apply(h - threshold)
        v = h * (1 - s.detach())
        spikes.append(s)
    return spikes


def attention_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(q k^T) v * 0.125` for each sentence and head of `[B, L, D]`, without softmax."""
    width = q.shape[-1] // HEADS
    sentences = []
    for b in range(q.shape[0]):
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            heads.append((q[b, :, part] @ k[b, :, part].t()) @ v[b, :, part] * SCALE)
        sentences.append(torch.cat(heads, -1))
    return torch.stack(sentences)


def reference_forward(
    weights: dict[str, Tensor], input_ids: Tensor, num_layers: int, num_steps: int, tau: float
) -> tuple[Tensor, list[list[Tensor]], dict[str, list[Tensor]]]:
    """Logits `[B, C]`; at each time step the output of each block; and every signal of spikes, by name.

    The first entry of the blocks' outputs is the spikes that enter the first block.
    """
    signals: dict[str, list[Tensor]] = {}

    def branch(x: list[Tensor], name: str, norm: str) -> list[Tensor]:
        currents = [layer_norm(linear(x_t, weights, name), weights, norm) for x_t in x]
        signals[name] = neurons(currents, tau)
        return signals[name]

    embeddings = weights["spikebert.embeddings.word_embeddings.weight"][input_ids]
    x = [Step.apply(embeddings) for _ in range(num_steps)]
    signals["encoding"] = x
    outputs = [x]
    for layer in range(num_layers):
        block = f"spikebert.encoder.layer.{layer}"
        q = branch(x, f"{block}.attention.query", f"{block}.attention.query_neuron")
        k = branch(x, f"{block}.attention.key", f"{block}.attention.key_neuron")
        v = branch(x, f"{block}.attention.value", f"{block}.attention.value_neuron")
        products = [attention_product(q[t], k[t], v[t]) for t in range(num_steps)]
        context = signals[f"{block}.attention.context"] = neurons(products, tau, ATTENTION_THRESHOLD)
        attention = branch(context, f"{block}.attention.output", f"{block}.attention.output_neuron")
        x = [x[t] + attention[t] for t in range(num_steps)]
        hidden = branch(x, f"{block}.mlp.intermediate", f"{block}.mlp.intermediate_neuron")
        mlp = branch(hidden, f"{block}.mlp.output", f"{block}.mlp.output_neuron")
        x = [x[t] + mlp[t] for t in range(num_steps)]
        outputs.append(x)

    logits = torch.zeros(input_ids.shape[0], weights["classifier.bias"].shape[0], dtype=embeddings.dtype)
    for x_t in x:
        pooled = layer_norm(x_t, weights, "norm").mean(1)  # over all positions, padding too
        logits = logits + linear(pooled, weights, "classifier") / num_steps
    return logits, outputs, signals


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for row, label in zip(logits, labels.tolist(), strict=True):
        total = total + torch.logsumexp(row, 0) - row[label]
    return total / len(labels)
