"""`DistillationTrainer` in both stages, with teachers and students so small that a step takes milliseconds."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import distributed_client
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_training import (
    BERT_SIZES,
    LABELS,
    OTHER_SIZES,
    VOCABULARY,
    in_float64,
    make_trainer,
    stage_models,
    stage_text,
    tiny_student,
    tiny_teacher,
    tiny_text,
    tiny_tokenizer,
    weights_of,
)
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    TrainerCallback,
    TrainingArguments,
)

from modeling_spikebert import (
    DistillationTrainer,
    DistillationTrainingArguments,
    SpikeBertForSequenceClassification,
    SpikeBertModel,
)
from modeling_spikebert.data import accuracy_metrics
from modeling_spikebert.distillation import PROJECTIONS_NAME
from modeling_spikebert.distillation.losses import logit_loss

stages = pytest.mark.parametrize("stage", ["general", "task"])
sizes = pytest.mark.parametrize("sizes", [{}, OTHER_SIZES], ids=["same_size", "other_size"])
MODERN = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
LOSSES = {
    "general": {"hidden_states": 1.0, "embeddings": 0.1},
    "task": {"hidden_states": 1.0, "embeddings": 0.1, "logits": 1.0, "cross_entropy": 0.1},
}

SPEED = {"samples_per_second", "tokens_per_second", "peak_memory_mb", "seconds_left"}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            actual[name], weight, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def student_weights(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """Of the student as it is released."""
    return {name: weight for name, weight in weights_of(trainer.model).items() if "projections" not in name}


class StopAt(TrainerCallback):
    """Ctrl-C at the end of a step, before its checkpoint is written."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# What is trained


@stages
@sizes
def test_every_parameter_of_student_and_projections_moves(tmp_path, stage, sizes):
    trainer = make_trainer(tmp_path, stage, stage_models(stage, **sizes))
    before = weights_of(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == before.keys()
    assert sum("projections" in name for name in trainable) == 4 * trainer.model.config.num_hidden_layers + bool(sizes)
    trainer.train()
    after = weights_of(trainer.model)
    assert not [name for name in before if torch.equal(before[name], after[name])]


@stages
@sizes
def test_the_teacher_is_frozen(tmp_path, stage, sizes):
    student, teacher = stage_models(stage, **sizes)
    teacher.train()
    before = weights_of(teacher)
    trainer = make_trainer(tmp_path, stage, (student, teacher), save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.evaluate()
    assert_same(weights_of(teacher), before)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    ids = {id(parameter) for parameter in teacher.parameters()}
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert ids.isdisjoint(id(parameter) for parameter in optimised)
    assert {id(parameter) for parameter in optimised} == {id(parameter) for parameter in trainer.model.parameters()}


@stages
def test_checkpoints_hold_student_and_projections_apart_and_no_teacher(tmp_path, stage):
    trainer = make_trainer(tmp_path, stage, stage_models(stage, **OTHER_SIZES), save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert_same(load_file(folder / "model.safetensors"), student_weights(trainer))
    assert_same(load_file(folder / PROJECTIONS_NAME), weights_of(trainer.projections))
    student_size = sum(parameter.numel() for parameter in trainer.model.parameters())
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    moments = [state["exp_avg"].numel() for state in optimizer["state"].values()]
    assert sum(moments) == student_size  # with the projections, which are a part of it; no teacher
    weights = [file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    files = ["model.safetensors", "optimizer.pt", PROJECTIONS_NAME, "rng_state.pth", "scheduler.pt"]
    assert sorted(weights) == files


def test_reference_mode_is_taught_too(tmp_path):
    trainer = make_trainer(tmp_path, "task", stage_models("task", variant="published"))
    assert trainer.model.config.variant == "published"
    before = weights_of(trainer.model)
    trainer.train()
    assert not [name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])]


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (RobertaConfig(**(BERT_SIZES | {"pad_token_id": 0, "type_vocab_size": 1})), RobertaModel),
        (
            DistilBertConfig(
                vocab_size=len(VOCABULARY), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=16
            ),
            DistilBertModel,
        ),
        (ElectraConfig(**(BERT_SIZES | {"embedding_size": 32})), ElectraModel),
        (ElectraConfig(**(BERT_SIZES | {"embedding_size": 24})), ElectraModel),
        (ModernBertConfig(**(BERT_SIZES | MODERN)), ModernBertModel),
        (DebertaV2Config(**BERT_SIZES), DebertaV2Model),
        (AlbertConfig(**(BERT_SIZES | {"embedding_size": 24})), AlbertModel),
        (MPNetConfig(**BERT_SIZES), MPNetModel),
    ],
    ids=[
        "roberta",
        "distilbert",
        "electra",
        "electra_with_narrow_embeddings",
        "modernbert",
        "deberta",
        "albert",
        "mpnet",
    ],
)
def test_other_encoders_teach(tmp_path, config, cls):
    torch.manual_seed(1)
    teacher = cls(config)
    student = tiny_student(SpikeBertModel, teacher, max_position_embeddings=16)
    trainer = make_trainer(tmp_path, "general", (student, teacher))
    before = weights_of(trainer.model)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss_hidden_states"] > 0.1
    assert logged["loss_embeddings"] > 0.1
    assert not [name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])]


