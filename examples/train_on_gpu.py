"""A whole distillation on one GPU in minutes: a teacher learns a task, a spiking student learns from it in two stages.

    python examples/fetch_teacher.py runs/mpnet
    python examples/train_on_gpu.py --teacher runs/mpnet --task sst2 --train-file data/sst2/train.parquet \
        --validation-file data/sst2/validation.parquet --text data/text-en/reviews-*.parquet --output-dir runs/gpu

(`examples/recipes/README.md` says what lies in `data`.) Nothing waits for the CPU: all text lies on the GPU, tokenised,
in buckets of one length, the teacher runs beside the student, and what a step launches is recorded once for each size
of batch. Schedules count steps.

What to expect, on an H200, on the 872 sentences of SST-2's validation set (the standard error of an accuracy is one
point, and another seed or GPU gives another one):

- MPNet (109 M parameters) reaches 94.2 to 94.5 %, in 19 s.
- Its student of 6 layers and 384 units (22 M), the defaults: 90.5 %. That run shared the GPU with three others, which
  took 132 s for stage 1 and 302 s for stage 2. It then went on with `--student ... --num-time-steps 4
  --mixed-time-steps --stage2-steps 1860 --stage2-lr 1e-3`, in 48 s: 90.8 % with one step, 91.5 % with four.
- A student of 12 layers and 768 units (109 M; `--num-hidden-layers 12 --hidden-size 768 --stage1-steps 2425
  --stage1-lr 1.2e-3 --stage2-steps 1860 --stage2-lr 7e-4`): 92.4, 92.1 and 92.7 % with the seeds 42, 1 and 2 of stage
  2, in 85 s and 61 s.

In these runs schedules followed the clock; the numbers of steps are those that they came to.
Splitting and tokenising the text comes first and takes minutes on the CPU.

    OUTPUT_DIR/teacher   the fine-tuned teacher, a transformers model
    OUTPUT_DIR/stage1    the student between the stages, from which `--student` goes on: with another seed or task
    OUTPUT_DIR/student   the student, its tokenizer, results.json with what was measured and all losses, and run.json,
                         from which `examples/release.py` makes its card; `--student` goes on from here, too
"""

import copy
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from one_bit_bert import dense_twin
from rate_twin import rate_twin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.commands.distill import record_run
from modeling_spikebert.data import LabelledText, load_labelled, load_task, load_unlabelled, match_labels, tokenize
from modeling_spikebert.data.augmentation import sentences_of
from modeling_spikebert.distillation import PROJECTIONS_NAME
from modeling_spikebert.distillation.layer_maps import uniform_layer_map
from modeling_spikebert.distillation.losses import embedding_loss, hidden_state_loss, logit_loss
from modeling_spikebert.distillation.projections import FeatureProjections
from modeling_spikebert.distillation.teachers import Teacher
from modeling_spikebert.distillation.trainer import time_steps_up_to
from modeling_spikebert.int8_spikebert import round_rows, rounded_modules
from modeling_spikebert.teacher_spikebert import copy_embeddings, embedding_tables, first_position_of, inherited_fields

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # a CPU is for trials
BUCKETS = (*range(4, 41, 4), 48, 56, 64)  # lengths in tokens
# Labels are for the teacher. The student does without: the teacher's logits say more of each sentence.
WEIGHTS = {"labels": 1.0, "hidden_states": 1.0, "embeddings": 0.1, "logits": 0.03}
TWINS = {"one-bit": dense_twin, "rate": rate_twin}  # of a membrane student with one time step
FORMS = ("membrane", "published", "neuromorphic", *TWINS)
SENTENCES_PER_STEP = 128  # of the teacher's fine-tuning

Batch = tuple[Tensor, Tensor, Tensor]  # ids and mask [B, L], labels [B]


