"""`spikebert distill`: one stage of the distillation of a student from a BERT-like teacher."""

import argparse
import gc
import json
import platform
import shlex
import sys
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)
from transformers.utils import cached_file

from ..console.loudness import say, set_loudness
from ..data import (
    TASKS,
    DataError,
    LabelledText,
    TextStream,
    load_labelled,
    load_task,
    load_unlabelled,
    match_labels,
    metrics_for,
    tokenize,
)
from ..distillation import (
    PROJECTIONS_NAME,
    DistillationTrainer,
    DistillationTrainingArguments,
    ResumableTrainer,
)
from ..distillation.checkpoints import last_checkpoint
from ..distillation.run_folder import the_only_run
from ..energy import compare_energy
from ..hub.fetching import load_model, reach_hub
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from .options.distill import DataArguments, ModelArguments

NUM_ENERGY_SENTENCES = 100
RECORDED_PACKAGES = ("modeling_spikebert", "torch", "transformers", "datasets", "accelerate", "tokenizers")


def run(options: argparse.Namespace) -> None:
    """Checks what is asked for, trains, and ends the processes in order."""
    model_args, data_args, args = options.model, options.data, options.training
    set_loudness(options.verbose and args.process_index == 0)
    set_seed(args.seed)
    if args.process_index == 0:
        reach_hub(model_args.teacher, model_args.model_name_or_path)

    if args.stage == "general":
        if model_args.teacher is None:
            raise ValueError("--stage general needs a --teacher.")
        if data_args.train_file is None:
            raise DataError("--stage general needs --train-file: text without labels.")
        if data_args.streaming and args.max_steps < 1:
            raise ValueError("--streaming needs --max-steps: a stream has no end.")
    elif data_args.streaming:
        raise ValueError("--streaming is for text without labels: --stage general.")
    with the_only_run(args, args.resume_from_checkpoint):
        try:
            train(options.arguments, model_args, data_args, args)
        except KeyboardInterrupt:
            if args.process_index == 0:
                last = last_checkpoint(Path(str(args.output_dir)))
                print(
                    f"\nspikebert distill: interrupted; last checkpoint: {last or 'none yet'}. The same command with "
                    "--resume-from-checkpoint last goes on from there.",
                    file=sys.stderr,
                )
            sys.exit(130)  # as a shell has it
    end_process_group()


def train(
    arguments: list[str], model_args: ModelArguments, data_args: DataArguments, args: DistillationTrainingArguments
) -> None:
    plain = args.stage == "task" and (model_args.teacher is None or model_args.from_scratch)
    trainer = (fine_tuning if plain else distillation)(model_args, data_args, args)
    if args.process_index == 0:
        command = ["spikebert", "distill", *arguments]
        record_run(Path(str(args.output_dir)), command, args.seed, args.device, args.world_size)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if isinstance(trainer, DistillationTrainer):  # it writes the card in save_model
        compare_energies(trainer)
    else:
        trainer.create_model_card()
    trainer.save_model()  # with --push-to-hub it pushes, too
    say_what_is_next(model_args, args)


def say_what_is_next(model_args: ModelArguments, args: DistillationTrainingArguments) -> None:
    folder = args.output_dir
    say(f"Written to {folder}: the model with tokenizer and card, all_results.json, checkpoints.")
    if args.stage == "general":
        say(f"Next, stage 2: spikebert distill --teacher FINE_TUNED_BERT --model-name-or-path {folder} --task NAME ...")
    elif model_args.teacher is None:
        say(f"Next, as a teacher: spikebert distill --teacher {folder} --stage general --train-file FILE ...")
    else:
        say(f'Next: spikebert energy {folder} --teacher {model_args.teacher} --text "A sentence."')


