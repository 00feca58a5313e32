"""int8 weights: rounding, products of bytes, `from_pretrained`, saving, remote code."""

import subprocess
import sys

import pytest
import torch
from helpers import fast_forms, mask_of, random_ids, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data.bundled import bundled_teacher
from modeling_spikebert.int8_spikebert import dequantized_product, has_kernels, int8_product, round_rows
from modeling_spikebert.modeling_spikebert import SpikeLinear
from modeling_spikebert.native_spikebert import forms_that_ran
from modeling_spikebert.quantization_spikebert import SpikeBertInt8Config

modes = pytest.mark.parametrize("mode", ["default", "reference"])
CONFIG = {"quant_method": "spikebert_int8"}
IDS, MASK = random_ids(3, 6), mask_of(6, 2, 4)


def weight_of(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def linears_of(model: nn.Module) -> dict[str, SpikeLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikeLinear)}


@pytest.fixture(params=["default", "reference"])
def folder(request, tmp_path):
    """A saved classifier with float32 weights."""
    tiny_model(SpikeBertForSequenceClassification, request.param, torch.float32, num_labels=3).save_pretrained(
        tmp_path / "float"
    )
    return tmp_path / "float"


def test_weights_are_rounded_by_at_most_half_a_step_and_the_largest_is_127():
    weight = weight_of(7, 33)
    rounded, scale = round_rows(weight)
    assert rounded.dtype == torch.int8
    assert (rounded.abs().amax(1) == 127).all()
    floats = rounded * scale.unsqueeze(1)
    assert ((floats - weight).abs() <= scale.unsqueeze(1) * 0.5001).all()
    assert torch.equal(round_rows(floats)[0], rounded)


def test_a_row_of_zeros_stays_zero():
    weight = weight_of(3, 5)
    weight[1] = 0
    rounded, scale = round_rows(weight)
    assert not rounded[1].any()
    assert dequantized_product(torch.ones(2, 5), rounded, None, scale).isfinite().all()


@pytest.mark.skipif(not has_kernels(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("largest", [1, 25], ids=["spikes", "counts"])
def test_products_of_bytes_equal_those_of_the_rounded_weights(largest, bias):
    weight, scale = round_rows(weight_of(6, 40))
    spikes = torch.randint(0, largest + 1, (2, 5, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    offset = weight_of(1, 6, seed=1)[0] if bias else None
    result = int8_product(spikes, weight, offset, scale)
    assert result.dtype == torch.float32
    expected = spikes.double() @ (weight.double() * scale.double().unsqueeze(1)).t()
    expected = expected if offset is None else expected + offset.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dequantized_product(spikes.double(), weight, offset, scale), expected)


def test_gradients_pass_through_int8_weights(folder):
    """They are those of the rounded weights in floating point, up to rounding, which may move a spike in float32."""
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG).double()
    floats = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    floats = floats.dequantize().double()
    floats.requires_grad_()
    gradients = []
    for each in (model, floats):
        each(IDS, attention_mask=MASK).logits.sum().backward()
        gradients.append(each.spikebert.embeddings.word_embeddings.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, SpikeBertInt8Config()], ids=["dict", "class"])
def test_from_pretrained_quantizes_the_linears_of_the_blocks_and_nothing_else(folder, config):
    original = SpikeBertForSequenceClassification.from_pretrained(folder)
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=config)
    names = {name for name, module in linears_of(model).items() if module.weight_scale is not None}
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    assert names == linears - {"classifier"}
    for name in names:
        linear, quantized = original.get_submodule(name), model.get_submodule(name)
        assert quantized.weight.dtype == torch.int8
        assert all(map(torch.equal, (quantized.weight, quantized.weight_scale), round_rows(linear.weight)))
    others = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in names}
    assert others
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in others.items())


