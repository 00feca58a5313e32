import sys
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..console.loudness import is_verbose
from ..console.text import duration, figure, number, speed
from .projections import ATTRIBUTE
from .speed import Stopwatch

# Of an evaluation's log, what a line leaves out: parts of the loss, rates and speeds.
UNPRINTED = ("loss_", "firing_rate", "runtime", "per_second", "preparation_time")
BAR = "{percentage:3.0f} % |{bar:20}| {n_fmt}/{total_fmt}{postfix}"


class ConsoleCallback(TrainerCallback):
    """A training in one line on a terminal, and elsewhere in one for each log. What is logged stays complete.

    All values of a log are printed, too, where transformers' log level is INFO.

    Args:
        stopwatch: of the same training.
        teacher: of a distillation, for the first line.
        bar: whether a terminal may have a bar.
    """

    def __init__(self, stopwatch: Stopwatch, teacher: PreTrainedModel | None = None, bar: bool = True):
        self.stopwatch, self.teacher = stopwatch, teacher
        self.may_have_bar = bar
        self.bar: Any = None
        self.evaluation_bar: Any = None
        self.shown: dict[str, str] = {}  # behind the bar: values by name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        what = f"{type(model).__name__} {size(model)}"
        if self.teacher is not None:
            what = f"student {size(model)}, teacher {size(self.teacher)}"
        steps = f"{state.max_steps:,} steps" + (f" from step {state.global_step:,}" if state.global_step else "")
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        device = args.device.type if args.world_size == 1 else f"{args.world_size} x {args.device.type}"
        print(f"Training {what}: {steps} of {batch} sentences on {device}", flush=True)
        self.shown = {}
        if self.may_have_bar and sys.stdout.isatty():
            self.bar = new_bar(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.shown["left"] = f"{duration(self.stopwatch.seconds_left(state))} left"
            self.bar.set_postfix_str("  ".join(self.shown.values()), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, eval_dataloader: Any = None, **__: Any
    ) -> None:
        wanted = self.may_have_bar and state.is_world_process_zero and sys.stdout.isatty()
        if not wanted or not has_length(eval_dataloader):
            return
        if self.evaluation_bar is None:
            self.evaluation_bar = new_bar(total=len(eval_dataloader), leave=False, desc="evaluation")
        self.evaluation_bar.update()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        if self.evaluation_bar is not None:
            self.evaluation_bar.close()
            self.evaluation_bar = None

    on_predict = on_evaluate

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if not state.is_world_process_zero:
            return
        place = (
            ""
            if state.max_steps < 1
            else f"step {state.global_step:>{len(f'{state.max_steps:,}')},}/{state.max_steps:,}"
        )
        if "loss" in logs:
            parts = {"loss": f"loss {figure(float(logs['loss'])):>6}"}
            if logs.get("skipped_steps"):
                parts["skipped"] = f"{logs['skipped_steps']} steps skipped"
            parts["speed"] = f"{speed(logs['samples_per_second'])} sentences/s"
            parts["left"] = f"{duration(logs['seconds_left'])} left"
        elif "train_runtime" in logs:
            place = f"trained in {duration(logs['train_runtime'])}"
            parts = {"mean": f"mean loss {figure(logs['train_loss'])}"}
        else:
            self.on_evaluate()  # its bar goes before its line comes
            place = f"{place}  evaluation".strip()
            parts = {name: f"{label(name)} {value_of(name, value)}" for name, value in logs.items() if printed(name)}
        if is_verbose():
            self._print("  ".join([place, *(f"{name} {value_of(name, value)}" for name, value in logs.items())]))
        elif self.bar is None:
            self._print("  ".join([place, *parts.values()]))
        elif "train_runtime" in logs:
            self.shown["left"] = f"in {duration(logs['train_runtime'])}"
        else:  # metrics of an evaluation stand until the next one, in front of speed and time
            last = {name: self.shown.pop(name) for name in ("speed", "left") if name in self.shown}
            self.shown |= parts if "loss" in parts else {n: t for n, t in parts.items() if n != "eval_loss"} | last
        if self.bar is not None:
            self.bar.set_postfix_str("  ".join(self.shown.values()))

    def _print(self, line: str) -> None:
        tqdm.write(line)  # above a bar, if there is one
        sys.stdout.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar of a training that was interrupted, too: it is not to be the last word."""
        for bar in (self.evaluation_bar, self.bar):
            if bar is not None:
                bar.close()
        self.bar = self.evaluation_bar = None


def new_bar(**options: Any) -> Any:
    bar_format = "{desc} " + BAR if "desc" in options else BAR
    return tqdm(**options, file=sys.stdout, dynamic_ncols=True, bar_format=bar_format)


def printed(name: str) -> bool:
    return name.startswith("eval_") and not any(part in name for part in UNPRINTED)


def label(name: str) -> str:
    """`eval_accuracy` as `accuracy`; of one evaluation set among several the name stays."""
    return name.removeprefix("eval_").replace("_", " ")


def value_of(name: str, value: Any) -> str:
    if "accuracy" in name:
        return f"{100 * value:.1f} %"
    return figure(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def size(model: PreTrainedModel) -> str:
    """Layers, width and millions of parameters of a model, without the projections of a student."""
    count = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith(ATTRIBUTE))
    return f"{model.config.num_hidden_layers} x {model.config.hidden_size} ({number(count)} parameters)"
