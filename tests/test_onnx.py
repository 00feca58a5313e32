"""Exported graphs in ONNX Runtime, against the model: both variants, time steps, resets, padding, int8."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import make_neurons_fire
from tiny_training import tiny_tokenizer
from transformers import pipeline, pipelines, set_seed

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification, SpikeBertModel, export_onnx
from modeling_spikebert.commands import main as spikebert
from modeling_spikebert.commands.export import agreement
from modeling_spikebert.export import OnnxCheck, OnnxSpikeBert
from modeling_spikebert.export.graph import DOMAIN, OPSET, build
from modeling_spikebert.export.onnx import rounded
from modeling_spikebert.runtime.session import spike_operators

CHECKPOINT = Path(__file__).parent.parent / "examples" / "checkpoints" / "spikebert-6x384-sst2"
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}

variants = pytest.mark.parametrize("variant", ["membrane", "published"])
precisions = pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
forms = pytest.mark.parametrize(("int8", "operators"), [(False, False), (True, False), (True, True)])


def model_of(variant: str = "membrane", **overrides) -> SpikeBertForSequenceClassification:
    set_seed(0)
    fields = SIZES | {"num_labels": 3} | overrides
    config = SpikeBertConfig(**fields) if variant == "membrane" else SpikeBertConfig.reference(**fields)
    model = SpikeBertForSequenceClassification(config).eval()
    make_neurons_fire(model)
    return model


def batch(model, size: int, length: int, pad_left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    inputs = {
        "input_ids": torch.randint(0, 64, (size, length), generator=generator),
        "attention_mask": mask.flip(1) if pad_left else mask,
    }
    if model.config.type_vocab_size:
        inputs["token_type_ids"] = torch.randint(0, 2, (size, length), generator=generator)
    return inputs


def computed(
    model, int8: bool, inputs: dict[str, torch.Tensor], operators: bool = False, with_spikes: bool = False
) -> dict[str, torch.Tensor]:
    """Outputs of the graph: by standard operators, or by those of the package."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if operators:
        options.register_custom_ops_library(str(spike_operators()))
    session = onnxruntime.InferenceSession(build(model, int8, with_spikes).SerializeToString(), options)
    names = [tensor.name for tensor in session.get_outputs()]
    outputs = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, outputs), strict=True))


@forms
@variants
@pytest.mark.parametrize(
    "fields",
    [
        {"num_time_steps": 1, "tau": 1.0},
        {"num_time_steps": 4},
        {"num_time_steps": 3, "v_reset": None, "tau": 2.5},
        {"num_time_steps": 8, "v_reset": -0.3},
        {"num_time_steps": 1, "v_reset": -0.3, "tau": 2.5, "type_vocab_size": 0},
    ],
    ids=str,
)
def test_scores_are_those_of_the_model(fields, variant, int8, operators):
    if variant == "published":
        fields = fields | {"type_vocab_size": 0}
    model = model_of(variant, **fields)
    oracle = rounded(model) if int8 else model
    for inputs in (batch(model, 5, 9), batch(model, 1, 1), batch(model, 3, 40, pad_left=True)):
        with torch.no_grad():
            expected = oracle(**inputs).logits
        torch.testing.assert_close(computed(model, int8, inputs, operators)["logits"], expected, rtol=1e-4, atol=1e-4)


def test_scores_after_each_step_are_those_of_a_model_with_so_many():
    model = model_of(num_time_steps=4)
    inputs = batch(model, 4, 7)
    outputs = computed(model, False, inputs)
    assert torch.equal(outputs["logits_per_step"][-1], outputs["logits"])
    for steps in (1, 2, 3, 4):
        with torch.no_grad():
            expected = model(**inputs, num_time_steps=steps).logits
        torch.testing.assert_close(outputs["logits_per_step"][steps - 1], expected, rtol=1e-4, atol=1e-4)


@variants
@forms
@pytest.mark.parametrize(("num_labels", "problem_type"), [(3, None), (2, "multi_label_classification")])
def test_unsure_sentences_get_more_steps(num_labels, problem_type, int8, operators, variant):
    fields = {"num_labels": num_labels, "problem_type": problem_type, "num_time_steps": 3}
    model = model_of(variant, **fields | ({"type_vocab_size": 0} if variant == "published" else {}))
    oracle = rounded(model) if int8 else model
    inputs = batch(model, 40, 9)
    taken = set()
    for threshold in (0.3, 0.6, 0.8, 1.0):
        model.config.exit_threshold = oracle.config.exit_threshold = threshold
        with torch.no_grad():
            expected = oracle(**inputs)
        outputs = computed(model, int8, inputs, operators)
        assert torch.equal(outputs["exit_steps"], expected.exit_steps)
        torch.testing.assert_close(outputs["logits"], expected.logits, rtol=1e-4, atol=1e-4)
        taken |= set(expected.exit_steps.tolist())
    assert taken == {1, 2, 3}


