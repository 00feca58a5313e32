"""A `Trainer` that may be interrupted anywhere: whole checkpoints, and the options with which a run goes on."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import safetensors
import transformers.trainer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from . import checkpoints
from .callbacks import ConsoleCallback
from .checkpoints import check_checkpoint, compare_options, last_checkpoint, remove_incomplete, write_options
from .run_folder import the_only_run

# What a resumed run may change, and what it does then is what its options say.
OPTIMISER_OPTIONS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE_OPTIONS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")


class ResumableTrainer(Trainer):
    """A `Trainer` that goes on from checkpoints which are whole, with the options of the run that goes on.

    One run holds its output folder (`the_only_run`). A checkpoint has a manifest, which is checked before anything is
    loaded, and the options of its run. Options that were changed since then apply, which is printed, or are refused.
    No pickle of the arguments, which has paths of this machine, is written.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: folder of a checkpoint; or True, or "last", for the last one in `output_dir` that
                was written to its end, and the beginning where there is none yet.
            *args, **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: the checkpoint is damaged, not of this model or of other options; the output folder has
                checkpoints of an earlier training, or belongs to another process.
        """
        folder = Path(str(self.args.output_dir))
        with the_only_run(self.args, resume_from_checkpoint):
            checkpoint = resume_from_checkpoint or None
            if checkpoint in (True, "last"):
                checkpoint = str(last_checkpoint(folder) or "") or None
            changed: dict[str, tuple[Any, Any]] = {}
            if checkpoint is not None:
                check_checkpoint(Path(str(checkpoint)), cast(Any, self.model).config)
                changed = compare_options(Path(str(checkpoint)), self.kept_options(), self.options())
            self._old_learning_rate, _ = changed.get("learning_rate", (self.args.learning_rate, None))
            self._prepare_run(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                remove_incomplete(folder)
                if changed:
                    print("Resumed with " + ", ".join(f"{k} {new} (was {old})" for k, (old, new) in changed.items()))
            try:
                return super().train(checkpoint, *args, **kwargs)
            finally:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, ConsoleCallback):
                        callback.close()

    def _prepare_run(self, checkpoint: str | bool | None) -> None:
        """What a kind of trainer does before its first step; the checkpoint has been checked."""

    # Options

    def kept_options(self) -> dict[str, Any]:
        """Options that a run keeps to its end: with others it would see other data, or could not load its state."""
        args = self.args
        kept: dict[str, Any] = {"optim": args.optim}
        if self.is_deepspeed_enabled:  # it loads the options of its optimiser with the state
            kept |= {name: getattr(args, name) for name in OPTIMISER_OPTIONS}
        if not args.ignore_data_skip:
            kept |= self._data_options()
        return kept

    def options(self) -> dict[str, Any]:
        """All options that its checkpoints record; those that are not kept apply from where a run is resumed."""
        names = (*OPTIMISER_OPTIONS, *SCHEDULE_OPTIONS, "max_grad_norm")
        return {name: getattr(self.args, name) for name in names} | self._data_options() | self.kept_options()

    def _data_options(self) -> dict[str, Any]:
        """What the order of the data follows from."""
        args, dataset = self.args, cast(Any, self.train_dataset)
        return {
            "seed": args.seed,
            "data_seed": args.data_seed,
            "global_batch_size": None if args.auto_find_batch_size else self.get_total_train_batch_size(args),
            "train_sampling_strategy": args.train_sampling_strategy,
            "training_rows": len(dataset) if hasattr(dataset, "__len__") else None,
            "training_text": _digest(dataset),
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and the place in the schedule are those of the checkpoint, all else is as this run has made it."""
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [options["initial_lr"] for options in own]
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        else:  # it follows the losses so far
            change = self.args.learning_rate / self._old_learning_rate
            rates = [group["lr"] * change for group in optimizer.param_groups]
        for group, options, rate in zip(optimizer.param_groups, own, rates, strict=True):
            group.update(options | {"lr": rate})
        scheduler._last_lr = rates

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # float16 has one; a run may go on in a wider format
            super()._load_scaler(checkpoint)

    # Checkpoints

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the Trainer would do a step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
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
                write_options(folder, self.options())
                self._add_to_checkpoint(folder)
                checkpoints.complete(folder)
        if push:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate_checkpoints(str(run_dir), limit, self.state.best_model_checkpoint)

    def _add_to_checkpoint(self, folder: Path) -> None:
        """What else a kind of trainer needs to go on, written by one process."""

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._no_pickle(Path(output_dir or str(self.args.output_dir))):
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._no_pickle(Path(str(self.args.output_dir))):
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _no_pickle(self, folder: Path) -> Iterator[None]:
        """The Trainer writes its arguments as a pickle: here under a name that pushes leave out, and it goes again."""
        name = transformers.trainer.TRAINING_ARGS_NAME
        hidden = f"_{name}"
        transformers.trainer.TRAINING_ARGS_NAME = hidden
        try:
            yield
        finally:
            transformers.trainer.TRAINING_ARGS_NAME = name
            if self.args.should_save:
                (folder / hidden).unlink(missing_ok=True)


def _digest(dataset: Any) -> str | None:
    """Of the tokens of a thousand rows: another file, tokenizer or longest sentence has another. None for a stream."""
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        return None
    rows = dataset.select_columns("input_ids").select(range(0, len(dataset), max(1, len(dataset) // 1000)))
    return sha256(json.dumps(rows["input_ids"][:]).encode()).hexdigest()[:12]
