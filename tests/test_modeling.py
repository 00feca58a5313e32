"""The common model tests of transformers, rewritten for SpikeBERT, and its own properties."""

import copy
import itertools
import math
from typing import Literal, get_origin

import pytest
import torch
import transformers
from helpers import mask_of, random_ids, tiny_config, tiny_model, tracing
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification, SpikeBertModel
from modeling_spikebert.modeling_spikebert import FIRING_RATE_NAMES, SpikeBertBatchNorm, SpikeBertNeuron
from modeling_spikebert.spike_attention_spikebert import Tokens

modes = pytest.mark.parametrize("mode", ["default", "reference", "neuromorphic"])
classes = pytest.mark.parametrize(
    "cls", [SpikeBertModel, SpikeBertForSequenceClassification], ids=["base", "classifier"]
)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 0, "atol": 1e-10}


def main_output(outputs) -> Tensor:
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def classifier(mode: str = "default", **overrides) -> SpikeBertForSequenceClassification:
    return tiny_model(SpikeBertForSequenceClassification, mode, **({"num_labels": 3} | overrides))


@pytest.fixture
def library_log(caplog):
    """The log of transformers, which does not reach the root logger by default."""
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # then torch.empty fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


# Saving and loading


@modes
@classes
def test_save_and_load_twice_keeps_weights_and_outputs_to_the_bit(tmp_path, cls, mode):
    model = tiny_model(cls, mode, torch.float32)
    model.save_pretrained(tmp_path / "first")
    once = cls.from_pretrained(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    twice = cls.from_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    ids, mask = random_ids(3, 6), mask_of(6, 2, 4)
    for loaded in (once, twice):
        assert not loaded.training
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        assert torch.equal(main_output(loaded(ids, mask)), main_output(model(ids, mask)))


@modes
def test_auto_classes_load_a_saved_model(tmp_path, mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode, torch.float32)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SpikeBertConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is SpikeBertModel
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is SpikeBertForSequenceClassification
    ids = random_ids(2, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@modes
def test_config_survives_saving_and_loading(tmp_path, mode):
    config = tiny_config(mode, tau=3, v_reset=-0.5, num_labels=5, classifier_dropout=0.1)
    config.save_pretrained(tmp_path)
    assert SpikeBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert set(config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSequenceClassification"}


def saved_with(path, change):
    """A saved classifier whose weights went through `change`; returns the weights."""
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, num_labels=3)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return weights


def load(path, cls=SpikeBertForSequenceClassification, **options):
    return cls.from_pretrained(path, output_loading_info=True, **options)


def test_complete_checkpoint_reports_nothing(tmp_path):
    saved_with(tmp_path, lambda weights: None)
    _, info = load(tmp_path)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_unexpected_keys_are_reported(tmp_path, library_log):
    saved_with(tmp_path, lambda weights: weights.update({"spikebert.encoder.bogus.weight": torch.ones(2)}))
    _, info = load(tmp_path)
    assert set(info["unexpected_keys"]) == {"spikebert.encoder.bogus.weight"}
    assert not info["missing_keys"]
    assert "bogus.weight" in library_log.text
    assert "UNEXPECTED" in library_log.text


def test_prefix_left_by_a_multi_gpu_wrapper_raises(tmp_path):
    """The published code loads `module.*` with strict=False: nothing loads, silently."""

    def wrap(weights):
        for name in list(weights):
            weights[f"module.{name}"] = weights.pop(name)

    saved_with(tmp_path, wrap)
    with pytest.raises(OSError, match=r"model\.safetensors has no classifier\.bias .* It has module\.classifier\.bias"):
        load(tmp_path)


def test_mismatched_sizes_raise(tmp_path):
    saved_with(tmp_path, lambda weights: weights.update({"classifier.weight": torch.ones(7, 32)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)


def test_mismatched_sizes_are_reported_when_allowed(tmp_path):
    saved_with(tmp_path, lambda weights: None)
    model, info = load(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (5, 32)
    assert model.classifier.weight.isfinite().all()


def test_classifier_from_a_base_checkpoint_misses_exactly_its_head(tmp_path):
    base = tiny_model(SpikeBertModel, dtype=torch.float32)
    base.save_pretrained(tmp_path)
    model, info = load(tmp_path)
    head = {"norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
    assert set(info["missing_keys"]) == head
    assert not info["unexpected_keys"]
    ids = random_ids(2, 5)
    assert torch.equal(model.spikebert(ids).last_hidden_state, base(ids).last_hidden_state)


def test_base_from_a_classifier_checkpoint_loads_all_but_the_head(tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    base, info = load(tmp_path, SpikeBertModel)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {"norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
    ids = random_ids(2, 5)
    assert torch.equal(model.spikebert(ids).last_hidden_state, base(ids).last_hidden_state)


def test_folder_without_weights_raises(tmp_path):
    saved_with(tmp_path, lambda weights: None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(tmp_path)


# Initialisation


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@modes
@classes
def test_from_pretrained_initialises_what_does_not_fit(tmp_path, cls, mode):
    model = tiny_model(cls, mode, torch.float32, initializer_range=0.05, intermediate_size=96)
    model.save_pretrained(tmp_path)
    name = "encoder.layer.0.attention.query.bias" if cls is SpikeBertModel else "classifier.bias"
    weights = {other: torch.zeros(1, dtype=weight.dtype) for other, weight in model.state_dict().items()}
    weights[name] = torch.full_like(model.state_dict()[name], 7)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    loaded, info = load(tmp_path, cls, ignore_mismatched_sizes=True)
    assert {other for other, *_ in info["mismatched_keys"]} == set(model.state_dict()) - {name}
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert (tensors.pop(name) == 7).all()
    stds = {nn.Linear: 0.05, nn.Embedding: 1.0 if mode == "reference" else 0.02}
    for path, module in loaded.named_modules():
        std = next((std for kind, std in stds.items() if isinstance(module, kind)), None)
        if std is not None:
            weight = tensors.pop(f"{path}.weight")
            deviations = 4 / weight.numel() ** 0.5  # of the mean, in standard deviations
            assert weight.std().item() == pytest.approx(std, rel=deviations), path
            assert abs(weight.mean().item()) < deviations * std, path
        elif isinstance(module, nn.LayerNorm | SpikeBertNeuron | SpikeBertBatchNorm) and module.weight is not None:
            undoes_leak = isinstance(module, SpikeBertBatchNorm) and not path.endswith("embeddings.batch_norm")
            gain = torch.full((len(module.weight),), 2.0 if undoes_leak else 1.0)  # 2 is tau
            assert torch.equal(tensors.pop(f"{path}.weight"), gain), path
        if isinstance(module, SpikeBertBatchNorm):
            assert torch.equal(tensors.pop(f"{path}.running_mean"), torch.zeros(len(module.weight))), path
            assert torch.equal(tensors.pop(f"{path}.running_var"), torch.ones(len(module.weight))), path
            assert tensors.pop(f"{path}.num_batches_tracked") == 0, path
        if f"{path}.bias" in tensors:
            bias = tensors.pop(f"{path}.bias").abs().max().item()
            bound = module.in_features**-0.5 if isinstance(module, nn.Linear) else 0  # as published: torch's default
            assert bound / 2 <= bias <= bound, path
    assert not tensors, "tensors whose initial values nothing checks"


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@modes
def test_new_model_has_the_documented_initial_weights(mode):
    torch.manual_seed(0)
    model = SpikeBertForSequenceClassification(tiny_config(mode, initializer_range=0.05, intermediate_size=96))
    weights = model.state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
    embeddings = weights["spikebert.embeddings.word_embeddings.weight"]
    assert embeddings.std().item() == pytest.approx(1.0 if mode == "reference" else 0.02, rel=0.1)
    query = weights["spikebert.encoder.layer.0.attention.query.weight"]
    assert query.std().item() == pytest.approx(0.05, rel=0.1)


@modes
@classes
def test_a_model_on_the_meta_device_holds_no_real_tensor(cls, mode):
    with torch.device("meta"):
        model = cls(tiny_config(mode))
    for module in model.modules():
        tensors = [value for value in vars(module).values() if isinstance(value, Tensor)]
        assert not tensors, f"{type(module).__name__} has a tensor that from_pretrained would leave on meta"
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@modes
@classes
def test_tensors_are_contiguous_and_none_is_shared(tmp_path, cls, mode):
    model = tiny_model(cls, mode, torch.float32)
    model.save_pretrained(tmp_path)
    for instance in (model, cls.from_pretrained(tmp_path)):
        tensors = list(instance.state_dict().values())
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
        assert all(tensor.is_contiguous() for tensor in tensors)


# Outputs


@modes
@classes
def test_tuple_and_dict_outputs_agree(cls, mode):
    model = tiny_model(cls, mode)
    options = {"output_hidden_states": True, "output_attentions": True, "output_firing_rates": True}
    if cls is SpikeBertForSequenceClassification:
        options["labels"] = torch.tensor([0, 1])
    ids, mask = random_ids(2, 6), mask_of(6, 3)
    as_dict = model(ids, mask, **options)
    as_tuple = model(ids, mask, return_dict=False, **options)
    assert type(as_tuple) is tuple
    assert len(as_tuple) == len(as_dict.to_tuple()) == 5
    torch.testing.assert_close(as_tuple, as_dict.to_tuple(), **EXACT)
    model.config.return_dict = False
    torch.testing.assert_close(model(ids, mask, **options), as_dict.to_tuple(), **EXACT)


@modes
@classes
def test_outputs_that_were_not_asked_for_are_absent(cls, mode):
    outputs = tiny_model(cls, mode)(random_ids(2, 5))
    expected = {"logits"} if "logits" in outputs else {"last_hidden_state", "hidden_states_per_step"}
    assert set(outputs) == expected


@modes
def test_hidden_states_are_the_embeddings_and_the_blocks_averaged_over_time(mode):
    model = tiny_model(SpikeBertModel, mode, num_hidden_layers=3, num_time_steps=3)
    blocks = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, inputs, output: blocks.append(output[0]))
    ids = random_ids(2, 5)
    outputs = model(ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    assert torch.equal(outputs.hidden_states[0], model.embeddings(ids, None, None, None))
    for state, block in zip(outputs.hidden_states[1:], blocks, strict=True):
        assert block.shape == (3, 2 * 5, 32)
        assert torch.equal(state, block.mean(0).unflatten(0, (2, 5)))
    assert torch.equal(outputs.hidden_states_per_step, blocks[-1].unflatten(1, (2, 5)))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@classes
def test_output_hidden_states_of_the_config_is_honoured(cls):
    model = tiny_model(cls, output_hidden_states=True)
    ids = random_ids(2, 5)
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


@modes
@torch.no_grad()
def test_attentions_count_the_channels_in_which_a_query_and_a_key_fire_at_once(mode):
    model = classifier(mode, num_hidden_layers=2, num_time_steps=3)
    layers = signals_of(model.spikebert)
    lengths = (6, 2, 4)
    attentions = model(random_ids(3, 6), mask_of(*lengths), output_attentions=True).attentions
    starts = [0, 6, 12] if mode == "reference" else [0, 6, 8]  # published: padding is counted
    assert len(attentions) == 2
    for counts, seen in zip(attentions, layers, strict=True):
        expected = torch.zeros(3, 4, 6, 6, dtype=torch.float64)
        for row, start in enumerate(starts):
            size = 6 if mode == "reference" else lengths[row]
            for head, i, j in itertools.product(range(4), range(size), range(size)):
                channels = slice(8 * head, 8 * head + 8)
                both = seen["query"][:, start + i, channels] * seen["key"][:, start + j, channels]  # [T, d]
                if mode == "neuromorphic":  # and the gate is open, and the value fires, too
                    both = both * seen["context"][:, row, channels] * seen["value"][:, start + j, channels]
                expected[row, head, i, j] = both.sum() / 3
        assert torch.equal(counts, expected)
        assert len(counts.unique()) > 4
    torch.testing.assert_close(
        model.spikebert(random_ids(3, 6), mask_of(*lengths), output_attentions=True).attentions, attentions, **EXACT
    )


@classes
def test_output_attentions_of_the_config_is_honoured(cls):
    model = tiny_model(cls, output_attentions=True)
    ids = random_ids(2, 5)
    assert [counts.shape for counts in model(ids).attentions] == [(2, 4, 5, 5)] * 2
    assert model(ids, output_attentions=False).attentions is None


@pytest.mark.parametrize("steps", [1, 3, 6])
@classes
@modes
@torch.no_grad()
def test_time_steps_of_a_call_are_those_of_a_model_with_as_many(cls, mode, steps):
    model, other = tiny_model(cls, mode), tiny_model(cls, mode, num_time_steps=steps)
    assert model.config.num_time_steps == 4
    ids, mask = random_ids(3, 6), mask_of(6, 2, 4)
    options = {"output_hidden_states": True, "output_attentions": True, "output_firing_rates": True}
    outputs, expected = model(ids, mask, num_time_steps=steps, **options), other(ids, mask, **options)
    torch.testing.assert_close(dict(outputs), dict(expected), **EXACT)
    assert not torch.equal(main_output(outputs), main_output(model(ids, mask)))
    assert model.config.num_time_steps == 4


@modes
def test_hidden_states_keep_gradients(mode):
    model = classifier(mode)
    outputs = model(random_ids(2, 5), output_hidden_states=True)
    outputs.hidden_states[0].retain_grad()
    outputs.logits.square().sum().backward()
    assert outputs.hidden_states[0].grad.abs().max() > 0
    for index in (1, 2):  # a loss on a block's output reaches this block and all before it
        model.zero_grad()
        states = model(random_ids(2, 5), output_hidden_states=True).hidden_states
        states[index].retain_grad()
        states[index].square().sum().backward()
        assert states[index].grad.abs().max() > 0
        reached = [layer.mlp.output.weight.grad is not None for layer in model.spikebert.encoder.layer]
        assert reached == [True, index == 2]
        assert model.get_input_embeddings().weight.grad.abs().max() > 0


@modes
def test_every_parameter_gets_a_gradient(mode):
    model = classifier(mode)
    model(random_ids(4, 8), token_type_ids=random_ids(4, 8) % 2, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []


@modes
@classes
def test_inputs_embeds_equal_input_ids(cls, mode):
    model = tiny_model(cls, mode)
    ids, mask = random_ids(2, 6), mask_of(6, 3)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(main_output(model(inputs_embeds=embeds, attention_mask=mask)), main_output(model(ids, mask)))


def test_word_order_and_token_types_count_by_default_but_not_as_published():
    ids = random_ids(1, 7)
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    default, reference = classifier("default"), classifier("reference")
    assert not torch.allclose(default(ids).logits, default(ids.flip(1)).logits, atol=1e-4)
    assert not torch.allclose(default(ids).logits, default(ids, token_type_ids=types).logits, atol=1e-4)
    torch.testing.assert_close(reference(ids).logits, reference(ids.flip(1)).logits, **CLOSE)
    assert torch.equal(reference(ids).logits, reference(ids, token_type_ids=types).logits)


def test_absent_positions_and_types_are_counted_from_zero():
    model = classifier()
    ids = random_ids(2, 6)
    explicit = model(ids, position_ids=torch.arange(6).repeat(2, 1), token_type_ids=torch.zeros_like(ids))
    assert torch.equal(explicit.logits, model(ids).logits)
    assert torch.equal(explicit.logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_time_steps": 1},
        {"v_reset": None},
        {"v_reset": -0.3, "tau": 3.0},
        {"tau": 1},
        {"type_vocab_size": 0},
        {"pad_token_id": None},
        {"surrogate_alpha": 4.0, "v_threshold": 0.7, "attention_v_threshold": 0.3, "attention_scale": 0.3},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_each_option_runs_forward_and_backward_and_changes_the_model(overrides):
    model = classifier(**overrides)
    outputs = model(random_ids(3, 6), labels=torch.tensor([0, 1, 2]), output_firing_rates=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert 0.01 < torch.stack(outputs.firing_rates).mean() < 0.99
    if "pad_token_id" not in overrides:
        assert not torch.allclose(outputs.logits, classifier()(random_ids(3, 6)).logits, atol=1e-6)


@modes
def test_logits_per_step_are_those_of_models_with_so_many_steps_and_so_are_all_gradients(mode):
    model, inputs = classifier(mode, num_time_steps=3).double(), (random_ids(3, 6), mask_of(6, 2, 4))
    per_step = model(*inputs, output_logits_per_step=True).logits_per_step
    apart = torch.stack([model(*inputs, num_time_steps=steps).logits for steps in (1, 2, 3)])
    torch.testing.assert_close(per_step, apart, **CLOSE)
    assert not torch.allclose(apart[0], apart[2])
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(x.square().sum(), parameters) for x in (per_step, apart)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_logits_are_the_last_of_those_per_step_with_dropout_too():
    model = classifier(num_time_steps=3, classifier_dropout=0.5).train()
    outputs = model(random_ids(3, 6), output_logits_per_step=True)
    assert torch.equal(outputs.logits, outputs.logits_per_step[-1])
    assert model(random_ids(3, 6)).logits_per_step is None


@pytest.mark.parametrize("v_reset", [0.0, None, -0.3, 0.3], ids=str)
def test_sign_encoding_fires_where_the_embedding_is_not_negative(v_reset):
    model = tiny_model(SpikeBertModel, "reference", v_reset=v_reset, attention_v_threshold=0.6)
    embeddings = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embeddings[0, 0, :2] = torch.tensor([0.0, -1e-300])
    embeddings = embeddings.flatten(0, 1)  # [N, D]
    encoded = model.encoding(embeddings, 3)
    assert encoded.shape == (3, 10, 32)
    assert torch.equal(encoded, (embeddings >= 0).double().expand(3, -1, -1))


def test_variant_is_the_only_switch():
    kinds = {name: SpikeBertConfig.__annotations__[name] for name in SpikeBertConfig.__annotations__}
    assert [name for name, kind in kinds.items() if get_origin(kind) is Literal or kind is bool] == ["variant"]
    default, published = tiny_config(type_vocab_size=0).to_dict(), tiny_config(variant="published", type_vocab_size=0)
    assert {name for name, value in published.to_dict().items() if value != default[name]} == {"variant"}


@modes
def test_every_combination_of_options_computes(mode):
    choices = {
        "type_vocab_size": [0, 2] if mode == "default" else [0],
        "tau": [1, 2.5],
        "v_reset": [0.0, None, -0.2],
        "num_time_steps": [1, 3],
        "pad_token_id": [0, None],
        "hidden_dropout_prob": [0.0, 0.1],
    }
    for values in itertools.product(*choices.values()):
        overrides = dict(zip(choices, values, strict=True))
        model = classifier(mode, num_hidden_layers=1, **overrides).train()
        outputs = model(random_ids(3, 6), mask_of(6, 2, 4), labels=torch.tensor([0, 1, 2]))
        outputs.loss.backward()
        assert outputs.loss.isfinite(), overrides
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters()), overrides


# Every sentence for itself


LENGTHS = (5, 2, 7, 1)


@pytest.fixture(scope="module")
def sentences():
    """A model, sentences of different lengths, and the logits of each on its own."""
    model = classifier()
    ids = [random_ids(1, length, seed=length) for length in LENGTHS]
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in ids])
    assert alone.std(0).min() > 1e-2, "sentences must differ for the comparison to mean something"
    return model, ids, alone


def batch_of(ids: list[Tensor], length: int, left: bool = False) -> dict[str, Tensor]:
    """Padding on either side with ids that would be noticed if they counted."""
    batch = {
        "input_ids": random_ids(len(ids), length, seed=99),
        "attention_mask": torch.zeros(len(ids), length, dtype=torch.long),
        "position_ids": torch.zeros(len(ids), length, dtype=torch.long),
    }
    for row, sentence in enumerate(ids):
        size = sentence.shape[1]
        place = slice(length - size, length) if left else slice(0, size)
        batch["input_ids"][row, place] = sentence[0]
        batch["attention_mask"][row, place] = 1
        batch["position_ids"][row, place] = torch.arange(size)
    if not left:
        del batch["position_ids"]
    return batch


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("length", [7, 9, 16])
@pytest.mark.parametrize(
    "rows",
    [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0], [1], [1, 1, 2, 1, 0, 3]],
    ids=["all", "reversed", "two", "one", "repeated"],
)
def test_logits_of_a_sentence_do_not_depend_on_its_batch(sentences, rows, length, left):
    model, ids, alone = sentences
    logits = model(**batch_of([ids[row] for row in rows], length, left)).logits
    torch.testing.assert_close(logits, alone[rows], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64], ids=str)
def test_attention_mask_of_any_type_means_the_same(sentences, dtype):
    model, ids, alone = sentences
    batch = batch_of(ids, 9)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    torch.testing.assert_close(model(**batch).logits, alone, **CLOSE)


@torch.no_grad()
def test_hidden_states_of_tokens_do_not_depend_on_padding(sentences):
    model, ids, _ = sentences
    states = model.spikebert(**batch_of(ids, 16)).last_hidden_state
    for row, sentence in enumerate(ids):
        expected = model.spikebert(sentence).last_hidden_state
        torch.testing.assert_close(states[row : row + 1, : sentence.shape[1]], expected, **CLOSE)


def test_gradients_do_not_depend_on_padding(sentences):
    model, ids, _ = sentences
    grads = []
    for length in (7, 16):
        model.zero_grad()
        model(**batch_of(ids, length), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append([model.classifier.weight.grad, model.spikebert.encoder.layer[0].attention.key.weight.grad])
    model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


@torch.no_grad()
def test_reference_sentences_of_one_length_do_not_depend_on_their_batch():
    model = classifier("reference")
    ids = random_ids(4, 6)
    alone = torch.cat([model(row.unsqueeze(0)).logits for row in ids])
    torch.testing.assert_close(model(ids).logits, alone, **CLOSE)
    torch.testing.assert_close(model(ids.flip(0)).logits, alone.flip(0), **CLOSE)


# No state


@modes
@classes
def test_no_state_between_calls(cls, mode):
    model = tiny_model(cls, mode)
    ids, mask = random_ids(3, 6), mask_of(6, 2, 4)
    first = main_output(model(ids, mask))
    attributes = [{name for name in vars(module)} for module in model.modules()]
    assert torch.equal(main_output(model(ids, mask)), first)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}  # BatchNorms learn them
    assert bool(statistics) == (mode == "neuromorphic")
    model.train()
    main_output(model(random_ids(2, 9, seed=5))).sum().backward()
    model.eval()
    model.load_state_dict(statistics, strict=False)
    assert torch.equal(main_output(model(ids, mask)), first)
    assert [{name for name in vars(module)} for module in model.modules()] == attributes
    assert torch.equal(main_output(copy.deepcopy(model)(ids, mask)), first)


def test_dropout_acts_in_training_only():
    model = classifier(hidden_dropout_prob=0.3)
    ids = random_ids(2, 6)
    assert model.dropout.p == 0.3
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert classifier(hidden_dropout_prob=0.3, classifier_dropout=0.0).dropout.p == 0


# Size of the vocabulary


@modes
@classes
def test_resizing_the_vocabulary_up_and_down(tmp_path, cls, mode):
    model = tiny_model(cls, mode, torch.float32)
    ids = random_ids(2, 6, vocab_size=40)
    before, rows = main_output(model(ids)), model.get_input_embeddings().weight.detach().clone()
    for size in (71, 40):
        model.resize_token_embeddings(size)
        weight = model.get_input_embeddings().weight
        assert model.config.vocab_size == weight.shape[0] == size
        assert torch.equal(weight[:40], rows[:40])
        assert torch.equal(main_output(model(ids)), before)
        assert main_output(model(torch.tensor([[size - 1]]))).isfinite().all()
        with pytest.raises(ValueError, match=f"input_ids must lie between 0 and {size - 1}"):
            model(torch.tensor([[size]]))
        model.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert torch.equal(main_output(loaded(ids)), before)


@classes
def test_input_embeddings_can_be_replaced(cls):
    model = tiny_model(cls)
    embeddings = nn.Embedding(64, 32, dtype=torch.float64)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    assert model.base_model.embeddings.word_embeddings is embeddings


# Gradient checkpointing


# The old name is the only one that all supported versions of transformers have.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@modes
@pytest.mark.parametrize(
    "options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=["default", "reentrant", "non-reentrant"]
)
def test_gradient_checkpointing_gives_the_same_gradients(options, mode):
    results = []
    for checkpointing in (False, True):
        model = classifier(mode).train()
        if checkpointing:
            model.gradient_checkpointing_enable(options)
        calls = []
        model.spikebert.encoder.layer[0].mlp.intermediate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        outputs = model(random_ids(3, 6), mask_of(6, 2, 4), labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
        (outputs.loss + outputs.hidden_states[1].sum()).backward()
        assert len(calls) == 1 + checkpointing  # computed again in the backward pass
        results.append((outputs.logits, {name: weight.grad for name, weight in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


# Losses


PROBLEMS = {
    # problem: num_labels, labels of four sentences, the same loss in words of torch
    "single_label_classification": (3, torch.tensor([0, 2, 1, 2]), F.cross_entropy),
    "multi_label_classification": (
        3,
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64),
        F.binary_cross_entropy_with_logits,
    ),
    "regression": (
        1,
        torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
        lambda logits, labels: F.mse_loss(logits.view(-1), labels),
    ),
}
problems = pytest.mark.parametrize("problem", PROBLEMS)


@problems
@modes
def test_loss_of_every_problem_type(mode, problem):
    num_labels, labels, loss = PROBLEMS[problem]
    model = classifier(mode, num_labels=num_labels, problem_type=problem)
    outputs = model(random_ids(4, 6), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    outputs.loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0


@problems
def test_problem_type_is_inferred_from_the_labels(problem):
    num_labels, labels, loss = PROBLEMS[problem]
    model = classifier(num_labels=num_labels)
    assert model.config.problem_type is None
    outputs = model(random_ids(4, 6), labels=labels)
    assert model.config.problem_type == problem
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


def test_regression_on_several_targets():
    model = classifier(num_labels=2, problem_type="regression")
    labels = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = model(random_ids(4, 6), labels=labels)
    torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels))
    one = classifier(num_labels=1, problem_type="regression")
    column = one(random_ids(4, 6), labels=labels[:, :1]).loss
    assert torch.equal(column, one(random_ids(4, 6), labels=labels[:, 0]).loss)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32], ids=str)
def test_integer_labels_of_every_kind_are_taken(dtype):
    single, labels, _ = classifier(), PROBLEMS["single_label_classification"][1], None
    assert torch.equal(
        single(random_ids(4, 6), labels=labels.to(dtype)).loss, single(random_ids(4, 6), labels=labels).loss
    )
    multi, targets = classifier(problem_type="multi_label_classification"), PROBLEMS["multi_label_classification"][1]
    assert torch.equal(
        multi(random_ids(4, 6), labels=targets.to(dtype)).loss, multi(random_ids(4, 6), labels=targets).loss
    )


def test_label_minus_100_is_ignored():
    model = classifier()
    ids = random_ids(3, 6)
    loss = model(ids, labels=torch.tensor([1, -100, 2])).loss
    torch.testing.assert_close(loss, model(ids[[0, 2]], labels=torch.tensor([1, 2])).loss, **CLOSE)


def test_a_batch_without_any_label_has_the_loss_0():
    model = classifier()
    loss = model(random_ids(2, 6), labels=torch.tensor([-100, -100])).loss
    loss.backward()
    assert loss == 0
    assert not model.classifier.weight.grad.any()


@pytest.mark.parametrize("number", [0, -1, math.nan, "2", torch.tensor(0), torch.tensor([1, 2])], ids=repr)
def test_a_number_of_labels_that_nothing_can_be_divided_by_raises(number):
    with pytest.raises(ValueError, match=r"num_items_in_batch must be one number of labels, got .* Pass None"):
        classifier()(random_ids(2, 6), labels=torch.tensor([0, 1]), num_items_in_batch=number)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@problems
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(problem, as_tensor):
    num_labels, labels, _ = PROBLEMS[problem]
    if problem == "single_label_classification":
        labels = torch.tensor([0, -100, 1, 2])
    items = int((labels != -100).sum())  # as the Trainer counts
    model = classifier(num_labels=num_labels, problem_type=problem)
    ids = random_ids(4, 6)
    whole = model(ids, labels=labels).loss
    parts = [
        model(ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(items) if as_tensor else items).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)
    halved = model(ids, labels=labels, num_items_in_batch=2 * items).loss
    torch.testing.assert_close(halved, whole / 2, **CLOSE)


@modes
def test_a_tiny_batch_can_be_learned_by_heart(mode):
    torch.manual_seed(0)
    model = SpikeBertForSequenceClassification(tiny_config(mode, num_labels=3)).train()
    ids, mask, labels = random_ids(6, 8), mask_of(8, 5, 8, 3, 8, 6), torch.tensor([0, 1, 2, 1, 0, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, mask, labels=labels).loss
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# Half precision, compilation, export


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@modes
def test_half_precision_loads_runs_and_saves(tmp_path, mode, dtype):
    tiny_model(SpikeBertForSequenceClassification, mode, torch.float32, num_labels=3).save_pretrained(tmp_path / "full")
    model = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "full", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids, mask = random_ids(3, 6), mask_of(6, 2, 4)
    outputs = model(ids, mask, labels=torch.tensor([0, 1, 2]), output_hidden_states=True, output_firing_rates=True)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype
    assert outputs.logits.isfinite().all()
    assert all(state.dtype == dtype and state.isfinite().all() for state in outputs.hidden_states)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert 0.02 < torch.stack(outputs.firing_rates)[:, 1:5].mean() < 0.98
    model.save_pretrained(tmp_path / "half")
    again = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    assert torch.equal(again(ids, mask).logits, outputs.logits)


@tracing
@modes
def test_torch_compile_has_no_graph_breaks_and_equals_eager(mode):
    model = classifier(mode, num_hidden_layers=1)
    inputs = {"input_ids": random_ids(2, 6), "attention_mask": mask_of(6, 3), "labels": torch.tensor([0, 2])}
    expected = model(**inputs)
    expected.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    outputs = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.logits, expected.logits, **CLOSE)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, grads, **CLOSE)


@tracing
@modes
@torch.no_grad()
def test_torch_export_equals_eager(mode):
    model = classifier(mode, num_hidden_layers=1)
    inputs = {"input_ids": random_ids(2, 6), "attention_mask": mask_of(6, 3)}
    sizes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, **CLOSE)
    other = {"input_ids": random_ids(3, 9, seed=1), "attention_mask": mask_of(9, 4, 1)}
    torch.testing.assert_close(exported(**other).logits, model(**other).logits, **CLOSE)


# Spikes


def signals_of(model: SpikeBertModel) -> list[dict[str, Tensor]]:
    """Fills, at the next call of the model, the signal behind each neuron (or identity) of each layer."""
    layers = []
    for layer in model.encoder.layer:
        seen: dict[str, Tensor] = {}
        layers.append(seen)
        neurons = {name: getattr(layer.attention, f"{name}_neuron") for name in ("query", "key", "value", "context")}
        neurons |= {"attention_input": layer.attention.input_neuron, "mlp_input": layer.mlp.input_neuron}
        neurons["intermediate"] = layer.mlp.intermediate_neuron
        for name, neuron in neurons.items():
            neuron.register_forward_hook(lambda m, i, output, seen=seen, name=name: seen.update({name: output}))
    return layers


@torch.no_grad()
@modes
def test_firing_rates_equal_a_count_of_spikes(mode):
    model = tiny_model(SpikeBertModel, mode, num_time_steps=3)
    layers = signals_of(model)
    lengths = (6, 2, 4)
    rates = model(random_ids(3, 6), mask_of(*lengths), output_firing_rates=True).firing_rates
    assert len(rates) == 2
    assert len(FIRING_RATE_NAMES) == 7
    for rate, seen in zip(rates, layers, strict=True):
        assert rate.shape == (3, 7)
        assert (rate.mean(0) > 0.02).all()
        for column, name in enumerate(FIRING_RATE_NAMES):
            for row, length in enumerate(lengths):
                spikes = places = 0.0
                first, length = (6 * row, 6) if mode == "reference" else (sum(lengths[:row]), length)
                for t in range(3):
                    for token in range(first, first + length):  # published: padding is counted
                        fired = seen[name][t, row if (name, mode) == ("context", "neuromorphic") else token]
                        if (name, mode) == ("context", "neuromorphic"):  # a gate of the sentence, and queries
                            fired = fired * seen["query"][t, token]
                        spikes += fired.sum().item()
                        places += fired.numel()
                assert rate[row, column].item() == pytest.approx(spikes / places, rel=1e-12), (name, row)


@torch.no_grad()
def test_firing_rates_do_not_depend_on_padding():
    model = tiny_model(SpikeBertModel)
    ids = random_ids(2, 5)
    padded = torch.cat([ids, random_ids(2, 4, seed=7)], 1)
    rates = model(ids, output_firing_rates=True).firing_rates
    torch.testing.assert_close(
        model(padded, mask_of(9, 9) * (torch.arange(9) < 5), output_firing_rates=True).firing_rates, rates, **CLOSE
    )


@torch.no_grad()
def test_padding_that_stays_in_changes_no_token():
    """As on an accelerator, and under a compiler."""
    model = tiny_model(SpikeBertModel)
    mask = mask_of(6, 2, 4)
    embeddings = model.embeddings(random_ids(3, 6), None, None, None)
    results = []
    for tokens in (Tokens.of(3, 6, mask), Tokens(3, 6, mask)):
        x = model.encoding(tokens.pack(embeddings), 4)
        x, *others = model.encoder(x, tokens, False, True, True)
        results.append([tokens.unpack(x)[:, mask == 1], *others])
        assert x.shape[1] == (12 if len(results) == 1 else 18)
    torch.testing.assert_close(*results, **CLOSE)


@torch.no_grad()
def test_every_linear_of_a_block_sees_binary_spikes():
    model = tiny_model(SpikeBertModel)
    seen = {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: inputs[0]}))
    states = model(random_ids(3, 6), mask_of(6, 2, 4)).hidden_states_per_step
    assert len(seen) == 2 * 6
    for name, inputs in seen.items():
        assert set(inputs.unique().tolist()) == {0.0, 1.0}, name
    assert not torch.equal(states, states.round()), "the shortcut carries real values"


@torch.no_grad()
def test_reference_shortcut_is_a_sum_of_spikes():
    depth = 3
    model = tiny_model(SpikeBertModel, "reference", num_hidden_layers=depth)
    for index, layer in enumerate(model.encoder.layer):
        layer.register_forward_hook(lambda m, i, output, index=index: streams.update({index: output[0]}))
    streams: dict[int, Tensor] = {}
    model(random_ids(3, 6))
    for index, stream in streams.items():
        assert torch.equal(stream, stream.round())
        assert stream.min() >= 0
        assert 1 < stream.max() <= 1 + 2 * (index + 1)
    assert len(streams) == depth


@modes
def test_constants_of_the_config_reach_the_neurons(mode):
    model = tiny_model(SpikeBertModel, mode, tau=3, v_threshold=0.9, attention_v_threshold=0.4, surrogate_alpha=3.0)
    neurons = {name: module for name, module in model.encoder.named_modules() if isinstance(module, SpikeBertNeuron)}
    assert len(neurons) == 2 * 7
    for name, neuron in neurons.items():
        constants = neuron.neurons
        own = name.endswith("context_neuron") and mode != "neuromorphic"
        assert constants.v_threshold == (0.4 if own else 0.9)
        assert (constants.tau, constants.v_reset, constants.surrogate.alpha) == (3, 0.0, 3.0)


# Students of teachers


TINY_TEACHER = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_TEACHER |= {"intermediate_size": 24, "max_position_embeddings": 12}


def teacher(name: str, **fields):
    torch.manual_seed(0)
    family = name.removesuffix("ForSequenceClassification").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")
    if family == "DistilBert":
        renamed = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
        fields = {"vocab_size": 50, "max_position_embeddings": 12} | renamed | fields
    else:
        fields = TINY_TEACHER | fields
    if family == "Electra":
        fields = {"embedding_size": 16} | fields
    return getattr(transformers, name)(config(**fields))


@pytest.mark.parametrize(
    ("name", "types", "first_position"),
    [
        ("BertForSequenceClassification", 2, 0),
        ("BertModel", 2, 0),
        ("RobertaModel", 1, 2),
        ("RobertaForSequenceClassification", 1, 2),
        ("DistilBertModel", 0, 0),
        ("DistilBertForSequenceClassification", 0, 0),
        ("ElectraModel", 2, 0),
    ],
)
def test_student_fits_its_teacher_and_starts_from_its_embeddings(name, types, first_position, caplog):
    labels = {0: "bad", 1: "so-so", 2: "good"}
    fields = {"type_vocab_size": types} if types else {}
    model = teacher(name, id2label=labels, label2id={label: i for i, label in labels.items()}, **fields)
    student = SpikeBertForSequenceClassification.from_teacher(model, layer_norm_eps=1e-12)  # the teachers' epsilon
    config = student.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50, 16, 2)
    assert (config.num_attention_heads, config.type_vocab_size) == (2, types)
    assert config.max_position_embeddings == 12 - first_position
    assert config.pad_token_id == model.config.pad_token_id
    assert config.id2label == labels
    assert config.label2id == model.config.label2id
    assert student.classifier.out_features == 3

    source, target = model.base_model.embeddings, student.spikebert.embeddings
    assert torch.equal(target.word_embeddings.weight, source.word_embeddings.weight)
    assert torch.equal(target.position_embeddings.weight, source.position_embeddings.weight[first_position:])
    if types:
        assert torch.equal(target.token_type_embeddings.weight, source.token_type_embeddings.weight)
    assert target.word_embeddings.weight.data_ptr() != source.word_embeddings.weight.data_ptr()
    assert not caplog.records

    # The student's embeddings are the teacher's: same tokens, positions and LayerNorm.
    ids = random_ids(2, 12 - first_position, vocab_size=50)
    ids[ids == 1] = 2  # RoBERTa's padding
    with torch.no_grad():
        expected = model.eval().base_model(ids, output_hidden_states=True).hidden_states[0]
        result = student.eval().spikebert(ids, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_student_has_its_teachers_intermediate_size(name):
    assert SpikeBertModel.from_teacher(teacher(name)).config.intermediate_size == 24


def test_student_has_its_teachers_problem_type():
    model = teacher("BertForSequenceClassification", problem_type="multi_label_classification", num_labels=4)
    student = SpikeBertForSequenceClassification.from_teacher(model)
    assert student.config.problem_type == "multi_label_classification"
    assert student.classifier.out_features == 4


def test_student_with_overrides():
    model = teacher("BertForSequenceClassification", num_labels=3)
    student = SpikeBertForSequenceClassification.from_teacher(
        model, num_hidden_layers=1, num_time_steps=2, num_labels=5, intermediate_size=40
    )
    assert len(student.spikebert.encoder.layer) == 1
    assert student.config.num_time_steps == 2
    assert student.config.intermediate_size == 40
    assert student.num_labels == student.config.num_labels == 5
    assert torch.equal(student.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("overrides", "tau"), [({}, 2), ({"num_time_steps": 1}, 1), ({"num_time_steps": 1, "tau": 3.0}, 3)]
)
def test_student_of_one_time_step_has_no_leak(overrides, tau):
    assert SpikeBertModel.from_teacher(teacher("BertModel"), **overrides).config.tau == tau


def test_student_of_another_width_starts_from_random_embeddings_and_says_so(caplog):
    model = teacher("BertModel")
    student = SpikeBertModel.from_teacher(model, hidden_size=24)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        assert f"{name} starts from random weights" in caplog.text
    assert "(50, 24) is not the teacher's (50, 16)" in caplog.text
    assert student.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert student(random_ids(2, 5, vocab_size=50)).last_hidden_state.isfinite().all()


def test_student_of_a_teacher_with_narrow_embeddings_says_that_they_do_not_fit(caplog):
    student = SpikeBertModel.from_teacher(teacher("ElectraModel", embedding_size=8))
    assert student.config.hidden_size == 16
    assert "(50, 16) is not the teacher's (50, 8)" in caplog.text


def test_reference_student_without_positions_takes_the_word_embeddings(caplog):
    model = teacher("BertModel")
    student = SpikeBertModel.from_teacher(model, variant="published")
    assert torch.equal(student.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert student.embeddings.position_embeddings is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("GPT2Model", {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}),
        ("T5Model", {"vocab_size": 50, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}),
        (
            "BartModel",
            {
                "vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            },
        ),
        ("BertModel", TINY_TEACHER | {"is_decoder": True}),
    ],
    ids=["GPT2", "T5", "Bart", "Bert-decoder"],
)  # fmt: skip
def test_teacher_that_is_no_bert_like_encoder_is_refused(name, fields):
    model = getattr(transformers, name)(getattr(transformers, name.replace("Model", "Config"))(**fields))
    with pytest.raises(ValueError, match=f"must be a BERT-like encoder .* got {name} .* Load a BERT, RoBERTa"):
        SpikeBertModel.from_teacher(model)


# Bad configs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, 0) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")],
        *[(name, 0) for name in ("intermediate_size", "max_position_embeddings", "num_time_steps")],
        *[(name, 10**9) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")],
        *[(name, 10**9) for name in ("intermediate_size", "max_position_embeddings", "num_time_steps")],
        *[(name, -1) for name in ("vocab_size", "num_time_steps", "type_vocab_size", "pad_token_id")],
        *[(name, "4") for name in ("vocab_size", "hidden_size", "num_time_steps", "tau", "v_threshold")],
        *[(name, 2.5) for name in ("num_hidden_layers", "num_attention_heads", "num_time_steps")],
        *[(name, None) for name in ("vocab_size", "num_time_steps", "tau", "v_threshold", "variant")],
        *[(name, math.nan) for name in ("tau", "v_threshold", "attention_v_threshold", "attention_scale")],
        *[(name, math.nan) for name in ("surrogate_alpha", "hidden_dropout_prob", "initializer_range")],
        *[(name, 0.0) for name in ("v_threshold", "attention_v_threshold", "attention_scale", "surrogate_alpha")],
        *[(name, -0.5) for name in ("v_threshold", "attention_v_threshold", "attention_scale", "surrogate_alpha")],
        *[(name, 0.0) for name in ("initializer_range", "embedding_initializer_range", "layer_norm_eps")],
        *[(name, 1.0) for name in ("hidden_dropout_prob", "classifier_dropout")],
        *[(name, -0.1) for name in ("hidden_dropout_prob", "classifier_dropout")],
        ("num_attention_heads", 5),
        ("pad_token_id", 64),
        ("tau", 0.99),
        ("tau", -2.0),
        ("v_threshold", True),
        ("v_reset", "zero"),
        ("variant", "spike"),
        ("problem_type", "multilabel"),
    ],
)  # fmt: skip
def test_impossible_config_value_raises_with_the_name_of_its_field(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"v_reset": 1.0}, "`v_threshold` must be finite and lie above the resting potential 1.0, got 1.0"),
        ({"v_reset": 0.5}, "`attention_v_threshold` must be finite and lie above the resting potential 0.5, got 0.5"),
        ({"v_reset": math.nan}, "resting potential nan"),
        ({"variant": "published"}, "`type_vocab_size` must be 0 in the published variant, got 2"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` \(5\) must divide `hidden_size` \(32\)"),
    ],
    ids=str,
)
def test_impossible_combination_raises_with_both_values(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be at most 1,000, got 1,000,000,000"),
        ({"num_labels": 10**9}, "`num_labels` must be at most 1,000,000, got 1,000,000,000"),
        ({"num_labels": 0}, "`num_labels` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_sizes_on_which_building_would_hang_raise_with_the_bound(fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        tiny_config(**fields)


def test_config_is_checked_again_when_it_is_saved(tmp_path):
    config = tiny_config()
    config.tau = 0.5
    with pytest.raises(StrictDataclassError, match="tau"):
        config.save_pretrained(tmp_path)


# Bad inputs


IDS = random_ids(2, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 32)}, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, L\] .* got shape \(5,\)"),
        ({"inputs_embeds": torch.zeros(5, 32)}, r"inputs_embeds \[B, L, D\], got shape \(5, 32\)"),
        ({"input_ids": random_ids(1, 17)}, r"has 17 tokens, but the model has 16 positions .* truncation=True"),
        ({"inputs_embeds": torch.zeros(1, 17, 32)}, "has 17 tokens, but the model has 16 positions"),
        ({"input_ids": torch.tensor([[3, 64]])}, "input_ids must lie between 0 and 63, got 3 to 64.* tokenizer"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids must lie between 0 and 63, got -1 to 3"),
        ({"input_ids": IDS, "token_type_ids": IDS * 0 + 2}, "token_type_ids must lie between 0 and 1, got 2 to 2"),
        ({"input_ids": IDS, "position_ids": torch.arange(12, 17)}, "position_ids must lie .* 0 and 15, got 12 to 16"),
        ({"inputs_embeds": torch.zeros(2, 5, 1)}, r"inputs_embeds must be 32 wide, got shape \(2, 5, 1\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "no tokens"),
        ({"inputs_embeds": torch.zeros(2, 0, 32)}, "no tokens"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "Row 1 of the batch has only padding"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"must have shape \(2, 5\), got \(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(5)}, r"must have shape \(2, 5\), got \(5,\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 1, 5)}, r"must have shape \(2, 5\), got \(2, 1, 1, 5\)"),
    ],
    ids=[
        "nothing", "both", "ids-1d", "embeds-2d", "too-long", "embeds-too-long", "id-above", "id-below", "type-above",
        "position-above", "embeds-narrow", "no-tokens", "embeds-no-tokens", "only-padding", "mask-short", "mask-1d",
        "mask-4d",
    ],
)  # fmt: skip
@classes
def test_wrong_inputs_raise_with_their_cause(cls, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(cls, dtype=torch.float32)(**inputs)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids must be a torch tensor, got list.* return_tensors"),
        ({"input_ids": IDS.float()}, ValueError, r"input_ids cannot be torch\.float32.* \.to\(torch\.int64\)"),
        ({"input_ids": IDS.to_sparse()}, ValueError, r"input_ids must be a dense tensor.*\.to_dense\(\)"),
        ({"input_ids": IDS.to("meta")}, ValueError, "The inputs are on the meta device.* Move them to cpu"),
        ({"input_ids": IDS, "attention_mask": IDS.to("meta")}, ValueError, "attention_mask is on meta, but"),
        ({"input_ids": IDS, "attention_mask": IDS * 0 + 2}, ValueError, "attention_mask must be 1 for tokens and 0"),
        ({"input_ids": IDS, "attention_mask": IDS * math.nan}, ValueError, "attention_mask must be 1 for tokens and 0"),
        ({"inputs_embeds": torch.full((2, 5, 32), math.nan)}, ValueError, "inputs_embeds has values that are NaN"),
        ({"inputs_embeds": torch.ones(2, 5, 32).long()}, ValueError, r"inputs_embeds cannot be torch\.int64"),
        ({"input_ids": IDS, "output_hidden_states": "no"}, TypeError, "output_hidden_states must be True, False or"),
        ({"input_ids": IDS, "output_attentions": 1}, TypeError, "output_attentions must be True, False or None"),
        ({"input_ids": IDS, "num_time_steps": 0}, ValueError, "num_time_steps must lie between 1 and 10,000, got 0"),
        ({"input_ids": IDS, "num_time_steps": 10**9}, ValueError, "between 1 and 10,000, got 1,000,000,000"),
        ({"input_ids": IDS, "num_time_steps": 2.0}, TypeError, "must be an int, or None for the config's, got float"),
        ({"input_ids": IDS, "num_time_steps": True}, TypeError, "must be an int, or None for the config's, got bool"),
    ],
    ids=[
        "list", "float-ids", "sparse", "meta", "mask-on-meta", "mask-of-2", "mask-of-nan", "embeds-of-nan",
        "integer-embeds", "flag", "attentions", "no-step", "too-many-steps", "half-steps", "bool-steps",
    ],
)  # fmt: skip
@classes
def test_objects_that_are_no_inputs_raise_with_what_to_do(cls, inputs, error, message):
    with pytest.raises(error, match=message):
        tiny_model(cls, dtype=torch.float32)(**inputs)


@modes
@torch.no_grad()
def test_embeddings_of_another_float_type_are_converted_with_autocast_too(mode):
    model = tiny_model(SpikeBertForSequenceClassification, mode, torch.float32)
    embeds = model.get_input_embeddings()(IDS).bfloat16()
    assert torch.equal(model(inputs_embeds=embeds).logits, model(inputs_embeds=embeds.float()).logits)
    assert torch.equal(model(inputs_embeds=embeds.double()).logits, model(inputs_embeds=embeds.float()).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs_embeds=embeds).logits.isfinite().all()


def test_without_positions_the_length_is_free():
    model = classifier("reference")
    assert model(random_ids(1, 40)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("problem", "labels", "message"),
    [
        ("single_label_classification", torch.tensor([0, 3]), r"between 0 and 2 \(num_labels=3\), got 3"),
        ("single_label_classification", torch.tensor([-1, 0]), r"between 0 and 2 \(num_labels=3\), got -1"),
        ("single_label_classification", torch.tensor([0.0, 1.0]), "must be class indices .* got torch.float32"),
        ("single_label_classification", torch.tensor([0, 1, 2]), r"must have shape \(2,\), got \(3,\)"),
        ("single_label_classification", torch.zeros(2, 3, dtype=torch.long), r"must have shape \(2,\), got \(2, 3\)"),
        ("multi_label_classification", torch.zeros(2, 4), r"must have shape \(2, 3\) for multi_label.* got \(2, 4\)"),
        ("multi_label_classification", torch.zeros(2), r"must have shape \(2, 3\) for multi_label.* got \(2,\)"),
        ("multi_label_classification", torch.zeros(3, 2), r"must have shape \(2, 3\) for multi_label.* got \(3, 2\)"),
        ("regression", torch.zeros(2), r"must have shape \(2, 3\) for regression, got \(2,\)"),
    ],
    ids=[
        "above", "below", "float", "too-many", "one-hot", "multi-wide", "multi-flat", "multi-transposed", "regression",
    ],
)  # fmt: skip
def test_wrong_labels_raise_with_their_cause(problem, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier(problem_type=problem)(IDS, labels=labels)


def test_labels_that_are_refused_leave_the_problem_type_open():
    model = classifier()
    with pytest.raises(ValueError, match="for multi_label_classification"):
        model(IDS, labels=torch.tensor([0.0, 1.0]))
    with pytest.raises(TypeError, match="labels must be a torch tensor, got list"):
        model(IDS, labels=[0, 1])
    assert model.config.problem_type is None


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200], ids=str)
def test_targets_of_a_regression_that_give_no_finite_loss_raise(value):
    model = classifier(problem_type="regression", num_labels=1)
    with pytest.raises(ValueError, match="labels must be finite, and their squares too"):
        model(IDS, labels=torch.tensor([0.0, value], dtype=torch.float64))


def test_from_teacher_refuses_a_misspelt_field():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    teacher = transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes))
    with pytest.raises(ValueError, match=r"no field .*'num_time_step'"):
        SpikeBertModel.from_teacher(teacher, num_time_step=8)
