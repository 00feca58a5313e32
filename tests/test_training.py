"""What a training does with numbers that are not finite and rows without labels, and what it reports."""

import math
import re
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import OTHER_SIZES, make_trainer, stage_models, stage_text, tiny_text, weights_of
from transformers import TrainerCallback
from transformers.utils import logging

from modeling_spikebert import DistillationTrainer
from modeling_spikebert.console.text import duration, number, speed
from modeling_spikebert.distillation import resuming

stages = pytest.mark.parametrize("stage", ["general", "task"])


class BreakGradient(TrainerCallback):
    """Makes a gradient infinite at some steps, behind the loss."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, model, **kwargs):
        def hook(grad: torch.Tensor) -> torch.Tensor:
            return torch.full_like(grad, math.inf) if state.global_step in self.steps else grad

        if state.global_step == 0:
            model.get_input_embeddings().weight.register_hook(hook)


# Steps that are not finite


@stages
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not_clipped"])
def test_a_gradient_that_is_not_finite_stops_the_training(tmp_path, stage, max_grad_norm):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": max_grad_norm}
    trainer = make_trainer(tmp_path, stage, trainer_options={"callbacks": [BreakGradient(1)]}, **options)
    checkpoint = re.escape(str(tmp_path / "checkpoint-1"))
    message = rf"not finite at step 1 of stage '{stage}': the norm of the gradient is (inf|nan)\. Last checkpoint: "
    with pytest.raises(FloatingPointError, match=message + checkpoint):
        trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())


@stages
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "not_clipped"])
def test_a_skipped_step_leaves_weights_and_moments_alone(tmp_path, stage, max_grad_norm):
    class Keep(TrainerCallback):
        def __init__(self):
            self.weights = []

        def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
            moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
            self.weights.append((weights_of(model), moments))

    keep = Keep()
    trainer = make_trainer(
        tmp_path,
        stage,
        trainer_options={"callbacks": [BreakGradient(1, 2), keep]},
        max_steps=4,
        non_finite="skip",
        max_grad_norm=max_grad_norm,
    )
    trainer.train()
    _, second, third, fourth = keep.weights
    for weights, moments in (third, fourth):
        assert all(torch.equal(weight, second[0][name]) for name, weight in weights.items())
        assert all(torch.equal(moment, before) for moment, before in zip(moments, second[1], strict=True))
    after = weights_of(trainer.model)
    assert any(not torch.equal(weight, second[0][name]) for name, weight in after.items())
    assert [entry["skipped_steps"] for entry in trainer.state.log_history if "loss" in entry] == [0, 1, 1, 0]


def test_a_loss_that_is_not_finite_is_skipped_and_kept_out_of_the_log(tmp_path):
    class BreakBatch(TrainerCallback):
        """Weights that are no numbers, for one step."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                self.bias = model.classifier.bias.detach().clone()
                with torch.no_grad():
                    model.classifier.bias.fill_(math.nan)

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.classifier.bias.copy_(self.bias)

    trainer = make_trainer(
        tmp_path,
        "task",
        trainer_options={"callbacks": [BreakBatch()]},
        max_steps=4,
        logging_steps=2,
        non_finite="skip",
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [1, 0]
    for entry in logs:
        assert all(math.isfinite(value) for name, value in entry.items() if name not in ("grad_norm", "loss"))
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer.model).values())


def test_evaluation_does_not_skip(tmp_path):
    trainer = make_trainer(tmp_path, "task", non_finite="skip")
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits nan"):
        trainer.evaluate()


def test_a_training_that_only_skips_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "MOST_SKIPPED_STEPS", 3)
    callbacks = [BreakGradient(*range(1, 20))]
    trainer = make_trainer(tmp_path, "task", trainer_options={"callbacks": callbacks}, max_steps=9, non_finite="skip")
    with pytest.raises(FloatingPointError, match=r"at step 4 .*3 steps were skipped one after the other"):
        trainer.train()


# Rows without labels


