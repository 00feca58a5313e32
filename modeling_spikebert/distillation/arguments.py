"""Arguments of `DistillationTrainer`."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .layer_maps import LAYER_MAPS

WEIGHTS = (
    "hidden_state_weight",
    "embedding_weight",
    "logit_weight",
    "cross_entropy_weight",
    "firing_rate_weight",
)


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what distillation adds.

    Learning rates, weights of the losses, `adam_beta2` and warm-up are by default those of the first student of
    6 x 384 that MPNet taught (docs/results.md), whose batches had 8,192 tokens. What the published script has (arXiv
    2308.15122; depth 12, T 4, stage 2) stands beside them.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]  # a number behind `__post_init__`
        default=None,
        metadata={
            "help": "Peak of the learning rate. Default: 3e-3 in stage 'general' and 1.5e-3 in stage 'task', good for "
            "students of 384 units; 12 layers of 768: 1.2e-3 and 7e-4. Published: 5e-4. A BERT: 5e-5."
        },
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Of AdamW."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps of warm-up; below 1, a part of all steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sentences of each process in a step."})
    logging_steps: float = field(
        default=0.05, metadata={"help": "Steps between two logs; below 1, a part of all steps."}
    )

    stage: str = field(
        default="task",
        metadata={
            "choices": ("general", "task"),
            "help": "'general': unlabelled text, hidden states and embeddings. 'task': labelled text, also logits "
            "and, with a weight, labels.",
        },
    )
    hidden_state_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the hidden-state loss. The published 0.1 belongs to another scale (a sum of plain MSEs "
            "over the layers, divided by the batch size once too often)."
        },
    )
    embedding_weight: float = field(default=0.1, metadata={"help": "Weight of the embedding loss. Published: 0.1."})
    logit_weight: float = field(default=0.03, metadata={"help": "Weight of the logit loss. Published: 1.0."})
    cross_entropy_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the label loss. The teacher's logits say more of the text that it was trained on. "
            "Published: 0.1."
        },
    )
    firing_rate_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the firing-rate penalty: how far the rates of a sentence lie above target_firing_rate, "
            "mean over the signals of all blocks. Published: none."
        },
    )
    target_firing_rate: float = field(
        default=0.05,
        metadata={"help": "Firing rate, in spikes per neuron and time step, up to which nothing is penalised."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Softens the logits of both models. Published: 1."})
    mixed_time_steps: bool = field(
        default=False,
        metadata={
            "help": "Draw the number of time steps of each batch among 1, 2, 4, ... and the student's num_time_steps, "
            "and take the loss of logits after each step, so that it works with each of them."
        },
    )
    layer_map: list[int] | str | None = field(  # None is there for HfArgumentParser: it then takes a string
        default="uniform",
        metadata={
            "help": "The teacher's layer for each layer of the student: 'uniform' (evenly spread, ends at the last), "
            "'last' (the last ones), 'skip' (every k-th from the bottom), or layers counted from 1 that end at the "
            "teacher's last, such as 2,4,6."
        },
    )
    initial_projections: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the stage-1 student, to go on with the projections that it was trained with. "
            "`spikebert distill` takes those of --model-name-or-path by itself."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the teacher's outputs for the training set: the teacher then runs once, and not "
            "in each step. Takes 2 bytes for each token, mapped layer and unit of the teacher's width."
        },
    )
    non_finite: str = field(
        default="stop",
        metadata={
            "choices": ("stop", "skip"),
            "help": "What to do when a loss or gradient is not finite: 'stop' with an error that names the last "
            "checkpoint, or 'skip' the step and count it in the log (skipped_steps).",
        },
    )

    def __post_init__(self) -> None:
        if _started_without_gpus():
            self.use_cpu = True
        if not self.use_cpu:
            _check_gpus()
        self.has_default_learning_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = 3e-3 if self.stage == "general" else 1.5e-3
        if self.eval_steps is None and self.logging_steps < 1:
            self.eval_steps = TrainingArguments.logging_steps  # as it is without our default
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn that it cannot
        super().__post_init__()
        if self.world_size == 1 < int(os.environ.get("WORLD_SIZE", "1")):
            raise ValueError(
                f"{os.environ['WORLD_SIZE']} processes were started, but each would train alone: start them with "
                "`accelerate launch`."
            )
        if self.stage not in ("general", "task"):
            raise ValueError(f"stage must be 'general' or 'task', got {self.stage!r}.")
        if self.non_finite not in ("stop", "skip"):
            raise ValueError(f"non_finite must be 'stop' or 'skip', got {self.non_finite!r}.")
        self.layer_map = _layers(self.layer_map)
        for name in (*WEIGHTS, "target_firing_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if not any(self.loss_weights.values()):
            raise ValueError(f"All loss weights of stage={self.stage!r} are 0; there is nothing to train.")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The losses of this stage and their weights, by the names under which they are logged."""
        weights = {"hidden_states": self.hidden_state_weight, "embeddings": self.embedding_weight}
        if self.stage == "task":
            weights |= {"logits": self.logit_weight, "cross_entropy": self.cross_entropy_weight}
        return weights | {"firing_rate": self.firing_rate_weight}


def _started_without_gpus() -> bool:
    """Whether this is one of several processes from which the launcher hides all GPUs: the CPU is meant."""
    return "LOCAL_RANK" in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")


def _check_gpus() -> None:
    """Refuses what the launcher asks of GPUs that are not there; the Trainer would let each process train alone."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if processes > max(gpus, 1):
        raise ValueError(
            f"{processes} processes were started on a machine with {gpus} GPUs: lower --num-processes of `accelerate "
            "launch`, or train on the CPU with --config-file examples/accelerate/two_cpu_processes.yaml."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if gpus == 0 and precision != "no":
        raise ValueError(
            f"`accelerate launch` was told to train in {precision} on a GPU, and this machine has none: start it "
            "without `accelerate launch`, or pass --use-cpu."
        )


def _layers(layer_map: list[int] | str | None) -> list[int] | str | None:
    """A name, or the layers that a command line has as `2,4,6`."""
    if layer_map is None or isinstance(layer_map, list) or layer_map in LAYER_MAPS:
        return layer_map
    try:
        return [int(layer) for layer in layer_map.split(",")]
    except ValueError:
        raise ValueError(
            f"layer_map must be one of {sorted(LAYER_MAPS)} or layers such as 2,4,6, got {layer_map!r}."
        ) from None
