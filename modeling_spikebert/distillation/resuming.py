"""A `Trainer` that may be interrupted anywhere: whole checkpoints, and the options with which a run goes on."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import transformers.trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import SCALER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..hub import CodeFilesCallback, save_code_files
from . import checkpoints
from .callbacks import ConsoleCallback
from .checkpoints import OPTIONS_NAME, check_checkpoint, compare_options, last_checkpoint, remove_incomplete
from .run_folder import the_only_run
from .speed import Stopwatch, peak_memory_mb

# What a resumed run may change, and what it does then is what its options say.
OPTIMISER_OPTIONS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE_OPTIONS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")
# A training that skips this many steps one after the other does not recover by skipping.
MOST_SKIPPED_STEPS = 50


class ResumableTrainer(Trainer, TrainerCallback):
    """A `Trainer` that goes on from checkpoints which are whole, with the options of the run that goes on.

    One run holds its output folder (`the_only_run`). A checkpoint has a manifest, which is checked before anything is
    loaded, and the options of its run. Options that were changed since then apply, which is printed, or are refused.
    No pickle of the arguments, which has paths of this machine, is left or pushed. Steps whose gradient is not finite
    stop the training, or are skipped with `non_finite="skip"` of the arguments.

    Args:
        teacher: of a distillation, for the console.
        *args, **kwargs: as for `Trainer`.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stopwatch = Stopwatch()
        self.add_callback(self._stopwatch)
        printer, bar = self.pop_callback(PrinterCallback), self.pop_callback(ProgressCallback)
        self._console = ConsoleCallback(self._stopwatch, teacher, bar=bar is not None)
        if printer or bar:  # notebooks keep their table
            self.add_callback(self._console)
        self.add_callback(CodeFilesCallback())
        self.add_callback(self)  # it listens to its own events
        self._changed: dict[str, tuple[Any, Any]] = {}
        # Sentences and tokens of all processes: in the step, and since the last log.
        self._counts_of_step = self._counts = torch.zeros(2, dtype=torch.long)
        self._skips_this_step = False
        self._skipped_steps = self._skipped_in_a_row = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: folder of a checkpoint; or True, or "last", for the last one in `output_dir` that
                was written to its end, and the beginning where there is none yet.
            *args, **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: the checkpoint is damaged, not of this model or of other options; the output folder has
                checkpoints of an earlier training, or belongs to another process.
            FloatingPointError: the gradient is not finite.
            OSError: a checkpoint cannot be written.
        """
        folder = Path(str(self.args.output_dir))
        with the_only_run(self.args, resume_from_checkpoint):
            last = resume_from_checkpoint in (True, "last")
            resume: Any = last_checkpoint(folder) if last else resume_from_checkpoint
            checkpoint = Path(resume) if resume else None
            self._changed = {}
            if checkpoint is not None:
                check_checkpoint(checkpoint, cast(Any, self.model).config)
                self._changed = compare_options(checkpoint, *self.options())
                if (checkpoint / SCALER_NAME).is_file() and self.accelerator.scaler is None:
                    # A run in float16 goes on in a wider format: this one takes the state, and scales nothing.
                    self.accelerator.scaler = torch.amp.GradScaler(enabled=False)
            self._prepare_run(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                remove_incomplete(folder)
                if self._changed:
                    changes = (f"{name} {new} (was {old})" for name, (old, new) in self._changed.items())
                    print("Resumed with " + ", ".join(changes))
            try:
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finally:
                self._console.close()

    def _prepare_run(self, checkpoint: Path | None) -> None:
        """What a kind of trainer does before its first step; the checkpoint has been checked."""
        self._counts = torch.zeros(2, dtype=torch.long)
        self._skipped_steps = self._skipped_in_a_row = 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As `Trainer.get_batch_samples`; counts sentences and tokens."""
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the Trainer would do a step more
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(1, 2, dtype=torch.long, device=device)
        for batch in batches:
            counts[0, 0] += len(batch["input_ids"])
            counts[0, 1] += batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        self._counts_of_step = cast(Tensor, self.accelerator.gather(counts)).sum(0)
        self._counts = self._counts.to(device) + self._counts_of_step
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the log of training what it takes: speed, the peak of memory, and the seconds that are left."""
        if "loss" in logs:
            (sentences, tokens), seconds = self._counts.tolist(), self._stopwatch.lap()
            logs["samples_per_second"], logs["tokens_per_second"] = sentences / seconds, tokens / seconds
            logs["peak_memory_mb"] = peak_memory_mb(self.args.device)
            logs["seconds_left"] = self._stopwatch.seconds_left(self.state)
            if self._may_skip:
                logs["skipped_steps"] = self._skipped_steps
            self._counts, self._skipped_steps = torch.zeros(2, dtype=torch.long), 0
        super().log(logs, start_time)

    # Options

    def options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint records: options that a run keeps to its end, and those that may change.

        With other ones of the first kind it would see other data, or could not load its state.
        """
        args, dataset = self.args, cast(Any, self.train_dataset)
        data = {  # what the order of the data follows from
            "seed": args.seed,
            "data_seed": args.data_seed,
            "global_batch_size": None if args.auto_find_batch_size else self.get_total_train_batch_size(args),
            "train_sampling_strategy": args.train_sampling_strategy,
            "training_rows": len(dataset) if hasattr(dataset, "__len__") else None,
            "training_text": _digest(dataset),
        }
        optimiser = {name: getattr(args, name) for name in OPTIMISER_OPTIONS}
        kept: dict[str, Any] = {"optim": args.optim}
        free: dict[str, Any] = {}
        # DeepSpeed loads the options of its optimiser with the state.
        (kept if self.is_deepspeed_enabled else free).update(optimiser)
        (free if args.ignore_data_skip else kept).update(data)
        return kept, free | {name: getattr(args, name) for name in (*SCHEDULE_OPTIONS, "max_grad_norm")}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Applies what was changed: moments and the place in the schedule stay those of the checkpoint."""
        if not self._changed or self.is_deepspeed_enabled:
            return
        optimizer, scheduler, model = cast(Any, self.optimizer), cast(Any, self.lr_scheduler), cast(Any, self.model)
        names = set(self.get_decay_parameter_names(model))
        decaying = {id(weight) for name, weight in model.named_parameters() if name in names}
        for group in optimizer.param_groups:
            group.update({name: optimizer.defaults[name] for name in ("betas", "eps") if name in group})
            if "weight_decay" in self._changed:
                decays = any(id(weight) in decaying for weight in group["params"])
                group["weight_decay"] = self.args.weight_decay if decays else 0.0
        old, new = self._changed.get("learning_rate", (self.args.learning_rate,) * 2)
        if isinstance(scheduler, LambdaLR):
            if new != old:
                scheduler.base_lrs = [new] * len(scheduler.base_lrs)
            factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
            rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        else:  # it follows the losses so far
            rates = [group["lr"] * new / old for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    # Steps that are not finite

    @property
    def _may_skip(self) -> bool:
        return getattr(self.args, "non_finite", "stop") == "skip"

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are those of all processes, and clipped, which makes what is not finite no number."""
        self._skips_this_step = False
        scaler, model = self.accelerator.scaler, cast(nn.Module, self.model)
        if scaler is not None and scaler.is_enabled():  # float16 finds its scale by such steps, and skips them itself
            return
        norm = float(self.accelerator.clip_grad_norm_(model.parameters(), math.inf) or 0.0)
        if math.isfinite(norm):
            return
        if not self._may_skip:
            raise self._not_finite(f"the norm of the gradient is {norm}")
        model.zero_grad()  # the optimiser leaves weights without a gradient alone, and its moments
        self._skips_this_step = True

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if not self._skips_this_step and not self.accelerator.optimizer_step_was_skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MOST_SKIPPED_STEPS and self._may_skip:
            raise self._not_finite(f"{MOST_SKIPPED_STEPS} steps were skipped one after the other")

    def _not_finite(self, what: str) -> FloatingPointError:
        step, stage = self.state.global_step, getattr(self.args, "stage", None)
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)), step)
        return FloatingPointError(
            f"The loss is not finite at step {step}{f' of stage {stage!r}' if stage else ''}: {what}. Last checkpoint: "
            f"{checkpoint or 'none yet'}. Lower the learning rate (now {self.args.learning_rate}) or train in a wider "
            "number format, and resume from it or an earlier one."
        )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """No event is there between the last file of a checkpoint, its push and the removal of older ones."""
        args, run_dir = self.args, Path(self._get_output_dir(trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        limit, push = args.save_total_limit, args.push_to_hub
        with self._writing(folder):
            if args.should_save:
                checkpoints.begin(folder)
            self.accelerator.wait_for_everyone()
            try:  # older checkpoints go, and this one is pushed, when it is whole
                args.save_total_limit, args.push_to_hub = None, False
                super()._save_checkpoint(model, trial)
            finally:
                args.save_total_limit, args.push_to_hub = limit, push
            self.accelerator.wait_for_everyone()
            if args.should_save:
                kept, free = self.options()
                (folder / OPTIONS_NAME).write_text(json.dumps(kept | free, indent=2), encoding="utf-8")
                self._add_to_checkpoint(folder)
                checkpoints.complete(folder)
        if push:
            self._push(folder)
        if args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint)

    def _add_to_checkpoint(self, folder: Path) -> None:
        """What else a kind of trainer needs to go on, written by one process."""

    def _push(self, checkpoint: Path) -> None:
        """The Trainer writes its arguments as a pickle first: under this name the push leaves it out."""
        name = f"_{TRAINING_ARGS_NAME}"
        try:
            transformers.trainer.TRAINING_ARGS_NAME = name
            self._push_from_checkpoint(str(checkpoint))
        finally:
            transformers.trainer.TRAINING_ARGS_NAME = TRAINING_ARGS_NAME
            if self.args.should_save:
                Path(str(self.args.output_dir), name).unlink(missing_ok=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        # The Trainer names the folder of a checkpoint, but not the output folder that `push_to_hub` saves to.
        is_checkpoint = _internal_call and output_dir is not None
        model: Any = self.accelerator.unwrap_model(cast(Any, self.model))
        sharded = type(model).__module__.startswith("torch.")  # FSDP's class of a model: its code would be torch's
        if sharded:
            type(model)._auto_class = None
        with nullcontext() if is_checkpoint else self._writing(folder):  # `_save_checkpoint` has it around
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                if sharded:
                    save_code_files(model, folder)
            self._add_to_model(folder, is_checkpoint)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _add_to_model(self, folder: Path, is_checkpoint: bool) -> None:
        """What a kind of trainer saves beside the model; all processes come here."""

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """Says what is left when a folder cannot be written; a checkpoint that was begun goes."""
        try:
            yield
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # a full disk has many names
            if self.args.should_save and (folder / checkpoints.INCOMPLETE_NAME).is_file():
                checkpoints.remove(folder)
            last = last_checkpoint(Path(str(self.args.output_dir)), self.state.global_step)
            disk = next(path for path in folder.resolve().parents if path.exists())
            raise OSError(
                f"{folder} could not be written ({error}); its disk has "
                f"{shutil.disk_usage(disk).free / 1e6:.1f} MB free. Last checkpoint: {last or 'none yet'}; if "
                "the disk is full, free space, and resume from it."
            ) from error


def _digest(dataset: Any) -> str | None:
    """Of the tokens of a thousand rows: another file, tokenizer or longest sentence has another. None for a stream."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        return None
    rows = dataset.select_columns("input_ids").select(range(0, len(dataset), max(1, len(dataset) // 1000)))
    return sha256(json.dumps(rows["input_ids"][:]).encode()).hexdigest()[:12]
