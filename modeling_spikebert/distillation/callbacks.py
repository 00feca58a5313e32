from typing import Any

from transformers import PreTrainedModel, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from .projections import ATTRIBUTE

# Of an evaluation's log, what a line leaves out: parts of the loss, rates and speeds.
UNPRINTED = ("loss_", "firing_rate", "runtime", "per_second", "preparation_time")


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
        what = f"{type(model).__name__} {size(model)}"
        if self.teacher is not None:
            what = f"stage {getattr(args, 'stage', '')}: student {size(model)}, teacher {size(self.teacher)}"
        steps = f"{state.max_steps:,} steps" + (f" from step {state.global_step:,}" if state.global_step else "")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        processes = "" if args.world_size == 1 else f"{args.world_size} x "
        print(
            f"Training {what}; {steps} of {batch} sentences on {processes}{args.device.type}, into {args.output_dir}",
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
        line = "  ".join(parts)
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)

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
