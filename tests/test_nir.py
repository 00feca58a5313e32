"""From a model to a NIR graph: fixed point, the graph in three independent readers, sizes, energy, events, errors."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nir
import nir_proof
import numpy as np
import pytest
import torch
from helpers import ROOT, make_neurons_fire, mask_of, random_ids, tiny_model
from nir_reader import NumpyNir
from snntorch.import_nir import import_from_nir as read_by_snntorch
from snntorch.utils import reset
from spikingjelly.activation_based.nir_exchange import import_from_nir as read_by_spikingjelly
from tiny_training import tiny_tokenizer

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.commands import main as spikebert
from modeling_spikebert.energy import estimate_energy
from modeling_spikebert.neuromorphic import (
    build,
    export_nir,
    graph_energy,
    input_currents,
    populations_of,
    read_export,
    run,
    run_checkpoint,
    to_fixed_point,
)
from modeling_spikebert.neuromorphic import graph as graph_module
from modeling_spikebert.neuromorphic.fixed_point import FINEST_GRID, SHORTCUT_GRIDS, _Rounding

EXAMPLE = ROOT / "examples" / "simulate_nir.py"
Simulation = runpy.run_path(EXAMPLE)["Simulation"]
LENGTHS = (6, 2, 4)
NUM_TOKENS = 8
WITH_GAINS = ("input_neuron.batch_norm", "norm.batch_norm", "context_neuron.batch_norm")  # also when they are folded
kinds = pytest.mark.parametrize(
    "fields",
    [
        {"num_time_steps": 1, "tau": 1.0},
        {"num_time_steps": 4, "tau": 2.0},
        {"num_time_steps": 3, "tau": 4.0, "v_threshold": 0.7, "type_vocab_size": 0},
    ],
    ids=str,
)


def neuromorphic(dtype: torch.dtype = torch.float32, **fields) -> SpikeBertForSequenceClassification:
    return tiny_model(SpikeBertForSequenceClassification, "neuromorphic", dtype, num_labels=3, **fields)


def rounded(**fields) -> SpikeBertForSequenceClassification:
    return to_fixed_point(neuromorphic(**fields), NUM_TOKENS, fields["num_time_steps"])


def padded(*lengths: int) -> dict[str, torch.Tensor]:
    mask = mask_of(*lengths)
    return {"input_ids": random_ids(*mask.shape) * mask, "attention_mask": mask}


BATCH = padded(*LENGTHS)


# Fixed point


@kinds
@torch.no_grad()
def test_folding_alone_changes_nothing(monkeypatch, fields):
    """On a grid that is too fine to see, the folded model is the model: scores and every neuron's rate."""
    model = neuromorphic(torch.float64, **fields)
    exact = "modeling_spikebert.neuromorphic.fixed_point"
    monkeypatch.setattr(f"{exact}.on_grid", lambda x, grid: x)
    folded = to_fixed_point(model, NUM_TOKENS, fields["num_time_steps"])
    before, after = (each(**BATCH, output_firing_rates=True) for each in (model, folded))
    torch.testing.assert_close(after.logits.double(), before.logits, rtol=0, atol=1e-5)
    for a, b in zip(before.firing_rates, after.firing_rates, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=0, atol=1e-6)


@kinds
def test_weights_are_whole_numbers_of_8_bits_and_norms_do_nothing_else(fields):
    model = rounded(**fields)
    assert model.config.v_threshold == 1
    assert model.config.num_time_steps == fields["num_time_steps"]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert whole_numbers(module.weight).abs().max() <= 127, name
        elif isinstance(module, torch.nn.Embedding):
            assert torch.equal(module.weight * 2 ** SHORTCUT_GRIDS[0], (module.weight * 2 ** SHORTCUT_GRIDS[0]).round())
        elif type(module).__name__ == "SpikeBertBatchNorm":
            assert not module.running_mean.any()
            assert (module.running_var + module.eps == 1).all()
            if name.endswith(WITH_GAINS):
                assert whole_numbers(module.weight.unsqueeze(1)).abs().max() <= 127, name
            else:
                assert (module.weight == 1).all()
                assert not module.bias.any(), name


