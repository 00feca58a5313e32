"""A reader of NIR files that shares nothing with others: arrays out of HDF5, and the equations of NIR's paper in NumPy.

It knows the nodes that a SpikeBERT has: Conv1d as a sum over taps, and LIF by Euler's method,

    v <- v + dt / tau (v_leak - v + r i),  a spike and v = v_reset where v > v_threshold.

All in float64, where the sums of a graph are exact as they are in float32.
"""

from pathlib import Path

import h5py
import numpy as np

DT = 1e-4


class NumpyNir:
    def __init__(self, path: str | Path):
        with h5py.File(path) as file:
            graph = file["node"]
            self.nodes = {
                name: {key: value[()] for key, value in node.items() if isinstance(value, h5py.Dataset)}
                for name, node in graph["nodes"].items()
            }
            edges = graph["edges"][()]
            self.num_time_steps = int(graph["metadata"]["num_time_steps"][()])
        self.sources = {name: [] for name in self.nodes}
        for source, target in edges:
            self.sources[target.decode()].append(source.decode())

    def run(self, currents: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Values of all nodes in each time step, `[channels, length]`, of one sentence `[D + 1, L]`."""
        membranes, steps = {}, []
        for _ in range(self.num_time_steps):
            values: dict[str, np.ndarray] = {}
            for name in self.nodes:
                self.compute(name, currents, values, membranes)
            steps.append(values)
        return steps

    def compute(self, name: str, currents: np.ndarray, values: dict, membranes: dict) -> np.ndarray:
        if name in values:
            return values[name]
        node, kind = self.nodes[name], self.nodes[name]["type"]
        if kind == b"Input":
            x = currents
        else:
            x = sum(self.compute(source, currents, values, membranes) for source in self.sources[name])
        if kind == b"Conv1d":
            x = conv1d(x, node)
        elif kind == b"LIF":
            v = membranes.get(name, np.zeros_like(x))
            v = v + DT / node["tau"] * (node["v_leak"] - v + node["r"] * x)
            x = (v > node["v_threshold"]).astype(float)
            membranes[name] = np.where(x > 0, node["v_reset"], v)
        values[name] = x
        return x


def conv1d(x: np.ndarray, node: dict) -> np.ndarray:
    assert (node["stride"], node["dilation"], node["groups"]) == (1, 1, 1)
    weight, padding = node["weight"].astype(float), int(node["padding"])
    x = np.pad(x, ((0, 0), (padding, padding)))
    length = x.shape[1] - weight.shape[2] + 1
    taps = (weight[:, :, k] @ x[:, k : k + length] for k in range(weight.shape[2]))
    return sum(taps) + node["bias"].astype(float)[:, None]