@torch.no_grad()
def test_saved_as_safetensors_and_loaded_as_it_was(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "int8")
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    assert {weights[name].dtype for name in weights if name.endswith("query.weight")} == {torch.int8}
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()
    assert torch.equal(loaded(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)


@torch.no_grad()
def test_dequantized_model_is_that_of_the_rounded_weights(folder):
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    with fast_forms(False):
        expected = model(IDS, attention_mask=MASK).logits
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_in_the_file_alone(folder, tmp_path):
    config = CONFIG | {"dequantize": True}
    original = SpikeBertForSequenceClassification.from_pretrained(folder)
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=config)
    expected = model(IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path / "small")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    words = "spikebert.embeddings.word_embeddings"
    rounded = {name.removesuffix("_scale") for name in weights if name.endswith("weight_scale")}
    assert {name for name in weights if weights[name].dtype == torch.int8} == rounded
    assert rounded == {f"{name}.weight" for name in (words, *linears_of(original))}
    assert not torch.equal(expected, original(IDS, attention_mask=MASK).logits)  # the model at hand is rounded, too

    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == original.state_dict().keys()
    error = (loaded.get_input_embeddings().weight - original.get_input_embeddings().weight).abs()
    assert (error <= weights[f"{words}.weight_scale"].unsqueeze(1) * 0.5001).all()
    torch.testing.assert_close(loaded(IDS, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-4)

    Trainer(loaded, TrainingArguments(str(tmp_path / "run"), report_to=[]))  # trains like any other
    loaded.save_pretrained(tmp_path / "float")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float")
    assert not hasattr(again.config, "quantization_config")
    for name, value in again.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not has_kernels(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("exit_threshold", [None, 0.6])
@modes
@torch.no_grad()
def test_products_of_bytes_give_the_scores_of_the_naive_form(tmp_path, mode, exit_threshold):
    tiny_model(SpikeBertForSequenceClassification, mode, torch.float32).save_pretrained(tmp_path)
    model = SpikeBertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=CONFIG, exit_threshold=exit_threshold
    )
    outputs = model(IDS, attention_mask=MASK)
    assert forms_that_ran()["spike_linear"].startswith("int8")
    with fast_forms(False):
        naive = model(IDS, attention_mask=MASK)
    torch.testing.assert_close(outputs.logits, naive.logits, rtol=1e-4, atol=1e-4)
    assert (outputs.exit_steps is None) == (exit_threshold is None)
    if exit_threshold is not None:
        assert torch.equal(outputs.exit_steps, naive.exit_steps)


def test_training_int8_weights_is_refused(folder, tmp_path):
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, TrainingArguments(str(tmp_path / "run"), report_to=[]))


def test_pipeline_takes_an_int8_folder(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bundled_teacher())
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "float")
    model = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    text = "The crew was great."
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        classify = pipeline("text-classification", model=str(tmp_path / "int8"))
        assert classify.model.spikebert.encoder.layer[0].mlp.output.weight.dtype == torch.int8
        (result,) = classify(text)
    assert result["score"] == pytest.approx(expected.max().item(), abs=1e-5)
    assert result["label"] == model.config.id2label[int(expected.argmax())]


REMOTE = """
import sys
sys.modules["modeling_spikebert"] = None  # the package must not be needed
import torch
from transformers import AutoModelForSequenceClassification as Auto
int8 = {"quant_method": "spikebert_int8"}
for source in sys.argv[1:]:
    first = Auto.from_pretrained(source, quantization_config=int8, trust_remote_code=True)
    first.save_pretrained(source + "-int8")
    second = Auto.from_pretrained(source + "-int8", trust_remote_code=True)  # another copy of the code
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(first(ids).logits, second(ids).logits)
    for model in (first, second):
        assert model.spikebert.encoder.layer[0].attention.query.weight.dtype == torch.int8
    print(second.num_parameters())
"""


def test_remote_code_quantizes_saves_and_loads(tmp_path):
    folders = []
    for mode in ("default", "reference"):
        folders.append(str(tmp_path / mode))
        tiny_model(SpikeBertForSequenceClassification, mode, torch.float32).save_pretrained(folders[-1])
    result = subprocess.run([sys.executable, "-c", REMOTE, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [int(line) > 0 for line in result.stdout.splitlines()[-2:]] == [True, True]
