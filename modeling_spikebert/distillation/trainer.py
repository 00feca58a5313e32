"""`DistillationTrainer`: both stages of distillation on top of `transformers.Trainer`."""

import inspect
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..hub import CodeFilesCallback, write_model_card
from ..modeling_spikebert import (
    SpikeBertForSequenceClassification,
    SpikeBertModel,
    SpikeBertPreTrainedModel,
    check_encoder,
    classification_losses,
)
from .arguments import DistillationTrainingArguments
from .losses import embedding_loss, firing_rate_loss, hidden_state_loss, logit_loss
from .projections import FeatureProjections, uniform_layer_map

PROJECTIONS_NAME = "projections.safetensors"


class DistillationTrainer(Trainer):
    """Trains a SpikeBERT student from a BERT-like teacher.

    Stage "general" takes unlabelled, tokenised text and a `SpikeBertModel`; stage "task" takes labelled text, a teacher
    fine-tuned on the same task and a `SpikeBertForSequenceClassification`. The teacher is never trained, saved or put
    into the optimiser. Projections are saved with checkpoints (for resuming) and with the stage-1 student (for stage
    2), in a file of their own.

    Args:
        model: the student.
        teacher: an encoder with as many hidden states as layers, of any depth and width.
        args: a `DistillationTrainingArguments`.
        teacher_tokenizer: tokenizer of the teacher, compared with `processing_class` if both are given.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: the teacher does not fit the student, the stage or the tokenizer; the message has both values.
    """

    args: DistillationTrainingArguments
    # compute_loss divides by the number of sentences of the whole accumulated batch. (Older versions of the Trainer
    # conclude this from the `**kwargs` of the student's forward.)
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: SpikeBertPreTrainedModel,
        teacher: PreTrainedModel,
        args: DistillationTrainingArguments,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(f"args must be DistillationTrainingArguments, got {type(args).__name__}.")
        if args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: the teacher's logits smooth the labels.")
        check_models(model, teacher, args.stage)
        check_tokenizers(teacher, kwargs.get("processing_class"), teacher_tokenizer)
        if args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process for each GPU with `accelerate launch`.")
        self.layer_map = check_layer_map(
            args.layer_map, model.config.num_hidden_layers, teacher.config.num_hidden_layers
        )
        if args.stage == "task":
            check_label_range(model, kwargs.get("train_dataset"))

        super().__init__(model=model, args=args, **kwargs)
        self.projections = FeatureProjections(  # here, because the Trainer has set the seed
            len(self.layer_map), model.config.hidden_size, teacher.config.hidden_size, embedding_table(teacher).shape[1]
        )
        if args.initial_projections is not None:
            self._load_projections(args.initial_projections)
        self.projections.attach(model)
        self.student = model
        # What the model card says beside what the trainer knows: keyword arguments of `create_model_card`.
        self.card_options: dict[str, Any] = {}
        self.add_callback(CodeFilesCallback())
        if args.stage == "general":  # evaluation is the loss alone
            self.label_names: list[str] = []
            self.can_return_loss = True
            self.args.prediction_loss_only = True

        self.teacher = teacher.requires_grad_(False).eval().to(self.accelerator.device)
        self._teacher_inputs = set(inspect.signature(teacher.forward).parameters) - {"labels"}
        self._teacher_variance = embedding_table(teacher).var()
        # By mode and name: sum over sentences, and their number. Kept on the device until they are logged.
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        student_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(
            **student_inputs,
            output_hidden_states=True,
            output_firing_rates=True,
            output_projections=True,
            return_dict=True,
        )
        with torch.no_grad(), self.accelerator.autocast():
            teacher_outputs = self.teacher(
                **{name: value for name, value in inputs.items() if name in self._teacher_inputs},
                output_hidden_states=True,
            )
        losses = self._losses(outputs, teacher_outputs, inputs, labels)
        weights = self.args.loss_weights
        total = sum(weights[name] * value for name, value in losses.items())  # [B]
        assert isinstance(total, Tensor)
        self._check_finite(total, losses)
        firing_rate = torch.cat(outputs["firing_rates"], dim=-1).mean(-1)  # [B], over the signals of all blocks
        self._add_to_log({f"loss_{name}": value for name, value in losses.items()} | {"firing_rate": firing_rate})

        # The Trainer averages gradients over processes, num_items_in_batch counts the sentences of all of them.
        count = len(total) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = total.sum() / count
        return (loss, {"logits": outputs.get("logits")}) if return_outputs else loss

    def _losses(self, outputs: Any, teacher_outputs: Any, inputs: dict[str, Any], labels: Any) -> dict[str, Tensor]:
        """The losses of the stage that have a weight, `[B]` each."""
        weights = self.args.loss_weights
        ids = inputs["input_ids"]
        token_mask = inputs.get("attention_mask", torch.ones_like(ids))
        word_embeddings, *states = outputs["projected_states"]
        losses = {}
        if weights["hidden_states"]:
            targets = [teacher_outputs.hidden_states[layer] for layer in self.layer_map]
            losses["hidden_states"] = hidden_state_loss(states, targets, token_mask)
        if weights["embeddings"]:
            targets = self.teacher.get_input_embeddings()(ids)
            losses["embeddings"] = embedding_loss(word_embeddings, targets, token_mask, self._teacher_variance)
        if weights.get("cross_entropy"):  # first: the labels may fill in the problem type
            if labels is None:
                raise ValueError("The batch has no labels. Add them, or set cross_entropy_weight=0.")
            losses["cross_entropy"] = (
                classification_losses(outputs["logits"], labels, self.student.config).reshape(len(ids), -1).mean(1)
            )
        if weights.get("logits"):
            losses["logits"] = logit_loss(
                outputs["logits"], teacher_outputs.logits, self.args.temperature, self.student.config.problem_type
            )
        if weights["firing_rate"]:
            losses["firing_rate"] = firing_rate_loss(outputs["firing_rates"], self.args.target_firing_rate)
        return losses

    def _check_finite(self, total: Tensor, losses: dict[str, Tensor]) -> None:
        if torch.isfinite(total).all():
            return
        folder = str(self.args.output_dir)
        checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        raise FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} of stage {self.args.stage!r}: "
            + ", ".join(f"{name} {value.mean().item():.4g}" for name, value in losses.items())
            + f". Last checkpoint: {checkpoint or 'none yet'}. Lower the learning rate (now {self.args.learning_rate}) "
            "or train in a wider number format, and resume from it or an earlier one."
        )

    def _mode(self) -> str:
        # Evaluation switches the student to eval mode, not the wrapper (DDP) around it.
        return "train" if self.student.training else "eval"

    def _add_to_log(self, values: dict[str, Tensor]) -> None:
        sums = self._sums[self._mode()]
        for name, value in values.items():  # [B] each
            sums[name] += value.detach().sum()
        sums["sentences"] += len(values["firing_rate"])

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict(*args, **kwargs)
        self._sums["eval"].clear()  # prediction logs nothing, and the next evaluation must not log its losses
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss of the stage (unweighted) and the firing rate, means over the sentences since the last log."""
        sums = self._sums[self._mode()]
        if sums["sentences"]:
            names = sorted(set(sums) - {"sentences"})
            values = torch.stack([torch.as_tensor(sums[name]).float() for name in [*names, "sentences"]])
            *means, count = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").tolist()
            prefix = "" if self._mode() == "train" else "eval_"
            logs |= {f"{prefix}{name}": mean / count for name, mean in zip(names, means, strict=True)}
            sums.clear()
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """The number of sentences in the accumulated batches of all processes; labelled or not."""
        sentences = sum(len(batch["input_ids"]) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(sentences, device=device)).sum()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or str(self.args.output_dir))
        # Checkpoints are for resuming, and the stage-1 student is for stage 2; a finished student needs no projections.
        # The Trainer names the folder of a checkpoint, but not the output folder that `push_to_hub` saves to.
        is_checkpoint = _internal_call and output_dir is not None
        if self.args.should_save and (is_checkpoint or self.args.stage == "general"):
            safetensors.torch.save_file(self.projections.state_dict(), folder / PROJECTIONS_NAME)
        if self.args.should_save and not _internal_call:
            self._write_model_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_projections(self.state.best_model_checkpoint)

    def _load_projections(self, folder: str) -> None:
        file = Path(folder) / PROJECTIONS_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: the folder is neither a checkpoint of a DistillationTrainer nor a stage-1 "
                "student."
            )
        try:
            self.projections.load_state_dict(safetensors.torch.load_file(file))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{file} has projections of other layers or widths than this training: {error}") from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of the student, with the metrics of the last evaluation."""
        if self.is_world_process_zero():
            named = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            self._write_model_card(Path(str(self.args.output_dir)), **named)

    def _write_model_card(self, folder: Path, **kwargs: Any) -> None:
        options = {"base_model": self.teacher.config.name_or_path or None} | kwargs | self.card_options
        write_model_card(folder, self, **options)