@dataclass
class Arguments:
    teacher: str = field(metadata={"help": "Folder or Hub name of an encoder; fine-tuned first if it has no classes."})
    text: list[str] = field(
        metadata={"help": "Text without labels, of the same domain: files, or name:split on the Hub."}
    )
    output_dir: str = field(metadata={"help": "New folder."})
    train_file: str | None = field(default=None, metadata={"help": "Columns text and label; by default the task's."})
    validation_file: str | None = field(default=None, metadata={"help": "The same."})
    task: str | None = field(default=None, metadata={"help": "Has columns, names of classes and data; such as sst2."})
    language: str = field(default="en", metadata={"help": "Of the text, to split it into sentences: en or zh."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Of the student."})
    hidden_size: int = field(default=384, metadata={"help": "Of the student; its MLP is four times as wide."})
    num_time_steps: int = field(default=1, metadata={"help": "Of the student."})
    form: str = field(
        default="membrane",
        metadata={
            "help": "Of the student: membrane, published, neuromorphic, one-bit (the dense twin of `one_bit_bert.py`) "
            "or rate (the twin of `rate_twin.py`)."
        },
    )
    mixed_time_steps: bool = field(
        default=False, metadata={"help": "Train it for 1, 2, 4, ... up to --num-time-steps, drawn for each batch."}
    )
    int8_weights: bool = field(
        default=False,
        metadata={
            "help": "Stage 2 rounds weights as int8 files do (`release.py`, `spikebert export`), which then hold "
            "the very student that was measured."
        },
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a student that had stage 1 before, such as OUTPUT_DIR/stage1 or OUTPUT_DIR/student; its "
            "sizes and variant count, and it takes the time steps."
        },
    )
    text_share: float = field(default=1.0, metadata={"help": "Part of the sentences of --text that stage 2 takes."})
    train_copies: int = field(default=3, metadata={"help": "Of the task's sentences, in a pass over stage 2's text."})
    teacher_steps: int = field(default=1497, metadata={"help": "Of 128 sentences: three passes over SST-2."})
    teacher_lr: float = 3e-5
    stage1_steps: int = field(default=2028, metadata={"help": "The plain teacher's hidden states, on --text."})
    stage1_lr: float = field(default=3e-3, metadata={"help": "12 layers of 768 units: 1.2e-3."})
    stage2_steps: int = field(default=4970, metadata={"help": "The fine-tuned teacher, on --text and the task's."})
    stage2_lr: float = field(default=1.5e-3, metadata={"help": "12 layers of 768 units: 7e-4."})
    tokens_per_step: int = field(default=8192, metadata={"help": "Most tokens of a batch."})
    logging_steps: int = 100
    seed: int = 42

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"--form must be one of {', '.join(FORMS)}, got {self.form}.")
        if self.form in TWINS and self.num_time_steps != 1:
            raise ValueError(f"--form {self.form} has one time step. Leave out --num-time-steps {self.num_time_steps}.")
        if self.form in TWINS and self.int8_weights:
            raise ValueError(f"--form {self.form} has no int8 file. Leave out --int8-weights.")
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"--text-share must be from 0 to 1, got {self.text_share}.")
        if self.train_copies < 1:
            raise ValueError(f"--train-copies must be at least 1, got {self.train_copies}.")


