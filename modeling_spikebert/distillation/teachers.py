"""What the teacher says of a batch: computed in each step, or once for a data set that stays the same."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoints import sha256

logger = logging.get_logger(__name__)

STATES, LOGITS = "teacher_states", "teacher_logits"
STATE_DTYPE = np.float16  # of stored states: they are targets, 0.0005 of their size is no loss
LARGEST_STATE = float(np.finfo(np.float16).max)
ROWS_SORTED_TOGETHER = 256
ROWS_WRITTEN_TOGETHER = 64  # 128 tokens, 12 layers and 768 columns make 2.4 MB a row


@dataclass
class TeacherOutputs:
    """Targets of a batch.

    Args:
        states: `K` tensors `[B, L, D]`: hidden states of the layers that teach.
        logits: `[B, C]`, if it has a classifier.
    """

    states: list[Tensor]
    logits: Tensor | None


class Teacher:
    """Runs a teacher without gradients and keeps what the losses need.

    Args:
        model: a frozen encoder, with or without classifier.
        layers: whose hidden states are kept, counted from 1.
    """

    def __init__(self, model: PreTrainedModel, layers: list[int]):
        self.model, self.layers = model, layers
        self.input_names = set(inspect.signature(model.forward).parameters) - {"labels"}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> TeacherOutputs:
        outputs = self.model(
            **{name: value for name, value in inputs.items() if name in self.input_names}, output_hidden_states=True
        )
        return TeacherOutputs([outputs.hidden_states[layer] for layer in self.layers], outputs.get("logits"))


def cached(
    dataset: Dataset,
    teacher: Teacher,
    collator: Callable[[list[dict[str, Any]]], Any],
    batch_size: int,
    folder: Path,
    precision: str,
    check: bool,
) -> Dataset:
    """Adds what the teacher says of each row, computed once and kept in `folder` under a fingerprint of both.

    Next to the file stands its SHA-256; a file that does not have it is damaged, and is computed again.

    Args:
        dataset: tokenised rows.
        teacher: on the device that it is to run on.
        collator: makes a batch of rows.
        batch_size: sentences in one call of the teacher.
        folder: takes a file of about `2 * K * D` bytes for each token.
        precision: what the teacher computes in, as accelerate names it.
        check: whether to compare a file that is there with its SHA-256; one process of a machine does.

    Raises:
        ValueError: the data set is a stream.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"teacher_cache needs a data set of fixed rows, got {type(dataset).__name__}. Leave it out for a stream."
        )

    def add(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        names = [name for name in rows if name in teacher.input_names]
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)  # little padding
        states: list[Any] = [None] * len(order)
        logits: list[Any] = [None] * len(order)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collator([{name: rows[name][i] for name in names} for i in chosen])
            outputs = teacher({name: value.to(teacher.model.device) for name, value in batch.items()})
            stacked, mask = torch.stack(outputs.states, dim=2).float().cpu().numpy(), token_mask(batch).numpy()
            for place, i in enumerate(chosen):
                real = stacked[place, mask[place]].clip(-LARGEST_STATE, LARGEST_STATE)  # [B, L, K, D] to [L, K, D]
                states[i] = real.astype(STATE_DTYPE).tobytes()
                logits[i] = [] if outputs.logits is None else outputs.logits[place].float().tolist()
        return {STATES: states, LOGITS: logits}

    features = Features({**dataset.features, STATES: Value("binary"), LOGITS: Sequence(Value("float32"))})
    digest = hashlib.sha256()
    for name, weight in sorted(teacher.model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    options = (teacher.layers, str(teacher.model.config), precision)
    fingerprint = Hasher.hash((dataset._fingerprint, digest.hexdigest(), *options))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"teacher-{fingerprint}.arrow"
    if check:
        _remove_if_damaged(file)
    outputs = dataset.map(
        add,
        batched=True,
        batch_size=ROWS_SORTED_TOGETHER,
        writer_batch_size=ROWS_WRITTEN_TOGETHER,
        features=features,
        cache_file_name=str(file),
        new_fingerprint=fingerprint,
        desc="Running the teacher",
    )
    if not _digest_of(file).is_file():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(sha256(file), encoding="utf-8")
        temporary.replace(_digest_of(file))
    return outputs


def _digest_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _remove_if_damaged(file: Path) -> None:
    """What is left of the teacher's outputs after a kill or damage goes: it would train other weights."""
    digest = _digest_of(file)
    both = file.is_file() and digest.is_file()
    if both and digest.read_text(encoding="utf-8") == sha256(file):
        return
    if both:
        logger.warning(f"{file} is damaged; the teacher runs again.")
    file.unlink(missing_ok=True)
    digest.unlink(missing_ok=True)


@dataclass
class CachedTeacherCollator:
    """Makes a batch of rows from `cached`: what `collator` makes, and the teacher's outputs with padding.

    Args:
        collator: of the other columns.
        num_states: `K` of `TeacherOutputs`.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    num_states: int

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        rows = [dict(row) for row in rows]
        if STATES not in rows[0]:  # evaluation
            return self.collator(rows)
        states = [np.frombuffer(row.pop(STATES), STATE_DTYPE) for row in rows]
        logits = [row.pop(LOGITS) for row in rows]
        batch = self.collator(rows)
        mask = token_mask(batch)
        width = len(states[0]) // (int(mask[0].sum()) * self.num_states)
        padded = torch.zeros(*mask.shape, self.num_states, width)
        padded[mask] = torch.from_numpy(np.concatenate(states).astype(np.float32)).view(-1, self.num_states, width)
        batch[STATES] = padded
        if logits[0]:
            batch[LOGITS] = torch.tensor(logits)
        return batch


def token_mask(batch: Mapping[str, Any]) -> Tensor:
    """`[B, L]`, True for tokens and False for padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def from_batch(inputs: Mapping[str, Any]) -> TeacherOutputs | None:
    """The teacher's outputs that a batch brings with it, or None."""
    return TeacherOutputs(list(inputs[STATES].unbind(2)), inputs.get(LOGITS)) if STATES in inputs else None
