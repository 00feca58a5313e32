"""Compares a graph in the NumPy reader with its checkpoint in PyTorch, neuron for neuron, on the sentences of a file.

    python tests/nir_proof.py runs/chip data/sst2/validation.parquet

The same as `examples/simulate_nir.py`, for the reader that shares nothing with others. A sentence takes 0.4 s (3 x 384,
T 1).
"""

import sys
from pathlib import Path

import numpy as np
from nir_reader import NumpyNir
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from modeling_spikebert.data import load_labelled, match_labels, tokenize
from modeling_spikebert.neuromorphic import GRAPH_NAME, input_currents, read_export, run_checkpoint, shape_of


def main(folder: str, file: str) -> None:
    graph, model = read_export(Path(folder) / GRAPH_NAME)
    reader = NumpyNir(Path(folder) / GRAPH_NAME)
    num_tokens, steps = shape_of(graph)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tokenize(match_labels(load_labelled(file, file), model.config.id2label).validation, tokenizer, num_tokens)
    sentences = spikes = differing = right = 0
    for batch in DataLoader(rows, batch_size=16, collate_fn=DataCollatorWithPadding(tokenizer)):
        labels = batch.pop("labels")
        expected = run_checkpoint(model, batch, steps)
        for i, currents in enumerate(input_currents(model, batch, num_tokens).numpy()):
            scores = 0
            for step, values in enumerate(reader.run(currents)):
                for name, trains in expected.items():
                    ours = trains[step, i].numpy()
                    theirs = values[name] != 0
                    spikes += int(ours.sum())
                    differing += int((theirs[:, : ours.shape[1]] != ours).sum()) + int(theirs[:, ours.shape[1] :].sum())
                scores = scores + values["output"][:, currents[-1] == 0].mean(1)
            right += int(np.argmax(scores)) == int(labels[i])
            sentences += 1
        print(f"  {sentences} sentences, {differing} differences", file=sys.stderr, flush=True)
    accuracy = f"{100 * right / sentences:.2f} % right"
    print(f"numpy: {sentences} sentences, T {steps}, {spikes:,} spikes, {differing} differ, {accuracy}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: nir_proof.py FOLDER FILE")
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"nir_proof.py: {error}")