@forms
@variants
def test_spikes_are_those_that_enter_the_blocks(variant, int8, operators):
    model = model_of(variant, num_time_steps=2, **({"type_vocab_size": 0} if variant == "published" else {}))
    oracle = rounded(model) if int8 else model
    seen = []
    for layer in oracle.spikebert.encoder.layer:
        layer.attention.query.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    inputs = batch(model, 3, 9)
    inputs["attention_mask"].fill_(1)  # the model leaves padding out, and packs what is left
    with torch.no_grad():
        oracle(**inputs)
    spikes = computed(model, int8, inputs, operators, with_spikes=True)["spikes"]  # [2, T, B, L, D]
    for got, want in zip(spikes, seen, strict=True):  # [T, B, L, D] and [T or 1, B * L, D]
        assert torch.equal(got, want.to(torch.uint8).unflatten(1, (3, 9)).expand_as(got))
    model.config.exit_threshold = 0.5
    with pytest.raises(ValueError, match="either spikes or early exit"):
        build(model, int8, with_spikes=True)


def test_branches_share_their_weights():
    sizes = []
    for steps, threshold in ((1, None), (4, 0.9)):
        model = model_of(num_time_steps=steps, exit_threshold=threshold, vocab_size=4096)
        sizes.append(build(model, True).ByteSize())
    assert sizes[1] < 1.5 * sizes[0]  # nodes of three branches, and one set of weights


def test_one_step_has_no_scores_per_step():
    assert [output.name for output in build(model_of(num_time_steps=1), False).graph.output] == ["logits"]


@precisions
def test_operators_are_of_the_named_opsets(int8):
    graph = build(model_of(), int8)
    onnx.checker.check_model(graph, full_check=True)
    assert {(x.domain, x.version) for x in graph.opset_import} == {("", OPSET)} | ({(DOMAIN, 1)} if int8 else set())
    functions = {function.name for function in graph.functions}
    assert functions == ({"SpikeAttention", "SpikeLinear", "SpikeNeuron", "SpikeNeurons"} if int8 else set())
    assert {node.op_type for node in graph.graph.node if node.domain} == functions
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    assert all(onnx.defs.has(node.op_type, "") for node in nodes if not node.domain)


def test_a_model_with_int8_weights_gives_the_graph_of_its_float_twin(tmp_path):
    model = model_of(num_time_steps=2)
    model.save_pretrained(tmp_path / "float")
    int8 = SpikeBertForSequenceClassification.from_pretrained(
        tmp_path / "float", quantization_config={"quant_method": "spikebert_int8"}
    )
    inputs = batch(model, 4, 9)
    one, other = (computed(x, True, inputs)["logits"] for x in (model, int8.eval()))
    assert torch.equal(one, other)
    checks = export_onnx(int8, tmp_path / "onnx")
    assert {name: found.num_differing for name, found in checks.items()} == {"float32": 0, "int8": 0}


def test_the_command_writes_a_folder_for_pipelines_and_servers(tmp_path, capsys, monkeypatch):
    model = model_of(num_time_steps=2, vocab_size=64)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    spikebert(["export", str(tmp_path / "model"), "--format", "onnx", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    found = re.findall(r"(model\w*\.onnx): (\w+), .* T 2; (?:all|63 of) 64 test sentences agree with", printed)
    assert found == [("model.onnx", "float32"), ("model_int8.onnx", "int8")]
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written >= {"config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model_int8.onnx"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}

    texts = ["word1 word2 word3", "word7", "word8"]
    errors: list[str] = []
    monkeypatch.setattr(pipelines.base.logger, "error", errors.append)  # of a class that pipelines do not know
    plain = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts)
    exported = OnnxSpikeBert.load(tmp_path / "out", "model.onnx")
    for want, got in zip(
        plain, pipeline("text-classification", model=exported, tokenizer=tokenizer)(texts, batch_size=2), strict=True
    ):
        assert got["label"] == want["label"]
        assert got["score"] == pytest.approx(want["score"], abs=1e-4)
    assert errors == []
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_logits_per_step=True).logits_per_step
    got = exported(**inputs, output_logits_per_step=True).logits_per_step
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert OnnxSpikeBert.load(tmp_path / "out").session.get_modelmeta() is not None  # int8 is there, and taken first


def test_the_agreement_of_a_file_in_words():
    check = OnnxCheck(Path("model.onnx"), 1.0, 2, 1.42e-6, num_differing=0, num_other_classes=0)
    assert agreement(check) == "all 64 test sentences agree with PyTorch to 1.4e-06"
    assert agreement(replace(check, num_differing=1)) == (
        "63 of 64 test sentences agree with PyTorch to 1.4e-06; in 1 a membrane lies on its threshold (normal)"
    )


