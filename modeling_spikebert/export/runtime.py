"""An exported model inside transformers: `pipeline("text-classification", model=OnnxSpikeBert.load(folder), ...)`."""

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..configuration_spikebert import SpikeBertConfig
from ..modeling_spikebert import SpikeBertSequenceClassifierOutput
from ..runtime.session import open_graph
from .onnx import FILES


class OnnxSpikeBertConfig(SpikeBertConfig):
    """Of its own, since transformers registers one classifier for each config class."""


class OnnxSpikeBert(PreTrainedModel):
    """A classifier that ONNX Runtime computes, on the CPU.

    Args:
        config: that beside the file.
        session: of the file.
    """

    config_class = OnnxSpikeBertConfig
    main_input_name = "input_ids"

    def __init__(self, config: SpikeBertConfig, session: Any):
        super().__init__(config)
        self.session = session
        self.register_buffer("place", torch.empty(0), persistent=False)  # says where a model is

    @classmethod
    def load(cls, folder: str | Path, file: str | None = None, num_threads: int = 0) -> Self:
        """From a folder that `export_onnx` wrote.

        Args:
            folder: has `config.json` and `onnx/`.
            file: in `onnx/`; by default the int8 one, and else the float32 one.
            num_threads: of ONNX Runtime; 0 leaves it the choice.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no ONNX file that ONNX Runtime loads.
        """
        folder = Path(folder)
        names = [FILES["int8"], FILES["float32"]] if file is None else [file]
        found = next((path for path in (folder / "onnx" / name for name in names) if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{folder / 'onnx'} has no {' and no '.join(names)}. `spikebert export` writes it.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(OnnxSpikeBertConfig(**config), open_graph(found, num_threads))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_logits_per_step: bool = False,
        **kwargs: Any,
    ) -> SpikeBertSequenceClassifierOutput:
        """Of token ids `[B, L]`, and of a mask and token types as in `SpikeBertModel.forward`.

        Returns:
            `logits`, `[B, C]`; with early exit in the graph also `exit_steps`, `[B]`; on request `logits_per_step`,
            `[T, B, C]`.

        Raises:
            ValueError: scores after each step are asked for, and the graph exits early.
        """
        names = [tensor.name for tensor in self.session.get_outputs()]
        if output_logits_per_step and "exit_steps" in names:
            raise ValueError(
                "The graph exits early and has no scores after each step. Export it without exit_threshold."
            )
        ones = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        given = {"input_ids": input_ids, "attention_mask": ones, "token_type_ids": types}
        feed = {tensor.name: given[tensor.name].long().numpy() for tensor in self.session.get_inputs()}
        outputs = dict(zip(names, map(torch.from_numpy, self.session.run(names, feed)), strict=True))
        return SpikeBertSequenceClassifierOutput(
            logits=outputs["logits"],
            exit_steps=outputs.get("exit_steps"),
            # A graph of one time step has the scores once.
            logits_per_step=outputs.get("logits_per_step", outputs["logits"][None]) if output_logits_per_step else None,
        )


# A pipeline logs an error when it is given a classifier that is not registered.
AutoModelForSequenceClassification.register(OnnxSpikeBertConfig, OnnxSpikeBert)
