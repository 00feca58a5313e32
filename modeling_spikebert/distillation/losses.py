"""The losses of both distillation stages, each as one number for each sentence of the batch.

A sentence's loss is a mean over its own real tokens (and over the mapped layers), so the weight of a loss does not
depend on padding, length, depth or batch size; the trainer divides the sum over sentences by their number, across
gradient accumulation and processes. `docs/distillation.md` has the equations beside the published ones.

Shapes: `B` batch, `L` tokens, `D` width of the teacher, `C` classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling_spikebert import masked_mean


def hidden_state_loss(projected: Sequence[Tensor], targets: Sequence[Tensor], token_mask: Tensor) -> Tensor:
    """Mean squared error between projected student states and normalised teacher states, mean over mapped layers.

    The published loss is the plain MSE, whose size follows the scale of the teacher's states; here each target vector
    is normalised (mean 0, variance 1), after Patient Knowledge Distillation (Sun et al., EMNLP 2019, eq. 7).

    Args:
        projected: student states behind their projections, one `[B, L, D]` for each mapped layer.
        targets: the teacher's states of the same layers, `[B, L, D]`.
        token_mask: `[B, L]`, 1 for tokens and 0 for padding.

    Returns:
        `[B]`; 0 where they agree, about 1 for a projection that predicts nothing.
    """
    per_layer = [
        masked_mean((p - F.layer_norm(t, t.shape[-1:])).square().mean(-1, keepdim=True), token_mask).squeeze(-1)
        for p, t in zip(projected, targets, strict=True)
    ]
    return sum(per_layer[1:], per_layer[0]) / len(per_layer)


def embedding_loss(projected: Tensor, targets: Tensor, token_mask: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error between the word embeddings of the sentence's tokens, in units of the teacher's variance.

    The published code compares the whole embedding tables; here each row counts as often as its token occurs.

    Args:
        projected: the student's word embeddings, `[B, L, D]`.
        targets: the teacher's word embeddings, `[B, L, D]`.
        token_mask: `[B, L]`, 1 for tokens and 0 for padding.
        variance: of the teacher's embedding table, a scalar.

    Returns:
        `[B]`.
    """
    return masked_mean((projected - targets).square().mean(-1, keepdim=True), token_mask).squeeze(-1) / variance


def firing_rate_loss(firing_rates: Sequence[Tensor], target: float) -> Tensor:
    """How far firing rates lie above the target, mean over all signals of all blocks.

    A rate at or below the target costs nothing, so that a signal which is sparse enough is left alone.

    Args:
        firing_rates: of each block, `[B, 7]`; see `SpikeBertModelOutput`.
        target: in spikes per neuron and time step.

    Returns:
        `[B]`.
    """
    return F.relu(torch.cat(tuple(firing_rates), dim=-1) - target).mean(-1)


def logit_loss(logits: Tensor, teacher_logits: Tensor, temperature: float, problem_type: str | None) -> Tensor:
    """How far the student's prediction is from the teacher's.

    One label: `temperature**2 * KL(teacher || student)` of the softened distributions (Hinton et al., 2015). Several
    labels: the same for each label's Bernoulli distribution, mean over labels. Regression: mean squared error.

    Args:
        logits: of the student, `[B, C]`.
        teacher_logits: `[B, C]`.
        temperature: softens both distributions; 1 in the published script.
        problem_type: of the config; None means one label, or regression if there is one logit.

    Returns:
        `[B]`.
    """
    if problem_type == "regression" or (problem_type is None and logits.shape[-1] == 1):
        return F.mse_loss(logits, teacher_logits, reduction="none").mean(-1)
    student, teacher = logits / temperature, teacher_logits / temperature
    if problem_type == "multi_label_classification":
        p = teacher.sigmoid()
        divergence = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
        divergence = divergence + (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return temperature**2 * divergence.mean(-1)
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)
