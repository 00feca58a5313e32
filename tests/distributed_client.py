"""Two steps of the task stage on a global batch of 8; `test_distillation.py` runs it in one process and in two."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_training import OTHER_SIZES, in_float64, make_trainer, stage_models, weights_of


def main(folder: Path) -> None:
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make_trainer(
        folder / f"run_{count}",
        "task",
        stage_models("task", **OTHER_SIZES),
        max_steps=2,
        per_device_train_batch_size=8 // count,
        optim="sgd",
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=1,  # divides the six sentences among one and two processes
        **({"ddp_backend": "gloo"} if count > 1 else {}),
    )
    assert trainer.args.world_size == count
    in_float64(trainer).train()
    save_file(weights_of(trainer.model), folder / f"{rank}_of_{count}.safetensors")
    if rank == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (folder / f"log_{count}.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
