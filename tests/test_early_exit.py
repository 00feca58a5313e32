"""The cascade: one time step for all sentences, and more for those whose class is not clear."""

from pathlib import Path

import pytest
import torch
from helpers import fast_forms, mask_of, random_ids, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.modeling_spikebert import confidence

modes = pytest.mark.parametrize("mode", ["default", "reference"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}
IDS, MASK = random_ids(6, 9), mask_of(9, 2, 4, 9, 7, 1)


pytestmark = pytest.mark.usefixtures("kernels_at_once")


def unsure_classifier(mode: str = "default", **overrides) -> SpikeBertForSequenceClassification:
    """A classifier whose confidence on the sentences above lies on both sides of 0.6."""
    model = tiny_model(SpikeBertForSequenceClassification, mode, **({"num_labels": 3} | overrides))
    with torch.no_grad():
        model.classifier.weight.mul_(0.15)
        model.classifier.bias.zero_()
    return model


@torch.no_grad()
def scores_after(model: SpikeBertForSequenceClassification, steps: int) -> Tensor:
    """Of all sentences, without early exit: by the mean of the first steps of all, restated."""
    states = model.spikebert(IDS, attention_mask=MASK).hidden_states_per_step[:steps]  # [T, B, L, D]
    weights = (MASK if model.config.variant == "membrane" else torch.ones_like(MASK)).double()
    weights = (weights / weights.sum(1, keepdim=True)).unsqueeze(-1)
    return torch.stack([model.classifier((model.norm(state) * weights).sum(1)) for state in states]).mean(0)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "naive"])
@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        ({}, [1, 2, 4]),
        ({"v_reset": None}, [1, 2, 4]),
        ({"v_reset": -0.3, "num_time_steps": 7}, [1, 2, 4, 7]),
        ({"num_time_steps": 1}, [1]),
        ({"num_time_steps": 2}, [1, 2]),
    ],
    ids=["hard", "soft", "T7", "T1", "T2"],
)
@modes
@torch.no_grad()
def test_a_sentence_takes_the_first_stage_that_is_sure(mode, overrides, stages, fast):
    model = unsure_classifier(mode, **overrides)
    scores = {steps: scores_after(model, steps) for steps in stages}
    sure = {steps: x.softmax(-1).amax(-1) for steps, x in scores.items()}
    exits = set()
    for threshold in (0.01, 0.5, 0.6, 0.7, 1.0):
        model.config.exit_threshold = threshold
        with fast_forms(fast):
            outputs = model(IDS, attention_mask=MASK)
        for row, taken in enumerate(outputs.exit_steps.tolist()):
            assert taken == next((t for t in stages if sure[t][row] >= threshold), stages[-1])
            torch.testing.assert_close(outputs.logits[row], scores[taken][row], **EXACT)
            exits.add(taken)
    assert {1, stages[-1]} <= exits


@modes
@torch.no_grad()
def test_scores_after_some_steps_are_those_of_a_model_with_fewer(mode):
    model = unsure_classifier(mode)
    for steps in (1, 2, 4):
        shorter = unsure_classifier(mode, num_time_steps=steps)
        logits = shorter(IDS, attention_mask=MASK).logits
        torch.testing.assert_close(scores_after(model, steps), logits, **EXACT)
        torch.testing.assert_close(model(IDS, attention_mask=MASK, num_time_steps=steps).logits, logits, **EXACT)
    assert not torch.allclose(scores_after(model, 4), scores_after(model, 2))


@torch.no_grad()
def test_only_unsure_sentences_are_computed_again():
    model = unsure_classifier(exit_threshold=0.6)
    seen = []
    model.spikebert.encoding.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    steps = model(IDS, attention_mask=MASK).exit_steps
    tokens = MASK.sum(1)
    expected = [(t, int(tokens[steps >= t].sum())) for t in (1, 2, 4)]
    assert seen == expected
    assert expected[0][1] > expected[1][1] > 0
    seen.clear()
    model.config.exit_threshold = 0.01
    model(IDS, attention_mask=MASK)
    assert seen == [(1, 32)], "all are sure"
    seen.clear()
    model.config.exit_threshold = 0.6
    assert model(IDS, attention_mask=MASK, num_time_steps=3).exit_steps.max() == 3
    assert [steps for steps, _ in seen] == [1, 2, 3]