@pytest.mark.parametrize(
    ("problem_type", "missing", "num_labels"),
    [("single_label_classification", -100, 3), ("regression", math.nan, 1)],
)
def test_a_row_without_label_is_labelled_by_the_teacher(tmp_path, problem_type, missing, num_labels):
    names = {i: str(i) for i in range(num_labels)}
    labels = {"problem_type": problem_type, "id2label": names, "label2id": {name: i for i, name in names.items()}}
    student, teacher = stage_models("task")
    for name, value in labels.items():
        setattr(teacher.config, name, value)
    teacher = type(teacher)(teacher.config).eval()
    teacher.classifier.bias.data.copy_(torch.arange(num_labels) * 0.3)
    student = type(student).from_teacher(teacher)
    options = {"models": (student, teacher), "hidden_state_weight": 0.0, "embedding_weight": 0.0, "logit_weight": 0.0}
    unlabelled = make_trainer(
        tmp_path, "task", trainer_options={"eval_dataset": tiny_text(6, labels=lambda i: missing)}, **options
    )
    with torch.no_grad():
        text = tiny_text(6, labels=None)
        logits = torch.cat([teacher(torch.tensor([ids])).logits for ids in text["input_ids"]])
    predicted = logits[:, 0].tolist() if num_labels == 1 else logits.argmax(-1).tolist()
    labelled = make_trainer(
        tmp_path, "task", trainer_options={"eval_dataset": tiny_text(6, labels=lambda i: predicted[i])}, **options
    )
    losses = [trainer.evaluate()["eval_loss_cross_entropy"] for trainer in (unlabelled, labelled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0


# What it reports


@stages
def test_speed_memory_and_the_time_that_is_left_are_logged(tmp_path, stage):
    class Slow(TrainerCallback):
        """Makes a step take a known time at least."""

        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.05)

    trainer = make_trainer(
        tmp_path, stage, trainer_options={"callbacks": [Slow()]}, max_steps=4, logging_steps=2, eval_strategy="steps"
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    # 2 steps of 4 sentences, 0.05 s each at least
    for entry in logs:
        assert 8 / seconds < entry["samples_per_second"] < 8 / 0.1
        assert 3 < entry["tokens_per_second"] / entry["samples_per_second"] < 12  # the length of sentences
        assert entry["peak_memory_mb"] > 50
    text = stage_text(stage)
    tokens = sum(entry["tokens_per_second"] / entry["samples_per_second"] * 8 for entry in logs)
    assert tokens == pytest.approx(sum(len(ids) for ids in text["input_ids"]), rel=1e-5)
    assert 0.1 < logs[0]["seconds_left"] < seconds
    assert logs[1]["seconds_left"] == 0
    assert not any("per_second" in name and "runtime" not in name for name in trainer.evaluate() if "tokens" in name)


def evaluated_trainer(folder, **options) -> DistillationTrainer:
    """Evaluates at the second and last step, with an accuracy."""

    def accuracy(prediction) -> dict[str, float]:
        return {"accuracy": 0.5}

    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2} | options
    return make_trainer(folder, "task", trainer_options={"compute_metrics": accuracy}, **options)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_log_file_has_a_plain_line_a_log(tmp_path, capsys, disable_tqdm):
    """Nothing of what is logged elsewhere is lost."""
    trainer = evaluated_trainer(tmp_path, disable_tqdm=disable_tqdm)
    trainer.train()
    printed = capsys.readouterr()
    assert printed.err == ""
    layers, start, *lines = printed.out.splitlines()
    assert layers.startswith("Layer map")
    assert start.startswith("Training student 2 x 32 (")
    assert start.endswith(": 2 steps of 4 sentences on cpu")
    patterns = [
        r"step 1/2  loss +\S+  +\S+ sentences/s  \d+ s left",
        r"step 2/2  loss +\S+  +\S+ sentences/s  0 s left",
        r"step 2/2  evaluation  loss \S+  accuracy 50\.0 %",
        r"trained in \d+ s  mean loss \S+",
    ]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"loss_logits", "firing_rate", "tokens_per_second", "grad_norm"} <= logs[0].keys()


def test_a_terminal_has_one_line_for_a_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    trainer = evaluated_trainer(tmp_path, disable_tqdm=False)
    trainer.train()
    _, _, *lines = capsys.readouterr().out.splitlines()
    states = [state.strip() for line in lines for state in line.split("\r")]
    last = r"100 % \|.{20}\| 2/2, loss +\S+  accuracy 50\.0 %  +\S+ sentences/s  in \d+ s"
    assert re.fullmatch(last, states[-1]), states[-1]
    assert not any(state.startswith("step") for state in states)
    trainer.evaluate()  # alone, it has a bar that goes, and then a line
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"step 2/2  evaluation  loss \S+  accuracy 50\.0 %", line)


