"""One training at a time in a folder, and none over the checkpoints of an earlier one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from .checkpoints import checkpoints, is_half_written, last_checkpoint

LOCK_NAME = "_training.lock"  # pushes leave names with `_` in front out


@contextmanager
def the_only_run(args: TrainingArguments, resume: str | bool | None) -> Iterator[None]:
    """Holds the output folder of a training, in its first process; may be entered again by the same process.

    The lock ends with the process, however it ends.

    Args:
        args: of the training.
        resume: where it goes on from, as for `Trainer.train`; "last" is the same as True.

    Raises:
        ValueError: another process trains there, or the training would begin over checkpoints of an earlier one.
    """
    if args.process_index != 0:
        yield
        return
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another process trains in {folder}: wait for its end, or pass another --output-dir."
        ) from None
    try:
        _check_older_checkpoints(folder, resume)
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # on Windows it goes with the lock
                Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _check_older_checkpoints(folder: Path, resume: str | bool | None) -> None:
    older = [path for path in checkpoints(folder) if not is_half_written(path)]
    if older and not resume:
        raise ValueError(
            f"{folder} has checkpoints of an earlier training, up to {older[-1].name}: pass --resume-from-checkpoint "
            "last to go on from there, or another --output-dir."
        )
    if older and resume in (True, "last") and last_checkpoint(folder) is None:
        raise ValueError(
            f"{older[-1]} has no manifest: this training cannot go on from there, and does not begin over it. Pass "
            "another --output-dir."
        )
