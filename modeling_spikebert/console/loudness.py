"""How much is said: what one must know by default, and with `--verbose` also all that is normal."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging


def set_loudness(verbose: bool) -> None:
    """For a command: bars, and the notes of transformers and datasets, only if they are wanted."""
    if verbose:
        transformers_logging.set_verbosity_info()
        transformers_logging.enable_progress_bar()
        datasets.logging.set_verbosity_info()
        datasets.enable_progress_bars()
    else:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def is_verbose() -> bool:
    return transformers_logging.get_verbosity() <= logging.INFO


def say(line: str = "") -> None:
    """Prints a line, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


class Held(logging.Filter):
    """Keeps the records of a logger back."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.records.append(record)
        return False


@contextmanager
def unsaid(name: str) -> Iterator[None]:
    """What a logger says is lost."""
    logger, held = logging.getLogger(name), Held()
    logger.addFilter(held)
    try:
        yield
    finally:
        logger.removeFilter(held)


@contextmanager
def said_on_failure(name: str) -> Iterator[None]:
    """What a logger says is said only if the block fails, or everything is said."""
    logger, held = logging.getLogger(name), Held()
    if is_verbose():
        yield
        return
    logger.addFilter(held)
    try:
        yield
    except BaseException:
        logger.removeFilter(held)
        for record in held.records:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(held)
