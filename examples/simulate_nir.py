"""Runs an exported graph in snnTorch and SpikingJelly and compares every spike with those of its checkpoint.

    pip install -c constraints.txt ".[simulators]" && pip install -c constraints.txt --no-deps spikingjelly
    spikebert export runs/own/student --format nir --output-dir runs/chip
    python examples/simulate_nir.py runs/chip --file data/sst2/validation.parquet

Prints a line for each simulator: sentences, spikes, spikes that differ, accuracy. Sentences longer than the graph are
cut.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nir
import torch
from snntorch.import_nir import import_from_nir as read_by_snntorch
from spikingjelly.activation_based.nir_exchange import import_from_nir as read_by_spikingjelly
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from modeling_spikebert.data import load_labelled, match_labels, tokenize
from modeling_spikebert.neuromorphic import GRAPH_NAME, Trace, input_currents, read_export, run_checkpoint, shape_of

SIMULATORS: dict[str, Callable[[nir.NIRGraph], Any]] = {
    "snntorch": read_by_snntorch,
    "spikingjelly": read_by_spikingjelly,
}
MINUTE = 60  # between two lines of progress


def main(args: argparse.Namespace) -> None:
    file = Path(args.folder) / GRAPH_NAME
    graph, model = read_export(file)
    num_tokens, steps = shape_of(graph)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = match_labels(load_labelled(args.file, args.file), model.config.id2label)
    rows = tokenize(text.validation.select(range(min(args.num_sentences, len(text.validation)))), tokenizer, num_tokens)
    print(f"{file}: {num_tokens} tokens, T {steps}, {len(rows)} sentences", flush=True)
    for name in args.simulator:
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it scales thresholds
            network = SIMULATORS[name](nir.read(file))
        batches = DataLoader(rows, batch_size=args.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
        compare(name, Simulation(network, graph), model, batches, num_tokens, steps)


@torch.no_grad()
def compare(name: str, simulation: "Simulation", model: Any, batches: DataLoader, num_tokens: int, steps: int) -> None:
    sentences = right = spikes = differing = 0
    start = said = time.perf_counter()
    for batch in batches:
        labels = batch.pop("labels")
        currents = input_currents(model, batch, num_tokens)
        real = currents[:, -1:] == 0  # [B, 1, L]
        expected = run_checkpoint(model, batch, steps)  # in PyTorch, as long as the longest sentence
        total: Any = 0
        for step, trace in enumerate(simulation.run(currents, steps)):
            assert trace.spikes.keys() == expected.keys()
            for layer, fired in trace.spikes.items():
                ours = expected[layer][step]
                spikes += int(ours.sum())
                differing += int((fired[..., : ours.shape[-1]] != ours).sum()) + int(fired[..., ours.shape[-1] :].sum())
            total = total + (trace.output * real).sum(-1)
        scores = total / (steps * real.sum(-1))
        right += int((scores.argmax(-1) == labels).sum())
        sentences += len(labels)
        if time.perf_counter() - said > MINUTE:
            said = time.perf_counter()
            print(f"  {name}: {sentences} sentences, {differing} differences, {said - start:.0f} s", flush=True)
    accuracy = f"{100 * right / sentences:.2f} % right"
    seconds = time.perf_counter() - start
    print(
        f"{name}: {sentences} sentences, {spikes:,} spikes, {differing} differ, {accuracy}, {seconds:.0f} s", flush=True
    )


class Simulation:
    """A graph in a simulator that NIRTorch runs, with every spike at hand.

    Args:
        network: as a simulator's reader returns it.
        graph: of which it was made.
    """

    def __init__(self, network: Any, graph: nir.NIRGraph):
        self.network = network
        self.found: dict[str, Tensor] = {}
        layers = {name.replace(".", "_"): name for name, node in graph.nodes.items() if isinstance(node, nir.LIF)}
        for child, module in network.named_children():
            if child in layers:
                module.register_forward_hook(self.keep(layers[child]))

    def keep(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.found[name] = (output[0] if isinstance(output, tuple) else output) != 0

        return hook

    def run(self, currents: Tensor, steps: int) -> Iterator[Trace]:
        """The same input in each step, from the resting potential on."""
        for module in self.network.modules():
            if hasattr(module, "init_hidden"):  # snnTorch keeps membranes in its modules, SpikingJelly in the state
                module.reset_mem()
        state = None
        for _ in range(steps):
            output, state = self.network(currents, state)
            yield Trace(dict(self.found), output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="of an export: spikebert export FOLDER --format nir --output-dir ...")
    parser.add_argument("--file", required=True, help="csv, json lines or parquet file with the columns text and label")
    parser.add_argument(
        "--simulator", nargs="+", choices=list(SIMULATORS), default=list(SIMULATORS), help="default: both"
    )
    parser.add_argument("--num-sentences", type=int, default=sys.maxsize, help="default: all")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse())
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"simulate_nir.py: {error}")
