"""Kills a training at random moments, lets it resume, and compares its end with that of an undisturbed one.

    python tests/kill_training.py --stage task --kills 20 --folder /tmp/kills

Each run is a process of its own, forked after the imports, so that a kill (SIGKILL) costs milliseconds. The training
saves a checkpoint after each step, so that many kills fall into a save. Prints what happened; fails if a weight of the
student or of the projections differs by a bit, if a checkpoint was taken that was not whole, or if no kill left one.
"""

import argparse
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_training import make_trainer, stage_models
from transformers import TrainerCallback

from modeling_spikebert.distillation.checkpoints import check_checkpoint, checkpoints, last_checkpoint

FILES = ("model.safetensors", "projections.safetensors")


class Announce(TrainerCallback):
    def __init__(self, stepped: multiprocessing.Semaphore):
        self.stepped = stepped

    def on_step_end(self, args, state, control, **kwargs):
        self.stepped.release()


def train(
    folder: Path, stage: str, steps: int, started: multiprocessing.Event, stepped: multiprocessing.Semaphore
) -> None:
    """One run: from the last whole checkpoint, or from the beginning, to the end."""
    started.set()
    torch.set_num_threads(1)
    os.setsid()
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    # Dropout: the state of the random numbers has to come back, too.
    models = stage_models(stage, hidden_dropout_prob=0.1)
    trainer = make_trainer(folder, stage, models, {"callbacks": [Announce(stepped)]}, **options)
    trainer.train(resume_from_checkpoint="last")


def run(folder: Path, stage: str, steps: int, kill_after: tuple[int, float] | None = None) -> float | None:
    """Seconds from the first step to the end, or None if it was killed, so many steps and seconds after its start."""
    context = multiprocessing.get_context("fork")
    started, stepped = context.Event(), context.Semaphore(0)
    process = context.Process(target=train, args=(folder, stage, steps, started, stepped))
    process.start()
    assert started.wait(60), "the run did not begin"
    for _ in range(1 if kill_after is None else kill_after[0]):
        assert stepped.acquire(timeout=60), "the run made no step"
    first_step = time.perf_counter()
    process.join(None if kill_after is None else kill_after[1])
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run ended with {process.exitcode}"
    return time.perf_counter() - first_step if process.exitcode == 0 else None


def kill(stage: str, kills: int, folder: Path, seed: int) -> None:
    steps = 4 * kills
    moments = random.Random(seed)

    seconds = run(folder / "whole", stage, steps)
    assert seconds is not None
    killed, seen, half_written = folder / "killed", 0, 0
    student = stage_models(stage)[0]
    config = type(student.config)(**(student.config.to_dict() | {"hidden_dropout_prob": 0.1}))
    for i in range(1, kills + 1):
        # Before the first step, too; the second step of the first run ends behind a whole checkpoint.
        after = 2 if i == 1 else moments.choice((0, 1, 2))
        ended = run(killed, stage, steps, (after, moments.uniform(0, 2 * seconds / steps)))
        assert ended is None, "the training ended before all kills"
        last = last_checkpoint(killed)
        half_written += len([path for path in checkpoints(killed) if not (path / "manifest.json").is_file()])
        if last is not None:
            check_checkpoint(last, config)
            seen += 1
        print(f"kill {i}: last whole checkpoint {re.sub('.*-', '', last.name) if last else 'none'}", flush=True)
    assert seen, "no kill left a checkpoint: nothing was resumed"
    assert run(killed, stage, steps) is not None
    for name in FILES:
        one, other = (load_file(path / f"checkpoint-{steps}" / name) for path in (folder / "whole", killed))
        assert one.keys() == other.keys()
        differing = [key for key, weight in one.items() if not torch.equal(weight, other[key])]
        assert not differing, f"{name} differs in {differing}"
    assert half_written or kills < 20, "no kill fell into a save"
    print(f"stage {stage}: {kills} kills, {half_written} half-written checkpoints, the same weights to the bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["general", "task"], nargs="+", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    for stage in args.stage:
        kill(stage, args.kills, args.folder / stage, args.seed)


if __name__ == "__main__":
    main()
