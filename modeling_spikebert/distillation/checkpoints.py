"""Checkpoints that are whole or none: a manifest of all files, written last, and checked before anything is loaded."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME, logging

logger = logging.get_logger(__name__)

MANIFEST_NAME = "manifest.json"
OPTIONS_NAME = "options.json"
INCOMPLETE_NAME = "incomplete"  # a file that is there from before the first byte of a checkpoint until after the last
# Of a config: what does not change what a model computes, or is filled in while it trains.
FREE_FIELDS = {"_name_or_path", "architectures", "auto_map", "dtype", "problem_type", "transformers_version"}
FREE_FIELDS |= {"bos_token_id", "eos_token_id"}
PICKLES = (".pt", ".pth", ".bin")
READ_FILES = (*PICKLES, ".json", ".safetensors")
ADVICE = "Resume from an earlier checkpoint."


def begin(folder: Path) -> None:
    """Declares that a checkpoint is being written to `folder`; an older one in its place goes."""
    if folder.exists():
        remove(folder)
    folder.mkdir(parents=True)
    (folder / INCOMPLETE_NAME).touch()


def remove(folder: Path) -> None:
    """Removes a checkpoint such that a kill in the midst leaves nothing of it under its name."""
    rest = folder.with_name("_removed")  # pushes leave names with `_` in front out
    shutil.rmtree(rest, ignore_errors=True)
    folder.rename(rest)
    shutil.rmtree(rest)


def is_half_written(folder: Path) -> bool:
    """Whether a training was killed while it wrote a checkpoint; those of a plain Trainer have no mark."""
    marked = (folder / INCOMPLETE_NAME).is_file() or not any(folder.iterdir())
    return marked and not (folder / MANIFEST_NAME).is_file()


def complete(folder: Path) -> None:
    """Declares the checkpoint in `folder` complete: size and SHA-256 of each of its files, in one atomic step."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
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
    """Removes checkpoints that a killed training left half-written."""
    for path in checkpoints(folder):
        if is_half_written(path):
            logger.warning(f"{path} was not written to its end; it is removed.")
            remove(path)


def compare_options(folder: Path, kept: dict[str, Any], free: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that changed since a checkpoint was written: its value and that of now, by name.

    Args:
        folder: of the checkpoint.
        kept: options of now that must be those of the checkpoint.
        free: options of now that may be others.

    Raises:
        ValueError: one of `kept` changed; the message has both values.
    """
    saved = json.loads((folder / OPTIONS_NAME).read_text(encoding="utf-8"))
    current = json.loads(json.dumps(kept | free))
    changed = {name: (saved[name], value) for name, value in current.items() if name in saved and saved[name] != value}
    refused = [f"{name} is {old} there and {new} here" for name, (old, new) in changed.items() if name in kept]
    if refused:
        raise ValueError(
            f"{folder} cannot go on with these options: {', '.join(refused)}. Pass those of the checkpoint, or begin "
            "anew in another --output-dir. (--ignore-data-skip lets go of the order of the data: seeds, batch, rows.)"
        )
    return changed


def check_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Refuses a checkpoint that is not whole, that holds code, or that is not of this model.

    Args:
        folder: of the checkpoint.
        config: of the model that is to go on from it.

    Raises:
        ValueError: a file is missing or other than it was saved, a pickle holds more than numbers, or the model's
            config differs; the message names the file, or the fields with both values.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such checkpoint. Its folder has {[p.name for p in checkpoints(folder.parent)]}."
        )
    for name, (size, digest) in _read_manifest(folder).items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing. {ADVICE}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} is damaged: it has {file.stat().st_size} of {size} bytes. {ADVICE}")
        if sha256(file) != digest:
            raise ValueError(f"{file} is damaged, or was changed after it was saved. {ADVICE}")
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES and file.name != TRAINING_ARGS_NAME:  # which nobody reads
            _check_pickle(file)
    saved: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    current: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    differing = {
        name: (saved[name], current[name])
        for name in sorted(saved.keys() & current.keys() - FREE_FIELDS)
        if saved[name] != current[name]
    }
    if differing:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not the model's config: "
            + ", ".join(f"{name} is {theirs} there and {ours} here" for name, (theirs, ours) in differing.items())
            + ". Build the model as it was built for this training."
        )


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file of a checkpoint; it names all that is read of the folder, and nothing outside."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}: it was not written to its end, or not by this package. {ADVICE}"
        )
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest} is damaged: {error!r}. {ADVICE}") from error
    for name in expected:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{manifest} is damaged: it names {name!r}, which is outside of the folder. {ADVICE}")
    read = {path.name for path in folder.iterdir() if path.suffix in READ_FILES} - {MANIFEST_NAME}
    unnamed = ({CONFIG_NAME, TRAINER_STATE_NAME, OPTIONS_NAME} | read) - expected.keys()
    if unnamed:
        raise ValueError(f"{manifest} is damaged: it does not name {', '.join(sorted(unnamed))}. {ADVICE}")
    return expected


def _check_pickle(file: Path) -> None:
    """Refuses a file that torch would not read as numbers alone; nothing of it is run."""
    try:
        with safe_globals():  # what the states of random number generators are made of
            code = get_unsafe_globals_in_checkpoint(file)
    except ValueError:
        raise ValueError(f"{file} was not written by torch.save. {ADVICE}") from None
    if code:
        raise ValueError(f"{file} holds code ({', '.join(code)}), which is not run. Resume from a checkpoint of yours.")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def sha256(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
