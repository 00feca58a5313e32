"""A folder as `spikebert export --format onnx` writes it, with a graph that can be computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_training import VOCABULARY, tiny_tokenizer

LABELS = ["bad", "fair", "good"]
TIME_STEPS = 2
STEP_FACTORS = np.array([0.5, 1.5], np.float32)  # of the logits, mean 1


def weights() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [V, D] and classifier [D, C]."""
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(len(VOCABULARY), 8)).astype(np.float32)
    return embeddings, generator.normal(size=(8, len(LABELS))).astype(np.float32)


def expected_logits(ids: list[int]) -> np.ndarray:
    """Logits [C] of a sentence alone."""
    embeddings, classifier = weights()
    return embeddings[ids].mean(0) @ classifier


def write_graph(file: Path, num_labels: int = len(LABELS), scale: float = 1.0, vocab_size: int | None = None) -> None:
    """The mean embedding of the tokens that count, times a matrix; also the logits of two time steps.

    Args:
        file: where to write it.
        num_labels: the first classes, which it keeps.
        scale: factor of the logits.
        vocab_size: the first tokens, which it keeps; it fails on others.
    """
    embeddings, classifier = weights()
    constants = {
        "embeddings": embeddings[:vocab_size],
        "classifier": scale * classifier[:, :num_labels],
        "last": np.array([2]),
        "tokens": np.array([1]),
        "factors": STEP_FACTORS.reshape(TIME_STEPS, 1, 1),
    }
    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "tokens"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["count"]),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "classifier"], ["logits"]),
        helper.make_node("Mul", ["logits", "factors"], ["logits_per_step"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "L"]) for n in ("input_ids", "attention_mask")],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", num_labels]),
            helper.make_tensor_value_info("logits_per_step", TensorProto.FLOAT, [TIME_STEPS, "B", num_labels]),
        ],
        [numpy_helper.from_array(value.astype(value.dtype), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)


def write_folder(folder: Path, **config: Any) -> Path:
    """`config` goes into config.json."""
    write_graph(folder / "onnx" / "model.onnx")
    tiny_tokenizer().save_pretrained(folder)
    config = {"id2label": dict(enumerate(LABELS)), "pad_token_id": 0, "max_position_embeddings": 16} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder
