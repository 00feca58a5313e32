"""The options of every command, read in one way. These modules import no torch, so that `--help` answers at once."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from ...console.text import did_you_mean

WIDEST = 110  # columns of a help text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names what each option takes and, where it has one, its default."""

    def __init__(self, prog: str, **_: Any) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, max_help_position=32, width=min(columns, WIDEST) - 2)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if has_none or not action.option_strings or "efault" in text:
            return text
        return f"{text.rstrip('.')} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """N of an integer, X of a number, and else the last word of its name: FILE, DIR, COLUMN."""
        return {int: "N", float: "X"}.get(action.type, action.dest.rpartition("_")[2].upper())  # type: ignore[call-overload]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == "?" and action.const is True else super()._format_args(action, default_metavar)


class OptionParser(argparse.ArgumentParser):
    """Takes `--train-file` and `--train_file`, and answers what it cannot use with one line and exit status 2.

    Args:
        prog: as for `ArgumentParser`.
        takes: what the usage line names: arguments and options that must be there.
        description: first a sentence that says what the command does.
        examples: command lines to paste.
        **kwargs: as for `ArgumentParser`.
    """

    def __init__(
        self, *args: Any, prog: str, takes: str = "", description: str, examples: Sequence[str] = (), **kwargs: Any
    ):
        usage = " ".join([prog, takes, "[OPTIONS]"]).replace("  ", " ")
        kwargs |= {"prog": prog, "usage": usage, "description": description, "formatter_class": HelpFormatter}
        kwargs |= {"allow_abbrev": False}  # a slip is no option
        super().__init__(*args, **kwargs)
        self.examples = examples
        self._positionals.title, self._optionals.title = "arguments", "other options"
        self.add_argument("-v", "--verbose", action="store_true", help="say all that the libraries say, too")

    def add_fields(self, group: Any, cls: Any, *names: str) -> None:
        """Options for fields of a dataclass, with the help of their metadata."""
        known = {field.name: field for field in fields(cls)}
        for name in names:
            field = known[name]
            group.add_argument(f"--{name.replace('_', '-')}", **keywords(field))

    def format_help(self) -> str:
        """What it does, how it is called, its groups of options, examples."""
        formatter = self._get_formatter()
        for paragraph in str(self.description).split("\n\n"):
            formatter.add_text(textwrap.fill(" ".join(paragraph.split()), formatter._width))
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for title, actions in self.groups():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if self.examples:
            title = "examples:" if len(self.examples) > 1 else "example:"
            formatter.add_text("\n".join([title, *(textwrap.indent(example, "  ") for example in self.examples)]))
        return "\n".join(line.rstrip() for line in formatter.format_help().splitlines()) + "\n"

    def groups(self) -> Iterable[tuple[str | None, list[argparse.Action]]]:
        """Titles and options, as the help has them: those of every command last."""
        first, last, *own = self._action_groups
        return [(group.title, group._group_actions) for group in (first, *own, last)]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = list(sys.argv[1:] if args is None else args)
        known = list(self._option_string_actions)
        for option in (argument.partition("=")[0] for argument in given if is_option(argument)):
            if with_dashes(option) not in known:
                self.error(f"unknown option {option}{did_you_mean(with_dashes(option), known) or '; see --help.'}")
        namespace, rest = super().parse_known_args([with_dashes(argument) for argument in given], namespace)
        if rest:
            self.error(f"no option takes {' '.join(rest)!r}; see --help.")
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            hint = did_you_mean(str(value), choices) or f"; there is {', '.join(choices)}."
            raise argparse.ArgumentError(action, f"no choice {str(value)!r}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # without the usage, which may fill a screen


def keywords(field: Any) -> dict[str, Any]:
    """Of `add_argument`, for the field of a dataclass: a str, int or float, perhaps None, or a Literal of strings."""
    kinds = [kind for kind in get_args(field.type) if kind is not type(None)] if get_origin(field.type) else []
    found: dict[str, Any] = {"help": field.metadata["help"]}
    if kinds and isinstance(kinds[0], str):
        found["choices"] = kinds
    else:
        found["type"] = kinds[0] if kinds else field.type
    return found | ({"required": True} if field.default is MISSING else {"default": field.default})


def of_class(cls: Any, options: argparse.Namespace) -> Any:
    """A dataclass with the options of its fields."""
    return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def check_at_least(smallest: int, options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {getattr(options, name)}.")


def check_new_folder(folder: Path, working: Sequence[str] = ()) -> None:
    """For a command that does not write over what is there; `working` are names of a stopped run without results."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Choose another --output-dir.")
    if folder.exists() and any(path.relative_to(folder).as_posix() not in working for path in folder.rglob("*")):
        raise ValueError(f"{folder} is not empty. Choose another --output-dir, or remove it.")


def is_option(argument: str) -> bool:
    return argument.startswith("--") and argument != "--" and " " not in argument


def with_dashes(argument: str) -> str:
    """`--train_file=a_b.csv` as `--train-file=a_b.csv`."""
    if not is_option(argument):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
