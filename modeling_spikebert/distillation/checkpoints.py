"""Checkpoints that are whole or none: a manifest of all files, written last, and checked before anything is loaded."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

logger = logging.get_logger(__name__)

MANIFEST_NAME = "manifest.json"
INCOMPLETE_NAME = "incomplete"  # a file that is there from before the first byte of a checkpoint until after the last
# Of a config: what does not change what a model computes, or is filled in while it trains.
FREE_FIELDS = {"_name_or_path", "architectures", "auto_map", "dtype", "problem_type", "transformers_version"}


def begin(folder: Path) -> None:
    """Declares that a checkpoint is being written to `folder`; an older one in its place goes."""
    if folder.exists():
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / INCOMPLETE_NAME).touch()


def complete(folder: Path) -> None:
    """Declares the checkpoint in `folder` complete: size and SHA-256 of each of its files, in one atomic step."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST_NAME, INCOMPLETE_NAME)
    }
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump({"files": files}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / MANIFEST_NAME)
    (folder / INCOMPLETE_NAME).unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a training, complete or not, by step."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=_step)


def last_checkpoint(folder: Path, step: float = math.inf) -> Path | None:
    """The newest checkpoint, up to a step, that was written to its end."""
    whole = [path for path in checkpoints(folder) if (path / MANIFEST_NAME).is_file() and _step(path) <= step]
    return whole[-1] if whole else None


def remove_incomplete(folder: Path) -> None:
    """Removes checkpoints that a killed training left half-written; not those of a plain Trainer, which has no mark."""
    for path in checkpoints(folder):
        if (path / INCOMPLETE_NAME).is_file() and not (path / MANIFEST_NAME).is_file():
            logger.warning(f"{path} was not written to its end; it is removed.")
            shutil.rmtree(path)


def check_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Refuses a checkpoint that is not whole, or not of this student.

    Args:
        folder: of the checkpoint.
        config: of the student that is to go on from it.

    Raises:
        ValueError: a file is missing or other than it was saved, or the student's config differs; the message names the
            file, or the fields with both values.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such checkpoint. Its folder has {[p.name for p in checkpoints(folder.parent)]}."
        )
    advice = "Resume from an earlier checkpoint."
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}: it was not written to its end, or not by a DistillationTrainer. {advice}"
        )
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged: {error!r}. {advice}") from error
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing. {advice}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} of {size} bytes. {advice}")
        if _sha256(file) != digest:
            raise ValueError(f"{file} is damaged, or was changed after it was saved. {advice}")
    saved: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    current: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    differing = {
        name: (saved[name], current[name])
        for name in sorted(saved.keys() & current.keys() - FREE_FIELDS)
        if saved[name] != current[name]
    }
    if differing:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not the student's config: "
            + ", ".join(f"{name} is {theirs} there and {ours} here" for name, (theirs, ours) in differing.items())
            + ". Build the student as it was built for this training."
        )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
