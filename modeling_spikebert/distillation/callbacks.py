import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from .projections import ATTRIBUTE

# Of an evaluation's log, what a line leaves out: parts of the loss, rates and speeds.
UNPRINTED = ("loss_", "firing_rate", "runtime", "per_second", "preparation_time")


class ProgressBar(ProgressCallback):
    """The bar alone."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """`ConsoleCallback` prints what is logged."""

    def close(self) -> None:
        """Ends the bar of a training that was interrupted, too: it is not to be the last word."""
        if self.training_bar is not None:
            self.training_bar.close()


class ConsoleCallback(TrainerCallback):
    """Prints what begins, and a line a log. What is logged elsewhere stays complete.

    Args:
        teacher: of a distillation, for the first line.
    """

    def __init__(self, teacher: PreTrainedModel | None = None):
        self.teacher = teacher

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        what = f"{type(model).__name__} {size(model)}"
        if self.teacher is not None:
            what = f"stage {getattr(args, 'stage', '')}: student {size(model)}, teacher {size(self.teacher)}"
        steps = f"{state.max_steps:,} steps" + (f" from step {state.global_step:,}" if state.global_step else "")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        device = args.device.type if args.world_size == 1 else f"{args.world_size} x {args.device.type}"
        print(f"Training {what}; {steps} of {batch} sentences on {device}, into {args.output_dir}", flush=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            parts = [f"step {state.global_step:,}/{state.max_steps:,}", f"loss {float(logs['loss']):.4g}"]
            parts += [f"{logs['samples_per_second']:,.3g} sentences/s", f"{duration(logs['seconds_left'])} left"]
            if logs.get("skipped_steps"):
                parts.append(f"{logs['skipped_steps']} steps skipped")
        elif "train_runtime" in logs:
            parts = [f"trained in {duration(logs['train_runtime'])}, mean loss {logs['train_loss']:.4g}"]
        else:
            parts = [f"step {state.global_step:,}"]
            parts += [
                f"{name} {value:.4g}"
                for name, value in logs.items()
                if name.startswith("eval_") and not any(part in name for part in UNPRINTED)
            ]
        tqdm.write("  ".join(parts))  # above a bar, if there is one
        sys.stdout.flush()


def size(model: PreTrainedModel) -> str:
    """Layers, width and millions of parameters of a model, without the projections of a student."""
    count = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(ATTRIBUTE))
    return f"{model.config.num_hidden_layers} x {model.config.hidden_size} ({count / 1e6:.3g} M parameters)"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
