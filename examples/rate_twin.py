"""The rate twin of a SpikeBERT: the same weights, and neurons that pass on a firing rate in place of spikes.

A neuron without leak that keeps what lies above its threshold (soft reset) answers a constant current with the rate
`clip(current / v_threshold, 0, 1)`, the more exactly the more time steps it has. So this twin, which needs one pass, is
what a student of ever more time steps comes close to, and a student of one step against it shows what more steps could
give. It is no spiking network. `train_on_gpu.py --form rate` trains one. The folder holds the weights; to load them,
make the twin again: `rate_twin(from_pretrained(...))`.
"""

import torch
import torch.nn.functional as F
from one_bit_bert import twin
from torch import Tensor

from modeling_spikebert.modeling_spikebert import SpikeBertNeuron, SpikeBertPreTrainedModel


class RateNeuron(SpikeBertNeuron):
    """LayerNorm and rate, `[1, ..., D]` to the same."""

    def forward(self, current: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = current.to(torch.promote_types(current.dtype, torch.float32))
        normed = F.layer_norm(wide, current.shape[-1:], self.weight, self.bias, self.eps)
        return (normed / self.neurons.v_threshold).clamp(0, 1).to(current.dtype)


def rate_twin(model: SpikeBertPreTrainedModel) -> SpikeBertPreTrainedModel:
    """Makes a SpikeBERT its twin, in place; the weights stay."""
    return twin(model, {SpikeBertNeuron: RateNeuron})