def whole_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Each row in its own steps."""
    return weight.detach().double() / step_of(weight).unsqueeze(1)


def exact_bounds(model, num_tokens: int) -> dict[str, float]:
    """Of each sum and membrane: the most that any sentence can bring it to, in steps of its finest grid.

    Restated in whole numbers from the rounded weights alone. float32 has all whole numbers up to 2^24.
    """
    steps, tau = model.config.num_time_steps, model.config.tau
    life = tau**steps  # a membrane is so much finer than its current
    found = {}
    tables = [table.weight.detach().double() for table in model.modules() if isinstance(table, torch.nn.Embedding)]
    low, high = sum(table.amin(0) for table in tables), sum(table.amax(0) for table in tables)
    grain = min(step_of(table).min() for table in tables)

    def linear(name, weight, bias, finer):
        step = torch.minimum(step_of(weight), step_of(bias.unsqueeze(1)))
        assert finer == 1 or (step / finer).min() >= 2.0**-22  # else a membrane could lie between threshold and 1
        most = torch.maximum(
            weight.clamp(min=0).sum(1) + bias.clamp(min=0), -(weight.clamp(max=0).sum(1) + bias.clamp(max=0))
        )
        found[name] = float((most / step * finer).max())

    def reader(name, norm):
        gain, shift = norm.weight.double(), norm.bias.double()
        step = torch.minimum(grain * step_of(gain.unsqueeze(1)), step_of(shift.unsqueeze(1)))
        assert (step / life).min() >= 2.0**-22
        found[name] = float(((torch.maximum(high, -low) * gain.abs() + shift.abs()) / step * life).max())

    for i, block in enumerate(model.spikebert.encoder.layer):
        reader(f"{i} attention reader", block.attention.input_neuron.batch_norm)
        for part in ("query", "key", "value"):
            layer = getattr(block.attention, part)
            linear(f"{i} {part}", layer.weight.double(), layer.bias.double(), life)
        norm = block.attention.context_neuron.batch_norm
        linear(f"{i} gate", norm.weight.double().unsqueeze(1).expand(-1, num_tokens), norm.bias.double(), life)
        for name, part in (("attention", block.attention), ("mlp", block.mlp)):
            if name == "mlp":
                reader(f"{i} mlp reader", block.mlp.input_neuron.batch_norm)
                linear(
                    f"{i} intermediate",
                    block.mlp.intermediate.weight.double(),
                    block.mlp.intermediate.bias.double(),
                    life,
                )
            weight, bias = part.output.weight.double(), part.output.bias.double()
            linear(f"{i} {name} output", weight, bias, 1)
            low = low + weight.clamp(max=0).sum(1) + bias.clamp(max=0)
            high = high + weight.clamp(min=0).sum(1) + bias.clamp(min=0)
            grain = min(grain, step_of(weight).min(), step_of(bias.unsqueeze(1)).min())
            found[f"{i} {name} shortcut"] = float(torch.maximum(high, -low).max() / grain)
    reader("norm", model.norm.batch_norm)
    linear("classifier", model.classifier.weight.double(), model.classifier.bias.double(), 1)
    return found


def step_of(weight: torch.Tensor) -> torch.Tensor:
    """The coarsest power of two of which all numbers of a row are multiples: `[O]`; 1 of zeros."""
    whole = (weight.detach().double() * 2.0**40).numpy().astype(np.int64)
    bits = np.bitwise_or.reduce(whole, axis=1)
    lowest = np.where(bits == 0, 2**40, bits & -bits)
    return torch.from_numpy(lowest / 2.0**40)


STRETCHED = {
    "as it is": lambda model: None,
    "large branches": lambda model: scale(model, ".output.weight", 20),
    "large biases": lambda model: scale(model, ".bias", 30),
    "rows of all sizes": lambda model: scale(model, ".weight", torch.logspace(-6, 1, 32).unsqueeze(1)),
    "large gates": lambda model: scale(model, "context_neuron.batch_norm.weight", 1000),
    "of one sign": lambda model: [weight.abs_() for name, weight in model.named_parameters()],
    "small embeddings": lambda model: scale(model, "embeddings.batch_norm.weight", 1e-2),
    "large classifier": lambda model: scale(model, "classifier.bias", 1e6),
}


def scale(model, ending: str, factor) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(ending) and (not torch.is_tensor(factor) or (weight.dim() == 2 and len(weight) == 32)):
            weight *= factor


@pytest.mark.parametrize("stretch", STRETCHED.values(), ids=STRETCHED)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_time_steps": 1, "tau": 1.0},
        {"num_time_steps": 4, "tau": 2.0, "num_hidden_layers": 6},
        {"num_time_steps": 8, "tau": 2.0},
        {"num_time_steps": 3, "tau": 4.0},
    ],
    ids=str,
)
@torch.no_grad()
def test_no_sentence_can_leave_what_float32_has(fields, stretch):
    model = neuromorphic(**fields)
    stretch(model)
    refusals = []
    for tokens in (8, 16):
        try:
            fixed = to_fixed_point(model, tokens, fields["num_time_steps"])
        except ValueError as error:  # it may refuse, but not round
            refusals.append(str(error))
            continue
        bounds = exact_bounds(fixed, tokens)
        assert {name: bound for name, bound in bounds.items() if bound > 2**24} == {}
        assert max(bounds.values()) > 2**18  # bits are used
        # And so float64 has the same bits.
        batch, steps = padded(tokens, 2, tokens - 1), fixed.config.num_time_steps
        states, spikes = fixed.spikebert(**batch).hidden_states_per_step, run_checkpoint(fixed, batch, steps)
        fixed.double()
        real = batch["attention_mask"][None, :, :, None]
        assert torch.equal((states * real).double(), fixed.spikebert(**batch).hidden_states_per_step * real)
        assert all(torch.equal(spikes[name], other) for name, other in run_checkpoint(fixed, batch, steps).items())
    assert all(re.search("too much for exact sums|its gains would be off by", refusal) for refusal in refusals)
    assert not refusals or stretch is not STRETCHED["as it is"]


@torch.no_grad()
def test_gates_of_long_sentences_are_exact():
    """Here gains of the readers have too few bits for an export; sums of gates have to hold all the same."""
    model = neuromorphic(num_time_steps=14)
    scale(model, "context_neuron.batch_norm.bias", 0)
    rounded = _Rounding(model, 16, 14, SHORTCUT_GRIDS[-1]).model
    bounds = exact_bounds(rounded, 16)
    assert max(bounds.values()) <= 2**24
    assert bounds["0 gate"] > 2**22


def test_what_is_too_fine_or_too_large_is_refused():
    steps = FINEST_GRID - SHORTCUT_GRIDS[-1] + 1
    with pytest.raises(ValueError, match=f"{steps} time steps are too fine for float32. Take fewer"):
        to_fixed_point(neuromorphic(), NUM_TOKENS, steps)
    for name, message in (
        ("key.weight", r"layer\.0\.attention\.key: currents may reach .* Take fewer tokens or time steps"),
        ("mlp.output.weight", r"layer\.0\.mlp\.output: the shortcut may reach .*, too much for exact sums"),
    ):
        model = neuromorphic()
        with torch.no_grad():
            scale(model, name, 1e7)
        with pytest.raises(ValueError, match=message):
            to_fixed_point(model, NUM_TOKENS, 4)
    model = neuromorphic()
    with torch.no_grad():
        scale(model, "mlp.output.weight", 3e3)
    with pytest.raises(
        ValueError, match=r"norm: the shortcut may reach .* would be off by \d+ %. Take fewer time steps"
    ):
        to_fixed_point(model, NUM_TOKENS, 4)


@torch.no_grad()
def test_early_exit_stays_behind():
    model = neuromorphic(num_time_steps=4)
    model.config.exit_threshold = 0.4
    assert to_fixed_point(model, NUM_TOKENS, 4).config.exit_threshold is None


# The graph, in four readers


@kinds
def test_all_readers_fire_as_the_model_does(tmp_path, fields):
    model, steps = rounded(**fields), fields["num_time_steps"]
    file = tmp_path / "model.nir"
    nir.write(file, build(model, NUM_TOKENS))
    graph = nir.read(file)
    currents = input_currents(model, BATCH, NUM_TOKENS)
    expected = run_checkpoint(model, BATCH, steps)
    ours = [(trace.spikes, trace.output) for trace in run(graph, currents, steps)]

    # With padding up to the tokens of the graph, which is silent. Each layer fires, and none always.
    assert {name for name, node in graph.nodes.items() if isinstance(node, nir.LIF)} == expected.keys()
    for name, spikes in expected.items():
        trains = torch.stack([trace[name] for trace, _ in ours])
        length = spikes.shape[-1]
        assert torch.equal(trains[..., :length], spikes), name
        assert not trains[..., length:].any(), name
        assert 0 < spikes.float().mean() < 1, name
    scores = sum((output[..., :6] * BATCH["attention_mask"].unsqueeze(1)).sum(-1) for _, output in ours)
    scores = scores / (steps * BATCH["attention_mask"].sum(1, keepdim=True))
    torch.testing.assert_close(scores, model(**BATCH).logits.detach(), rtol=0, atol=1e-6)

    with contextlib.redirect_stdout(io.StringIO()):  # it says that it scales thresholds
        snntorch = read_by_snntorch(nir.read(file))
    for network in (snntorch, read_by_spikingjelly(nir.read(file))):
        with torch.no_grad():
            traces = list(Simulation(network, graph).run(currents, steps))
        for (spikes, output), other in zip(ours, traces, strict=True):
            assert other.spikes.keys() == spikes.keys()
            assert all(torch.equal(other.spikes[name], spikes[name]) for name in spikes)
            assert torch.equal(other.output, output)

    reader = NumpyNir(file)
    assert reader.num_time_steps == steps
    for sentence, own in enumerate(currents.numpy()):
        for values, (spikes, output) in zip(reader.run(own), ours, strict=True):
            assert all(np.array_equal(values[name] != 0, train[sentence]) for name, train in spikes.items())
            assert np.array_equal(values["output"], output[sentence])


def test_a_graph_of_one_token():
    model = to_fixed_point(neuromorphic(num_time_steps=2), 1, 2)
    batch = padded(1, 1)
    graph = build(model, 1)
    traces = list(run(graph, input_currents(model, batch, 1), 2))
    for name, spikes in run_checkpoint(model, batch, 2).items():
        assert torch.equal(torch.stack([trace.spikes[name] for trace in traces]), spikes), name
    assert_same_account(model, graph, batch)


@torch.no_grad()
def test_without_memory_one_time_step_is_enough():
    model = to_fixed_point(neuromorphic(num_time_steps=3, tau=1.0), NUM_TOKENS, 3)
    assert model.config.num_time_steps == 1
    assert build(model, NUM_TOKENS).metadata["num_time_steps"] == 1
    torch.testing.assert_close(model(**BATCH, num_time_steps=3).logits, model(**BATCH).logits, rtol=0, atol=1e-6)


# Traps of other graphs, that this one stays clear of


def graph_of(node: nir.NIRNode) -> nir.NIRGraph:
    return nir.NIRGraph.from_list(
        nir.Conv1d(1, np.ones((1, 1, 1), np.float32), 1, 0, 1, 1, np.zeros(1, np.float32)), node
    )


def lif(tau: float, v_threshold: float) -> nir.LIF:
    return nir.LIF(*(np.full((1, 1), x) for x in (tau, 1.0, 0.0, v_threshold)))


def fires(read, node: nir.NIRNode, current: float) -> bool:
    with contextlib.redirect_stdout(io.StringIO()):
        network = read(graph_of(node))
    output, _ = network(torch.full((1, 1, 1), current), None)
    return bool(output.any())


def test_at_its_threshold_a_neuron_fires_in_one_simulator_and_not_in_the_other():
    """So ours lies half a step below it."""
    at_threshold = lif(2e-4, 1.0)
    assert fires(read_by_spikingjelly, at_threshold, 2.0)
    assert not fires(read_by_snntorch, at_threshold, 2.0)
    for read in (read_by_spikingjelly, read_by_snntorch):
        assert fires(read, lif(2e-4, graph_module.THRESHOLD), 2.0)
        assert not fires(read, lif(2e-4, graph_module.THRESHOLD), 2.0 - 2.0**-20)


def test_a_neuron_without_memory_is_read_by_one_simulator_alone():
    """So ours have tau = 2 dt, and twice the current."""
    assert fires(read_by_snntorch, lif(1e-4, 0.9), 1.0)
    with pytest.raises(ValueError, match="must be finite and greater than 1"):
        fires(read_by_spikingjelly, lif(1e-4, 0.9), 1.0)


def test_an_if_node_leaks_in_snntorch():
    """So ours are LIF."""
    node = nir.IF(*(np.full((1, 1), x) for x in (1.0, 1.95)))
    with contextlib.redirect_stdout(io.StringIO()):
        network = read_by_snntorch(graph_of(node))
    (neuron,) = (module for module in network.modules() if type(module).__name__ == "Leaky")
    assert float(neuron.beta) == pytest.approx(0.9)


def test_a_conv1d_with_groups_is_refused_by_spikingjelly_and_mistyped_by_nir():
    """So sums over tokens have zeros between channels."""
    grouped = nir.Conv1d(4, np.ones((2, 1, 4), np.float32), 1, 0, 1, 2, np.zeros(2, np.float32))
    assert grouped.input_type["input"].tolist() == [1, 4]  # and it takes two channels
    graph = nir.NIRGraph(
        {"input": nir.Input(np.array([2, 4])), "sum": grouped, "output": nir.Output(np.array([2, 1]))},
        [("input", "sum"), ("sum", "output")],
        type_check=False,
    )
    with pytest.raises(NotImplementedError, match="Grouped convolutions are not supported"):
        read_by_spikingjelly(graph)


def test_snntorch_remembers_the_sentence_before():
    """So its membranes are reset in between; SpikingJelly's are in the state that it returns."""
    currents = torch.full((1, 1, 1), 1.5)
    with contextlib.redirect_stdout(io.StringIO()):
        network = read_by_snntorch(graph_of(lif(2e-4, graph_module.THRESHOLD)))
    assert [bool(network(currents, None)[0].any()) for _ in range(2)] == [False, True]  # 0.75, and 1.125
    reset(network)
    assert not network(currents, None)[0].any()
    network = read_by_spikingjelly(graph_of(lif(2e-4, graph_module.THRESHOLD)))
    assert [bool(network(currents, None)[0].any()) for _ in range(2)] == [False, False]


