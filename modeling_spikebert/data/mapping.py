"""`Dataset.map` that Ctrl-C ends."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher


def mapped(dataset: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """`dataset.map(function, **options)`, for which all that the result depends on is hashed here.

    `map` would do that under a bare `except`: a Ctrl-C then is lost, and the command goes on.
    """
    try:
        fingerprint = Hasher.hash((dataset._fingerprint, function, options))
    except Exception:  # a tokenizer that cannot be pickled, say: `map` draws a name for the result
        fingerprint = None
    return dataset.map(function, new_fingerprint=fingerprint, **options)
