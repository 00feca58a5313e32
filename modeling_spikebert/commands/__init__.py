"""The console script `spikebert`, also `python -m modeling_spikebert`."""

import sys
from importlib import import_module

# Name of a command, which is the module beside this one that runs it, and what it does.
COMMANDS = {
    "quickstart": "train a spiking student from a real BERT in two stages, compare and classify",
    "energy": "count operations and energy of a model on given sentences, beside a BERT",
    "augment": "write changed copies of training text, which the teacher labels in stage 2",
    "convert": "make a folder that loads from a state dict of the published code",
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: spikebert COMMAND [OPTIONS]\n\ncommands:")
        for name, summary in COMMANDS.items():
            print(f"  {name:12} {summary}")
        print("\n`spikebert COMMAND --help` lists a command's options.")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"spikebert: no command {name!r}; there is {', '.join(COMMANDS)}.")
    import_module(f".{name}", __name__).main(rest)  # only now: what they import takes seconds