# Sizes and energy


def test_sizes_of_a_graph_by_hand():
    model = rounded(num_time_steps=4, tau=2.0)
    sizes = {population.name: population for population in populations_of(build(model, NUM_TOKENS))}
    name = "spikebert.encoder.layer.0.attention"
    width, inner, length = 32, 64, NUM_TOKENS
    key = model.spikebert.encoder.layer[0].attention.key.weight
    neurons = sizes[f"{name}.key_neuron"]
    assert neurons.neurons == width * length
    assert neurons.synapses == length * (int((key != 0).sum()) + width)  # and those of padding
    assert neurons.fan_in == int((key != 0).sum(1).max()) + 1
    assert neurons.fan_out == 1
    assert neurons.state_bytes == 4 * width * length
    assert neurons.weight_bytes == width * width + 5 * width  # a byte for each row's grid, 4 for its bias
    gates = sizes[f"{name}.context_neuron"]
    assert (gates.neurons, gates.synapses, gates.fan_in, gates.fan_out) == (width, width * length, length, length)
    masked = sizes[f"{name}.masked_neuron"]
    assert (masked.synapses, masked.fan_in) == (2 * width * length, 2)
    fired = [population for population in sizes.values() if population.fires]
    assert len(fired) == 2 * 9 + 1
    assert sum(population.neurons for population in fired) == length * (2 * (7 * width + inner) + width) + 2 * width
    shortcut = sizes["spikebert.encoder.layer.1.mlp.shortcut"]
    output = model.spikebert.encoder.layer[1].mlp.output.weight
    assert (shortcut.fires, shortcut.state_bytes) == (False, 0)
    assert shortcut.synapses == length * (int((output != 0).sum()) + width)
    assert sizes["output"].synapses == length * int((model.classifier.weight != 0).sum())