# Losses


@stages
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_loss_is_logged_and_their_weighted_sum_is_the_loss(tmp_path, stage, accumulation):
    trainer = make_trainer(
        tmp_path,
        stage,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    train = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(train) == len(evaluations) == 2
    for prefix, entries in (("", train), ("eval_", evaluations)):
        for entry in entries:
            names = {name for name in entry if re.fullmatch(r"(eval_)?loss_.*", name)}
            assert names == {f"{prefix}loss_{name}" for name in LOSSES[stage]}
            assert all(entry[name] > 0 for name in names)
            total = sum(weight * entry[f"{prefix}loss_{name}"] for name, weight in LOSSES[stage].items())
            assert entry[f"{prefix}loss"] == pytest.approx(total, rel=1e-5)


@stages
def test_weights_of_the_arguments_are_the_weights_of_the_losses(tmp_path, stage):
    weights = {"hidden_states": 0.5, "embeddings": 3.0, "firing_rate": 7.0}
    options = {"hidden_state_weight": 0.5, "embedding_weight": 3.0, "firing_rate_weight": 7.0}
    if stage == "task":
        weights |= {"logits": 0.25, "cross_entropy": 2.0}
        options |= {"logit_weight": 0.25, "cross_entropy_weight": 2.0}
    metrics = make_trainer(tmp_path, stage, **options).evaluate()
    total = sum(weight * metrics[f"eval_loss_{name}"] for name, weight in weights.items())
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


@stages
def test_a_loss_of_weight_zero_is_left_out(tmp_path, stage):
    metrics = make_trainer(tmp_path, stage, embedding_weight=0.0).evaluate()
    assert "eval_loss_embeddings" not in metrics
    assert metrics["eval_loss_hidden_states"] > 0


@stages
def test_evaluation_losses_are_means_over_sentences(tmp_path, stage):
    models = stage_models(stage)
    batched = in_float64(make_trainer(tmp_path, stage, models)).evaluate()  # batches of 4 and 2
    single = make_trainer(tmp_path, stage, models, per_device_eval_batch_size=1)
    single.projections.load_state_dict(make_trainer(tmp_path, stage).projections.state_dict())
    one_by_one = in_float64(single).evaluate()
    for name in ("eval_loss", *(f"eval_loss_{name}" for name in LOSSES[stage])):
        assert batched[name] == pytest.approx(one_by_one[name], rel=1e-6), name


@stages
def test_firing_rates_are_logged(tmp_path, stage):
    trainer = make_trainer(tmp_path, stage)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["firing_rate"] < 1
    rates = []
    for row in stage_text(stage, 6, seed=1):
        with torch.no_grad():
            outputs = trainer.model.eval()(torch.tensor([row["input_ids"]]), output_firing_rates=True)
        rates.append(torch.stack(outputs.firing_rates).mean().item())
    assert trainer.evaluate()["eval_firing_rate"] == pytest.approx(np.mean(rates), rel=1e-5)


@stages
def test_the_penalty_holds_firing_rates_down_to_the_target(tmp_path, stage):
    rates = {}
    for weight, target in ((0.0, 0.0), (100.0, 0.0), (100.0, 0.2)):
        options = {"firing_rate_weight": weight, "target_firing_rate": target, "max_steps": 60}
        trainer = make_trainer(tmp_path, stage, **options)
        trainer.train()
        metrics = trainer.evaluate()
        rates[weight, target] = metrics["eval_firing_rate"]
        assert ("eval_loss_firing_rate" in metrics) == (weight > 0)
    assert rates[100.0, 0.0] < 0.6 * rates[0.0, 0.0]
    assert rates[100.0, 0.0] < rates[100.0, 0.2] < rates[0.0, 0.0]


def test_task_losses_by_hand(tmp_path):
    student, teacher = stage_models("task")
    trainer = make_trainer(tmp_path, "task", (student, teacher), temperature=2.0)
    metrics = trainer.evaluate()
    logits, teacher_logits, labels = [], [], []
    for row in stage_text("task", 6, seed=1):
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        with torch.no_grad():
            logits.append(student.eval()(**inputs).logits[0])
            teacher_logits.append(teacher(**inputs).logits[0])
        labels.append(row["labels"])
    x, y = torch.stack(logits), torch.stack(teacher_logits)
    divergence = 4 * nn.functional.kl_div((x / 2).log_softmax(-1), (y / 2).softmax(-1), reduction="batchmean")
    assert metrics["eval_loss_logits"] == pytest.approx(divergence.item(), rel=1e-4)
    cross_entropy = nn.functional.cross_entropy(x, torch.tensor(labels))
    assert metrics["eval_loss_cross_entropy"] == pytest.approx(cross_entropy.item(), rel=1e-4)


def test_general_losses_by_hand(tmp_path):
    student, teacher = stage_models("general", **OTHER_SIZES)
    trainer = in_float64(make_trainer(tmp_path, "general", (student, teacher)))
    metrics = trainer.evaluate()
    table, hidden, embeddings = teacher.get_input_embeddings().weight, [], []
    for row in stage_text("general", 6, seed=1):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            states = student.eval()(ids, output_hidden_states=True).hidden_states
            targets = teacher(ids, output_hidden_states=True).hidden_states
            for layer, target in ((1, 1), (2, 1), (3, 2)):  # three layers of the student, two of the teacher
                projected = trainer.projections.layers[layer - 1](states[layer])
                target = nn.functional.layer_norm(targets[target], (32,))
                hidden.append(nn.functional.mse_loss(projected, target).item())
            projected = trainer.projections.embeddings(student.get_input_embeddings()(ids))
            embeddings.append((nn.functional.mse_loss(projected, table[ids]) / table.var()).item())
    assert metrics["eval_loss_hidden_states"] == pytest.approx(np.mean(hidden), rel=1e-6)
    assert metrics["eval_loss_embeddings"] == pytest.approx(np.mean(embeddings), rel=1e-6)


def test_embedding_loss_is_zero_for_a_fresh_student_of_the_teachers_width(tmp_path):
    teacher = tiny_teacher(BertModel)
    student = SpikeBertModel.from_teacher(teacher)
    assert make_trainer(tmp_path, "general", (student, teacher)).evaluate()["eval_loss_embeddings"] == 0


@stages
def test_gradient_accumulation_follows_the_same_path(tmp_path, stage):
    weights = []
    for batch_size, accumulation in ((8, 1), (1, 8), (3, 3)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(
            tmp_path,
            stage,
            stage_models(stage, **OTHER_SIZES),
            {"train_dataset": stage_text(stage, 8)},  # with 3 x 3 the last batch has 2 sentences
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.5,
            **options,
        )
        in_float64(trainer).train()
        assert trainer.state.global_step == 2
        weights.append(weights_of(trainer.model))
    assert_same(weights[1], weights[0], 1e-9)
    assert_same(weights[2], weights[0], 1e-9)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("multi_label_classification", lambda i: [float(i % 2), 1.0, 0.0]),
        ("regression", lambda i: [i / 10, -1.0, 0.5]),
    ],
)
def test_other_problem_types(tmp_path, problem_type, labels):
    teacher = tiny_teacher(problem_type=problem_type)
    student = tiny_student(SpikeBertForSequenceClassification, teacher)
    data = {"train_dataset": tiny_text(8, labels=labels), "eval_dataset": tiny_text(6, 1, labels)}
    trainer = make_trainer(tmp_path, "task", (student, teacher), data)
    before = weights_of(trainer.model)
    metrics = trainer.evaluate()
    output = trainer.predict(data["eval_dataset"])
    logits, expected = torch.tensor(output.predictions), torch.tensor(output.label_ids)
    by_torch = {
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }[problem_type]
    assert metrics["eval_loss_cross_entropy"] == pytest.approx(by_torch(logits, expected).item(), rel=1e-5)
    trainer.train()
    assert not [name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])]