@torch.no_grad()
def test_each_input_follows_its_sentence():
    """And those that belong to all sentences stay whole."""
    model = unsure_classifier()
    types = random_ids(6, 9, vocab_size=2) * torch.arange(6).remainder(2).unsqueeze(1)
    positions = torch.arange(9).flip(0)
    embeds = model.get_input_embeddings()(IDS)
    given = {"attention_mask": MASK, "token_type_ids": types, "position_ids": positions}
    first = confidence(model(IDS, **given, num_time_steps=1).logits, None)
    model.config.exit_threshold = first.median().item()  # half of them are sure at once
    expected = model(IDS, **given)
    assert len(expected.exit_steps.unique()) > 1
    for same in (positions.unsqueeze(0), positions.expand(6, 9)):
        outputs = model(inputs_embeds=embeds, **(given | {"position_ids": same}))
        torch.testing.assert_close(outputs.logits, expected.logits, **EXACT)
        assert torch.equal(outputs.exit_steps, expected.exit_steps)
    for row in range(6):
        part = slice(row, row + 1)
        alone = model(IDS[part], MASK[part], token_type_ids=types[part], position_ids=positions)
        torch.testing.assert_close(alone.logits, expected.logits[part], **EXACT)
        assert alone.exit_steps.tolist() == expected.exit_steps[part].tolist()


def test_confidence_of_several_labels_is_that_of_the_least_certain():
    scores = torch.tensor([[3.0, -4.0, 0.5], [-3.0, 5.0, 9.0]])
    certain = confidence(scores, "multi_label_classification")
    torch.testing.assert_close(certain, torch.tensor([0.5, 3.0]).sigmoid())


def test_confidence_by_hand():
    """Two classes; the probability of the larger score is sigmoid(difference)."""
    scores = torch.tensor([[1.0, 0.0], [0.1, 0.0], [0.0, 9.0]])
    torch.testing.assert_close(confidence(scores, None), torch.tensor([1.0, 0.1, 9.0]).sigmoid())


def test_training_and_questions_about_all_steps_take_all_steps():
    model = unsure_classifier(exit_threshold=0.01)
    for question in ("output_hidden_states", "output_firing_rates", "output_attentions", "output_logits_per_step"):
        outputs = model(IDS, attention_mask=MASK, **{question: True})
        assert outputs.exit_steps is None
        torch.testing.assert_close(outputs.logits, scores_after(model, 4), **EXACT)
    model.config.output_hidden_states = True
    assert model(IDS, attention_mask=MASK).exit_steps is None
    assert model(IDS, attention_mask=MASK, output_hidden_states=False).exit_steps is not None
    model.train()
    outputs = model(IDS, attention_mask=MASK)
    assert outputs.exit_steps is None
    torch.testing.assert_close(outputs.logits, scores_after(model, 4), **EXACT)


def test_gradients_in_evaluation_mode_are_those_of_the_steps_taken():
    model = unsure_classifier(exit_threshold=0.6)
    outputs = model(IDS, attention_mask=MASK)
    outputs.logits.square().sum().backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert results["spikebert.encoder.layer.0.attention.query.weight"].any()
    model.zero_grad()
    model.config.exit_threshold = None
    for row, steps in enumerate(outputs.exit_steps.tolist()):
        part = slice(row, row + 1)
        model(IDS[part], MASK[part], num_time_steps=steps).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(results[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_loss_is_that_of_the_early_scores():
    model = unsure_classifier(exit_threshold=0.6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    outputs = model(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


@torch.no_grad()
def test_bad_input_is_refused_before_the_batch_is_taken_apart():
    model = unsure_classifier(exit_threshold=0.6)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(6, 9\), got \(5, 9\)"):
        model(IDS, attention_mask=MASK[:5])
    with pytest.raises(ValueError, match="Pass either input_ids or inputs_embeds"):
        model()


def test_threshold_is_saved_and_can_be_given_when_loading(tmp_path: Path):
    model = unsure_classifier(exit_threshold=0.9)
    model.save_pretrained(tmp_path)
    load = SpikeBertForSequenceClassification.from_pretrained
    assert load(tmp_path).config.exit_threshold == 0.9
    assert load(tmp_path, exit_threshold=None).config.exit_threshold is None
    assert SpikeBertModel.from_pretrained(tmp_path)(IDS).last_hidden_state is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_threshold": 0.0}, "must be a probability above 0, got 0.0"),
        ({"exit_threshold": 1.5}, "must be a probability above 0, got 1.5"),
        ({"exit_threshold": 0.9, "num_labels": 1}, "must be None in a regression"),
        ({"exit_threshold": 0.9, "problem_type": "regression"}, "must be None in a regression"),
    ],
    ids=str,
)
def test_impossible_threshold_raises(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)