def operations(report) -> dict[str, tuple]:
    return {
        layer.name: (
            layer.part,
            layer.num_time_steps,
            layer.dense_macs,
            layer.published,
            layer.strict,
            layer.firing_rate,
            None if layer.output is None else layer.output.nonzero,
        )
        for layer in report.layers
    }


def assert_same_account(model, graph, batch):
    report, traffic = graph_energy(graph, model, batch)
    expected = estimate_energy(model, batch)
    assert operations(report) == operations(expected)
    for account in ("published", "strict"):  # sums of the same rows
        assert getattr(report, account).energy_mj == pytest.approx(getattr(expected, account).energy_mj, rel=1e-12)
    assert (report.firing_rate, report.tokens_per_sentence) == (expected.firing_rate, expected.tokens_per_sentence)
    return report, traffic, expected


@kinds
def test_the_account_of_a_graph_is_that_of_its_model_to_the_last_addition(fields):
    model = rounded(**fields)
    graph = build(model, NUM_TOKENS)
    report, traffic, expected = assert_same_account(model, graph, BATCH)
    for name, spikes in run_checkpoint(model, BATCH, fields["num_time_steps"]).items():
        assert traffic.spikes[name] == int(spikes.sum()), name
    # Memory: the same but for weights, of which 8 bits are read in place of 32.
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    gains = sum(len(module.weight) for name, module in model.named_modules() if name.endswith(WITH_GAINS))
    assert expected.memory_bytes - report.memory_bytes == 3 * (weights + gains)

    # Without weights of 0, operations are fewer than those of the account, which has them.
    assert traffic.operations["spikebert.encoder.layer.0.attention.key_neuron"] == int(
        (
            run_checkpoint(model, BATCH, fields["num_time_steps"])[
                "spikebert.encoder.layer.0.attention.input_neuron"
            ].sum((0, 1, 3))
            * (model.spikebert.encoder.layer[0].attention.key.weight != 0).sum(0)
        ).sum()
    )


