"""Learned maps from the student's states to the teacher's. They belong to training, not to the released model."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

ATTRIBUTE = "distillation_projections"


class FeatureProjections(nn.Module):
    """One `LayerNorm(Linear(state))` a student layer, as published, and one Linear for embeddings if widths differ.

    If they agree the Linears begin as the identity: the student starts from the teacher's embeddings, in its space.

    `attach` makes it a submodule of the student: so it is trained, clipped, moved, wrapped and synchronised like the
    student's own weights, and runs inside the student's forward. `save_pretrained` leaves it out.

    Args:
        num_layers: number of mapped layers.
        student_size: width of the student.
        teacher_size: width of the teacher.
        embedding_size: width of the teacher's word embeddings, smaller than `teacher_size` in ELECTRA-small.
    """

    def __init__(self, num_layers: int, student_size: int, teacher_size: int, embedding_size: int):
        super().__init__()
        self.layers = nn.ModuleList(_projection(student_size, teacher_size) for _ in range(num_layers))
        self.embeddings = (
            nn.Identity() if student_size == embedding_size else nn.Linear(student_size, embedding_size, bias=False)
        )
        self._handle: Any = None

    def attach(self, student: PreTrainedModel) -> None:
        """Joins the student.

        Args:
            student: whose outputs then have `projected_states` where `output_projections` asks for them.
        """
        previous = getattr(student, ATTRIBUTE, None)
        if previous is not None:
            previous.detach(student)
        self.to(student.device, student.dtype)
        setattr(student, ATTRIBUTE, self)
        student._keys_to_ignore_on_save = set(student._keys_to_ignore_on_save or ()) | self._saved_names()
        self._handle = student.register_forward_hook(self._project, with_kwargs=True)

    def detach(self, student: PreTrainedModel) -> None:
        self._handle.remove()
        delattr(student, ATTRIBUTE)
        student._keys_to_ignore_on_save = set(student._keys_to_ignore_on_save or ()) - self._saved_names()

    def load(self, file: Path) -> None:
        """Takes over what a training saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or of other layers or widths.
        """
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: the folder is neither a checkpoint of a DistillationTrainer nor a stage-1 "
                "student."
            )
        try:
            weights = load_file(file)
            for name, weight in weights.items():
                if not weight.is_floating_point() or not weight.isfinite().all():
                    kind = "numbers that are not finite" if weight.is_floating_point() else f"numbers of {weight.dtype}"
                    raise ValueError(f"{file} is damaged: {name} has {kind}.")
            self.load_state_dict(weights)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{file} has projections of other layers or widths than this training: {error}") from error

    def _saved_names(self) -> set[str]:
        return {f"{ATTRIBUTE}.{name}" for name in self.state_dict()}

    def _project(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if kwargs.get("output_projections"):  # the trainer asks for them; other callers see the plain student
            word_embeddings = student.get_input_embeddings()(kwargs["input_ids"])
            # A plain dict: DDP takes outputs apart and rebuilds them, and a ModelOutput refuses further fields there.
            outputs = {**outputs, "projected_states": self(outputs.hidden_states[1:], word_embeddings)}
        return outputs

    def forward(self, hidden_states: tuple[Tensor, ...], word_embeddings: Tensor) -> tuple[Tensor, ...]:
        """Projected word embeddings `[B, L, embedding_size]`, then projected states, `[B, L, teacher_size]` each."""
        states = [layer(state) for layer, state in zip(self.layers, hidden_states, strict=True)]
        return (self.embeddings(word_embeddings), *states)


def _projection(student_size: int, teacher_size: int) -> nn.Sequential:
    linear = nn.Linear(student_size, teacher_size)
    if student_size == teacher_size:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(teacher_size))
