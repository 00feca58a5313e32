"""Turns a run into a folder to be given away, laid out like a repository on the Hub: int8 files, code, tokenizer, card.

    python examples/release.py --run runs/mixed/student --folder release --teacher runs/gpu/teacher \
        --validation-file data/sst2/validation.parquet --num-time-steps 1 --dataset stanfordnlp/sst2 \
        --license apache-2.0 --notes examples/recipes/sst2/notes.md

The run is one of `spikebert distill` or of `examples/train_on_gpu.py` (there the folder `student`).

What the card says is measured on what lies in the folder, loaded as its users load it. `SHA256SUMS` is for
`sha256sum --check`.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from modeling_spikebert.commands.energy import load
from modeling_spikebert.data import accuracy_metrics, load_labelled, load_unlabelled, tokenize
from modeling_spikebert.energy import compare_energy
from modeling_spikebert.hub import model_card

INT8_FILES = {"quant_method": "spikebert_int8", "dequantize": True}
NUM_ENERGY_SENTENCES = 100


@dataclass
class ReleaseArguments:
    run: str = field(metadata={"help": "Folder of a student, with run.json."})
    folder: str = field(metadata={"help": "New folder."})
    teacher: str = field(metadata={"help": "The teacher, to compare energies."})
    validation_file: str = field(metadata={"help": "Text to measure on; with the column `label` for a classifier."})
    labels: list[str] | None = field(default=None, metadata={"help": "Names of the classes instead of numbers."})
    num_time_steps: int | None = field(
        default=None, metadata={"help": "That the model has when it is loaded, if it was trained for several."}
    )
    base_model: str | None = field(default=None, metadata={"help": "Hub id of what the teacher was made from."})
    dataset: str | None = field(default=None, metadata={"help": "Hub id of the data set, for the card."})
    examples: list[str] = field(default_factory=list, metadata={"help": "Sentences to try, for the card."})
    language: str = field(default="en", metadata={"help": "For the card."})
    license: str | None = field(default=None, metadata={"help": "For the card, such as apache-2.0."})
    notes: str | None = field(default=None, metadata={"help": "Markdown file that ends the card."})
    max_length: int = field(default=64, metadata={"help": "Longest sentence, in tokens."})
    max_shard_size: str = field(default="15MB", metadata={"help": "Largest file of weights."})


def main() -> None:
    (args,) = HfArgumentParser(ReleaseArguments).parse_args_into_dataclasses()
    run, folder = Path(args.run), Path(args.folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Remove it, or name another folder.")
    # All that can fail is read before anything is written.
    teacher = load(args.teacher)
    overrides = label_maps(args.labels)
    if args.num_time_steps is not None:
        overrides["num_time_steps"] = args.num_time_steps
    student = load(args.run, quantization_config=INT8_FILES, **overrides)
    if hasattr(student, "classifier"):
        text = load_labelled(args.validation_file, args.validation_file).validation
    else:
        text = load_unlabelled(args.validation_file)
    notes = "" if args.notes is None else Path(args.notes).read_text(encoding="utf-8")
    recorded = json.loads((run / "run.json").read_text())

    student.save_pretrained(folder, max_shard_size=args.max_shard_size)
    AutoTokenizer.from_pretrained(run).save_pretrained(folder)
    shutil.copy(run / "run.json", folder)
    card = make_card(args, folder, teacher, text, recorded)
    card.text = f"{card.text.rstrip()}\n\n{notes}"
    card.save(folder / "README.md")
    print(card.text.split("## Use")[1].split("## Training")[0])
    files = sorted(folder.iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def label_maps(names: list[str] | None) -> dict[str, Any]:
    """What gives the classes of a checkpoint other names."""
    if names is None:
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def make_card(
    args: ReleaseArguments, folder: Path, teacher: PreTrainedModel, text: Dataset, recorded: dict[str, Any]
) -> ModelCard:
    model, tokenizer = load(str(folder)), AutoTokenizer.from_pretrained(folder)
    rows = tokenize(text, tokenizer, args.max_length)
    collate = DataCollatorWithPadding(tokenizer)
    metrics = {}
    if hasattr(model, "classifier"):
        options = TrainingArguments(
            str(folder), per_device_eval_batch_size=32, dataloader_pin_memory=False, report_to="none"
        )
        trainer = Trainer(model, options, data_collator=collate, compute_metrics=accuracy_metrics)
        measured = trainer.evaluate(rows)
        metrics = {name: measured[f"eval_{name}"] for name in ("accuracy", "f1")}
    sample = rows.shuffle(seed=0).select(range(min(NUM_ENERGY_SENTENCES, len(rows))))
    energy = compare_energy(model, teacher, list(DataLoader(sample, batch_size=8, collate_fn=collate)))
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    return model_card(
        model,
        folder.resolve().name,
        language=args.language,
        license=args.license,
        base_model=args.base_model,
        dataset=args.dataset,
        dataset_name=None if args.dataset else Path(args.validation_file).name,
        num_sentences=len(rows),
        metrics=metrics,
        examples=args.examples,
        energy=energy.to_markdown(Path(args.validation_file).name),
        training={"command": f"`{recorded['command']}`", "seed": recorded["seed"], "versions": versions},
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"release.py: {error}")
