"""Arguments of `DistillationTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what distillation adds.

    Defaults cite the published script where they are its own (arXiv 2308.15122; depth 12, T 4, stage 2).
    """

    stage: str = field(
        default="task",
        metadata={
            "help": "'general': unlabelled text, hidden states and embeddings. 'task': labelled text, also logits and "
            "cross entropy."
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
    logit_weight: float = field(default=1.0, metadata={"help": "Weight of the logit loss. Published: 1.0."})
    cross_entropy_weight: float = field(default=0.1, metadata={"help": "Weight of the label loss. Published: 0.1."})
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
    layer_map: list[int] | None = field(
        default=None,
        metadata={
            "help": "The teacher's layer (1 is its first, the last must be its last) for each layer of the student. "
            "By default evenly spread."
        },
    )
    initial_projections: str | None = field(
        default=None,
        metadata={"help": "Folder of the stage-1 student, to go on with the projections that it was trained with."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("general", "task"):
            raise ValueError(f"stage must be 'general' or 'task', got {self.stage!r}.")
        for name in (
            "hidden_state_weight",
            "embedding_weight",
            "logit_weight",
            "cross_entropy_weight",
            "firing_rate_weight",
            "target_firing_rate",
        ):
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
