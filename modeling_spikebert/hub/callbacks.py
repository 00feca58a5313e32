from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save


def save_code_files(model: PreTrainedModel, folder: str | Path) -> None:
    """Puts the files that `trust_remote_code` needs into a folder; none for a model of transformers' own."""
    # FSDP gives a sharded model a class of its own, in a module of torch's.
    cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))
    if getattr(cls, "_auto_class", None) is not None:
        custom_object_save(object.__new__(cls), folder)


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
        if args.push_to_hub and state.is_world_process_zero:
            assert args.output_dir is not None
            assert model is not None
            save_code_files(model, args.output_dir)
