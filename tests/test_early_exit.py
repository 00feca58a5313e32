"""Stopping at the time step at which a sentence's class is clear."""

import pytest
import torch
from helpers import mask_of, random_ids, tiny_config, tiny_model, tracing
from huggingface_hub.errors import StrictDataclassError

from modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.early_exit_spikebert import confidence, first_confident

pytestmark = tracing
modes = pytest.mark.parametrize("mode", ["default", "reference"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}
IDS, MASK = random_ids(6, 9), mask_of(9, 2, 4, 9, 7, 1)


OPTIONS = ("shortcut", "input_encoding", "position_embedding_type", "type_vocab_size", "mask_padding", "num_labels")


def unsure_classifier(mode: str = "default", **overrides) -> SpikeBertForSequenceClassification:
    """A classifier whose confidence on the sentences above lies on both sides of 0.6."""
    model = tiny_model(SpikeBertForSequenceClassification, mode, **({"num_labels": 3} | overrides))
    with torch.no_grad():
        model.classifier.weight.mul_(0.15)
        model.classifier.bias.zero_()
    return model


@torch.no_grad()
def logits_after(model, steps: int):
    """The logits of the same weights in a model with fewer time steps."""
    fields = {name: getattr(model.config, name) for name in OPTIONS}
    shorter = type(model)(tiny_config(**fields, num_time_steps=steps))
    shorter = shorter.to(model.dtype).eval()
    shorter.load_state_dict(model.state_dict())
    return shorter(IDS, attention_mask=MASK).logits


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("implementation", ["plain", "fused"])
@pytest.mark.parametrize("overrides", [{}, {"v_reset": None}, {"num_time_steps": 7}, {"v_reset": -0.3}], ids=str)
@modes
@torch.no_grad()
def test_a_sentence_gets_the_mean_of_its_scores_up_to_the_first_confident_step(mode, overrides, implementation):
    model = unsure_classifier(mode, **overrides)
    steps = model.config.num_time_steps
    states = model.spikebert(IDS, attention_mask=MASK).hidden_states_per_step  # [T, B, L, D]
    weights = (MASK if model.config.mask_padding else torch.ones_like(MASK)).double()
    weights = (weights / weights.sum(1, keepdim=True)).unsqueeze(-1)
    scores = torch.stack([model.classifier((model.norm(state) * weights).sum(1)) for state in states])
    exits = set()
    for threshold in (0.01, 0.5, 0.6, 0.7, 1.0):
        model.config.exit_threshold, model.config.implementation = threshold, implementation
        outputs = model(IDS, attention_mask=MASK)
        for row in range(len(IDS)):
            taken = int(outputs.exit_steps[row])
            torch.testing.assert_close(outputs.logits[row], scores[:taken, row].mean(0), **EXACT)
            for earlier in range(1, taken):
                assert scores[:earlier, row].mean(0).softmax(-1).max() < threshold
            assert taken == steps or scores[:taken, row].mean(0).softmax(-1).max() >= threshold
            exits.add(taken)
    assert {1, steps} <= exits


@pytest.mark.usefixtures("uncompiled")
@modes
@torch.no_grad()
def test_scores_after_some_steps_are_those_of_a_model_with_fewer(mode):
    model = unsure_classifier(mode)
    model.config.exit_threshold = 0.01
    assert torch.equal(model(IDS, attention_mask=MASK).exit_steps, torch.ones(6, dtype=torch.long))
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, logits_after(model, 1), **EXACT)
    model.config.exit_threshold = None
    outputs = model(IDS, attention_mask=MASK)
    assert outputs.exit_steps is None
    torch.testing.assert_close(outputs.logits, logits_after(model, 4), **EXACT)
    assert not torch.allclose(outputs.logits, logits_after(model, 2))


def test_first_confident_step_by_hand():
    """Two classes; the probability of the larger mean is sigmoid(difference): .731, .622 | .525, .881 | .9 at once."""
    scores = torch.tensor([[[1.0, 0.0], [0.1, 0.0], [2.2, 0.0]], [[0.0, 0.0], [3.9, 0.0], [0.0, 9.0]]])  # [T, B, C]
    chosen, steps = first_confident(scores, 0.8, None)
    assert steps.tolist() == [2, 2, 1]
    torch.testing.assert_close(chosen, torch.tensor([[0.5, 0.0], [2.0, 0.0], [2.2, 0.0]]))


def test_confidence_of_several_labels_is_that_of_the_least_certain():
    scores = torch.tensor([[3.0, -4.0, 0.5], [-3.0, 5.0, 9.0]])
    certain = confidence(scores, "multi_label_classification")
    torch.testing.assert_close(certain, torch.tensor([0.5, 3.0]).sigmoid())


@pytest.mark.usefixtures("uncompiled")
def test_training_and_questions_about_all_steps_take_all_steps():
    model = unsure_classifier(exit_threshold=0.01)
    assert model(IDS, attention_mask=MASK, output_hidden_states=True).exit_steps is None
    assert model(IDS, attention_mask=MASK, output_firing_rates=True).exit_steps is None
    model.config.output_hidden_states = True
    assert model(IDS, attention_mask=MASK).exit_steps is None
    assert model(IDS, attention_mask=MASK, output_hidden_states=False).exit_steps is not None
    model.train()
    outputs = model(IDS, attention_mask=MASK)
    assert outputs.exit_steps is None
    torch.testing.assert_close(outputs.logits, logits_after(model, 4), **EXACT)


@pytest.mark.usefixtures("uncompiled")
def test_gradients_in_evaluation_mode_are_those_of_the_steps_taken():
    model = unsure_classifier(exit_threshold=0.01)
    model(IDS, attention_mask=MASK).logits.sum().backward()
    assert model.classifier.weight.grad.any()
    assert model.spikebert.encoder.layer[0].attention.query.weight.grad.any()


@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_hooks_on_blocks_are_called():
    model = unsure_classifier(exit_threshold=0.6)
    model.config.implementation = "fused"
    expected = model(IDS, attention_mask=MASK)
    seen = []
    model.spikebert.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(IDS, attention_mask=MASK)
    assert len(seen) == 1
    torch.testing.assert_close(outputs.logits, expected.logits, **EXACT)
    assert torch.equal(outputs.exit_steps, expected.exit_steps)


@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_loss_is_that_of_the_early_scores():
    model = unsure_classifier(exit_threshold=0.6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    outputs = model(IDS, attention_mask=MASK, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


@pytest.mark.usefixtures("uncompiled")
def test_threshold_is_saved_and_can_be_given_when_loading(tmp_path):
    model = unsure_classifier(exit_threshold=0.9)
    model.save_pretrained(tmp_path)
    load = SpikeBertForSequenceClassification.from_pretrained
    assert load(tmp_path).config.exit_threshold == 0.9
    assert load(tmp_path, exit_threshold=None).config.exit_threshold is None
    assert load(tmp_path, num_time_steps=2).spikebert.encoding.num_time_steps == 2
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
