"""int8 weights: rounding, products of bytes, `from_pretrained`, saving, remote code."""

import subprocess
import sys

import pytest
import torch
from helpers import mask_of, random_ids, tiny_model, tracing
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from modeling_spikebert import SpikeBertForSequenceClassification
from modeling_spikebert.data.bundled import bundled_teacher
from modeling_spikebert.quantization_spikebert import (
    Int8Embedding,
    Int8Linear,
    SpikeBertInt8Config,
    int8_linear,
    pack,
)

pytestmark = tracing
modes = pytest.mark.parametrize("mode", ["default", "reference"])
CONFIG = {"quant_method": "spikebert_int8"}
IDS, MASK = random_ids(3, 6), mask_of(6, 2, 4)


def linear_of(out_features: int, in_features: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features)


@pytest.fixture(params=["default", "reference"])
def folder(request, tmp_path):
    """A saved classifier with float32 weights."""
    tiny_model(SpikeBertForSequenceClassification, request.param, torch.float32, num_labels=3).save_pretrained(
        tmp_path / "float"
    )
    return tmp_path / "float"


def test_weights_are_rounded_by_at_most_half_a_step_and_the_largest_is_127():
    linear = linear_of(7, 33)
    quantized = Int8Linear.from_linear(linear)
    assert quantized.weight.dtype == torch.int8
    assert (quantized.weight.abs().amax(1) == 127).all()
    error = (quantized.to_linear(torch.float32).weight - linear.weight).abs()
    assert (error <= quantized.weight_scale.unsqueeze(1) * 0.5001).all()
    assert torch.equal(quantized.bias, linear.bias)
    again = Int8Linear.from_linear(quantized.to_linear(torch.float32))
    assert torch.equal(again.weight, quantized.weight)


def test_a_row_of_zeros_stays_zero():
    linear = linear_of(3, 5)
    linear.weight.data[1] = 0
    quantized = Int8Linear.from_linear(linear)
    assert not quantized.weight[1].any()
    assert quantized(torch.ones(2, 5)).isfinite().all()


@pytest.mark.parametrize("largest", [1, 25], ids=["spikes", "counts"])
def test_products_of_bytes_equal_those_of_the_rounded_weights(largest):
    linears = [Int8Linear.from_linear(linear_of(6, 40, seed)) for seed in range(3)]
    spikes = torch.randint(0, largest + 1, (2, 5, 40), dtype=torch.uint8)
    expected = torch.cat([linear(spikes.double()) for linear in linears], dim=-1)
    result = int8_linear(spikes, pack(linears))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.weight.neg_(),
        lambda linear: linear.weight_scale.mul_(3),
        lambda linear: linear.bias.add_(1),
        lambda linear: setattr(linear.weight, "data", -linear.weight.data),
        lambda linear: linear.load_state_dict(Int8Linear.from_linear(linear_of(6, 40, 7)).state_dict(), assign=True),
        lambda linear: linear.bfloat16(),
    ],
    ids=["weight", "scale", "bias", "data", "assigned", "bfloat16"],
)
@torch.no_grad()
def test_weights_are_packed_once_and_again_when_they_change(change):
    linear = Int8Linear.from_linear(linear_of(6, 40))
    packed = pack([linear])
    assert pack([linear]) is packed
    change(linear)
    assert pack([linear]) is not packed
    spikes = torch.ones(1, 40, dtype=torch.uint8)
    torch.testing.assert_close(
        int8_linear(spikes, pack([linear])).float(), linear(spikes.float()), rtol=2**-7, atol=1e-5
    )


def test_gradients_of_int8_models_are_those_of_the_plain_modules(folder):
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    gradients = []
    for implementation in ("auto", "plain"):
        model.config.implementation = implementation
        model.zero_grad()
        model(IDS, attention_mask=MASK).logits.sum().backward()
        gradients.append(model.spikebert.embeddings.word_embeddings.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
    model.config.implementation = "fused"
    with pytest.raises(ValueError, match="bytes have no gradients"):
        model(IDS, attention_mask=MASK)


@pytest.mark.parametrize("config", [CONFIG, SpikeBertInt8Config()], ids=["dict", "class"])
def test_from_pretrained_quantizes_the_linears_of_the_blocks_and_nothing_else(folder, config):
    original = SpikeBertForSequenceClassification.from_pretrained(folder)
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=config)
    names = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    assert names == linears - {"classifier"}
    for name in names:
        linear, quantized = original.get_submodule(name), model.get_submodule(name)
        assert torch.equal(quantized.weight, Int8Linear.from_linear(linear).weight)
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
    model.config.implementation = loaded.config.implementation = "plain"
    assert torch.equal(loaded(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)


@torch.no_grad()
def test_dequantized_model_is_that_of_the_rounded_weights(folder):
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=CONFIG)
    model.config.implementation = "plain"
    expected = model(IDS, attention_mask=MASK).logits
    model.dequantize()
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_in_the_file_alone(folder, tmp_path):
    config = CONFIG | {"dequantize": True}
    original = SpikeBertForSequenceClassification.from_pretrained(folder)
    model = SpikeBertForSequenceClassification.from_pretrained(folder, quantization_config=config)
    model.config.implementation = "plain"
    expected = model(IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path / "small")
    weights = load_file(tmp_path / "small" / "model.safetensors")
    words = "spikebert.embeddings.word_embeddings"
    assert weights[f"{words}.weight"].dtype == torch.int8

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