# Evaluation and prediction


def test_task_evaluation_and_prediction(tmp_path):
    trainer = make_trainer(tmp_path, "task", trainer_options={"compute_metrics": accuracy_metrics})
    metrics = trainer.evaluate()
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions.shape == (6, 3)  # logits alone, no hidden states or projections
    assert output.label_ids.tolist() == trainer.eval_dataset["labels"]
    assert metrics["eval_accuracy"] == np.mean(output.predictions.argmax(-1) == output.label_ids)
    with torch.no_grad():
        row = trainer.eval_dataset[0]
        alone = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    torch.testing.assert_close(torch.tensor(output.predictions[0]), alone, rtol=0, atol=1e-4)


def test_general_evaluation_and_prediction_need_no_labels(tmp_path):
    trainer = make_trainer(tmp_path, "general")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions is None
    assert output.label_ids is None
    assert output.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


def test_task_prediction_needs_no_labels_without_cross_entropy(tmp_path):
    trainer = make_trainer(tmp_path, "task", cross_entropy_weight=0.0)
    output = trainer.predict(tiny_text(6, 1, labels=None))
    assert output.predictions.shape == (6, 3)


@stages
def test_prediction_leaves_no_trace_in_the_next_evaluation(tmp_path, stage):
    trainer = make_trainer(tmp_path, stage)
    first = trainer.evaluate()
    trainer.predict(stage_text(stage, 12, seed=5))
    second = trainer.evaluate()
    for name in LOSSES[stage]:
        assert second[f"eval_loss_{name}"] == pytest.approx(first[f"eval_loss_{name}"]), name


