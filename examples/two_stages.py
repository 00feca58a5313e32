"""Two-stage distillation as plain code: what `spikebert quickstart` does, without its comparisons and plots.

    pip install -c constraints.txt ".[quickstart]"
    python examples/two_stages.py runs/two_stages 200

A BERT of 6 layers (MiniLM) becomes a classifier of tweets and teaches a spiking student of 3 layers; each of the three
trainings takes 200 steps.
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from modeling_spikebert import (
    DistillationTrainer,
    DistillationTrainingArguments,
    SpikeBertForSequenceClassification,
    SpikeBertModel,
)
from modeling_spikebert.data import accuracy_metrics, tokenize
from modeling_spikebert.data.bundled import bundled_teacher, bundled_tweets


def main(folder: Path, steps: int) -> None:
    # Text, tokens and a real BERT
    text = bundled_tweets()
    tokenizer = AutoTokenizer.from_pretrained(bundled_teacher())
    teacher = AutoModelForSequenceClassification.from_pretrained(bundled_teacher(), **text.label_maps)
    teacher.accepts_loss_kwargs = False  # it takes num_items_in_batch and does not use it
    train, validation = (tokenize(split, tokenizer, max_length=48) for split in (text.train, text.validation))
    data = {"processing_class": tokenizer, "data_collator": DataCollatorWithPadding(tokenizer)}
    options = {"max_steps": steps, "per_device_train_batch_size": 16, "warmup_steps": 10, "save_strategy": "no"}

    # The teacher learns the task
    args = TrainingArguments(str(folder / "teacher"), learning_rate=1e-4, **options)
    Trainer(teacher, args, train_dataset=train, **data).train()

    # Stage 1: the student learns the teacher's hidden states on text without labels
    args = DistillationTrainingArguments(str(folder / "stage1"), stage="general", **options)
    student = SpikeBertModel.from_teacher(teacher, num_hidden_layers=3, num_time_steps=2)
    stage1 = DistillationTrainer(student, teacher, args, train_dataset=train.remove_columns("labels"), **data)
    stage1.train()
    stage1.save_model()

    # Stage 2: it learns the task from the teacher's logits and hidden states
    args = DistillationTrainingArguments(
        str(folder / "student"), stage="task", initial_projections=str(folder / "stage1"), **options
    )
    student = SpikeBertForSequenceClassification.from_pretrained(folder / "stage1", **text.label_maps)
    stage2 = DistillationTrainer(
        student, teacher, args, train_dataset=train, eval_dataset=validation, compute_metrics=accuracy_metrics, **data
    )
    stage2.train()
    print(stage2.evaluate())
    stage2.save_model()

    # The folder is a complete checkpoint, laid out like a repository on the Hub
    classify = pipeline("text-classification", model=str(folder / "student"))
    print(classify("@united thank you, best flight I ever had!", truncation=True))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        sys.exit("usage: two_stages.py FOLDER STEPS")
    main(Path(sys.argv[1]), steps=int(sys.argv[2]))