def test_the_checkpoint_gives_its_classes(tmp_path):
    checks = export_onnx(SpikeBertForSequenceClassification.from_pretrained(CHECKPOINT), tmp_path, precisions=("int8",))
    assert checks["int8"].megabytes < 25
    assert checks["int8"].num_other_classes == 0
    assert checks["int8"].num_differing <= 4


def test_what_cannot_be_exported_says_why(tmp_path, capsys):
    model = model_of()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match=r"Only a SpikeBertForSequenceClassification is exported, got SpikeBertModel\."):
        export_onnx(SpikeBertModel(model.config), tmp_path / "out")
    with pytest.raises(ValueError, match=r"precisions must be among float32, int8, got int4\."):
        export_onnx(model, tmp_path / "out", precisions=("int4",))
    with pytest.raises(ValueError, match=r"Only weights in float32 are exported, .* has torch.bfloat16"):
        export_onnx(model_of().bfloat16(), tmp_path / "out")
    changed = model_of()
    changed.spikebert.encoder.layer[1].mlp.output = torch.nn.Linear(64, 32)
    with pytest.raises(
        ValueError, match=r"The layer spikebert\.encoder\.layer\.1\.mlp\.output is Linear, which cannot"
    ):
        export_onnx(changed, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.onnx"))
    export_onnx(model, tmp_path / "out", precisions=("int8",))
    with pytest.raises(ValueError, match=r"onnx has files already\. Choose another folder, or remove them\."):
        export_onnx(model, tmp_path / "out")
    for arguments, status, message in (
        (["--format", "nirr"], 2, "no choice 'nirr'; did you mean nir?"),
        (["--num-time-steps", "0"], 2, "--num-time-steps must be at least 1, got 0."),
    ):
        with pytest.raises(SystemExit) as ended:
            spikebert(["export", str(tmp_path / "model"), "--output-dir", str(tmp_path / "new"), *arguments])
        assert ended.value.code == status
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"nothing"):
        spikebert(["export", str(tmp_path / "nothing"), "--output-dir", str(tmp_path / "new")])


def test_damaged_files_are_refused_by_name(tmp_path):
    export_onnx(model_of(), tmp_path, precisions=("int8",))
    file = tmp_path / "onnx" / "model_int8.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model_int8\.onnx is damaged or no ONNX file: .* Export it again\."):
        OnnxSpikeBert.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx\. `spikebert export` writes it\."):
        OnnxSpikeBert.load(tmp_path, "model.onnx")


def test_a_graph_that_computes_something_else_is_removed(tmp_path, monkeypatch):
    other = model_of(num_time_steps=1)
    with torch.no_grad():
        other.classifier.bias.add_(1)
    monkeypatch.setattr("modeling_spikebert.export.onnx.build", lambda model, int8, with_spikes: build(other, int8))
    with pytest.raises(RuntimeError, match=r"model\.onnx does not compute what the model does: 64 of 64 sentences"):
        export_onnx(model_of(num_time_steps=1), tmp_path)
    assert not (tmp_path / "onnx" / "model.onnx").exists()


def test_without_the_extra_the_command_names_it(tmp_path):
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        f"from modeling_spikebert.commands import main; main(['export', 'x', '--output-dir', {str(tmp_path)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'pip install -c constraints.txt ".[onnx]"' in result.stderr.splitlines()[-1]


def test_scores_per_step_of_one_step_and_of_early_exit(tmp_path):
    model = model_of(num_time_steps=1)
    export_onnx(model, tmp_path / "one", precisions=("float32",))
    outputs = OnnxSpikeBert.load(tmp_path / "one")(**batch(model, 3, 5), output_logits_per_step=True)
    assert torch.equal(outputs.logits_per_step, outputs.logits[None])
    export_onnx(model_of(num_time_steps=2, exit_threshold=0.6), tmp_path / "exits", precisions=("float32",))
    with pytest.raises(ValueError, match=r"exits early and has no scores after each step\."):
        OnnxSpikeBert.load(tmp_path / "exits")(**batch(model, 3, 5), output_logits_per_step=True)


def test_random_inputs_of_one_file(tmp_path):
    """Batches of all sizes through one session, as a server does."""
    model = model_of(num_time_steps=2)
    export_onnx(model, tmp_path, precisions=("float32",))
    exported = OnnxSpikeBert.load(tmp_path, num_threads=1)
    sizes = np.random.default_rng(0).integers(1, 12, (10, 2))
    for size, length in sizes.tolist():
        inputs = batch(model, size, length)
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
