# SPDX-License-Identifier: Apache-2.0
"""Early exit over time steps: a sentence whose class is clear needs no further ones.

The class scores after `t` time steps are the mean of those of each step, and no step sees a later one. So they are the
scores of the same model with `num_time_steps=t`, and stopping there changes nothing but the answer's certainty.

Shapes: `T` time steps, `B` batch, `L` tokens, `D` hidden, `C` classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fused_spikebert import fused_layer, pack_tokens, resting_membranes, unpack_tokens


def confidence(scores: Tensor, problem_type: str | None) -> Tensor:
    """Probability of the most likely class, or the least of several labels' certainties: `[..., C]` to `[...]`."""
    if problem_type == "multi_label_classification":
        return scores.abs().sigmoid().amin(-1)
    return scores.softmax(-1).amax(-1)


def first_confident(scores: Tensor, exit_threshold: float, problem_type: str | None) -> tuple[Tensor, Tensor]:
    """The oracle of `step_until_confident`: chooses among the scores of all time steps.

    Args:
        scores: class scores of each time step, `[T, B, C]`.
        exit_threshold: confidence at which a sentence stops.
        problem_type: as in the config.

    Returns:
        `[B, C]`, the mean of the scores up to the first step at which it is confident (the last, if it never is), and
        the number of steps to there, `[B]`.
    """
    count = torch.arange(1, len(scores) + 1, device=scores.device)
    means = scores.cumsum(0) / count[:, None, None]  # [T, B, C]
    confident = confidence(means, problem_type) >= exit_threshold  # [T, B]
    confident[-1] = True
    steps = confident.int().argmax(0)  # [B], of equal ones the first
    return means[steps, torch.arange(scores.shape[1], device=scores.device)], steps + 1


@torch.no_grad()
def step_until_confident(
    encoder: Any,
    hidden_states: Tensor,
    token_mask: Tensor | None,
    head: Callable[[Tensor, Tensor | None], Tensor],
    exit_threshold: float,
    problem_type: str | None,
) -> tuple[Tensor, Tensor]:
    """Computes one time step after the other, each only for the sentences that are not confident yet.

    Args:
        encoder: a `SpikeBertEncoder`; it takes the fused path.
        hidden_states: input of the first block, the same at each time step, `[T, B, L, D]`.
        token_mask: `[B, L]`, 1 for tokens and 0 for padding, or None.
        head: from states `[B, L, D]` and mask to class scores `[B, C]`.
        exit_threshold, problem_type: as in `first_confident`.

    Returns:
        as `first_confident`.
    """
    num_time_steps, batch = hidden_states.shape[:2]
    x, tokens = pack_tokens(hidden_states[:1], token_mask)  # [1, N, D]
    membranes = [resting_membranes(layer, x.shape[1]) for layer in encoder.layer]
    running = torch.arange(batch, device=x.device)  # the sentences that are not confident yet
    steps = running.new_full((batch,), num_time_steps)
    chosen: Any = None
    total: Any = 0.0
    for step in range(1, num_time_steps + 1):
        states = x
        for index, layer in enumerate(encoder.layer):
            states, _, membranes[index] = fused_layer(layer, states, tokens, False, membranes[index])
        total = total + head(unpack_tokens(states[0], tokens), token_mask)  # [B, C]
        scores = total / step
        if chosen is None:
            chosen = torch.empty_like(scores)
        chosen[running] = scores  # of those that go on, written again at the next step
        if step == num_time_steps:
            break
        goes_on = confidence(scores, problem_type) < exit_threshold
        steps[running[~goes_on]] = step
        if not goes_on.any():
            break
        if not goes_on.all():
            running, total = running[goes_on], total[goes_on]
            stays, tokens = tokens.keep(goes_on)
            x = x[:, stays]
            membranes = [[v[stays] for v in of_layer] for of_layer in membranes]
            token_mask = None if token_mask is None else token_mask[goes_on]
    return chosen, steps
