"""`spikebert distill`: one stage of the distillation of a student from a BERT-like teacher.

Without a teacher it fine-tunes a model. Options may stand in a json or yaml file, and those behind it go before it:
`spikebert distill recipe.yaml --seed 1`. Data are csv, json lines or parquet files, splits on the Hub (name:split), or
a task by its name (--task sst2). After an interruption the same command goes on with --resume-from-checkpoint last. On
several GPUs: `accelerate launch -m modeling_spikebert distill` with the same options.
"""

import gc
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import yaml
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
from ..hub.fetching import reach_hub
from ..modeling_spikebert import SpikeBertForSequenceClassification, SpikeBertModel
from .exits import did_you_mean
from .options import DataclassParser

NUM_ENERGY_SENTENCES = 100
RECORDED_PACKAGES = ("modeling_spikebert", "torch", "transformers", "datasets", "accelerate", "tokenizers")


@dataclass
class ModelArguments:
    teacher: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the teacher. Without it, the model is fine-tuned plainly."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the student to go on with. By default a new one, from the teacher."},
    )
    student_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the new student's config that differ from the teacher's, as json."}
    )
    from_scratch: bool = field(
        default=False,
        metadata={
            "help": "For comparison: a new student with the vocabulary and sizes of --teacher but none of its weights, "
            "which learns from the labels alone."
        },
    )

    def __post_init__(self) -> None:
        if self.from_scratch and (self.teacher is None or self.model_name_or_path is not None):
            raise ValueError("--from-scratch takes --teacher, for vocabulary and sizes, and no --model-name-or-path.")
        if self.teacher is None and self.model_name_or_path is None:
            raise ValueError("Pass --teacher (distillation), --model-name-or-path (plain fine-tuning), or both.")
        if isinstance(self.student_config, str):
            try:
                self.student_config = json.loads(self.student_config)
            except json.JSONDecodeError as error:
                raise ValueError(
                    "--student-config must be json such as "
                    f"""'{{"num_hidden_layers": 6}}', got {self.student_config!r}."""
                ) from error
        if self.student_config and self.model_name_or_path is not None:
            raise ValueError("--student-config is for a new student; --model-name-or-path brings its own config.")

    @property
    def new_config(self) -> dict[str, Any]:
        """`student_config` as keyword arguments."""
        return cast(dict[str, Any], self.student_config or {})


@dataclass
class DataArguments:
    task: str | None = field(
        default=None,
        metadata={
            "help": f"Task with data on the Hub, columns and metrics of its own, one of {', '.join(TASKS)}. Files that "
            "are named here take the place of its own."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "csv, json lines or parquet file, or name:split on the Hub. With --streaming also a folder, a "
            "pattern, or plain text."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second sentence of pairs."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    regression: bool = field(default=False, metadata={"help": "Labels are numbers to be predicted, not classes."})
    max_length: int = field(default=128, metadata={"help": "Longest sentence, in tokens."})
    streaming: bool = field(
        default=False, metadata={"help": "Stage 1: read --train-file while training, without end; needs --max-steps."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows of a stream from which the next one is drawn."}
    )
    packing: str = field(
        default="none",
        metadata={
            "help": "Rows of a stream: 'none' (a text each), 'length' (batches of similar length), 'packed' (texts one "
            "behind the other, all rows full)."
        },
    )

    def __post_init__(self) -> None:
        if self.task is None and self.train_file is None:
            raise ValueError("Pass --train-file, or --task.")
        if self.packing != "none" and not self.streaming:
            raise ValueError("--packing is for streams; without one, --train-sampling-strategy group_by_length.")


def main(arguments: list[str]) -> None:
    model_args, data_args, args = read_arguments(arguments)
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
            run(arguments, model_args, data_args, args)
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


def run(
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
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if isinstance(trainer, DistillationTrainer):  # it writes the card in save_model
        compare_energies(trainer)
    else:
        trainer.create_model_card()
    trainer.save_model()  # with --push-to-hub it pushes, too


def read_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, DistillationTrainingArguments]:
    """The arguments of a command line that may begin with a recipe: a json or yaml file with options."""
    parser = DataclassParser(
        cast(Any, (ModelArguments, DataArguments, DistillationTrainingArguments)),
        prog="spikebert distill",
        usage="spikebert distill [RECIPE.yaml] [OPTIONS]",
        description=__doc__,
    )
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        file, *arguments = arguments
        recipe = read_recipe(Path(file))
        known = [action.dest for action in parser._actions]
        unknown = [str(key) for key in recipe if key not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known) or "; see --help."
            raise ValueError(f"{file} has keys that are no options of spikebert distill: {', '.join(unknown)}{hint}")
        parser.set_defaults(**recipe)
    return cast(Any, parser.parse_args_into_dataclasses(arguments))


def read_recipe(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The options of a recipe and, where it has none, of the recipe next to it that it names as `base`.

    `above` are the recipes that build on this one.
    """
    above = (*above, file.resolve())
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))  # json is yaml, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no yaml or json: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} must have one option a line, such as `stage: task`.")
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise ValueError(f"{file}: base must name a recipe, such as student.yaml, got {base!r}.")
    if (file.parent / base).resolve() in above:
        raise ValueError(f"{file}: its base {base} builds on {file.name} in turn. Name another base.")
    return read_recipe(file.parent / base, above) | recipe


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
        print("The weights are sharded over processes; `spikebert energy` counts the student that is saved.")
        return
    dataset: Any = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    if isinstance(dataset, TextStream):
        dataset.load_state_dict(None, 0)  # from its beginning
        sample: Any = list(islice(dataset, NUM_ENERGY_SENTENCES))
    else:
        sample = dataset.shuffle(seed=0).select(range(min(NUM_ENERGY_SENTENCES, len(dataset))))
    batches = list(DataLoader(sample, batch_size=8, collate_fn=trainer.data_collator))
    energy = compare_energy(trainer.student, trainer.teacher, batches)
    print(f"Theoretical energy on {len(sample)} sentences:\n{energy}")
    (Path(str(trainer.args.output_dir)) / "energy.json").write_text(json.dumps(energy.to_dict(), indent=2))
    measured = trainer.card_options.get("dataset", trainer.card_options.get("dataset_tags"))
    trainer.card_options["energy"] = energy.to_markdown(measured)


def distillation(
    model_args: ModelArguments, data_args: DataArguments, args: DistillationTrainingArguments
) -> DistillationTrainer:
    general = args.stage == "general"
    name = str(model_args.teacher)
    teacher = (AutoModel if general else AutoModelForSequenceClassification).from_pretrained(name)
    teacher_tokenizer = tokenizer = AutoTokenizer.from_pretrained(name)
    student_class: Any = SpikeBertModel if general else SpikeBertForSequenceClassification
    labels = {} if general else {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
    if model_args.model_name_or_path is None:
        student = student_class.from_teacher(teacher, **model_args.new_config)
    else:
        student = student_class.from_pretrained(model_args.model_name_or_path, **labels)
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
    print(f"Projections: {f'those of {name}' if folder else f'new ones; {name} has no {PROJECTIONS_NAME}'}.")
    return folder


def fine_tuning(
    model_args: ModelArguments, data_args: DataArguments, args: DistillationTrainingArguments
) -> ResumableTrainer:
    text = read_labelled(data_args)
    text.check_all_labelled()
    source = str(model_args.teacher if model_args.from_scratch else model_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(source, ignore_mismatched_sizes=True, **text.label_maps)
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
