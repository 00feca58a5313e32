"""Tiny teachers, students and text for tests that train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import make_neurons_fire
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from modeling_spikebert import (
    DistillationTrainer,
    DistillationTrainingArguments,
    SpikeBertForSequenceClassification,
    SpikeBertModel,
)

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(59))]
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
BERT_SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
OTHER_SIZES = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 48}


def tiny_tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(VOCABULARY)}, model_max_length=16)


def tiny_teacher(cls: type[PreTrainedModel] = BertForSequenceClassification, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    return cls(BertConfig(**(BERT_SIZES | LABELS | overrides)))


def stage_models(stage: str, **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student whose neurons fire, and a teacher, of the classes that the stage takes."""
    teacher_class, student_class = {
        "general": (BertModel, SpikeBertModel),
        "task": (BertForSequenceClassification, SpikeBertForSequenceClassification),
    }[stage]
    teacher = tiny_teacher(teacher_class)
    return tiny_student(student_class, teacher, **overrides), teacher


def tiny_student(cls: type[PreTrainedModel], teacher: PreTrainedModel, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(2)
    student = cls.from_teacher(teacher, **overrides)
    embeddings = student.base_model.embeddings.word_embeddings.weight.clone()
    make_neurons_fire(student)
    with torch.no_grad():  # further than the teacher's own embeddings, so that their loss is not zero
        student.base_model.embeddings.word_embeddings.weight.lerp_(embeddings, 0.5)
    return student


def tiny_text(count: int = 16, seed: int = 0, labels: Callable[[int], Any] | None = lambda i: i % 3) -> Dataset:
    """Tokenised sentences of 3 to 12 tokens, with labels or without."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(1, 11, (), generator=generator))
        ids = [2, *torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist(), 3]
        row = {"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids)}
        rows.append(row if labels is None else row | {"labels": labels(i)})
    return Dataset.from_list(rows)


def stage_text(stage: str, count: int = 16, seed: int = 0) -> Dataset:
    return tiny_text(count, seed) if stage == "task" else tiny_text(count, seed, labels=None)


def arguments(folder: Path, stage: str, **overrides: Any) -> DistillationTrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logit_weight": 1.0,  # all losses count, as published
        "cross_entropy_weight": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationTrainingArguments(str(folder), stage=stage, **(options | overrides))


def make_trainer(
    folder: Path,
    stage: str,
    models: tuple[PreTrainedModel, PreTrainedModel] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **overrides: Any,
) -> DistillationTrainer:
    """A trainer with 16 sentences for training and 6 for evaluation; `overrides` are training arguments."""
    student, teacher = models or stage_models(stage)
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {
        "train_dataset": stage_text(stage),
        "eval_dataset": stage_text(stage, 6, seed=1),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    torch.manual_seed(3)  # of the projections
    return DistillationTrainer(
        student, teacher, arguments(folder, stage, **overrides), **(options | (trainer_options or {}))
    )


def in_float64(trainer: DistillationTrainer) -> DistillationTrainer:
    """Rounding then flips no spike, and two ways to the same weights can be compared closely."""
    trainer.model.double()  # with the projections, which are a part of it
    trainer.teacher.double()
    return trainer


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}
