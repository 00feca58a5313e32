"""`DistillationTrainer`: both stages of distillation on top of `transformers.Trainer`."""

import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..checks_spikebert import classification_losses, problem_type_of
from ..data import TextStream
from ..hub import write_model_card
from ..modeling_spikebert import SpikeBertPreTrainedModel
from .arguments import WEIGHTS, DistillationTrainingArguments
from .checks import check_label_range, check_models, check_tokenizers, embedding_table
from .layer_maps import resolve_layer_map
from .losses import embedding_loss, firing_rate_loss, hidden_state_loss, logit_loss
from .projections import ATTRIBUTE, FeatureProjections
from .resuming import ResumableTrainer
from .teachers import LOGITS, STATES, CachedTeacherCollator, Teacher, TeacherOutputs, cached, from_batch

PROJECTIONS_NAME = "projections.safetensors"
STREAM_NAME = "stream.json"


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
        if args.mixed_time_steps and model.config.num_time_steps == 1:
            raise ValueError("mixed_time_steps needs a student of several time steps, and its num_time_steps is 1.")
        if args.stage == "task":
            check_label_range(model, kwargs.get("train_dataset"))
        loading: Any = args.accelerator_config
        if isinstance(kwargs.get("train_dataset"), IterableDataset) and loading.dispatch_batches is None:
            # Each process reads the stream and takes its share; sending batches around needs them of equal lengths.
            loading.dispatch_batches = False

        super().__init__(model=model, args=args, teacher=teacher, **kwargs)
        if args.non_finite == "skip" and self.is_deepspeed_enabled:
            raise ValueError("non_finite must be 'stop' under DeepSpeed: its step is done before a gradient is seen.")
        self.projections = FeatureProjections(  # here, because the Trainer has set the seed
            len(self.layer_map), model.config.hidden_size, teacher.config.hidden_size, embedding_table(teacher).shape[1]
        )
        if args.initial_projections is not None:
            self.projections.load(Path(args.initial_projections) / PROJECTIONS_NAME)
        # Without a loss they have no gradient, for which DDP would wait.
        self.projections.layers.requires_grad_(args.hidden_state_weight > 0)
        self.projections.embeddings.requires_grad_(args.embedding_weight > 0)
        self.projections.attach(model)
        self.student = model
        # What the model card says beside what the trainer knows: keyword arguments of `create_model_card`.
        self.card_options: dict[str, Any] = {}
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
        # The Trainer keeps the columns that the student's forward takes, and these.
        self._set_signature_columns_if_needed()
        cast(Any, self._signature_columns).extend([STATES, LOGITS])

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
            output_logits_per_step=self._mixes_time_steps() and bool(self.args.loss_weights.get("logits")),
            output_projections=True,
            num_time_steps=self._draw_time_steps(),
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
        self._add_to_log(losses, outputs["firing_rates"], finite)

        # The Trainer averages gradients over processes, num_items_in_batch counts the sentences of all of them.
        count = len(total) if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = total.sum() / count
        return (loss, {"logits": outputs.get("logits")}) if return_outputs else loss

    def _mixes_time_steps(self) -> bool:
        return self.args.mixed_time_steps and self.student.training

    def _draw_time_steps(self) -> int | None:
        if not self._mixes_time_steps():
            return None  # those of the config
        numbers = time_steps_up_to(self.student.config.num_time_steps)
        return numbers[int(torch.randint(len(numbers), ()))]

    def _losses(self, outputs: Any, targets: TeacherOutputs, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of the stage that have a weight, `[B]` each."""
        weights = self.args.loss_weights
        ids, labels = inputs["input_ids"], inputs.get("labels")
        token_mask = inputs.get("attention_mask", torch.ones_like(ids))
        word_embeddings, *states = outputs["projected_states"]
        losses = {}
        if labels is not None:  # the loss of logits and the pipeline follow it
            self.student.config.problem_type = problem_type_of(labels, self.student.config)
        if weights["hidden_states"]:
            losses["hidden_states"] = hidden_state_loss(states, targets.states, token_mask)
        if weights["embeddings"]:
            embeddings = self.teacher.get_input_embeddings()(ids)
            losses["embeddings"] = embedding_loss(word_embeddings, embeddings, token_mask, self._teacher_variance)
        if weights.get("cross_entropy"):
            if labels is None:
                raise ValueError("The batch has no labels. Add them, or set cross_entropy_weight=0.")
            assert targets.logits is not None
            labels = labelled_by_teacher(labels, targets.logits)
            losses["cross_entropy"] = (
                classification_losses(outputs["logits"], labels, self.student.config).reshape(len(ids), -1).mean(1)
            )
        if weights.get("logits"):
            assert targets.logits is not None
            scores = outputs.get("logits_per_step", outputs["logits"][None])  # [T or 1, B, C]
            options = (targets.logits, self.args.temperature, self.student.config.problem_type)
            losses["logits"] = torch.stack([logit_loss(logits, *options) for logits in scores]).mean(0)
        if weights["firing_rate"]:
            losses["firing_rate"] = firing_rate_loss(outputs["firing_rates"], self.args.target_firing_rate)
        return losses

    # The log

    def _add_to_log(self, losses: dict[str, Tensor], firing_rates: tuple[Tensor, ...], finite: Tensor) -> None:
        per_block = torch.stack([rates.detach().mean(-1) for rates in firing_rates], dim=-1)  # [B, M], over all signals
        values = {f"loss_{name}": value for name, value in losses.items()}
        values |= {f"firing_rate_layer_{i}": rate for i, rate in enumerate(per_block.unbind(-1), start=1)}
        values |= {"firing_rate": per_block.mean(-1)}
        # Evaluation switches the student to eval mode, not the wrapper (DDP) around it.
        sums = self._sums["train" if self.student.training else "eval"]
        for name, value in values.items():  # [B] each
            sums[name] += value.detach().where(finite, 0.0).sum()
        sums["sentences"] += finite.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss of the stage (unweighted) and firing rates, as means over the sentences since the last log.

        They are those of all processes.
        """
        runtime = next((name for name in logs if name.endswith("_runtime")), "")
        sums = self._sums["train" if "loss" in logs else "eval"]
        if sums:
            prefix = runtime.removesuffix("runtime")  # of one evaluation set among several it has the name
            names = sorted(sums)
            values = [torch.as_tensor(sums[name], dtype=torch.float32, device=self.args.device) for name in names]
            totals: Any = self.accelerator.reduce(torch.stack(values), reduction="sum")
            total = dict(zip(names, totals.tolist(), strict=True))
            sentences = max(total.pop("sentences"), 1.0)
            logs |= {prefix + name: value / sentences for name, value in total.items()}
            sums.clear()
        super().log(logs, start_time)

    def on_predict(self, *_: Any, **__: Any) -> None:
        self._sums["eval"].clear()  # prediction logs nothing, and the next evaluation must not log its losses

    # Training, checkpoints

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of a step, and the number of sentences that they have in all processes, labelled or not."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._counts_of_step[0]

    def options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        args, (kept, free) = self.args, super().options()
        kept |= {
            "stage": args.stage,
            "layer_map": self.layer_map,
            # Which projections are trained, and have moments.
            "hidden_state_weight > 0": args.hidden_state_weight > 0,
            "embedding_weight > 0": args.embedding_weight > 0,
        }
        names = (*WEIGHTS, "temperature", "target_firing_rate", "mixed_time_steps", "non_finite")
        return kept, free | {name: getattr(args, name) for name in names}

    def _prepare_run(self, checkpoint: Path | None) -> None:
        super()._prepare_run(checkpoint)
        self._sums["train"].clear()
        if isinstance(self.train_dataset, TextStream):
            self._place_stream(self.train_dataset, checkpoint)
        if checkpoint is not None:
            self._load_projections_of(checkpoint)
        if self.is_world_process_zero():
            pairs = ", ".join(f"{i} <- {n}" for i, n in enumerate(self.layer_map, start=1))
            print(f"Layer map (student <- teacher): {pairs}")

    def _place_stream(self, stream: TextStream, checkpoint: Path | None) -> None:
        """Where the stream begins, and how much the Trainer skips. Without its file it is read again from the start."""
        state, steps = None, 0
        if checkpoint is not None and (checkpoint / STREAM_NAME).is_file() and not self.args.ignore_data_skip:
            state = json.loads((checkpoint / STREAM_NAME).read_text(encoding="utf-8"))
            steps = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
        stream.load_state_dict(state, self._sequences_in(steps))

    def _sequences_in(self, steps: int) -> int:
        """Sequences of all processes that so many steps take."""
        return steps * self.get_total_train_batch_size(self.args)

    def _add_to_checkpoint(self, folder: Path) -> None:
        if isinstance(self.train_dataset, TextStream):
            place = self.train_dataset.state_dict(self._sequences_in(self.state.global_step))
            if place is not None:
                (folder / STREAM_NAME).write_text(json.dumps(place), encoding="utf-8")

    def _add_to_model(self, folder: Path, is_checkpoint: bool) -> None:
        # Checkpoints are for resuming, and the stage-1 student is for stage 2; a finished student needs no projections.
        if is_checkpoint or self.args.stage == "general":
            weights: Any = self.projections.state_dict()
            if self.is_fsdp_enabled:  # gathered from all processes
                names = {f"{ATTRIBUTE}.{name}": name for name in weights}
                gathered = self.accelerator.get_state_dict(self.model)
                weights = {names[name]: weight for name, weight in gathered.items() if name in names}
            if self.args.should_save:
                safetensors.torch.save_file(weights, folder / PROJECTIONS_NAME)
        if self.args.should_save and not is_checkpoint:
            self._write_model_card(folder)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_projections_of(Path(self.state.best_model_checkpoint))

    def _load_projections_of(self, checkpoint: Path) -> None:
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # their checkpoints hold them with the student
            self.projections.load(checkpoint / PROJECTIONS_NAME)

    # The card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of the student, with the metrics of the last evaluation."""
        if self.is_world_process_zero():
            named = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            self._write_model_card(Path(str(self.args.output_dir)), **named)

    def _write_model_card(self, folder: Path, **kwargs: Any) -> None:
        options = {"base_model": self.teacher.config.name_or_path or None} | kwargs | self.card_options
        write_model_card(folder, self, **options)


def time_steps_up_to(num_time_steps: int) -> list[int]:
    """1, 2, 4, ... and the number itself: what an early exit goes through."""
    return [*(2**i for i in range(num_time_steps.bit_length()) if 2**i < num_time_steps), num_time_steps]


def labelled_by_teacher(labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """Labels of which those that are missing (class -100, or no number) are the teacher's predictions."""
    if labels.shape == teacher_logits.shape and labels.shape[-1] > 1:  # several labels for a sentence
        return labels
    if labels.is_floating_point():
        return torch.where(labels.isnan(), teacher_logits.view_as(labels).to(labels.dtype), labels)
    return torch.where(labels == -100, teacher_logits.argmax(-1), labels)
