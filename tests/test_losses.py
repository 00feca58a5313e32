"""Each loss by its algebra: what it is for equal inputs, in its limits, and what it must not depend on."""

import pytest
import torch
import torch.nn.functional as F
from helpers import mask_of
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from modeling_spikebert.distillation.layer_maps import last_layer_map, skip_layer_map, uniform_layer_map
from modeling_spikebert.distillation.losses import (
    embedding_loss,
    firing_rate_loss,
    hidden_state_loss,
    logit_loss,
)

B, L, D, C = 3, 5, 8, 4
MASK = mask_of(5, 2, 1)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")
DEPTHS = range(1, 25)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return hidden_state_loss([x, 2 * x], [y, y + 1], mask)


def embedding(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return embedding_loss(x, y, mask, torch.tensor(0.3, dtype=torch.float64))


token_losses = pytest.mark.parametrize("loss", [hidden, embedding])


# Firing rates


def test_firing_rate_loss_by_hand():
    rates = [torch.tensor([[0.1, 0.3], [0.0, 0.2]]), torch.tensor([[0.2, 0.6], [0.1, 0.1]])]
    torch.testing.assert_close(firing_rate_loss(rates, 0.0), torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(firing_rate_loss(rates, 0.2), torch.tensor([0.5 / 4, 0.0]))


def test_firing_rate_loss_leaves_rates_below_the_target_alone():
    rates = torch.tensor([[0.1, 0.3, 0.2]], requires_grad=True)
    firing_rate_loss([rates], 0.2).sum().backward()
    torch.testing.assert_close(rates.grad, torch.tensor([[0.0, 1 / 3, 0.0]]))


# Hidden states


def test_hidden_state_loss_is_zero_at_the_layer_normalised_target():
    targets = [random(B, L, D, seed=i) * 7 + 3 for i in range(2)]
    normalised = [
        (t - t.mean(-1, keepdim=True)) / (t.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for t in targets
    ]
    torch.testing.assert_close(
        hidden_state_loss(normalised, targets, MASK), torch.zeros(B, dtype=torch.float64), **CLOSE
    )
    assert (hidden_state_loss(targets, targets, MASK) > 1).all()


def test_hidden_state_loss_is_one_for_a_projection_that_predicts_nothing():
    target = random(B, L, 512)
    loss = hidden_state_loss([torch.zeros_like(target)], [target], MASK)
    torch.testing.assert_close(loss, torch.ones(B, dtype=torch.float64), rtol=1e-4, atol=0)


def test_hidden_state_loss_by_a_plain_loop():
    states, targets = ([random(B, L, D, seed=seed + i) for i in range(3)] for seed in (0, 10))
    expected = []
    for sentence in range(B):
        terms = []
        for state, target in zip(states, targets, strict=True):
            for token in range(int(MASK[sentence].sum())):
                vector = target[sentence, token]
                vector = (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()
                terms.append(((state[sentence, token] - vector) ** 2).mean())
        expected.append(torch.stack(terms).mean())  # each layer has the same number of tokens
    torch.testing.assert_close(hidden_state_loss(states, targets, MASK), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_hidden_state_loss_does_not_depend_on_the_scale_of_the_teacher(scale):
    state, target = random(B, L, D), random(B, L, D, seed=1)
    torch.testing.assert_close(
        hidden_state_loss([state], [scale * target], MASK),
        hidden_state_loss([state], [target], MASK),
        rtol=0.2 if scale < 1 else 1e-4,  # the epsilon of the normalisation is not small beside 1e-2 ** 2
        atol=0,
    )


@pytest.mark.parametrize("times", [2, 5])
def test_hidden_state_loss_does_not_depend_on_depth(times):
    states, targets = ([random(B, L, D, seed=seed + i) for i in range(2)] for seed in (0, 10))
    torch.testing.assert_close(
        hidden_state_loss(states * times, targets * times, MASK), hidden_state_loss(states, targets, MASK), **CLOSE
    )


def test_hidden_state_loss_refuses_different_numbers_of_layers():
    with pytest.raises(ValueError, match="longer than argument 1"):
        hidden_state_loss([random(B, L, D)], [random(B, L, D)] * 2, MASK)


# Embeddings


def test_embedding_loss_is_zero_for_equal_embeddings():
    x = random(B, L, D)
    assert torch.equal(embedding(x, x, MASK), torch.zeros(B, dtype=torch.float64))


def test_embedding_loss_is_in_units_of_the_variance():
    table = random(500, D) * 0.05
    ids = torch.randint(500, (B, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(B, 400)
    predicts_the_mean = table.mean().expand(B, 400, D)
    loss = embedding_loss(predicts_the_mean, table[ids], mask, table.var())
    torch.testing.assert_close(loss, torch.ones(B, dtype=torch.float64), rtol=0.1, atol=0)
    scaled = embedding_loss(9 * predicts_the_mean, 9 * table[ids], mask, (9 * table).var())
    torch.testing.assert_close(scaled, loss, **CLOSE)


# Padding, length and batch


@token_losses
@pytest.mark.parametrize("filling", [0.0, -1e30, 1e100])
def test_padding_has_no_influence_on_value_and_gradient(loss, filling):
    values, gradients = [], []
    for fill in (1.0, filling):
        x, y = random(B, L, D), random(B, L, D, seed=1)
        x[MASK == 0] = fill
        y[MASK == 0] = fill
        x.requires_grad_()
        value = loss(x, y, MASK)
        values.append(value.detach())
        gradients.append(*torch.autograd.grad(value.sum(), x))
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[1][MASK == 0].any()
    assert gradients[1][MASK == 1].all()


@token_losses
def test_padding_may_be_cut_off(loss):
    x, y = random(1, L, D), random(1, L, D, seed=1)
    torch.testing.assert_close(
        loss(x, y, mask_of(2).new_tensor([[1, 1, 0, 0, 0]])), loss(x[:, :2], y[:, :2], mask_of(2))
    )


@token_losses
def test_token_losses_do_not_depend_on_length(loss):
    x, y = random(B, L, D), random(B, L, D, seed=1)
    mask = torch.ones(B, L)
    thrice = loss(x.repeat(1, 3, 1), y.repeat(1, 3, 1), mask.repeat(1, 3))
    torch.testing.assert_close(thrice, loss(x, y, mask), **CLOSE)


@token_losses
def test_token_losses_of_a_sentence_do_not_depend_on_its_batch(loss):
    x, y = random(B, L, D), random(B, L, D, seed=1)
    together = loss(x, y, MASK)
    for row in range(B):
        alone = loss(x[row : row + 1], y[row : row + 1], MASK[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], **CLOSE)
    torch.testing.assert_close(
        loss(x.repeat(2, 1, 1), y.repeat(2, 1, 1), MASK.repeat(2, 1)), together.repeat(2), **CLOSE
    )


# Logits


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_loss_is_zero_only_for_equal_logits(problem_type, temperature):
    x, y = random(B, C).requires_grad_(), random(B, C, seed=1)
    same = logit_loss(x, x.detach(), temperature, problem_type)
    torch.testing.assert_close(same, torch.zeros(B, dtype=torch.float64), **CLOSE)
    (gradient,) = torch.autograd.grad(same.sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(x), **CLOSE)
    assert (logit_loss(x, y, temperature, problem_type) > 1e-3).all()


def test_logit_loss_at_temperature_one_is_torchs_kl_divergence():
    x, y = random(B, C), random(B, C, seed=1)
    loss = logit_loss(x, y, 1.0, "single_label_classification")
    expected = F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss.mean(), expected, **CLOSE)
    for row in range(B):
        expected = kl_divergence(
            torch.distributions.Categorical(logits=y[row]), torch.distributions.Categorical(logits=x[row])
        )
        torch.testing.assert_close(loss[row], expected, **CLOSE)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_logit_loss_softens_both_models_and_scales_by_the_squared_temperature(temperature):
    x, y = random(B, C), random(B, C, seed=1)
    torch.testing.assert_close(
        logit_loss(x, y, temperature, None),
        temperature**2 * logit_loss(x / temperature, y / temperature, 1.0, None),
        **CLOSE,
    )


def test_logit_loss_at_high_temperature_is_half_the_variance_of_the_difference():
    # KL of softmax(y / t) and softmax(x / t) is Var(y - x) / (2 t^2) to leading order.
    x, y = random(B, C), random(B, C, seed=1)
    limit = (y - x).var(-1, unbiased=False) / 2
    torch.testing.assert_close(logit_loss(x, y, 1e4, None), limit, rtol=1e-3, atol=0)


def test_logit_loss_ignores_a_constant_added_to_all_classes():
    x, y = random(B, C), random(B, C, seed=1)
    torch.testing.assert_close(logit_loss(x + 5, y - 3, 2.0, None), logit_loss(x, y, 2.0, None), **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_multi_label_logit_loss_is_the_mean_of_bernoulli_divergences(temperature):
    x, y = random(B, C), random(B, C, seed=1)
    expected = kl_divergence(Bernoulli(logits=y / temperature), Bernoulli(logits=x / temperature))  # [B, C]
    torch.testing.assert_close(
        logit_loss(x, y, temperature, "multi_label_classification"), temperature**2 * expected.sum(-1) / C, **CLOSE
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_regression_logit_loss_is_the_mean_squared_error(temperature):
    x, y = random(B, C), random(B, C, seed=1)
    torch.testing.assert_close(logit_loss(x, y, temperature, "regression").mean(), F.mse_loss(x, y), **CLOSE)


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_logit_loss_of_a_certain_teacher_is_finite(problem_type):
    x = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = logit_loss(x, -x.detach(), 1.0, problem_type)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss.item(), 400.0 if problem_type is None else 200.0)
    assert torch.isfinite(gradient).all()
    assert gradient.any()


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_logit_loss_does_not_depend_on_the_batch(problem_type):
    x, y = random(B, C), random(B, C, seed=1)
    together = logit_loss(x, y, 2.0, problem_type)
    for row in range(B):
        torch.testing.assert_close(
            logit_loss(x[row : row + 1], y[row : row + 1], 2.0, problem_type), together[row : row + 1], **CLOSE
        )


# The layer map


def test_layer_map_is_even_and_ends_at_the_last_layer():
    for student in DEPTHS:
        for teacher in DEPTHS:
            layers = uniform_layer_map(student, teacher)
            assert len(layers) == student
            assert layers[-1] == teacher
            assert layers == sorted(layers)
            assert layers[0] >= 1
            spread = [layer - i * teacher / student for i, layer in enumerate(layers, start=1)]
            assert all(-0.5 <= distance < 1 for distance in spread), (student, teacher, layers)
            if student <= teacher:
                assert len(set(layers)) == student
            else:
                assert set(layers) == set(range(1, teacher + 1))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (12, 12, list(range(1, 13))),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (3, 6, [2, 4, 6]),
        (1, 12, [12]),
        (4, 2, [1, 1, 2, 2]),
        (5, 12, [2, 5, 7, 10, 12]),
    ],
)
def test_layer_map_examples(student, teacher, expected):
    assert uniform_layer_map(student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "last", "skip"),
    [
        (6, 12, [7, 8, 9, 10, 11, 12], [2, 4, 6, 8, 10, 12]),
        (5, 12, [8, 9, 10, 11, 12], [2, 4, 6, 8, 10]),
        (2, 2, [1, 2], [1, 2]),
        (4, 2, [1, 1, 1, 2], [1, 2, 2, 2]),
        (1, 6, [6], [6]),
    ],
)
def test_layer_maps_last_and_skip(student, teacher, last, skip):
    assert last_layer_map(student, teacher) == last
    assert skip_layer_map(student, teacher) == skip


def test_the_published_layer_map_misses_the_last_layer():
    teacher_layers = list(range(13))  # hidden states of a 12-layer teacher: embeddings and 12 layers
    published = teacher_layers[1:][:: 12 // 6]
    assert published == [1, 3, 5, 7, 9, 11]
    assert 12 not in published
    assert 12 in uniform_layer_map(6, 12)
