import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FiniteLossCallback(TrainerCallback):
    """Stops a plain `Trainer` whose logged loss is not finite; `DistillationTrainer` looks at each step by itself.

    Needs `logging_nan_inf_filter=False`, or the Trainer logs 0 in its place.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise FloatingPointError(
                f"The loss is {loss} at step {state.global_step}. Lower the learning rate (now {args.learning_rate}); "
                f"earlier checkpoints, if there are any, are in {args.output_dir}."
            )
