"""The console script `spikebert`, also `python -m modeling_spikebert`."""

import sys
from collections.abc import Callable
from importlib import import_module


def _quickstart(arguments: list[str]) -> None:
    import_module(".quickstart", __name__).main(arguments)


def _energy(arguments: list[str]) -> None:
    import_module(".energy", __name__).main(arguments)


def _convert(arguments: list[str]) -> None:
    import_module(".convert", __name__).main(arguments)


def _augment(arguments: list[str]) -> None:
    import_module(".augment", __name__).main(arguments)


# Name of a command, what it does, and the function that runs it with the remaining arguments.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "quickstart": ("train a spiking student from a real BERT in two stages, compare and classify", _quickstart),
    "energy": ("count operations and energy of a model on given sentences, beside a BERT", _energy),
    "augment": ("write changed copies of training text, which the teacher labels in stage 2", _augment),
    "convert": ("make a folder that loads from a state dict of the published code", _convert),
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: spikebert COMMAND [OPTIONS]\n\ncommands:")
        for name, (summary, _) in COMMANDS.items():
            print(f"  {name:12} {summary}")
        print("\n`spikebert COMMAND --help` lists a command's options.")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"spikebert: no command {name!r}; there is {', '.join(COMMANDS)}.")
    COMMANDS[name][1](rest)