def main(args: Arguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Remove it, or pass another --output-dir.")

    # Text, tokenised once
    text = read_task(args)
    config = AutoConfig.from_pretrained(args.teacher)
    fine_tuned = any("SequenceClassification" in name for name in config.architectures or ())
    if fine_tuned:
        text = match_labels(text, config.id2label)
    else:
        text.check_all_labelled()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    unlabelled = other_sentences(args, text)
    rows = [tokenize(split, tokenizer, BUCKETS[-1]) for split in (text.train, text.validation, unlabelled)]
    task_ids, _, other_ids = (split.select_columns("input_ids") for split in rows)
    share = other_ids.shuffle(seed=args.seed).select(range(round(args.text_share * len(other_ids))))
    rows.append(concatenate_datasets([share.flatten_indices(), *[task_ids] * args.train_copies]))
    train, validation, general, mixed = (
        Sentences(split, tokenizer.pad_token_id, args.tokens_per_step) for split in rows
    )
    counts = [len(split) for split in rows]
    print("{} labelled sentences, {} to validate, {} without labels; stage 2 has {}.".format(*counts), flush=True)

    # The teacher learns the task. The student starts from what it was before, which teaches stage 1, too.
    set_seed(args.seed)
    names = {} if fine_tuned else text.label_maps
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher, dtype=torch.float32, **names)
    student, projections = make_student(args, teacher, general)
    plain = in_half(teacher.to(DEVICE))
    run, losses = partial(fit, logging_steps=args.logging_steps), {}
    set_seed(args.seed)
    if not fine_tuned:
        batches, losses_of = train.forever(SENTENCES_PER_STEP), partial(label_losses, teacher)
        losses["teacher"] = run("teacher", [teacher], losses_of, batches, args.teacher_steps, args.teacher_lr)
        teacher.save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
    teacher_logits = torch.cat([out.logits for out in outputs_of(teacher, validation)])
    labels = torch.cat([labels for _, labels in validation.buckets])
    print(f"teacher: {accuracy(teacher_logits, labels):.2f} % of {len(labels)}", flush=True)

    # Stage 1: hidden states and embeddings. Stage 2: logits, too.
    for stage, model, data, steps, lr in (
        ("stage 1", plain, general, args.stage1_steps, args.stage1_lr),
        ("stage 2", in_half(teacher), mixed, args.stage2_steps, args.stage2_lr),
    ):
        if stage == "stage 1" and args.student is not None:
            continue
        if stage == "stage 2" and args.int8_weights:
            round_weights(student)
        losses_of = distillation_losses(student, projections, model, stage == "stage 2", args.mixed_time_steps)
        most = student.config.num_time_steps
        drawn = time_steps_up_to(most) if args.mixed_time_steps else [most]
        losses[stage] = run(stage, [student, projections], losses_of, data.forever(), steps, lr, time_steps=drawn)
        if stage == "stage 1":
            save(student, projections, tokenizer, folder / "stage1")
    keep_rounded(student)

    # What it is worth, in float32
    outputs = outputs_of(student, validation, output_firing_rates=True)
    logits = torch.cat([out.logits for out in outputs])
    rates = torch.cat([torch.stack(out.firing_rates, 1) for out in outputs])  # [n, blocks, 7]
    results = {
        "teacher_accuracy": accuracy(teacher_logits, labels),
        "accuracy": accuracy(logits, labels),
        "agreement": accuracy(logits, teacher_logits.argmax(-1)),
        "kl": logit_loss(logits, teacher_logits, 1.0, None).mean().item(),
        "firing_rate": rates.mean().item(),
        "num_sentences": len(labels),
    }
    print(json.dumps(results, indent=2))
    save(student, projections, tokenizer, folder / "student")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    results |= {"device": device, "torch": torch.__version__, "arguments": asdict(args), "losses": losses}
    (folder / "student" / "results.json").write_text(json.dumps(results, indent=2))
    record_run(folder / "student", ["python", "examples/train_on_gpu.py", *sys.argv[1:]], args.seed, DEVICE)
    print(f"{folder / 'student'}: the student")


def save(
    student: SpikeBertForSequenceClassification, projections: FeatureProjections, tokenizer: Any, folder: Path
) -> None:
    """A complete model, and the projections, from which `--student` goes on."""
    student.save_pretrained(folder)
    save_file(projections.state_dict(), folder / PROJECTIONS_NAME)
    tokenizer.save_pretrained(folder)


# Text


def read_task(args: Arguments) -> LabelledText:
    if args.task is not None:
        text = load_task(args.task, args.train_file, args.validation_file)
    elif args.train_file is None or args.validation_file is None:
        raise ValueError("There is no task: pass --task, or --train-file and --validation-file.")
    else:
        text = load_labelled(args.train_file, args.validation_file)
    if text.problem_type == "regression" or "text_pair" in text.train.column_names:
        raise ValueError("This example is for classes of single sentences; `spikebert distill` takes the other tasks.")
    return text


def other_sentences(args: Arguments, text: LabelledText) -> Dataset:
    """The sentences of --text, each once, without those of the task, however they are spelled."""
    known = {letters_of(sentence) for split in (text.train, text.validation) for sentence in split["text"]}
    passages = (passage for source in args.text for passage in load_unlabelled(source)["text"])
    found = dict.fromkeys(sentences_of(passages, args.language, sys.maxsize))
    sentences = [sentence for sentence in found if letters_of(sentence) not in known]
    if not sentences:
        raise ValueError("--text has no sentences of 5 to 40 words that the task does not have. Pass other files.")
    return Dataset.from_dict({"text": sentences})


def letters_of(sentence: str) -> str:
    return re.sub(r"\W", "", sentence.lower())


