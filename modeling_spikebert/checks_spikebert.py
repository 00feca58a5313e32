# SPDX-License-Identifier: Apache-2.0
"""What the models refuse, each with one sentence that says what, where and what to do; and the loss of their labels."""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_spikebert import LARGEST, SpikeBertConfig

# What `forward` takes. Of each, errors advise the first.
ID_TYPES = (torch.int64, torch.int32)
FLOAT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBER_TYPES = (*ID_TYPES, *FLOAT_TYPES, torch.bool, torch.uint8, torch.int8, torch.int16)


def classification_losses(logits: Tensor, labels: Tensor, config: SpikeBertConfig) -> Tensor:
    """Unreduced loss of the config's problem type: `[B]` for one label a sentence, `[B, C]` for several targets.

    Fills in `config.problem_type` from the labels if it is None, as BERT does.
    """
    check_tensor("labels", labels, NUMBER_TYPES)
    problem_type = problem_type_of(labels, config)
    check_labels(logits, labels, problem_type)
    config.problem_type = problem_type
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.reshape(-1).long(), reduction="none")
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels, reduction="none")
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while compiling, and not on an accelerator, which would stall."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor, got {type(value).__name__}. Convert it with torch.tensor, or call the "
            'tokenizer with return_tensors="pt".'
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} must be a dense tensor, got one that is {kind}. Convert it with .to_dense().")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} cannot be {value.dtype}. Convert it with .to({dtypes[0]}).")


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, got {type(value).__name__}. Pass bool(...) of it.")


def check_num_time_steps(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"num_time_steps must be an int, or None for the config's, got {type(value).__name__}.")
    if not 1 <= value <= LARGEST["num_time_steps"]:
        raise ValueError(f"num_time_steps must lie between 1 and {LARGEST['num_time_steps']:,}, got {value:,}.")


def check_num_items(value: Any) -> None:
    """`num_items_in_batch`, as the Trainer counts it."""
    if isinstance(value, Tensor):
        check_tensor("num_items_in_batch", value, NUMBER_TYPES)
        if value.numel() == 1 and not value.is_meta:
            if not has_values(value):
                return
            value = value.item()
    if not isinstance(value, int | float) or not 1 <= value <= 2**53:
        got = value if isinstance(value, int | float) else type(value).__name__
        raise ValueError(f"num_items_in_batch must be one number of labels, got {got}. Pass None to count them here.")


def check_inputs(
    config: SpikeBertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> None:
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Pass either input_ids or inputs_embeds, not both and not neither.")
    for name, tensor, dtypes in (
        ("input_ids", input_ids, ID_TYPES),
        ("inputs_embeds", inputs_embeds, FLOAT_TYPES),
        ("attention_mask", attention_mask, NUMBER_TYPES),
        ("token_type_ids", token_type_ids, ID_TYPES),
        ("position_ids", position_ids, ID_TYPES),
    ):
        if tensor is not None:
            check_tensor(name, tensor, dtypes)
            if tensor.device != inputs.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, but the inputs are on {inputs.device}. Move one of them."
                )
    if inputs.dim() != (2 if inputs_embeds is None else 3):
        raise ValueError(f"input_ids must be [B, L] and inputs_embeds [B, L, D], got shape {tuple(inputs.shape)}.")
    if inputs_embeds is not None and inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(f"inputs_embeds must be {config.hidden_size} wide, got shape {tuple(inputs_embeds.shape)}.")
    batch, length = inputs.shape[:2]
    has_positions = config.variant != "published"
    if has_positions and length > config.max_position_embeddings:
        raise ValueError(
            f"The input has {length} tokens, but the model has {config.max_position_embeddings} positions "
            "(max_position_embeddings). Truncate it with truncation=True in the call of the tokenizer or pipeline."
        )
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != (batch, length):
            raise ValueError(f"{name} must have shape {(batch, length)}, got {tuple(tensor.shape)}.")
    if position_ids is not None and position_ids.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"position_ids must have shape {(batch, length)}, got {tuple(position_ids.shape)}.")
    if not has_values(inputs):
        return
    if length == 0:
        raise ValueError("The input has no tokens. Pass at least one token for each sentence.")
    if attention_mask is not None:
        real = attention_mask == 1
        if not (real | (attention_mask == 0)).all():
            raise ValueError(
                "attention_mask must be 1 for tokens and 0 for padding, got other values. Pass the tokenizer's."
            )
        if not real.any(1).all():
            row = int((~real.any(1)).nonzero()[0])
            raise ValueError(f"Row {row} of the batch has only padding. Remove it, or pass at least one token.")
    for name, ids, size in (
        ("input_ids", input_ids, config.vocab_size),
        ("token_type_ids", token_type_ids, config.type_vocab_size or None),
        ("position_ids", position_ids, config.max_position_embeddings if has_positions else None),
    ):
        if ids is not None and ids.numel() and size is not None and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(
                f"{name} must lie between 0 and {size - 1}, got {int(ids.min())} to {int(ids.max())}. "
                "Is this the tokenizer that belongs to the model?"
            )


def problem_type_of(labels: Tensor, config: SpikeBertConfig) -> Any:
    """The config's, and if it is None what the labels say, as in BERT."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_labels(logits: Tensor, labels: Tensor, problem_type: str) -> None:
    batch, num_labels = logits.shape
    if labels.is_meta and not logits.is_meta:
        raise ValueError(f"labels are on the meta device, without values. Move them to {logits.device}.")
    if problem_type == "single_label_classification":
        if labels.is_floating_point():
            raise ValueError(f"labels must be class indices (integers), got {labels.dtype}; see config.problem_type.")
        if labels.numel() != batch:
            raise ValueError(f"labels must have shape {(batch,)}, got {tuple(labels.shape)}.")
        if not has_values(labels):
            return
        labels = labels.long()
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= num_labels))]
        if len(wrong):
            raise ValueError(
                f"labels must lie between 0 and {num_labels - 1} (num_labels={num_labels}), got {int(wrong[0])}."
            )
    elif labels.shape != logits.shape and (num_labels > 1 or labels.shape != (batch,)):
        raise ValueError(f"labels must have shape {tuple(logits.shape)} for {problem_type}, got {tuple(labels.shape)}.")
    elif not has_values(labels):
        return
    elif problem_type == "multi_label_classification":
        if not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError("labels must lie between 0 and 1 for multi_label_classification.")
    elif not labels.to(logits.dtype).square().sum().isfinite():
        raise ValueError(f"labels must be finite, and their squares too in {logits.dtype}. Scale them down.")