@kinds
def test_what_padding_takes(fields):
    """A token that is not there has silent neurons, whose updates are all that it takes, its inhibition and gates."""
    model = rounded(**fields)
    steps, missing = fields["num_time_steps"], 3 * NUM_TOKENS - sum(LENGTHS)
    _, traffic = graph_energy(build(model, NUM_TOKENS), model, BATCH)
    width, inner = 32, 64
    neurons = 2 * (7 * width + inner) + width  # of a token: input, query, key, value, both products, input; norm
    inhibited = 2 * (5 * width + inner) + width
    gates = sum(
        int((spikes.sum((0, 2, 3)) * (NUM_TOKENS - torch.tensor(LENGTHS))).sum())
        for name, spikes in run_checkpoint(model, BATCH, steps).items()
        if name.endswith("context_neuron")
    )
    shortcuts, gains = 2 * 2 * width, (2 * 2 + 1) * width
    assert traffic.padding_additions == steps * missing * (2 * neurons + inhibited + shortcuts) + gates
    assert traffic.padding_multiplications == steps * missing * (neurons + gains)


def test_layers_whose_weights_are_all_zero_are_counted_as_what_they_are():
    model = neuromorphic(num_time_steps=2)
    with torch.no_grad():
        model.spikebert.encoder.layer[0].attention.query.weight.zero_()
        model.spikebert.encoder.layer[1].attention.output.weight.zero_()
        model.spikebert.encoder.layer[1].mlp.output.weight.zero_()
    model = to_fixed_point(model, NUM_TOKENS, 2)
    assert_same_account(model, build(model, NUM_TOKENS), BATCH)