class Sentences:
    """Token ids on the device, one table `[n, L]` for each bucket, so that batches need little padding and no copies.

    Args:
        rows: from `tokenize`; labels are -100 where it has none.
        pad_token_id: fills the tables.
        tokens: most of a batch.
    """

    def __init__(self, rows: Dataset, pad_token_id: int, tokens: int):
        column = rows.data.column("input_ids").combine_chunks()
        all_ids, lengths = column.flatten().to_numpy(), column.value_lengths().to_numpy().astype(np.int64)
        starts = lengths.cumsum() - lengths
        labels = np.array(rows["labels"][:]) if "labels" in rows.column_names else np.full(len(rows), -100)
        bucket_of = np.searchsorted(BUCKETS, lengths)
        self.pad_token_id, self.tokens = pad_token_id, tokens
        self.buckets = []
        for bucket in np.unique(bucket_of):
            (chosen,) = (bucket_of == bucket).nonzero()
            columns = np.arange(BUCKETS[bucket])
            places = np.minimum(starts[chosen, None] + columns, len(all_ids) - 1)
            ids = np.where(columns < lengths[chosen, None], all_ids[places], pad_token_id)  # [n, L]
            self.buckets.append(
                (torch.from_numpy(ids.astype(np.int32)).to(DEVICE), torch.from_numpy(labels[chosen]).to(DEVICE))
            )

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs, padding aside; `[V]`."""
        counts = torch.stack([torch.bincount(ids.flatten(), minlength=vocab_size) for ids, _ in self.buckets]).sum(0)
        counts[self.pad_token_id] = 0
        return counts

    def batches(self, sentences: int = sys.maxsize, shuffle: bool = False) -> Iterator[Batch]:
        """One pass, in batches of one length with at most so many sentences."""
        parts = []
        for ids, labels in self.buckets:
            order = torch.randperm(len(ids), device=DEVICE) if shuffle else torch.arange(len(ids), device=DEVICE)
            size = max(1, min(sentences, self.tokens // ids.shape[1]))
            chunks = list(order.split(size))
            if shuffle and len(chunks) > 1 and len(chunks[-1]) < size // 2:  # a step of its own would weigh too much
                chunks.pop()
            parts += [(ids, labels, chunk) for chunk in chunks]
        if shuffle:
            random.shuffle(parts)
        for ids, labels, chunk in parts:
            batch = ids[chunk].long()
            yield batch, (batch != self.pad_token_id).long(), labels[chunk]

    def forever(self, sentences: int = sys.maxsize) -> Iterator[Batch]:
        while True:
            yield from self.batches(sentences, shuffle=True)


# Models


def in_half(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy to learn from."""
    return copy.deepcopy(model).to(HALF).eval().requires_grad_(False)


def make_student(
    args: Arguments, teacher: PreTrainedModel, text: Sentences
) -> tuple[SpikeBertForSequenceClassification, FeatureProjections]:
    words, _, _ = embedding_tables(teacher)
    if args.student is not None:
        labels = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        student = SpikeBertForSequenceClassification.from_pretrained(
            args.student, dtype=torch.float32, ignore_mismatched_sizes=True, **labels
        )
        student = with_time_steps(student, args.num_time_steps)
        if args.form in TWINS:
            TWINS[args.form](student)
        projections = new_projections(student, teacher)
        own = student.get_input_embeddings().weight.detach()
        if (Path(args.student) / PROJECTIONS_NAME).is_file():
            projections.load(Path(args.student) / PROJECTIONS_NAME)
        elif own.shape[1] != words.embedding_dim:  # the way back to the teacher's embeddings
            projections.embeddings.weight.data = torch.linalg.lstsq(own, words.weight.detach()).solution.T.contiguous()
        return student.to(DEVICE), projections.to(DEVICE)
    sizes: dict[str, Any] = {
        name: getattr(args, name) for name in ("num_hidden_layers", "hidden_size", "num_time_steps")
    }
    sizes["intermediate_size"] = 4 * args.hidden_size
    if args.form == "published":
        reference = SpikeBertConfig.reference()
        sizes |= {name: getattr(reference, name) for name in ("variant", "num_attention_heads")}
    elif args.form == "neuromorphic":
        sizes["variant"] = args.form
    student = SpikeBertForSequenceClassification(SpikeBertConfig(**inherited_fields(teacher, sizes)))
    if args.form in TWINS:
        TWINS[args.form](student)
    projections = new_projections(student, teacher)
    if args.hidden_size < words.embedding_dim:
        start_narrower(student, projections, teacher, text.token_counts(words.num_embeddings))
    else:
        copy_embeddings(teacher, student.base_model.embeddings)
    return student.to(DEVICE), projections.to(DEVICE)