def embedding_table(model: PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def check_models(student: PreTrainedModel, teacher: PreTrainedModel, stage: str) -> None:
    check_encoder(teacher)
    expected = SpikeBertModel if stage == "general" else SpikeBertForSequenceClassification
    if type(student).__name__ != expected.__name__:  # by name: remote code brings classes of its own
        raise ValueError(f"stage={stage!r} trains a {expected.__name__}, got a {type(student).__name__} as student.")
    vocab_size = embedding_table(teacher).shape[0]
    if student.config.vocab_size != vocab_size:
        raise ValueError(
            f"Student and teacher have different vocabularies: {student.config.vocab_size} and {vocab_size} tokens. "
            "Build the student with from_teacher(teacher)."
        )
    if stage == "general":
        return
    if "ForSequenceClassification" not in type(teacher).__name__:
        raise ValueError(
            f"stage='task' needs a teacher with a classifier, got {type(teacher).__name__}. Load it with "
            "AutoModelForSequenceClassification."
        )
    if student.config.id2label != teacher.config.id2label:
        raise ValueError(
            f"Student and teacher have different labels: {student.config.id2label} and {teacher.config.id2label}. "
            "Build the student with from_teacher(teacher), or load it with id2label=teacher.config.id2label."
        )


def check_label_range(student: PreTrainedModel, dataset: Any) -> None:
    """Refuses class ids outside the classifier before training; on an accelerator the model cannot check them."""
    columns = getattr(dataset, "column_names", None) or []
    num_labels = len(student.config.id2label or {})
    one_label = student.config.problem_type in (None, "single_label_classification") and num_labels > 1
    if not one_label or "labels" not in columns or not hasattr(dataset, "__len__"):
        return
    for row, label in enumerate(dataset["labels"]):
        if isinstance(label, int) and label != -100 and not 0 <= label < num_labels:
            raise ValueError(f"Row {row + 1} has the label {label}, but the student has {num_labels} labels (from 0).")


def check_tokenizers(
    teacher: PreTrainedModel, tokenizer: Any, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    vocab_size = embedding_table(teacher).shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the teacher has {vocab_size} word embeddings. Use the "
            "tokenizer of the teacher."
        )
    if teacher_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"Tokenizer and teacher's tokenizer differ: {token!r} is {ours.get(token)} and {theirs.get(token)}. "
                "Use the tokenizer of the teacher."
            )


def check_layer_map(layer_map: list[int] | None, num_student_layers: int, num_teacher_layers: int) -> list[int]:
    if layer_map is None:
        return uniform_layer_map(num_student_layers, num_teacher_layers)
    if len(layer_map) != num_student_layers:
        raise ValueError(
            f"layer_map has {len(layer_map)} entries, but the student has {num_student_layers} layers. Leave it out "
            "for an even spread."
        )
    if not all(1 <= layer <= num_teacher_layers for layer in layer_map):
        raise ValueError(
            f"layer_map must lie between 1 and {num_teacher_layers}, the teacher's depth, got {layer_map}."
        )
    if layer_map[-1] != num_teacher_layers:
        raise ValueError(f"layer_map must end at the teacher's last layer, {num_teacher_layers}, got {layer_map}.")
    return layer_map
