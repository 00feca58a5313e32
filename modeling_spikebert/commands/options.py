"""The options of every command and script, read in one way."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .exits import did_you_mean


class OptionParser(argparse.ArgumentParser):
    """Takes `--train-file` and `--train_file`, and answers what it cannot use with one line and exit status 2."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        known = list(self._option_string_actions)
        for option in (argument.partition("=")[0] for argument in given if is_option(argument)):
            if not any(name.startswith(with_dashes(option)) for name in known):  # the beginning of a name will do
                self.error(f"unknown option {option}{did_you_mean(with_dashes(option), known) or '; see --help.'}")
        namespace, rest = super().parse_known_args([with_dashes(argument) for argument in given], namespace)
        if rest:
            self.error(f"no option takes {' '.join(rest)!r}; see --help.")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # without the usage, which may fill a screen


class DataclassParser(OptionParser, HfArgumentParser):
    """The same for the fields of dataclasses; help and errors spell options with dashes alone."""

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*dict.fromkeys(map(with_dashes, names)), **kwargs)


def check_at_least(smallest: int, options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(options, name)}.")


def check_new_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another --output-dir, or remove it.")


def is_option(argument: str) -> bool:
    return argument.startswith("--") and argument != "--" and " " not in argument


def with_dashes(argument: str) -> str:
    """`--train_file=a_b.csv` as `--train-file=a_b.csv`."""
    if not is_option(argument):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