def new_projections(student: PreTrainedModel, teacher: PreTrainedModel) -> FeatureProjections:
    words, _, _ = embedding_tables(teacher)
    config = student.config
    return FeatureProjections(
        config.num_hidden_layers, config.hidden_size, teacher.config.hidden_size, words.embedding_dim
    )


def with_time_steps(
    student: SpikeBertForSequenceClassification, num_time_steps: int
) -> SpikeBertForSequenceClassification:
    """The student with another number of time steps; its first step computes what it did before."""
    fields = student.config.to_dict() | {"num_time_steps": num_time_steps}
    for name in ("quantization_config", "dtype", "auto_map"):
        fields.pop(name, None)
    weights = student.state_dict()
    if fields["tau"] == 1 < num_time_steps:  # with tau 2 the first membrane is half the current
        fields["tau"] = 2.0
        of_neurons = re.compile(r"(_neuron\.|_neuron\.batch_norm\.|^norm\.batch_norm\.)(weight|bias)$")
        weights = {name: 2 * x if of_neurons.search(name) else x for name, x in weights.items()}
    student = SpikeBertForSequenceClassification(SpikeBertConfig(**fields))
    student.load_state_dict(weights)
    return student


@torch.no_grad()
def start_narrower(
    student: SpikeBertForSequenceClassification,
    projections: FeatureProjections,
    teacher: PreTrainedModel,
    counts: Tensor,
) -> None:
    """Gives a student its teacher's embeddings in fewer directions, and the projection of embeddings the way back.

    The directions are those in which the embeddings of the text spread most, turned at random so that units are alike.
    """
    words, positions, types = embedding_tables(teacher)
    weighted = words.weight.double() * (counts.cpu().double() + 0.1)[:, None] ** 0.25  # [V, E]
    _, directions = torch.linalg.eigh(weighted.T @ weighted)  # in columns, those of the largest spread last
    width = student.config.hidden_size
    turn, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    basis = (directions[:, -width:] @ turn).float()  # [E, D]
    projections.embeddings.weight.copy_(basis)
    embeddings = student.base_model.embeddings
    embeddings.word_embeddings.weight.copy_(words.weight @ basis)
    if positions is not None and embeddings.position_embeddings is not None:
        embeddings.position_embeddings.weight.copy_(positions.weight[first_position_of(positions) :] @ basis)
    if types is not None and embeddings.token_type_embeddings is not None:
        embeddings.token_type_embeddings.weight.copy_(types.weight @ basis)


