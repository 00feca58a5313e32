"""Trains on a disk that has room for one checkpoint and a half; `test_checkpoints.py` runs it in a mount of its own."""

import shutil
import sys
from pathlib import Path

import torch
from tiny_training import make_trainer


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def main(disk: Path, aside: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    make_trainer(aside / "whole", "task", **options).train()
    one = size(aside / "whole" / "checkpoint-1")
    # What is left free is taken by a file.
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - int(1.5 * one)))
    try:
        make_trainer(disk / "run", "task", **options).train()
    except OSError as error:
        print(f"error: {error}")
    print("folders:", sorted(path.name for path in (disk / "run").iterdir() if path.is_dir()))
    filler.unlink()
    resumed = make_trainer(disk / "run", "task", **options)
    resumed.train(resume_from_checkpoint="last")
    last = "checkpoint-4/model.safetensors"
    print("same:", (disk / "run" / last).read_bytes() == (aside / "whole" / last).read_bytes())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