def test_labels_beside_unlabelled_stage_are_ignored(tmp_path):
    trainer = make_trainer(tmp_path, "general", trainer_options={"eval_dataset": tiny_text(6, 1)})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(make_trainer(tmp_path, "general").evaluate()["eval_loss"])


def test_the_best_model_is_loaded_with_its_projections(tmp_path):
    first_step = make_trainer(tmp_path / "one", "task")
    first_step.train()
    predicted = first_step.predict(first_step.eval_dataset).predictions.argmax(-1).tolist()
    # By these labels the model after step 1 is perfect; the training labels lead away from it.
    evaluation = first_step.eval_dataset.remove_columns("labels").add_column("labels", predicted)
    trainer = make_trainer(
        tmp_path / "three",
        "task",
        trainer_options={"eval_dataset": evaluation, "compute_metrics": accuracy_metrics},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    best, last = tmp_path / "three" / "checkpoint-1", tmp_path / "three" / "checkpoint-3"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert trainer.state.best_metric == 1.0
    assert_same(student_weights(trainer), load_file(best / "model.safetensors"))
    assert_same(weights_of(trainer.projections), load_file(best / PROJECTIONS_NAME))
    for name in ("model.safetensors", PROJECTIONS_NAME):
        assert any(not torch.equal(w, load_file(last / name)[key]) for key, w in load_file(best / name).items())


# Checkpoints


@stages
def test_resuming_is_exact_to_the_bit(tmp_path, stage):
    def trainer(folder: str) -> DistillationTrainer:
        models = stage_models(stage, hidden_dropout_prob=0.1)
        return make_trainer(tmp_path / folder, stage, models, max_steps=4, save_strategy="steps", save_steps=2)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    nn.init.zeros_(resumed.projections.layers[0][0].weight)  # comes back from the checkpoint
    nn.init.zeros_(resumed.model.get_input_embeddings().weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights_of(resumed.model), weights_of(whole.model))
    steps = {entry["step"]: entry for entry in whole.state.log_history if "loss" in entry}
    for entry in resumed.state.log_history:
        if "loss" in entry:
            same = entry.keys() - SPEED
            assert {name: entry[name] for name in same} == {name: steps[entry["step"]][name] for name in same}


@stages
def test_an_interrupted_training_keeps_its_last_checkpoint(tmp_path, stage):
    def trainer(folder: str, **options) -> DistillationTrainer:
        return make_trainer(
            tmp_path / folder, stage, max_steps=4, save_strategy="steps", save_steps=1, trainer_options=options
        )

    whole = trainer("whole")
    whole.train()
    interrupted = trainer("interrupted", callbacks=[StopAt(3)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    folders = sorted(folder.name for folder in (tmp_path / "interrupted").glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2"]
    resumed = trainer("interrupted")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same(weights_of(resumed.model), weights_of(whole.model))


def test_the_stage_1_student_is_saved_with_projections_and_the_finished_one_without(tmp_path):
    for stage in ("general", "task"):
        trainer = make_trainer(tmp_path / stage, stage)
        trainer.train()
        trainer.save_model()
        assert (tmp_path / stage / PROJECTIONS_NAME).exists() == (stage == "general")
        assert_same(load_file(tmp_path / stage / "model.safetensors"), student_weights(trainer))
    assert_same(
        load_file(tmp_path / "general" / PROJECTIONS_NAME),
        weights_of(make_trainer(tmp_path, "general", initial_projections=str(tmp_path / "general")).projections),
    )


@stages
def test_a_saved_student_loads_without_missing_or_unexpected_weights(tmp_path, stage):
    trainer = make_trainer(tmp_path, stage, stage_models(stage, **OTHER_SIZES))
    trainer.train()
    trainer.save_model()
    auto_class = {"general": AutoModel, "task": AutoModelForSequenceClassification}[stage]
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_same(weights_of(loaded), student_weights(trainer))


def test_stage_2_goes_on_from_stage_1(tmp_path):
    stage1 = make_trainer(tmp_path / "stage1", "general", stage_models("general", **OTHER_SIZES))
    stage1.train()
    stage1.save_model()
    student = SpikeBertForSequenceClassification.from_pretrained(tmp_path / "stage1", **LABELS)
    stage2 = make_trainer(
        tmp_path / "stage2", "task", (student, tiny_teacher()), initial_projections=str(tmp_path / "stage1")
    )
    assert_same(weights_of(stage2.projections), weights_of(stage1.projections))
    assert_same(weights_of(student.spikebert), student_weights(stage1))
    stage2.train()
    assert stage2.state.global_step == 1


def test_projections_of_equal_widths_begin_as_the_identity(tmp_path):
    states = torch.randn(3, 2, 5, 32)
    embeddings, *projected = make_trainer(tmp_path, "general").projections(tuple(states[1:]), states[0])
    assert torch.equal(embeddings, states[0])
    for state, result in zip(states[1:], projected, strict=True):
        torch.testing.assert_close(result, nn.functional.layer_norm(state, (32,)))


def test_initial_projections_from_a_folder_without_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint of a DistillationTrainer nor a stage-1 student"):
        make_trainer(tmp_path, "task", initial_projections=str(tmp_path / "nowhere"))


def test_initial_projections_of_other_sizes(tmp_path):
    other = make_trainer(tmp_path, "general", stage_models("general", **OTHER_SIZES))
    other.save_model()
    with pytest.raises(ValueError, match=r"(?s)other layers or widths than this training.*Unexpected key"):
        make_trainer(tmp_path, "task", initial_projections=str(tmp_path))


def test_initial_projections_of_a_foreign_file(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / PROJECTIONS_NAME)
    with pytest.raises(ValueError, match=r"(?s)other layers or widths than this training.*Missing key"):
        make_trainer(tmp_path, "task", initial_projections=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"], ids=["empty", "damaged"])
def test_initial_projections_of_a_damaged_file(tmp_path, content):
    (tmp_path / PROJECTIONS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{PROJECTIONS_NAME} is damaged"):
        make_trainer(tmp_path, "task", initial_projections=str(tmp_path))


# The student after training


def test_two_trainings_of_the_same_student_one_after_another(tmp_path):
    student, teacher = stage_models("task")
    wide = tiny_teacher(hidden_size=64, num_hidden_layers=3)
    first = make_trainer(tmp_path / "first", "task", (student, teacher))
    first.train()
    second = make_trainer(tmp_path / "second", "task", (student, wide))
    assert student.distillation_projections is second.projections
    assert len(student._forward_hooks) == 1
    names = {name for name in student.state_dict() if "projections" in name}
    assert names == {f"distillation_projections.{name}" for name in second.projections.state_dict()}
    assert student._keys_to_ignore_on_save == names
    before = weights_of(student)
    second.train()
    assert not [name for name, weight in weights_of(student).items() if torch.equal(weight, before[name])]
    second.save_model()
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_same(weights_of(loaded), student_weights(second))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(ids, output_hidden_states=True),
        lambda model, ids: model(input_ids=ids, output_hidden_states=True),
        lambda model, ids: model(inputs_embeds=model.get_input_embeddings()(ids), output_hidden_states=True),
        lambda model, ids: model(input_ids=ids, output_hidden_states=True, return_dict=False),
        lambda model, ids: model(input_ids=ids, return_dict=False),
    ],
    ids=["positional", "named", "embeddings", "tuple_with_states", "tuple"],
)
@stages
def test_a_trained_student_is_called_as_any_model(tmp_path, stage, call):
    trainer = make_trainer(tmp_path, stage)
    trainer.save_model()
    auto_class = {"general": AutoModel, "task": AutoModelForSequenceClassification}[stage]
    loaded = auto_class.from_pretrained(tmp_path)
    ids = torch.tensor([[2, 7, 8, 3]])
    with torch.no_grad():
        actual, expected = call(trainer.model.eval(), ids), call(loaded, ids)
    assert type(actual) is type(expected)
    assert len(actual) == len(expected)
    if not isinstance(expected, tuple):
        assert actual.keys() == expected.keys()
        actual, expected = actual.to_tuple(), expected.to_tuple()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_card_describes_the_training(tmp_path):
    student, teacher = stage_models("task")
    teacher.config._name_or_path = "someone/teacher"
    folder = tmp_path / "my-student"
    trainer = make_trainer(folder, "task", (student, teacher), {"compute_metrics": accuracy_metrics})
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/teacher"
    assert card.data.license is None  # nobody has said it
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert {"spikebert", "spiking-neural-network", "knowledge-distillation"} <= set(card.data.tags)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-4)
    assert card.data.to_dict()["model-index"][0]["name"] == "my-student"
    assert "optimizer steps: 1" in card.content
    assert "weight of loss embeddings: 0.1" in card.content
    assert str(tmp_path) not in card.content


def test_the_card_names_no_local_folder(tmp_path):
    student, teacher = stage_models("general")
    teacher.save_pretrained(tmp_path / "teacher")
    teacher = BertModel.from_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path / "student", "general", (student, teacher))
    trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    assert "Not measured." in card.content


# Refusals


def refuse(message: str, tmp_path: Path, stage: str, models, trainer_options=None, **overrides) -> None:
    before = weights_of(models[0])
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, stage, models, trainer_options, **overrides)
    assert_same(weights_of(models[0]), before)
    assert not models[0]._forward_hooks


@pytest.mark.parametrize(
    "teacher",
    [
        GPT2Model(GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=16)),
        BertModel(BertModel.config_class(**(BERT_SIZES | {"is_decoder": True}))),
        T5Model(T5Config(vocab_size=len(VOCABULARY), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),
    ],
    ids=["gpt2", "bert_decoder", "encoder_decoder"],
)
def test_teacher_that_is_not_an_encoder(tmp_path, teacher):
    student, _ = stage_models("general")
    refuse(f"BERT-like encoder .* got {type(teacher).__name__} .*Load", tmp_path, "general", (student, teacher))


@stages
def test_teacher_of_another_vocabulary(tmp_path, stage):
    student, teacher = stage_models(stage)
    teacher.resize_token_embeddings(70)
    refuse("different vocabularies: 64 and 70 tokens.*from_teacher", tmp_path, stage, (student, teacher))


def test_teacher_of_other_labels(tmp_path):
    student, _ = stage_models("task")
    other = {"id2label": {0: "good", 1: "fair", 2: "bad"}, "label2id": {"good": 0, "fair": 1, "bad": 2}}
    message = re.escape(f"{student.config.id2label} and {other['id2label']}")
    refuse(f"different labels: {message}", tmp_path, "task", (student, tiny_teacher(**other)))


@pytest.mark.parametrize("base", ["student", "teacher"])
def test_base_model_in_the_task_stage(tmp_path, base):
    student, teacher = stage_models("task")
    models = (student.spikebert, teacher) if base == "student" else (student, teacher.bert)
    name = {"student": "SpikeBertModel", "teacher": "BertModel"}[base]
    needed = {"student": "trains a SpikeBertForSequenceClassification", "teacher": "needs a teacher with a classifier"}
    refuse(f"{needed[base]}, got a? ?{name}", tmp_path, "task", models)


def test_classifier_in_the_general_stage(tmp_path):
    """Its head would stay as it is, and be released."""
    refuse("trains a SpikeBertModel, got a SpikeBertForSequence", tmp_path, "general", stage_models("task"))


def test_arguments_of_a_plain_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[])
    with pytest.raises(TypeError, match="must be DistillationTrainingArguments, got TrainingArguments"):
        DistillationTrainer(*stage_models("task"), args)