# The commands


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint of the variant, and what its export printed."""
    folder = tmp_path_factory.mktemp("nir")
    checkpoint(folder / "student", "neuromorphic")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export = ["export", folder / "student", "--format", "nir", "--num-tokens", NUM_TOKENS]
        spikebert([*map(str, export), "--output-dir", str(folder / "chip")])
    return folder, printed.getvalue()


def checkpoint(folder: Path, variant: str):
    tokenizer = tiny_tokenizer()
    model = SpikeBertForSequenceClassification(
        SpikeBertConfig(
            variant=variant,
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=64,
            num_hidden_layers=2,
            num_time_steps=2,
            max_position_embeddings=16,
        )
    ).eval()
    make_neurons_fire(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_export_writes_a_graph_and_its_checkpoint(exported):
    folder, printed = exported
    assert f"{folder / 'chip' / 'model.nir'}: " in printed
    assert "8 tokens, T 2" in printed
    assert "All its neurons fire as those of the checkpoint next to it" in printed
    assert ".attention.query_neuron" in printed
    graph, model = read_export(folder / "chip" / "model.nir")
    assert graph.metadata["num_time_steps"] == 2
    with torch.no_grad():
        before = SpikeBertForSequenceClassification.from_pretrained(folder / "student").eval()(**BATCH).logits
        after = model(**BATCH).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0, atol=0.5)
    assert (folder / "chip" / "tokenizer_config.json").is_file()


def test_energy_reads_the_graph(exported, capsys, tmp_path):
    folder, _ = exported
    texts = ["the film is good", "bad"]
    spikebert(["energy", str(folder / "chip" / "model.nir"), "--text", *texts, "--json", str(tmp_path / "graph.json")])
    assert "Tokens that are not there take" in capsys.readouterr().out
    spikebert(["energy", str(folder / "chip"), "--text", *texts, "--json", str(tmp_path / "model.json")])
    graph, model = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("graph", "model"))
    for account in ("published", "strict"):
        for figure in ("synaptic_operations", "macs", "energy_mj"):
            assert graph[account][figure] == pytest.approx(model[account][figure], rel=1e-12)
    assert len(graph["spikes"]) == 2 * 9 + 1
    assert graph["padding"]["additions"] > graph["padding"]["multiplications"] > 0


def test_events_of_a_graph_can_be_replayed(exported, capsys, tmp_path):
    """The file has the currents: another reader comes to the same spikes."""
    folder, _ = exported
    texts = ["the film is good", "bad"]
    spikebert(["export", str(folder / "chip"), "--format", "events", "--text", *texts, "--output-dir", str(tmp_path)])
    assert f"{tmp_path / 'events.npz'}: " in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"events.npz", "raster-1.png", "raster-2.png"}
    with np.load(tmp_path / "events.npz", allow_pickle=False) as file:
        events = dict(file)
    assert events["texts"].tolist() == texts
    assert events["num_time_steps"] == 2
    reader = NumpyNir(folder / "chip" / "model.nir")
    found = set(zip(*(events[name].tolist() for name in ("sentence", "time", "layer", "neuron")), strict=True))
    expected = set()
    for sentence, currents in enumerate(events["currents"]):
        for time, values in enumerate(reader.run(currents)):
            for layer, name in enumerate(events["layers"].tolist()):
                assert events["shapes"][sentence, layer].tolist() == list(values[name].shape)
                expected |= {(sentence, time, layer, int(i)) for i in values[name].ravel().nonzero()[0]}
            assert np.array_equal(events["class_currents"][sentence, time], values["output"])
    assert found == expected
    assert len(found) == len(events["neuron"]) > 100
    assert (np.diff(events["sentence"] * 2 + events["time"]) >= 0).all()


def test_events_of_an_ordinary_checkpoint(tmp_path):
    model, tokenizer = checkpoint(tmp_path / "student", "membrane")
    command = ["export", tmp_path / "student", "--format", "events", "--output-dir", tmp_path / "events"]
    spikebert([*map(str, command), "--text", "the film is good"])
    with np.load(tmp_path / "events" / "events.npz", allow_pickle=False) as events:
        with torch.no_grad():
            outputs = model(**tokenizer("the film is good", return_tensors="pt"), output_firing_rates=True)
        rate = outputs.firing_rates[1][0, 1]  # of queries
        layer = events["layers"].tolist().index("layer.1.query")
        _, num_tokens = events["shapes"][0, layer]
        assert (events["layer"] == layer).sum() == round(float(rate) * 2 * 32 * num_tokens)
    assert (tmp_path / "events" / "raster.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nir", "--num-tokens", "17"], "A graph has 1 to 16 tokens, the positions of its model, got 17."),
        (["--format", "nir", "--num-time-steps", "20"], "20 time steps are too fine for float32. Take fewer steps."),
        (["--format", "events", "--text", "a film", "--num-time-steps", "3"], "has 2 time steps. Leave out"),
        (
            ["--format", "events", "--text", "good " * 20],
            "The graph takes 8 tokens, and the longest sentence has 22. Shorten it, or",
        ),
    ],
    ids=str,
)
def test_what_the_export_refuses(exported, arguments, message, tmp_path, capsys):
    folder, _ = exported
    source = folder / ("chip" if "events" in arguments else "student")
    with pytest.raises(SystemExit) as exit:
        spikebert(["export", str(source), *arguments, "--output-dir", str(tmp_path / "new")])
    assert message in str(exit.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-tokens", "8"], "--num-tokens belongs to --format nir. Leave it out, or add --format nir."),
        (["--format", "nir", "--precision", "int8"], "--precision belongs to --format onnx."),
        (["--format", "events"], "--format events needs --text with at least one sentence"),
        (["--format", "nir", "--num-tokens", "0"], "--num-tokens must be at least 1, got 0."),
    ],
    ids=str,
)
def test_options_of_another_format(arguments, message, capsys):
    with pytest.raises(SystemExit):
        spikebert(["export", "somewhere", *arguments, "--output-dir", "nowhere"])
    assert message in capsys.readouterr().err


def test_nothing_is_written_over(exported, tmp_path):
    folder, _ = exported
    model = SpikeBertForSequenceClassification.from_pretrained(folder / "student")
    with pytest.raises(ValueError, match=r"model\.nir is there already. Choose another folder, or remove this one."):
        export_nir(model, folder / "chip")
    with pytest.raises(ValueError, match=r"student.config\.json is there already. Choose another folder"):
        export_nir(model, folder / "student")
    assert not (folder / "student" / "model.nir").exists()


def test_a_graph_that_fires_otherwise_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "THRESHOLD", 0.9)
    with pytest.raises(RuntimeError, match="fires in the graph otherwise than in the checkpoint in time step 1"):
        export_nir(neuromorphic(num_time_steps=2), tmp_path / "new", num_tokens=8)
    assert not list((tmp_path / "new").iterdir())


def test_a_model_that_does_not_map_says_which_parts(tmp_path):
    model = tiny_model(SpikeBertForSequenceClassification, dtype=torch.float32)
    expected = (
        r"no node for \d+ LayerNorms \(such as spikebert.embeddings.LayerNorm\) and 2 products of queries, keys and "
        r"values \(such as spikebert.encoder.layer.0.attention\).* --student-config '{\"variant\": \"neuromorphic\"}'"
    )
    with pytest.raises(ValueError, match=expected):
        export_nir(model, tmp_path / "new")
    for fields, message in (
        ({"v_reset": None}, r"soft reset \(v_reset None\). Train with 0"),
        ({"v_reset": -0.1}, "v_reset -0.1. Train with 0"),
        ({"tau": 3.0}, "tau is a power of two, and it is 3.0. Train with tau 2"),
    ):
        with pytest.raises(ValueError, match=message):
            export_nir(neuromorphic(**fields), tmp_path / "new")
    with pytest.raises(TypeError, match="goes to a chip, got SpikeBertModel"):
        export_nir(neuromorphic().spikebert, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_graph_that_would_be_too_large_says_how_large(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "MOST_BYTES", 1e5)
    # 2 blocks, each with a sum and a broadcast of 32 x 32 x 8 numbers of 4 bytes: 131,072 bytes
    with pytest.raises(ValueError, match=r"8 tokens would have 0\.0 GB .* Take at most 6 tokens"):
        export_nir(neuromorphic(), tmp_path / "new", num_tokens=8)


def test_a_damaged_graph_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*model\.nir. Write one with: spikebert export"):
        read_export(tmp_path / "model.nir")
    (tmp_path / "model.nir").write_bytes(os.urandom(100))
    with pytest.raises(ValueError, match=r"model\.nir cannot be read as a NIR graph .* Export it again."):
        read_export(tmp_path / "model.nir")
    nir.write(tmp_path / "model.nir", graph_of(lif(2e-4, 1.0)))
    with pytest.raises(ValueError, match=r"model\.nir was not written by spikebert export. Name a graph of a Spike"):
        read_export(tmp_path / "model.nir")
    nir.write(tmp_path / "model.nir", build(rounded(num_time_steps=2), NUM_TOKENS))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint next to .*model\.nir, .* Move the whole folder"):
        read_export(tmp_path / "model.nir")
    rounded(num_time_steps=2).save_pretrained(tmp_path)
    nir.write(tmp_path / "model.nir", build(rounded(num_time_steps=2, v_threshold=0.7), NUM_TOKENS))
    with pytest.raises(ValueError, match=r"checkpoint next to .*model\.nir is not the one of that graph. Export both"):
        read_export(tmp_path / "model.nir")


def test_the_numpy_reader_compares_a_file_of_sentences(exported, tmp_path, capsys):
    folder, _ = exported
    (tmp_path / "some.csv").write_text("text,label\nthe film is good,LABEL_1\nbad,LABEL_0\n")
    nir_proof.main(folder / "chip", str(tmp_path / "some.csv"))
    assert re.search(r"numpy: 2 sentences, T 2, [\d,]{3,} spikes, 0 differ, ", capsys.readouterr().out)


def test_the_example_compares_simulators_with_the_checkpoint(exported, tmp_path):
    folder, _ = exported
    rows = [("the film is good", "LABEL_1"), ("bad", "LABEL_0"), ("the film is good and " * 9, "LABEL_1")]
    (tmp_path / "some.csv").write_text("text,label\n" + "\n".join(",".join(row) for row in rows) + "\n")
    command = [sys.executable, EXAMPLE, folder / "chip", "--file", tmp_path / "some.csv"]
    result = subprocess.run([*command, "--batch-size", "2"], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("model.nir: 8 tokens, T 2, 3 sentences")
    for line, name in zip(lines[1:], ("snntorch", "spikingjelly"), strict=True):
        spikes = re.fullmatch(rf"{name}: 3 sentences, ([\d,]+) spikes, 0 differ, [\d.]+ % right, \d+ s", line)
        assert int(spikes[1].replace(",", "")) > 1000