def record_run(folder: Path, command: list[str], seed: int, device: torch.device, processes: int = 1) -> None:
    """Writes `run.json`: what it takes to do this run again."""
    run = {
        "command": shlex.join(map(without_folders, command)),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def without_folders(argument: str) -> str:
    """An absolute path says more of the machine than of the run: its last part is kept, also of `--option=path`."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def compare_energies(trainer: DistillationTrainer) -> None:
    """Prints what student and teacher cost on a few sentences and puts it into the card, also as `energy.json`."""
    if not trainer.is_world_process_zero():
        return
    if trainer.is_fsdp_enabled:
        say("The weights are sharded over processes; `spikebert energy` counts the student that is saved.")
        return
    dataset: Any = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, TextStream):
        dataset.load_state_dict(None, 0)  # from its beginning
        sample: Any = list(islice(dataset, NUM_ENERGY_SENTENCES))
    else:
        sample = dataset.shuffle(seed=0).select(range(min(NUM_ENERGY_SENTENCES, len(dataset))))
    batches = list(DataLoader(sample, batch_size=8, collate_fn=trainer.data_collator))
    energy = compare_energy(trainer.student, trainer.teacher, batches)
    say(f"\nEnergy on {len(sample)} sentences\n{energy}\n")
    (Path(str(trainer.args.output_dir)) / "energy.json").write_text(json.dumps(energy.to_dict(), indent=2))
    measured = trainer.card_options.get("dataset", trainer.card_options.get("dataset_tags"))
    trainer.card_options["energy"] = energy.to_markdown(measured)


def distillation(
    model_args: ModelArguments, data_args: DataArguments, args: DistillationTrainingArguments
) -> DistillationTrainer:
    general = args.stage == "general"
    name = str(model_args.teacher)
    teacher = load_model(AutoModel if general else AutoModelForSequenceClassification, name)
    teacher_tokenizer = tokenizer = AutoTokenizer.from_pretrained(name)
    student_class: Any = SpikeBertModel if general else SpikeBertForSequenceClassification
    labels = {} if general else {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
    if model_args.model_name_or_path is None:
        student = student_class.from_teacher(teacher, **model_args.new_config)
    else:
        student = load_model(student_class, model_args.model_name_or_path, to_be_trained=True, **labels)
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        if not general and args.initial_projections is None:
            args.initial_projections = projections_of(model_args.model_name_or_path)

    metrics, train, validation = None, None, None
    if general:
        if not data_args.streaming:
            train = load_unlabelled(str(data_args.train_file), data_args.text_column)
        if data_args.validation_file is not None:
            validation = load_unlabelled(data_args.validation_file, data_args.text_column)
    else:
        text = match_labels(read_labelled(data_args), teacher.config.id2label)
        metrics, train, validation = metrics_for(text, data_args.task), text.train, text.validation
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        teacher_tokenizer=teacher_tokenizer,
        compute_metrics=metrics,
        **tokenized(train, validation, tokenizer, data_args, args),
    )
    measured = data_args.validation_file or data_args.train_file
    if measured is None or ":" in measured:
        on_hub = TASKS[str(data_args.task)].path if measured is None else measured.split(":")[0]
        trainer.card_options["dataset_tags"] = on_hub
    else:
        trainer.card_options["dataset"] = Path(measured).name
    return trainer


def projections_of(name: str) -> str | None:
    """The folder with the projections of a stage-1 student, local or from the Hub."""
    try:
        folder = str(Path(str(cached_file(name, PROJECTIONS_NAME))).parent)
    except OSError:
        folder = None
    say(f"Projections: {f'those of {name}' if folder else f'new ones; {name} has no {PROJECTIONS_NAME}'}.")
    return folder


def fine_tuning(
    model_args: ModelArguments, data_args: DataArguments, args: DistillationTrainingArguments
) -> ResumableTrainer:
    text = read_labelled(data_args)
    text.check_all_labelled()
    source = str(model_args.teacher if model_args.from_scratch else model_args.model_name_or_path)
    model: Any = load_model(
        AutoModelForSequenceClassification, source, to_be_trained=True, ignore_mismatched_sizes=True, **text.label_maps
    )
    if model_args.from_scratch:
        like_teacher = SpikeBertForSequenceClassification.from_teacher(model, **model_args.new_config)
        model = SpikeBertForSequenceClassification(like_teacher.config)
    if not isinstance(model, SpikeBertForSequenceClassification):
        model.accepts_loss_kwargs = False  # transformers' own classifiers take num_items_in_batch and do not use it
        if args.has_default_learning_rate:
            args.learning_rate = TrainingArguments.learning_rate
    tokenizer = AutoTokenizer.from_pretrained(source)
    return ResumableTrainer(
        model,
        args,
        compute_metrics=metrics_for(text, data_args.task),
        **tokenized(text.train, text.validation, tokenizer, data_args, args),
    )


def read_labelled(data_args: DataArguments) -> LabelledText:
    if data_args.task is not None:
        text = load_task(data_args.task, data_args.train_file, data_args.validation_file)
    elif data_args.train_file is None or data_args.validation_file is None:
        raise DataError("Pass --validation-file: a model is chosen and measured on text that it was not trained on.")
    else:
        text = load_labelled(
            data_args.train_file,
            data_args.validation_file,
            data_args.text_column,
            data_args.label_column,
            data_args.text_pair_column,
            data_args.regression,
        )
    text.check_apart()
    return text


def tokenized(
    train: Dataset | None,
    validation: Dataset | None,
    tokenizer: Any,
    data_args: DataArguments,
    args: DistillationTrainingArguments,
) -> dict[str, Any]:
    """What every trainer needs of data."""
    if data_args.streaming:
        rows: Any = TextStream(
            str(data_args.train_file),
            tokenizer,
            data_args.max_length,
            data_args.text_column,
            data_args.packing,
            batch_size=args.per_device_train_batch_size * args.world_size,
            buffer_size=data_args.shuffle_buffer_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
    else:
        rows = tokenize(train, tokenizer, data_args.max_length)
    return {
        "train_dataset": rows,
        "eval_dataset": None if validation is None else tokenize(validation, tokenizer, data_args.max_length),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }


def end_process_group() -> None:
    """For the end of `main`: a group that is alive at exit can abort the process.

    Whatever holds a reference to it in C++ (DDP) has to be gone before: freed last, it would wait for the group's
    threads with the GIL, which they need to end.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
