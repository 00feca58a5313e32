"""The console script `spikebert`, also `python -m modeling_spikebert`."""

import sys
from importlib import import_module
from importlib.metadata import version

from ..console.text import did_you_mean
from .exits import exits

# Name of a command, and what it does. Its options are in `options`, and a module next to this one runs it.
COMMANDS = {
    "quickstart": "train a spiking student from a real BERT in two stages, compare and classify",
    "distill": "train one stage with all options, or fine-tune a model without a teacher",
    "energy": "count operations and energy of a model on given sentences, compared with a BERT",
    "show": "draw a model's spikes, firing rates and energy for a sentence",
    "augment": "write changed copies of training text, which the teacher labels in stage 2",
    "export": "write a classifier for ONNX Runtime, servers and browsers, or for neuromorphic hardware",
    "convert": "make a folder that loads from a state dict of the published code",
    "serve": "answer HTTP requests with an exported model, on ONNX Runtime",
}
# What Ctrl-C leaves, where that is a question.
INTERRUPTED = {
    "quickstart": "interrupted; finished stages stay in the output folder, but a new run starts from the beginning. "
    "If there are any, remove the folder or choose another --output-dir; if not, type the same command again.",
    "distill": "interrupted; --resume-from-checkpoint last goes on from a checkpoint.",
    "augment": "interrupted; nothing was written.",
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: spikebert COMMAND [OPTIONS]\n\ncommands:")
        for name, summary in COMMANDS.items():
            print(f"  {name:12} {summary}")
        print("\n`spikebert COMMAND --help` lists a command's options, `spikebert --version` says the version.")
        return
    name, *rest = arguments
    if name == "--version":
        print(f"spikebert {version('modeling_spikebert')}")
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, [*COMMANDS, "--version", "--help"]) or f"; there is {', '.join(COMMANDS)}."
        print(f"spikebert: no command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    with exits(f"spikebert {name}", INTERRUPTED.get(name, "interrupted.")):
        options = import_module(f".options.{name}", __name__).parse(rest)  # before what the command imports: seconds
        import_module(f".{name}", __name__).run(options)