def test_int8_embeddings_are_rounded_row_by_row():
    embedding = nn.Embedding(9, 16)
    quantized = Int8Embedding.from_embedding(embedding)
    assert (quantized.weight.abs().amax(1) == 127).all()
    ids = torch.tensor([[0, 8, 3]])
    assert torch.equal(quantized(ids), quantized.to_embedding(torch.float32)(ids))
    error = (quantized(ids) - embedding(ids)).abs()
    assert (error <= quantized.weight_scale[ids].unsqueeze(-1) * 0.5001).all()


@pytest.mark.parametrize("exit_threshold", [None, 0.6])
@modes
@torch.no_grad()
def test_fused_bytes_equal_the_plain_modules_with_currents_in_bfloat16(tmp_path, mode, exit_threshold):
    model = tiny_model(SpikeBertForSequenceClassification, mode, torch.float32)
    model.save_pretrained(tmp_path)
    model = SpikeBertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=CONFIG, exit_threshold=exit_threshold
    )
    with torch.compiler.set_stance("force_eager"):
        fused = model(IDS, attention_mask=MASK)
    for module in model.modules():
        if isinstance(module, Int8Linear):  # the hook also makes the model take the plain path
            module.register_forward_hook(lambda module, args, output: output.bfloat16().float())
    plain = model(IDS, attention_mask=MASK)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert (fused.exit_steps is None) == (exit_threshold is None)
    if exit_threshold is not None:
        assert torch.equal(fused.exit_steps, plain.exit_steps)


def test_compiled_bytes_equal_uncompiled_ones(tmp_path):
    torch._dynamo.reset()
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32, num_hidden_layers=2, num_time_steps=2)
    model.save_pretrained(tmp_path)
    model = SpikeBertForSequenceClassification.from_pretrained(tmp_path, quantization_config=CONFIG)
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        compiled = model(IDS, attention_mask=MASK).logits  # "auto" compiles int8 weights
        with torch.compiler.set_stance("force_eager"):
            uncompiled = model(IDS, attention_mask=MASK).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            model(random_ids(5, 9), attention_mask=mask_of(9, 2, 3, 8, 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled_before
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, uncompiled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled, uncompiled, rtol=1e-4, atol=1e-4)


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
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        classify = pipeline("text-classification", model=str(tmp_path / "int8"))
        assert isinstance(classify.model.spikebert.encoder.layer[0].mlp.output, Int8Linear)
        (result,) = classify(text)
    assert result["score"] == pytest.approx(expected.max().item(), abs=1e-5)
    assert result["label"] == model.config.id2label[int(expected.argmax())]


REMOTE = """
import sys
sys.modules["modeling_spikebert"] = None  # the package must not be needed
import torch
from transformers import AutoModelForSequenceClassification as Auto
for source in sys.argv[1:]:
    config = {"quant_method": "spikebert_int8"}
    first = Auto.from_pretrained(source, quantization_config=config, trust_remote_code=True)
    first.save_pretrained(source + "-int8")
    second = Auto.from_pretrained(source + "-int8", trust_remote_code=True)  # another copy of the code
    first.config.implementation = second.config.implementation = "plain"
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(first(ids).logits, second(ids).logits)
    for model in (first, second):
        assert type(model.spikebert.encoder.layer[0].attention.query).__name__ == "Int8Linear"
    print(second.config.shortcut, second.num_parameters() > 0)
"""


def test_remote_code_quantizes_saves_and_loads(tmp_path):
    folders = [str(tmp_path / mode) for mode in ("default", "reference")]
    for mode in ("default", "reference"):
        tiny_model(SpikeBertForSequenceClassification, mode, torch.float32).save_pretrained(tmp_path / mode)
    result = subprocess.run([sys.executable, "-c", REMOTE, *folders], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["membrane True", "spike True"]
