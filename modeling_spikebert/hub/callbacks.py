from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save


class CodeFilesCallback(TrainerCallback):
    """Puts the model's code files into the output folder before the first push.

    While it trains, the Trainer pushes config and weights from there, but the code only at the end; until then the
    repository could not be loaded.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        # A model of transformers' own has no `_auto_class`, and its code is not pushed.
        if args.push_to_hub and state.is_world_process_zero and getattr(model, "_auto_class", None) is not None:
            assert args.output_dir is not None
            custom_object_save(model, args.output_dir)
