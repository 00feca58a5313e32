"""Turns a run into a folder to be given away, laid out like a repository on the Hub: int8 files, code, tokenizer, card.

    python examples/release.py --run runs/sst2/best --folder release --teacher runs/sst2/teacher \
        --validation_file data/sst2/validation.parquet --labels negative positive --dataset stanfordnlp/sst2

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

from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
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
    run: str = field(metadata={"help": "Folder that run_distillation.py wrote."})
    folder: str = field(metadata={"help": "New folder."})
    teacher: str = field(metadata={"help": "The teacher, to compare energies."})
    validation_file: str = field(metadata={"help": "Text to measure on; with the column `label` for a classifier."})
    labels: list[str] | None = field(default=None, metadata={"help": "Names of the classes in place of numbers."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of what the teacher was made from."})
    dataset: str | None = field(default=None, metadata={"help": "Hub id of the data set, for the card."})
    language: str = field(default="en", metadata={"help": "For the card."})
    notes: str | None = field(default=None, metadata={"help": "Markdown file that ends the card."})
    max_length: int = field(default=64, metadata={"help": "Longest sentence, in tokens."})
    max_shard_size: str = field(default="15MB", metadata={"help": "Largest file of weights."})


def main() -> None:
    (args,) = HfArgumentParser(ReleaseArguments).parse_args_into_dataclasses()
    run, folder = Path(args.run), Path(args.folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already. Remove it, or name another folder.")
    write_model(args, run, folder)
    card = write_card(args, run, folder)
    print(card.split("## Use")[1].split("## Training")[0])
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def write_model(args: ReleaseArguments, run: Path, folder: Path) -> None:
    classifies = "ForSequenceClassification" in json.loads((run / "config.json").read_text())["architectures"][0]
    names: dict[str, Any] = {}
    if args.labels is not None:
        names = {
            "id2label": dict(enumerate(args.labels)),
            "label2id": {name: i for i, name in enumerate(args.labels)},
        }
    auto = AutoModelForSequenceClassification if classifies else AutoModel
    model = auto.from_pretrained(run, quantization_config=INT8_FILES, **names)
    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    AutoTokenizer.from_pretrained(run).save_pretrained(folder)
    shutil.copy(run / "run.json", folder)


def write_card(args: ReleaseArguments, run: Path, folder: Path) -> str:
    model, tokenizer, teacher = load(str(folder)), AutoTokenizer.from_pretrained(folder), load(args.teacher)
    classifies = hasattr(model, "classifier")
    if classifies:
        text = load_labelled(args.validation_file, args.validation_file).validation
    else:
        text = load_unlabelled(args.validation_file)
    rows = tokenize(text, tokenizer, args.max_length)
    collate = DataCollatorWithPadding(tokenizer)
    metrics = {}
    if classifies:
        options = TrainingArguments(
            str(folder), per_device_eval_batch_size=32, dataloader_pin_memory=False, report_to="none"
        )
        trainer = Trainer(model, options, data_collator=collate, compute_metrics=accuracy_metrics)
        measured = trainer.evaluate(rows)
        metrics = {name: measured[f"eval_{name}"] for name in ("accuracy", "f1")}
    sample = rows.shuffle(seed=0).select(range(min(NUM_ENERGY_SENTENCES, len(rows))))
    energy = compare_energy(model, teacher, list(DataLoader(sample, batch_size=8, collate_fn=collate)))
    recorded = json.loads((run / "run.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    card = model_card(
        model,
        folder.resolve().name,
        language=args.language,
        base_model=args.base_model,
        dataset=args.dataset,
        dataset_name=None if args.dataset else Path(args.validation_file).name,
        metrics=metrics,
        energy=energy.to_markdown(Path(args.validation_file).name),
        training={"command": f"`{recorded['command']}`", "seed": recorded["seed"], "versions": versions},
    )
    if args.notes is not None:
        card.text += "\n" + Path(args.notes).read_text(encoding="utf-8")
    card.save(folder / "README.md")
    return str(card.text)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"release.py: {error}")
