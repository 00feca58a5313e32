# SPDX-License-Identifier: Apache-2.0
"""What a student takes over from its teacher."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_spikebert import SpikeBertConfig

logger = logging.get_logger(__name__)


def check_encoder(teacher: Any) -> None:
    """Raises a ValueError unless `teacher` is a loaded encoder with word embeddings, in which tokens see both sides."""
    config = getattr(teacher, "config", None)
    decodes = any(getattr(config, name, False) for name in ("is_encoder_decoder", "is_decoder", "is_causal"))
    try:
        words = teacher.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model, or one of other things than text
        words = None
    if isinstance(words, nn.Embedding) and not decodes:  # a model that only decodes says so in its attention
        decodes = any(getattr(module, "is_causal", False) for module in teacher.modules())
    if decodes or not isinstance(words, nn.Embedding) or not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"The teacher must be a BERT-like encoder with word embeddings, got {type(teacher).__name__} (model_type "
            f"{getattr(config, 'model_type', None)!r}). Load a BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM or "
            "ModernBERT checkpoint with AutoModel.from_pretrained."
        )


def first_position_of(position_embeddings: nn.Embedding) -> int:
    """The row of a sentence's first token: 0, but RoBERTa counts from `padding_idx + 1`."""
    return 0 if position_embeddings.padding_idx is None else position_embeddings.padding_idx + 1


def embedding_tables(teacher: PreTrainedModel) -> tuple[nn.Embedding, nn.Embedding | None, nn.Embedding | None]:
    """Of words, positions and token types. ModernBERT rotates queries and keys instead, and has no token types."""
    words: Any = teacher.get_input_embeddings()
    source = getattr(teacher.base_model, "embeddings", None)
    return words, getattr(source, "position_embeddings", None), getattr(source, "token_type_embeddings", None)


def inherited_fields(teacher: PreTrainedModel, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of the config of a student: vocabulary, sizes, labels and problem type of its teacher, and `overrides`.

    With one time step `tau` is 1 unless an override says otherwise: a membrane that is used once has nothing to forget,
    and a leak would only halve what it gets.

    Raises:
        ValueError: the teacher is no encoder with word embeddings, or an override is no field of the config.
    """
    check_encoder(teacher)
    unknown = overrides.keys() - SpikeBertConfig.__dataclass_fields__.keys() - {"num_labels"}
    if unknown:
        raise ValueError(f"SpikeBertConfig has no field {sorted(unknown)}. Check the spelling.")
    config: Any = teacher.config
    words, positions, types = embedding_tables(teacher)
    inherited: dict[str, Any] = {
        "vocab_size": words.num_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        # DistilBERT has hidden_dim
        "intermediate_size": config.intermediate_size if hasattr(config, "intermediate_size") else config.hidden_dim,
        "max_position_embeddings": (
            config.max_position_embeddings
            if positions is None
            else positions.num_embeddings - first_position_of(positions)
        ),
        "type_vocab_size": 0 if types is None else types.num_embeddings,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "problem_type": config.problem_type,
    }
    if overrides.get("num_time_steps") == 1:
        inherited["tau"] = 1.0
    if overrides.get("variant") == "published":
        inherited["type_vocab_size"] = 0
    if not overrides.keys() & {"num_labels", "id2label", "label2id"}:
        inherited |= {"id2label": config.id2label, "label2id": config.label2id}
    return inherited | overrides


@torch.no_grad()
def copy_embeddings(teacher: PreTrainedModel, target: Any) -> None:
    """Copies the teacher's embedding tables into those of a student, `target`, where shapes agree."""
    words, positions, types = embedding_tables(teacher)
    weights: dict[str, Tensor] = {"word_embeddings": words.weight}
    if positions is not None:
        weights["position_embeddings"] = positions.weight[first_position_of(positions) :]
    if types is not None:
        weights["token_type_embeddings"] = types.weight
    for name, weight in weights.items():
        module = getattr(target, name)
        if module is not None and module.weight.shape == weight.shape:
            module.weight.copy_(weight)
        elif module is not None:
            logger.warning(
                f"from_teacher: {name} starts from random weights, because its shape {tuple(module.weight.shape)} is "
                f"not the teacher's {tuple(weight.shape)}."
            )