def test_label_smoothing(tmp_path):
    refuse("label_smoothing_factor must be 0", tmp_path, "task", stage_models("task"), label_smoothing_factor=0.1)


def test_label_out_of_range_is_refused_before_training(tmp_path):
    student, teacher = stage_models("task")
    data = Dataset.from_dict({"input_ids": [[2, 5, 3]] * 3, "labels": [0, 1, student.config.num_labels]})
    refuse(
        "Row 3 has the label 3, but the student has 3 labels",
        tmp_path,
        "task",
        (student, teacher),
        {"train_dataset": data},
    )


@stages
def test_tokenizer_with_more_tokens_than_the_teacher(tmp_path, stage):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more", "words"])
    refuse(
        "tokenizer has 66 tokens, but the teacher has 64",
        tmp_path,
        stage,
        stage_models(stage),
        {"processing_class": tokenizer},
    )


@stages
def test_tokenizer_that_is_not_the_teachers(tmp_path, stage):
    swapped = list(VOCABULARY)
    swapped[10], swapped[20] = swapped[20], swapped[10]
    theirs = BertTokenizerFast(vocab={token: i for i, token in enumerate(swapped)})
    # word15 is token 20 of ours and token 10 of theirs
    refuse("'word15' is 20 and 10", tmp_path, stage, stage_models(stage), {"teacher_tokenizer": theirs})


