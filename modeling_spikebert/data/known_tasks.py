"""Tasks by name: where they are on the Hub, their columns, labels and metrics.

Read by the command line, too, which does not wait for torch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any


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
