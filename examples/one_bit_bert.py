"""The dense twin of a SpikeBERT: the same weights, taught by the same recipe, with signs for spikes and a softmax.

    python examples/one_bit_bert.py --stage general --teacher runs/bert --train-file text.txt \
        --student-config '{"num_hidden_layers": 6, "num_time_steps": 1}' --output-dir runs/one_bit/stage1
    python examples/one_bit_bert.py --teacher runs/teacher --train-file train.csv --validation-file validation.csv \
        --model-name-or-path runs/one_bit/stage1 --output-dir runs/one_bit/stage2

A neuron of one time step is a one-bit activation, 0 or 1. In its place this has what a one-bit BERT (BinaryBERT, BiT)
has: -1 or 1, and attention weights from a softmax. So a reader sees what spikes cost, or give, at one bit. Options are
those of `spikebert distill`. The folder holds the weights; to load them, make the twin again:
`dense_twin(from_pretrained(...))`.
"""

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from modeling_spikebert.commands.distill import distillation
from modeling_spikebert.commands.options.distill import parse
from modeling_spikebert.modeling_spikebert import SpikeBertNeuron, SpikeBertPreTrainedModel, SpikeBertSelfAttention
from modeling_spikebert.norm_lif_spikebert import LIF, norm_lif
from modeling_spikebert.spike_attention_spikebert import Tokens


class SignNeuron(SpikeBertNeuron):
    """LayerNorm and sign, with the surrogate of the neuron that it was."""

    def forward(self, current: Tensor, mask: Tensor | None = None) -> Tensor:
        step = LIF(tau=1.0, v_threshold=0.0, surrogate=self.neurons.surrogate)
        return 2 * norm_lif(current, step, self.weight, self.bias, self.eps) - 1


class SoftmaxAttention(SpikeBertSelfAttention):
    """`softmax(q k^T / sqrt(d)) v` in the place of `(q k^T) v`."""

    def forward(self, hidden_states: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        signs = self.input_neuron(hidden_states)
        query = self.query_neuron(self.query(signs))
        key = self.key_neuron(self.key(signs))
        value = self.value_neuron(self.value(signs))
        heads = [tokens.unpack(x).unflatten(-1, (self.num_heads, -1)).transpose(2, 3) for x in (query, key, value)]
        mask = None if tokens.mask is None else tokens.mask.bool()[None, :, None, None, :]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask)  # [T, B, H, L, d]
        mixed = mixed.transpose(2, 3).flatten(3).flatten(1, 2)  # [T, B * L, D]
        context = self.context_neuron(mixed if tokens.places is None else mixed.index_select(1, tokens.places))
        return self.dropout(self.output(context)), (signs, query, key, value, context)


def dense_twin(model: SpikeBertPreTrainedModel) -> SpikeBertPreTrainedModel:
    """Makes a SpikeBERT its twin, in place; the weights stay."""
    return twin(model, {SpikeBertNeuron: SignNeuron, SpikeBertSelfAttention: SoftmaxAttention})


def twin(model: SpikeBertPreTrainedModel, classes: dict[type, type]) -> SpikeBertPreTrainedModel:
    """Gives modules of some classes other ones, in place; the weights stay."""
    if model.config.variant != "membrane" or model.config.num_time_steps != 1:
        raise ValueError("The twin is one of the variant membrane with num_time_steps 1.")
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    trainer = distillation(options.model, options.data, options.training)
    dense_twin(trainer.student)
    trainer.train()
    trainer.save_model()
    if trainer.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    return metrics


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"one_bit_bert.py: {error}")
