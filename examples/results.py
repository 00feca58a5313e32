"""Prints the tables of docs/notebook.md from the folders that the recipes of `examples/recipes` wrote.

    python examples/results.py runs data

`runs` has a folder for each set and row, such as `runs/mr/student`; other seeds stand beside it, `runs/mr/student-1`.
`data` has `train.parquet` and `validation.parquet` of each set. Latencies that the runs measured are left out: other
runs were beside them. `spikebert energy` measures them on a quiet machine.
"""

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

SETS = {
    "mr": "MR",
    "sst2": "SST-2",
    "sst5": "SST-5",
    "subj": "Subj",
    "chnsenti": "ChnSenti",
    "waimai": "Waimai",
}
ROWS = {
    "teacher": "teacher",
    "direct": "student, labels alone from random weights",
    "without_stage1": "student, without stage 1",
    "without_logits": "student, without logits",
    "without_augmentation": "student, without augmentation",
    "student": "student, in full",
}
COLUMNS = (
    "seeds",
    "accuracy, %",
    "kept, %",
    "firing rate",
    "published, %",
    "strict, %",
    "recipe",
)


def main(runs: Path, data: Path) -> None:
    for name, title in SETS.items():
        teachers = seeds_of(runs / name, "teacher")
        if not teachers:
            continue
        majority, num_sentences = majority_accuracy(data / name)
        accuracy = statistics.mean(100 * seed["eval_accuracy"] for seed in teachers)
        error = math.sqrt(accuracy * (100 - accuracy) / num_sentences)
        print(
            f"### {title}\n\n{num_sentences} validation sentences, standard error of the teacher {error:.1f} points.\n"
        )
        print(f"| | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
        print(f"| majority | | {majority:.1f} {'| ' * (len(COLUMNS) - 2)}|")
        for row, description in ROWS.items():
            seeds = seeds_of(runs / name, row)
            if seeds:
                print(f"| {description} | " + " | ".join(cells(seeds, accuracy)) + f" | `{name}/{row}.yaml` |")
        print()


def majority_accuracy(folder: Path) -> tuple[float, int]:
    """Accuracy in percent of always saying the most frequent class of the training set, and of how many sentences."""
    train, validation = (
        Dataset.from_parquet(str(folder / f"{split}.parquet"))["label"][:] for split in ("train", "validation")
    )
    most_frequent = Counter(train).most_common(1)[0][0]
    return 100 * validation.count(most_frequent) / len(validation), len(validation)


def seeds_of(folder: Path, row: str) -> list[dict[str, Any]]:
    """What the finished runs of a row measured."""
    finished = []
    for path in sorted([folder / row, *folder.glob(f"{row}-[0-9]*")]):
        if (path / "eval_results.json").is_file():
            results = json.loads((path / "eval_results.json").read_text())
            energy = path / "energy.json"
            finished.append(results | {"energy": json.loads(energy.read_text()) if energy.is_file() else None})
    return finished


def cells(seeds: list[dict[str, Any]], teacher_accuracy: float) -> list[str]:
    accuracies = [100 * seed["eval_accuracy"] for seed in seeds]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(seeds) > 1 else ""
    mean = statistics.mean(accuracies)
    energies = [seed["energy"] for seed in seeds if seed["energy"] is not None]
    figures = [
        f"{value:.3g}" if value is not None else ""
        for value in (
            mean_of(seed.get("eval_firing_rate") for seed in seeds),
            mean_of(100 * energy["ratio"]["published"] for energy in energies),
            mean_of(100 * energy["ratio"]["strict"] for energy in energies),
        )
    ]
    return [str(len(seeds)), f"{mean:.1f}{spread}", f"{100 * mean / teacher_accuracy:.1f}", *figures]


def mean_of(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


if __name__ == "__main__":
    if len(sys.argv) != 3 or not all(Path(folder).is_dir() for folder in sys.argv[1:]):
        sys.exit("usage: results.py RUNS_FOLDER DATA_FOLDER")
    main(*map(Path, sys.argv[1:]))
