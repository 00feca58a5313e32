"""`save_events`: every spike of given sentences as a file of arrays, to be replayed elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def save_events(file: str | Path, texts: Sequence[str], spikes: Sequence[Mapping[str, Tensor]], **arrays: Any) -> int:
    """Writes an `.npz` without pickles, one entry for each spike, in the order of sentences and time.

    Its arrays: `sentence`, `time`, `layer` and `neuron` of each spike, int32, all from 0. Neuron `i` of a layer stands
    for channel `i // L` at token `i % L`. `layers` has the names of the layers, `texts` the sentences,
    `shapes` channels and `L` of each sentence and layer, and `num_time_steps` is a number.

    Args:
        file: to write.
        texts: the sentences.
        spikes: of each sentence, by layer, bool `[T, channels, L]`; all sentences have the same layers.
        **arrays: others for the same file.

    Returns:
        the number of spikes.
    """
    layers = list(spikes[0])
    columns = []
    for sentence, trains in enumerate(spikes):
        found = []
        for layer, name in enumerate(layers):
            fired = trains[name].flatten(1).nonzero().numpy()  # time and neuron, [S, 2]
            found.append(np.insert(fired, 1, layer, axis=1))
        rows = np.concatenate(found)
        columns.append(np.insert(rows[np.argsort(rows[:, 0], kind="stable")], 0, sentence, axis=1))
    table = np.concatenate(columns).astype(np.int32)
    everything: dict[str, Any] = dict(zip(("sentence", "time", "layer", "neuron"), table.T, strict=True))
    everything["layers"], everything["texts"] = np.array(layers), np.array(list(texts))
    everything["shapes"] = np.array([[trains[name].shape[1:] for name in layers] for trains in spikes], np.int32)
    everything["num_time_steps"] = np.array(len(next(iter(spikes[0].values()))))
    np.savez_compressed(file, **everything, **arrays)
    return len(table)
