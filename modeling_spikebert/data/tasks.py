"""Reads tasks by name."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset
from transformers import EvalPrediction
from transformers.utils import logging

from .known_tasks import TASKS, Task
from .texts import DataError, LabelledText, has_text, labelled_text, read_table, select_columns

logger = logging.get_logger(__name__)

HELD_OUT, HELD_OUT_SEED = 0.1, 0


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
    from .metrics import accuracy_metrics, compute_metrics  # `evaluate` imports seconds of transformers

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
