"""What a training refuses before it begins; messages hold both values."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from ..teacher_spikebert import check_encoder


def embedding_table(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_models(student: PreTrainedModel, teacher: PreTrainedModel, stage: str) -> None:
    check_encoder(teacher)
    expected = SpikeBertModel if stage == "general" else SpikeBertForSequenceClassification
    if type(student).__name__ != expected.__name__:  # by name: remote code brings classes of its own
        raise ValueError(f"stage={stage!r} trains a {expected.__name__}, got a {type(student).__name__} as student.")
    vocab_size = embedding_table(teacher).shape[0]
    if student.config.vocab_size != vocab_size:
        raise ValueError(
            f"Student and teacher have different vocabularies: {student.config.vocab_size} and {vocab_size} tokens. "
            "Build the student with from_teacher(teacher)."
        )
    if stage == "general":
        return
    if "ForSequenceClassification" not in type(teacher).__name__:
        raise ValueError(
            f"stage='task' needs a teacher with a classifier, got {type(teacher).__name__}. Load it with "
            "AutoModelForSequenceClassification."
        )
    if student.config.id2label != teacher.config.id2label:
        raise ValueError(
            f"Student and teacher have different labels: {student.config.id2label} and {teacher.config.id2label}. "
            "Build the student with from_teacher(teacher), or load it with id2label=teacher.config.id2label."
        )


def check_label_range(student: PreTrainedModel, dataset: Any) -> None:
    """Refuses labels that are no class ids before training; on an accelerator the model cannot check them."""
    columns = getattr(dataset, "column_names", None) or []
    num_labels = len(student.config.id2label or {})
    one_label = student.config.problem_type in (None, "single_label_classification") and num_labels > 1
    if not one_label or "labels" not in columns or not hasattr(dataset, "__len__"):
        return
    for row, label in enumerate(dataset["labels"]):
        if isinstance(label, float | str | None):
            raise ValueError(f"Row {row + 1} has the label {label!r}, but a class id is an integer (-100: no label).")
        if isinstance(label, int) and label != -100 and not 0 <= label < num_labels:
            raise ValueError(f"Row {row + 1} has the label {label}, but the student has {num_labels} labels (from 0).")


def check_tokenizers(
    teacher: PreTrainedModel, tokenizer: Any, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    vocab_size = embedding_table(teacher).shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the teacher has {vocab_size} word embeddings. Use the "
            "tokenizer of the teacher."
        )
    if teacher_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"Tokenizer and teacher's tokenizer differ: {token!r} is {ours.get(token)} and {theirs.get(token)}. "
                "Use the tokenizer of the teacher."
            )