def test_tokenizer_that_lacks_a_token_of_the_teachers(tmp_path):
    theirs = BertTokenizerFast(vocab={token: i for i, token in enumerate([*VOCABULARY[:-1], "other"])})
    refuse("'other' is None and 63", tmp_path, "task", stage_models("task"), {"teacher_tokenizer": theirs})


def test_the_teachers_own_tokenizer_is_accepted(tmp_path):
    make_trainer(tmp_path, "task", trainer_options={"teacher_tokenizer": tiny_tokenizer()})


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ([2], r"layer_map has 1 entries, but the student has 2 layers"),
        ([0, 2], r"between 1 and 2.*\[0, 2\]"),
        ([1, 3], r"between 1 and 2.*\[1, 3\]"),
        ([2, 1], r"must end at the teacher's last layer, 2, got \[2, 1\]"),
    ],
)
def test_layer_map_that_does_not_fit(tmp_path, layer_map, message):
    refuse(message, tmp_path, "general", stage_models("general"), layer_map=layer_map)


@pytest.mark.parametrize(
    ("layer_map", "expected"),
    [("uniform", [2]), ("last", [2]), ("skip", [2]), (None, [2]), ("2", [2]), ([2], [2])],
)
def test_layer_map_by_name_or_by_layers_is_printed(tmp_path, capsys, layer_map, expected):
    trainer = make_trainer(tmp_path, "general", stage_models("general", num_hidden_layers=1), layer_map=layer_map)
    assert trainer.layer_map == expected
    trainer.train()
    assert capsys.readouterr().out.startswith("Layer map (student <- teacher): 1 <- 2\n")