class Int8Weights(nn.Module):
    """A weight `[M, K]` as it comes out of an int8 file; gradients pass straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        rounded, scale = round_rows(weight)
        return weight + (rounded * scale.unsqueeze(1) - weight).detach()


def round_weights(student: SpikeBertForSequenceClassification) -> None:
    """Those that an int8 file rounds, in each forward pass from now on."""
    for module in rounded_modules(student):
        parametrize.register_parametrization(module, "weight", Int8Weights())


def keep_rounded(student: SpikeBertForSequenceClassification) -> None:
    """Ends `round_weights`, with the weights rounded."""
    for module in [module for module in student.modules() if parametrize.is_parametrized(module)]:
        parametrize.remove_parametrizations(module, "weight")


# Training

LossesOf = Callable[[Tensor, Tensor, Tensor, int], dict[str, Tensor]]


def autocast() -> AbstractContextManager:
    return torch.autocast(DEVICE.type, HALF, enabled=DEVICE.type == "cuda")


def label_losses(model: PreTrainedModel, ids: Tensor, mask: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
    with autocast():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return {"labels": F.cross_entropy(logits.float(), labels)}


def distillation_losses(
    student: SpikeBertForSequenceClassification,
    projections: FeatureProjections,
    teacher: PreTrainedModel,
    with_logits: bool,
    after_every_step: bool,
) -> LossesOf:
    taught = Teacher(teacher, uniform_layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers))
    words = teacher.get_input_embeddings()
    variance = words.weight.float().var()

    def losses_of(ids: Tensor, mask: Tensor, labels: Tensor, steps: int) -> dict[str, Tensor]:
        inputs = {"input_ids": ids, "attention_mask": mask}
        targets = taught(inputs)
        with autocast(), parametrize.cached():  # a weight is rounded once, however often it is read
            outputs = student.spikebert(**inputs, output_hidden_states=True, num_time_steps=steps)
            embeddings, *states = projections(outputs.hidden_states[1:], student.get_input_embeddings()(ids))
            losses = {
                "hidden_states": hidden_state_loss(states, targets.states, mask).mean(),
                "embeddings": embedding_loss(embeddings, words(ids).float(), mask, variance).mean(),
            }
            if with_logits:
                scores = student.scores_per_step(outputs, mask).float()  # [T, B, C]
                wanted, first = targets.logits.float(), 0 if after_every_step else -1
                losses["logits"] = torch.stack([logit_loss(x, wanted, 1.0, None).mean() for x in scores[first:]]).mean()
        return losses

    return losses_of


class Gradients:
    """Computes the losses of a batch and adds to the gradients.

    Python takes longer to launch a step than a GPU to compute it, so that from the third batch of a size on its
    launches are recorded as a CUDA graph and replayed. Gradients stay where they are for that: set them to zero.
    """

    def __init__(self, losses_of: LossesOf, parameters: list[nn.Parameter]):
        self.losses_of = losses_of
        self.recordings: dict[Any, Any] = {}
        self.seen: Counter[Any] = Counter()
        self.pool: Any = None
        self.records = DEVICE.type == "cuda"
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, steps: int) -> dict[str, Tensor]:
        size = (*batch[0].shape, steps)
        self.seen[size] += 1
        if not self.records or self.seen[size] < 3:
            return self.compute(batch, steps)
        if size not in self.recordings and not self.record(size, batch, steps):
            return self.compute(batch, steps)
        graph, own, losses = self.recordings[size]
        for tensor, new in zip(own, batch, strict=True):
            tensor.copy_(new)
        graph.replay()
        return {name: value.clone() for name, value in losses.items()}

    def record(self, size: Any, batch: Batch, steps: int) -> bool:
        own, graph = [tensor.clone() for tensor in batch], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                losses = self.compute(own, steps)
        except RuntimeError as error:  # a teacher whose forward pass waits for the CPU
            print(f"Launches are not recorded, which takes longer: {str(error).splitlines()[0]}", flush=True)
            self.records = False
            return False
        self.pool = graph.pool()
        self.recordings[size] = graph, own, losses
        return True

    def compute(self, batch: Any, steps: int) -> dict[str, Tensor]:
        losses = self.losses_of(*batch, steps)
        torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum().backward()
        return {name: value.detach() for name, value in losses.items()}


def fit(
    name: str,
    modules: list[nn.Module],
    losses_of: LossesOf,
    batches: Iterator[Batch],
    steps: int,
    lr: float,
    logging_steps: int,
    time_steps: Sequence[int] = (1,),
) -> list[dict[str, float]]:
    """AdamW with warm-up and linear decay. Returns the losses, each a mean over `logging_steps`."""
    parameters = [parameter for module in modules for parameter in module.train().parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=DEVICE.type == "cuda")
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * steps), steps)
    gradients = Gradients(losses_of, parameters)
    log, recent, start = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        losses = gradients(next(batches), random.choice(time_steps))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        recent.append(torch.stack(list(losses.values())))
        if step % logging_steps == 0 or step == steps:  # only here does the CPU wait for the GPU
            means = dict(zip(losses, torch.stack(recent).mean(0).tolist(), strict=True))
            recent = []
            log.append({"step": step, "seconds": round(time.perf_counter() - start, 1), **means})
            print(name, json.dumps(log[-1]), flush=True)
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"{name}: losses are not finite after {step} steps. Lower its learning rate.")
    return log


@torch.no_grad()
def outputs_of(model: PreTrainedModel, sentences: Sentences, **options: Any) -> list[Any]:
    """What the model says of all sentences, in evaluation mode and in float32."""
    model.eval()
    return [model(input_ids=ids, attention_mask=mask, **options) for ids, mask, _ in sentences.batches()]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        sys.exit(f"train_on_gpu.py: {error}")
