"""`DistillationTrainer`: both stages of distillation on top of `transformers.Trainer`."""

import inspect
import json
import math
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from ..checks_spikebert import classification_losses
from ..data import TextStream
from ..hub import CodeFilesCallback, save_code_files, write_model_card
from ..modeling_spikebert import SpikeBertPreTrainedModel
from .arguments import WEIGHTS, DistillationTrainingArguments
from .callbacks import use_console
from .checkpoints import last_checkpoint
from .checks import check_label_range, check_models, check_tokenizers, embedding_table
from .layer_maps import resolve_layer_map
from .losses import embedding_loss, firing_rate_loss, hidden_state_loss, logit_loss
from .projections import ATTRIBUTE, FeatureProjections
from .resuming import ResumableTrainer
from .speed import peak_memory_mb
from .teachers import LOGITS, STATES, CachedTeacherCollator, Teacher, TeacherOutputs, cached, from_batch

PROJECTIONS_NAME = "projections.safetensors"
STREAM_NAME = "stream.json"
# A training that skips this many steps one after the other does not recover by skipping.
MOST_SKIPPED_STEPS = 50


class DistillationTrainer(ResumableTrainer):
    """Trains a SpikeBERT student from an encoder as teacher.

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
        self.layer_map = resolve_layer_map(
            args.layer_map, model.config.num_hidden_layers, teacher.config.num_hidden_layers
        )
        if args.stage == "task":
            check_label_range(model, kwargs.get("train_dataset"))
        loading: Any = args.accelerator_config
        if isinstance(kwargs.get("train_dataset"), IterableDataset) and loading.dispatch_batches is None:
            # Each process reads the stream and takes its share; sending batches around needs them of equal lengths.
            loading.dispatch_batches = False

        super().__init__(model=model, args=args, **kwargs)
        if args.non_finite == "skip" and self.is_deepspeed_enabled:
            raise ValueError("non_finite must be 'stop' under DeepSpeed: its step is done before a gradient is seen.")
        self.projections = FeatureProjections(  # here, because the Trainer has set the seed
            len(self.layer_map), model.config.hidden_size, teacher.config.hidden_size, embedding_table(teacher).shape[1]
        )
        if args.initial_projections is not None:
            self._load_projections(args.initial_projections)
        # Without a loss they have no gradient, for which DDP would wait.
        self.projections.layers.requires_grad_(args.hidden_state_weight > 0)
        self.projections.embeddings.requires_grad_(args.embedding_weight > 0)
        self.projections.attach(model)
        self.student = model
        # What the model card says beside what the trainer knows: keyword arguments of `create_model_card`.
        self.card_options: dict[str, Any] = {}
        self.add_callback(CodeFilesCallback())
        use_console(self, teacher)
        if args.stage == "general":  # evaluation is the loss alone
            self.label_names: list[str] | None = []
            self.can_return_loss = True
            self.args.prediction_loss_only = True

        self.teacher = teacher.requires_grad_(False).eval().to(self.accelerator.device)
        self._run_teacher = Teacher(self.teacher, self.layer_map)
        self._teacher_variance = embedding_table(teacher).var()
        if args.teacher_cache is not None:
            self._cache_teacher(Path(args.teacher_cache))
        # By mode and name: sum over sentences, and their number. Kept on the device until they are logged.
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._skipped_in_a_row = 0
        self._prefix = "eval"  # of the evaluation that is logged next
        # From here the seconds of training are counted; it moves on by what evaluations and checkpoints take.
        self._clock = self._clock_of_run = time.perf_counter()

    def _cache_teacher(self, folder: Path) -> None:
        if getattr(self.processing_class, "padding_side", "right") != "right":
            raise ValueError("teacher_cache needs padding on the right, or positions would differ from batch to batch.")
        with self.args.main_process_first(desc="running the teacher"), self.accelerator.autocast():
            self.train_dataset = cached(
                self.train_dataset,
                self._run_teacher,
                self.data_collator,
                self.args.per_device_eval_batch_size,
                folder,
                self.accelerator.mixed_precision,
                check=self.args.local_process_index == 0,
            )
        self.data_collator = CachedTeacherCollator(self.data_collator, len(self.layer_map))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns += [STATES, LOGITS]

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in ("labels", STATES, LOGITS)},
            output_hidden_states=True,
            output_firing_rates=True,
            output_projections=True,
            return_dict=True,
        )
        targets = from_batch(inputs)
        if targets is None:
            with self.accelerator.autocast():
                targets = self._run_teacher(inputs)
        losses = self._losses(outputs, targets, inputs)
        weights = self.args.loss_weights
        total = sum(weights[name] * value for name, value in losses.items())  # [B]
        assert isinstance(total, Tensor)
        finite = torch.isfinite(total)
        if not finite.all() and (self.args.non_finite == "stop" or not model.training):
            raise self._not_finite(", ".join(f"{name} {v.mean().item():.4g}" for name, v in losses.items()))
        self._add_to_log(losses, outputs["firing_rates"], inputs, finite)

        # The Trainer averages gradients over processes, num_items_in_batch counts the sentences of all of them.
        count = len(total) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = total.sum() / count
        return (loss, {"logits": outputs.get("logits")}) if return_outputs else loss

    def _losses(self, outputs: Any, targets: TeacherOutputs, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of the stage that have a weight, `[B]` each."""
        weights = self.args.loss_weights
        ids, labels = inputs["input_ids"], inputs.get("labels")
        token_mask = inputs.get("attention_mask", torch.ones_like(ids))
        word_embeddings, *states = outputs["projected_states"]
        losses = {}
        if weights["hidden_states"]:
            losses["hidden_states"] = hidden_state_loss(states, targets.states, token_mask)
        if weights["embeddings"]:
            embeddings = self.teacher.get_input_embeddings()(ids)
            losses["embeddings"] = embedding_loss(word_embeddings, embeddings, token_mask, self._teacher_variance)
        if weights.get("cross_entropy"):  # first: the labels may fill in the problem type
            if labels is None:
                raise ValueError("The batch has no labels. Add them, or set cross_entropy_weight=0.")
            assert targets.logits is not None
            labels = labelled_by_teacher(labels, targets.logits)
            losses["cross_entropy"] = (
                classification_losses(outputs["logits"], labels, self.student.config).reshape(len(ids), -1).mean(1)
            )
        if weights.get("logits"):
            assert targets.logits is not None
            losses["logits"] = logit_loss(
                outputs["logits"], targets.logits, self.args.temperature, self.student.config.problem_type
            )
        if weights["firing_rate"]:
            losses["firing_rate"] = firing_rate_loss(outputs["firing_rates"], self.args.target_firing_rate)
        return losses

    # What is not finite

    def _not_finite(self, what: str) -> FloatingPointError:
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)), self.state.global_step)
        return FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} of stage {self.args.stage!r}: {what}. Last "
            f"checkpoint: {checkpoint or 'none yet'}. Lower the learning rate (now {self.args.learning_rate}) or train "
            "in a wider number format, and resume from it or an earlier one."
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once before each step of the optimiser, with gradients that all processes share."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if math.isfinite(float(grad_norm)):
            self._skipped_in_a_row = 0
            return grad_norm
        scaled = self.accelerator.scaler is not None  # float16 finds its scale by such steps, and skips them itself
        if self.args.non_finite == "stop":
            if scaled:
                return grad_norm
            raise self._not_finite(f"the norm of the gradient is {float(grad_norm)}")
        if not scaled:
            model.zero_grad()  # the optimiser leaves weights without a gradient alone, and its moments
        self._sums["train"]["skipped_steps"] += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MOST_SKIPPED_STEPS:
            raise self._not_finite(f"{MOST_SKIPPED_STEPS} steps were skipped one after the other")
        return grad_norm

    # The log

    def _mode(self) -> str:
        # Evaluation switches the student to eval mode, not the wrapper (DDP) around it.
        return "train" if self.student.training else "eval"

    def _add_to_log(
        self, losses: dict[str, Tensor], firing_rates: tuple[Tensor, ...], inputs: dict[str, Any], finite: Tensor
    ) -> None:
        per_block = torch.stack([rates.detach().mean(-1) for rates in firing_rates], dim=-1)  # [B, M], over all signals
        values = {f"loss_{name}": value for name, value in losses.items()}
        values |= {f"firing_rate_layer_{i}": rate for i, rate in enumerate(per_block.unbind(-1), start=1)}
        values |= {"firing_rate": per_block.mean(-1)}
        sums = self._sums[self._mode()]
        for name, value in values.items():  # [B] each
            sums[name] += value.detach().where(finite, 0.0).sum()
        sums["sentences"] += finite.sum()
        sums["tokens"] += inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict(*args, **kwargs)
        self._sums["eval"].clear()  # prediction logs nothing, and the next evaluation must not log its losses
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the log what happened since the last one.

        Each loss of the stage (unweighted) and firing rates, as means over the sentences of all processes; in training
        also sentences and tokens a second, the peak of memory, and the seconds that are left.
        """
        mode = self._mode()
        sums = self._sums[mode]
        if sums:
            prefix = "" if mode == "train" else f"{self._prefix}_"
            skipped = sums.pop("skipped_steps", 0)  # the same on all processes
            names = sorted(sums)
            values = [torch.as_tensor(sums[name], dtype=torch.float32, device=self.args.device) for name in names]
            totals: Any = self.accelerator.reduce(torch.stack(values), reduction="sum")
            total = dict(zip(names, totals.tolist(), strict=True))
            sentences, tokens = total.pop("sentences"), total.pop("tokens")
            logs |= {prefix + name: value / max(sentences, 1.0) for name, value in total.items()}
            if mode == "train":
                logs |= self._speed(sentences, tokens)
                if self.args.non_finite == "skip":
                    logs["skipped_steps"] = skipped
            sums.clear()
        super().log(logs, start_time)

    def _speed(self, sentences: float, tokens: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds, seconds_of_run = now - self._clock, now - self._clock_of_run
        self._clock = now
        done = max(self.state.global_step - (self._first_step or 0), 1)
        return {
            "samples_per_second": sentences / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory_mb(self.accelerator.device),
            "seconds_left": (self.state.max_steps - self.state.global_step) * seconds_of_run / done,
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        start = time.perf_counter()
        self._prefix = metric_key_prefix  # of one data set among several it has the name
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._clock += time.perf_counter() - start
        return output

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """The number of sentences in the accumulated batches of all processes; labelled or not."""
        sentences = sum(len(batch["input_ids"]) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(sentences, device=device)).sum()

    # Training, checkpoints

    def kept_options(self) -> dict[str, Any]:
        args = self.args
        return super().kept_options() | {
            "stage": args.stage,
            "layer_map": self.layer_map,
            # Which projections are trained, and have moments.
            "hidden_state_weight > 0": args.hidden_state_weight > 0,
            "embedding_weight > 0": args.embedding_weight > 0,
        }

    def options(self) -> dict[str, Any]:
        names = (*WEIGHTS, "temperature", "target_firing_rate", "non_finite")
        return super().options() | {name: getattr(self.args, name) for name in names}

    def _prepare_run(self, checkpoint: str | bool | None) -> None:
        if isinstance(self.train_dataset, TextStream):
            self._place_stream(self.train_dataset, checkpoint)
        if self.is_world_process_zero():
            pairs = ", ".join(f"{i} <- {n}" for i, n in enumerate(self.layer_map, start=1))
            print(f"Layer map (student <- teacher): {pairs}")
        self._sums["train"].clear()
        self._clock = self._clock_of_run = time.perf_counter()
        self._first_step: int | None = None

    def _place_stream(self, stream: TextStream, checkpoint: str | bool | None) -> None:
        """Where the stream begins, and how much the Trainer skips. Without its file it is read again from the start."""
        state, steps, folder = None, 0, Path(str(checkpoint))
        if checkpoint and (folder / STREAM_NAME).is_file() and not self.args.ignore_data_skip:
            state = json.loads((folder / STREAM_NAME).read_text(encoding="utf-8"))
            steps = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        stream.load_state_dict(state, self._sequences_in(steps))

    def _sequences_in(self, steps: int) -> int:
        """Sequences of all processes that so many steps take."""
        args = self.args
        return steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._first_step is None:
            self._first_step = self.state.global_step
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self._clock += time.perf_counter() - start

    def _add_to_checkpoint(self, folder: Path) -> None:
        if isinstance(self.train_dataset, TextStream):
            place = self.train_dataset.state_dict(self._sequences_in(self.state.global_step))
            if place is not None:
                (folder / STREAM_NAME).write_text(json.dumps(place), encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        cls: Any = type(self.student)
        sharded = cls.__module__.startswith("torch.")  # FSDP's class of a sharded student: its code would be torch's
        if sharded:
            cls._auto_class = None
        # Checkpoints are for resuming, and the stage-1 student is for stage 2; a finished student needs no projections.
        # The Trainer names the folder of a checkpoint, but not the output folder that `push_to_hub` saves to.
        is_checkpoint = _internal_call and output_dir is not None
        with nullcontext() if is_checkpoint else self._writing(folder):
            super().save_model(output_dir, _internal_call=True)
            if sharded and self.args.should_save:
                save_code_files(self.student, folder)
            if is_checkpoint or self.args.stage == "general":
                weights = self._projection_weights()
                if self.args.should_save:
                    safetensors.torch.save_file(weights, folder / PROJECTIONS_NAME)
            if self.args.should_save and not _internal_call:
                self._write_model_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _projection_weights(self) -> dict[str, Tensor]:
        if not self.is_fsdp_enabled:
            return self.projections.state_dict()
        weights = self.accelerator.get_state_dict(self.model)  # gathered from all processes
        return {name.removeprefix(f"{ATTRIBUTE}."): w for name, w in weights.items() if name.startswith(ATTRIBUTE)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # its checkpoints hold them with the student
            self._load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        if not self.is_fsdp_enabled:
            self._load_projections(self.state.best_model_checkpoint)

    def _load_projections(self, folder: str) -> None:
        file = Path(folder) / PROJECTIONS_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: the folder is neither a checkpoint of a DistillationTrainer nor a stage-1 "
                "student."
            )
        try:
            weights = safetensors.torch.load_file(file)
            for name, weight in weights.items():
                if not weight.is_floating_point() or not weight.isfinite().all():
                    kind = "numbers that are not finite" if weight.is_floating_point() else f"numbers of {weight.dtype}"
                    raise ValueError(f"{file} is damaged: {name} has {kind}.")
            self.projections.load_state_dict(weights)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{file} has projections of other layers or widths than this training: {error}") from error

    # The card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of the student, with the metrics of the last evaluation."""
        if self.is_world_process_zero():
            named = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            self._write_model_card(Path(str(self.args.output_dir)), **named)

    def _write_model_card(self, folder: Path, **kwargs: Any) -> None:
        options = {"base_model": self.teacher.config.name_or_path or None} | kwargs | self.card_options
        write_model_card(folder, self, **options)


def labelled_by_teacher(labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """Labels of which those that are missing (class -100, or no number) are the teacher's predictions."""
    if labels.shape == teacher_logits.shape and labels.shape[-1] > 1:  # several labels for a sentence
        return labels
    if labels.is_floating_point():
        return torch.where(labels.isnan(), teacher_logits.view_as(labels).to(labels.dtype), labels)
    return torch.where(labels == -100, teacher_logits.argmax(-1), labels)