def test_layer_map_chooses_the_targets(tmp_path):
    student, teacher = stage_models("general", num_hidden_layers=1)
    trainer = make_trainer(tmp_path, "general", (student, teacher), layer_map=[2])
    assert trainer.layer_map == [2]
    student, teacher = stage_models("general")
    losses = [
        make_trainer(tmp_path, "general", (student, teacher), layer_map=layers).evaluate()["eval_loss_hidden_states"]
        for layers in ([1, 2], [2, 2])
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_map": "middle"}, r"one of \['last', 'skip', 'uniform'\] or layers such as 2,4,6, got 'middle'"),
        ({"layer_map": "2,x"}, "or layers such as 2,4,6, got '2,x'"),
        ({"non_finite": "ignore"}, "non_finite must be 'stop' or 'skip', got 'ignore'"),
        ({"stage": "both"}, "stage must be 'general' or 'task', got 'both'"),
        ({"hidden_state_weight": -1.0}, "hidden_state_weight must not be negative, got -1.0"),
        ({"embedding_weight": -0.1}, "embedding_weight must not be negative"),
        ({"logit_weight": float("nan")}, "logit_weight must not be negative, got nan"),
        ({"cross_entropy_weight": -1e-9}, "cross_entropy_weight must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"stage": "general", "hidden_state_weight": 0.0, "embedding_weight": 0.0}, "All loss weights .* are 0"),
    ],
)
def test_impossible_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_every_argument_has_help():
    own = {f.name for f in fields(DistillationTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
    assert {"stage", "temperature", "layer_map", "initial_projections"} < own
    for field in fields(DistillationTrainingArguments):
        if field.name in own:
            assert field.metadata["help"].endswith(".")


def test_mixed_time_steps_are_drawn_for_each_batch(tmp_path):
    """1, 2, 3 in training, all 3 in evaluation; an interrupted training draws the same."""
    student, teacher = stage_models("task", num_time_steps=3)
    options = {"max_steps": 16, "mixed_time_steps": True, "save_strategy": "steps", "save_steps": 8}
    trainer = make_trainer(tmp_path, "task", (student, teacher), **options)
    seen = {True: [], False: []}
    student.spikebert.encoding.register_forward_pre_hook(lambda module, args: seen[module.training].append(args[1]))
    trainer.train()
    trainer.evaluate()
    assert set(seen[True]) == {1, 2, 3}
    assert set(seen[False]) == {3}
    drawn = seen[True][8:]
    seen[True].clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert seen[True] == drawn


def test_mixed_time_steps_teach_the_logits_after_each_step(tmp_path):
    student, teacher = stage_models("task", num_time_steps=3)
    weights = {"hidden_state_weight": 0.0, "embedding_weight": 0.0, "logit_weight": 1.0, "cross_entropy_weight": 0.0}
    trainer = make_trainer(tmp_path, "task", (student, teacher), mixed_time_steps=True, **weights)
    trainer._draw_time_steps = lambda: 3
    in_float64(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    wanted = teacher(**inputs).logits
    after = [logit_loss(student(**inputs, num_time_steps=k).logits, wanted, 1.0, None).mean() for k in (1, 2, 3)]
    assert after[0] != after[2]
    loss = trainer.compute_loss(student.train(), batch)
    torch.testing.assert_close(loss, sum(after) / 3, rtol=1e-9, atol=0)
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, sum(after) / 3)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    torch.testing.assert_close(trainer.compute_loss(student.eval(), batch), after[-1], rtol=1e-9, atol=0)


def test_mixed_time_steps_need_several(tmp_path):
    with pytest.raises(ValueError, match=r"mixed_time_steps needs a student of several time steps"):
        make_trainer(tmp_path, "task", stage_models("task", num_time_steps=1), mixed_time_steps=True)


@pytest.mark.parametrize(("stage", "expected"), [("general", 3e-3), ("task", 1.5e-3)])
def test_the_learning_rate_follows_the_stage(tmp_path, stage, expected):
    assert DistillationTrainingArguments(str(tmp_path), stage=stage, use_cpu=True).learning_rate == expected
    assert DistillationTrainingArguments(str(tmp_path), stage=stage, use_cpu=True, learning_rate=1.0).learning_rate == 1


def test_several_labels_need_no_weight_of_their_own(tmp_path):
    """What the labels are is known without their loss: the logits teach each of them apart."""
    student, teacher = stage_models("task")
    student.config.problem_type = None
    rows = tiny_text(16, 0, labels=lambda i: [float(i % 2), 1.0, 0.0])
    options = {"train_dataset": rows, "eval_dataset": None}
    make_trainer(tmp_path, "task", (student, teacher), options, cross_entropy_weight=0.0).train()
    assert student.config.problem_type == "multi_label_classification"


def test_labels_are_missing(tmp_path):
    trainer = make_trainer(tmp_path, "task", trainer_options={"train_dataset": tiny_text(8, labels=None)})
    with pytest.raises(ValueError, match=r"The batch has no labels\. Add them, or set cross_entropy_weight=0"):
        trainer.train()


# Trouble while training


@stages
@pytest.mark.parametrize("saved", [True, False], ids=["with_checkpoint", "without_checkpoint"])
def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, stage, saved):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.get_input_embeddings().weight.fill_(math.nan)

    options = {"save_strategy": "steps", "save_steps": 1} if saved else {}
    trainer = make_trainer(tmp_path, stage, trainer_options={"callbacks": [Break()]}, max_steps=3, **options)
    checkpoint = re.escape(str(tmp_path / "checkpoint-1")) if saved else "none yet"
    message = rf"not finite at step 1 of stage '{stage}': .*embeddings nan.*Last checkpoint: {checkpoint}\. Lower the"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    if saved:
        assert all(torch.isfinite(w).all() for w in load_file(tmp_path / "checkpoint-1" / "model.safetensors").values())


@stages
def test_bf16(tmp_path, stage):
    trainer = make_trainer(tmp_path, stage, bf16=True)
    before = weights_of(trainer.model)
    trainer.train()
    assert {weight.dtype for weight in weights_of(trainer.model).values()} == {torch.float32}
    assert not [name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])]


