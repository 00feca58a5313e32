"""Tasks by name: where they are on the Hub, their columns, labels and metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import EvalPrediction
from transformers.utils import logging

from .metrics import accuracy_metrics, compute_metrics
from .texts import DataError, LabelledText, has_text, labelled_text, read_table, select_columns

logger = logging.get_logger(__name__)

HELD_OUT, HELD_OUT_SEED = 0.1, 0


@dataclass(frozen=True)
class Task:
    """A task for text classification or regression.

    Args:
        path: name of the data set on the Hub.
        label_names: name of each class id, as the data set has them; none means regression.
        metrics: keys of `METRICS`. "f1" is that of the class with id 1, which is GLUE's definition.
        config: part of the data set, if it has parts.
        text_column: column of the (first) sentence.
        text_pair_column: column of the second sentence, if there is one.
        label_column: column of the label.
        train_split: split for training.
        validation_split: split for validation. None if the data set has none: then it is a tenth of the rows of
            `train_split`, drawn with a fixed seed. Test splits are never used.
    """

    path: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    config: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    train_split: str = "train"
    validation_split: str | None = "validation"

    @property
    def regression(self) -> bool:
        return not self.label_names

    @property
    def columns(self) -> dict[str, str]:
        pair = {} if self.text_pair_column is None else {"text_pair": self.text_pair_column}
        return {"text": self.text_column, "label": self.label_column} | pair

    def source(self, split: str) -> str:
        """The split as `load_labelled` takes it."""
        return ":".join(part for part in (self.path, self.config, split) if part is not None)


_NEGATIVE_POSITIVE = ("negative", "positive")
_GLUE = partial(Task, "nyu-mll/glue")
_ENTAILMENT = ("entailment", "neutral", "contradiction")
_MNLI = partial(_GLUE, _ENTAILMENT, config="mnli", text_column="premise", text_pair_column="hypothesis")
_SENTENCES: dict[str, Any] = {"text_column": "sentence1", "text_pair_column": "sentence2"}

# Most paths, splits, columns and label names were read in the data sets' cards and file lists on the Hub, not loaded
# from there; all are plain parquet or json files (`datasets` runs no scripts).
TASKS = {
    # GLUE (Wang et al., ICLR 2019, table 1). Its test splits have no labels (-1).
    "cola": _GLUE(("unacceptable", "acceptable"), ("matthews_correlation",), "cola", "sentence"),
    "sst2": _GLUE(_NEGATIVE_POSITIVE, config="sst2", text_column="sentence"),
    "mrpc": _GLUE(("not_equivalent", "equivalent"), ("accuracy", "f1"), "mrpc", **_SENTENCES),
    "qqp": _GLUE(("not_duplicate", "duplicate"), ("accuracy", "f1"), "qqp", "question1", "question2"),
    "stsb": _GLUE((), ("pearson", "spearmanr"), "stsb", **_SENTENCES),
    "mnli": _MNLI(validation_split="validation_matched"),
    "mnli-mm": _MNLI(validation_split="validation_mismatched"),
    "qnli": _GLUE(("entailment", "not_entailment"), config="qnli", text_column="question", text_pair_column="sentence"),
    "rte": _GLUE(("entailment", "not_entailment"), config="rte", **_SENTENCES),
    "wnli": _GLUE(("not_entailment", "entailment"), config="wnli", **_SENTENCES),
    # The six of SpikeBERT (table 1), with SST-2 above.
    "mr": Task("cornell-movie-review-data/rotten_tomatoes", ("neg", "pos")),
    "subj": Task("SetFit/subj", ("objective", "subjective"), validation_split=None),
    "sst5": Task("SetFit/sst5", ("very negative", "negative", "neutral", "positive", "very positive")),
    "chnsenti": Task("lansinuote/ChnSentiCorp", _NEGATIVE_POSITIVE),
    "waimai": Task("XiangPan/waimai_10k", _NEGATIVE_POSITIVE, validation_split=None),
}


def load_task(name: str, train: str | None = None, validation: str | None = None) -> LabelledText:
    """Reads a task from the Hub, or from files of one's own, with the labels of the task in either case.

    Args:
        name: a key of `TASKS`.
        train: a file (or Hub split) in place of the task's own. Columns are those of the task, or `text`, `text_pair`
            and `label`; labels are the task's names or their numbers.
        validation: the same.

    Raises:
        DataError: there is no such task, or as for `load_labelled`.
    """
    task = _task(name)
    if train is not None and validation is None and task.validation_split is None:
        raise DataError(
            f"{task.path} has no validation split, and rows of {train} may be in one drawn from it. Pass validation."
        )
    sources = [train or task.source(task.train_split), validation or task.source(task.validation_split or "train")]
    if train is None and validation is None and task.validation_split is None:
        parts = _read(task, sources[0]).train_test_split(HELD_OUT, seed=HELD_OUT_SEED)
        tables = [parts["train"], parts["test"]]
    else:
        tables = [_read(task, source) for source in sources]
    return labelled_text(tables, sources, regression=task.regression, label_names=task.label_names)


def metrics_for(text: LabelledText, task: str | None = None) -> Callable[[EvalPrediction], dict[str, float]]:
    """For `Trainer(compute_metrics=...)`: the metrics of a task, or without one those of the problem type.

    Accuracy and macro F1 for classes, Pearson's and Spearman's correlation for regression.

    Args:
        text: what is trained on, with the labels as the model numbers them (after `match_labels`).
        task: a key of `TASKS`.
    """
    if task is None:
        regression = text.problem_type == "regression"
        return partial(compute_metrics, names=("pearson", "spearmanr")) if regression else accuracy_metrics
    names = _task(task).label_names
    # A teacher may number the labels otherwise than the data set.
    positive = text.label_names.index(names[1]) if names and names[1] in text.label_names else 1
    return partial(compute_metrics, names=_task(task).metrics, positive_label=positive)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise DataError(f"There is no task {name!r}. There are {', '.join(TASKS)}.")
    return TASKS[name]


def _read(task: Task, source: str) -> Dataset:
    ours = {name: name for name in task.columns}
    table = read_table(source, {*task.columns.values(), *ours})
    columns = task.columns if task.text_column in table.column_names else ours
    if source.startswith(f"{task.path}:"):  # nobody can remove rows there
        texts = [column for name, column in columns.items() if name != "label"]
        whole = table.filter(lambda *values: all(map(has_text, values)), input_columns=texts)
        if len(whole) < len(table):
            logger.warning(f"{source}: {len(table) - len(whole)} rows without text are left out.")
        table = whole
    return select_columns(table, source, columns)