def test_all_that_is_logged_is_printed_if_it_is_wanted(tmp_path, capsys):
    trainer = evaluated_trainer(tmp_path, log_level="info", max_steps=1, eval_steps=1)
    try:
        trainer.train()
    finally:
        logging.set_verbosity_warning()
    out = capsys.readouterr().out
    for name in ("loss_logits", "firing_rate_layer_1", "grad_norm", "learning_rate", "eval_runtime"):
        assert re.search(rf"  {name} \S+", out), name
    assert "{" not in out


def test_durations_are_said_in_a_unit_of_their_size():
    assert [duration(seconds) for seconds in (0.4, 89, 91, 3000, 12_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "50 min",
        "3 h 20 min",
    ]


def test_numbers_are_written_as_people_read_them():
    numbers = [0, 0.14200000166893005, 31.44, 999.7, 1420, 22_713_216, 3.4e9]
    assert [number(value) for value in numbers] == ["0", "0.142", "31.4", "1.00 k", "1.42 k", "22.7 M", "3.40 G"]
    assert [speed(value) for value in (1.7, 142, 1420)] == ["  1.70", "   142", "1.42 k"]


def test_evaluation_does_not_slow_the_speed_that_is_logged(tmp_path):
    class SlowEvaluation(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.25)

    options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, "task", trainer_options={"callbacks": [SlowEvaluation()]}, **options)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["samples_per_second"] > 8 / 0.5


@stages
def test_every_loss_and_firing_rate_reaches_tensorboard(tmp_path, stage, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, stage, report_to="tensorboard", **options)
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    values = ["loss", "firing_rate", "firing_rate_layer_1", "firing_rate_layer_2", "loss_hidden_states"]
    values += ["loss_embeddings"]
    values += ["loss_logits", "loss_cross_entropy"] if stage == "task" else []
    assert {f"train/{name}" for name in values} | {f"eval/{name}" for name in values} <= names
    assert {"train/samples_per_second", "train/tokens_per_second", "train/peak_memory_mb"} <= names
    assert {"train/seconds_left", "train/grad_norm", "train/learning_rate"} <= names
    logged = [entry["loss_embeddings"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss_embeddings")] == pytest.approx(logged)
    mean = [events.Scalars(f"train/firing_rate_layer_{i}")[0].value for i in (1, 2)]
    assert events.Scalars("train/firing_rate")[0].value == pytest.approx(sum(mean) / 2)


def test_float16_leaves_gradients_that_overflow_to_its_scaler(tmp_path):
    """It looks for its scale by them."""
    trainer = make_trainer(tmp_path, "task")
    trainer.model.classifier.bias.grad = torch.full((3,), math.inf)
    event = trainer.callback_handler.on_pre_optimizer_step
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    event(trainer.args, trainer.state, trainer.control)
    assert math.isinf(trainer.model.classifier.bias.grad[0])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(FloatingPointError):
        event(trainer.args, trainer.state, trainer.control)


def test_several_evaluation_sets_have_names_and_do_not_slow_the_speed(tmp_path):
    sets = {"near": tiny_text(4, seed=1), "far": tiny_text(4, seed=2)}
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, "task", trainer_options={"eval_dataset": sets}, **options)
    trainer.train()
    losses = [
        [entry[f"eval_{name}_loss_logits"] for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        for name in sets
    ]
    assert [len(values) for values in losses] == [2, 2]
    assert losses[0] != losses[1]
    assert not any("eval_loss_logits" in entry for entry in trainer.state.log_history)
    assert all(entry["samples_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_projections_without_a_loss_are_not_trained(tmp_path):
    """Or DDP waits for gradients that never come."""
    trainer = make_trainer(tmp_path, "task", stage_models("task", **OTHER_SIZES), hidden_state_weight=0.0)
    frozen = {name for name, parameter in trainer.projections.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in trainer.projections.named_parameters() if name.startswith("layers.")}
    before = weights_of(trainer.projections)
    trainer.train()
    moved = {name for name, weight in weights_of(trainer.projections).items() if not torch.equal(weight, before[name])}
    assert moved == {"embeddings.weight"}


@pytest.mark.parametrize("label", [1.0, math.nan, "good", None])
def test_labels_that_are_no_class_ids_are_refused_by_row(tmp_path, label):
    labels = [label if i == 2 else type(label)(0) if isinstance(label, float | str) else 0 for i in range(4)]
    rows = tiny_text(4, labels=None).add_column("labels", labels)
    with pytest.raises(ValueError, match=r"Row [13] has the label .*, but a class id is an integer"):
        make_trainer(tmp_path, "task", trainer_options={"train_dataset": rows})