@stages
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_in_another_number_format(tmp_path, stage, role, dtype):
    student, teacher = stage_models(stage, **OTHER_SIZES)
    (student if role == "student" else teacher).to(dtype)
    trainer = make_trainer(tmp_path, stage, (student, teacher), learning_rate=0.1)
    before = weights_of(trainer.projections)
    trainer.train()
    assert {weight.dtype for weight in before.values()} == {student.dtype}
    assert not [name for name, weight in weights_of(trainer.projections).items() if torch.equal(weight, before[name])]


# Deprecated in favour of a name that the oldest supported transformers does not have.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@stages
def test_gradient_checkpointing_changes_nothing(tmp_path, stage):
    weights = []
    for on in (False, True):
        trainer = make_trainer(tmp_path, stage, gradient_checkpointing=on)
        trainer.train()
        layers = trainer.model.base_model.encoder.layer
        assert all(layer.gradient_checkpointing is on for layer in layers)
        weights.append(weights_of(trainer.model))
    assert_same(weights[1], weights[0], 1e-6)


# Two processes


def test_two_processes_follow_the_same_path_as_one(tmp_path):
    distributed_client.main(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, distributed_client.__file__, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    single, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("0_of_1", "0_of_2", "1_of_2"))
    assert any("projections" in name for name in single)
    assert_same(second, first)
    assert_same(first, single, 1e-9)
    logs = [json.loads((tmp_path / f"log_{count}.json").read_text()) for count in (1, 2)]
    assert len(logs[0]) == 4
    for ours, theirs in zip(*logs, strict=True):
        prefix = "eval_" if "eval_loss" in theirs else ""
        for name in ("loss", *(f"loss_{name}" for name in LOSSES["task"])):
            assert ours[prefix + name] == pytest.approx(theirs[prefix + name], rel=1e-5), name
