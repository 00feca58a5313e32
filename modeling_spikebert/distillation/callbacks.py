import math
import time
from typing import Any

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .projections import ATTRIBUTE

# Of an evaluation's log, what a line leaves out: parts of the loss, rates and speeds.
UNPRINTED = ("loss_", "firing_rate", "runtime", "per_second", "preparation_time")


class FiniteLossCallback(TrainerCallback):
    """Stops a plain `Trainer` whose logged loss is not finite; `DistillationTrainer` looks at each step by itself.

    Needs `logging_nan_inf_filter=False`, or the Trainer logs 0 in its place.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"The loss is {loss} at step {state.global_step}. Lower the learning rate (now {args.learning_rate}); "
                f"earlier checkpoints, if there are any, are in {args.output_dir}."
            )


def use_console(trainer: Trainer, teacher: PreTrainedModel | None = None) -> None:
    """Lets a `Trainer` print a readable line a log in place of a dictionary; notebooks keep their table."""
    printers = [trainer.pop_callback(callback) for callback in (PrinterCallback, ProgressCallback)]
    if any(printers):
        trainer.add_callback(ConsoleCallback(teacher))


class ConsoleCallback(ProgressCallback):
    """Prints what begins, and a line a log; the progress bar stays. What is logged elsewhere stays complete.

    Args:
        teacher: of a distillation, for the first line.
    """

    def __init__(self, teacher: PreTrainedModel | None = None):
        super().__init__()
        self.teacher = teacher

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        assert model is not None
        self.batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.first_step = self.last_step = state.global_step
        self.start = self.last_time = time.perf_counter()
        what = f"{type(model).__name__} {size(model)}"
        if self.teacher is not None:
            what = f"stage {getattr(args, 'stage', '')}: student {size(model)}, teacher {size(self.teacher)}"
        steps = f"{state.max_steps:,} steps" + (f" from step {state.global_step:,}" if state.global_step else "")
        processes = "" if args.world_size == 1 else f"{args.world_size} x "
        print(
            f"Training {what}; {steps} of {self.batch} sentences on {processes}{args.device.type}, into "
            f"{args.output_dir}",
            flush=True,
        )
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            line = self._training(state, logs)
        elif "train_runtime" in logs:
            line = f"trained in {duration(logs['train_runtime'])}, mean loss {logs['train_loss']:.4g}"
        else:
            shown = {
                name: value
                for name, value in logs.items()
                if name.startswith("eval_") and not any(part in name for part in UNPRINTED)
            }
            line = "  ".join([f"step {state.global_step:,}", *(f"{name} {value:.4g}" for name, value in shown.items())])
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)

    def _training(self, state: TrainerState, logs: dict[str, float]) -> str:
        now, step = time.perf_counter(), state.global_step
        # A `DistillationTrainer` knows them without evaluations and saving.
        speed = logs.get("samples_per_second", (step - self.last_step) * self.batch / (now - self.last_time))
        per_step = (now - self.start) / max(step - self.first_step, 1)
        left = logs.get("seconds_left", (state.max_steps - step) * per_step)
        self.last_time, self.last_step = now, step
        parts = [f"step {step:,}/{state.max_steps:,}", f"loss {float(logs['loss']):.4g}"]
        parts += [f"{speed:,.3g} sentences/s", f"{duration(left)} left"]
        if logs.get("skipped_steps"):
            parts.append(f"{logs['skipped_steps']} steps skipped")
        return "  ".join(parts)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar, also when a training was interrupted: the bar is not to be the last word."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def size(model: PreTrainedModel) -> str:
    """Layers, width and millions of parameters of a model, without the projections of a student."""
    count = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(ATTRIBUTE))
    return f"{model.config.num_hidden_layers} x {model.config.hidden_size} ({count / 1e6:.3g} M parameters)"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
