"""Tiny models whose neurons fire."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modeling_spikebert
from modeling_spikebert.configuration_spikebert import SpikeBertConfig
from modeling_spikebert.native_spikebert import use_fast_forms

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
}

# The files of the package that travel with a checkpoint.
CODE_FILES = {path.name for path in Path(modeling_spikebert.__file__).parent.glob("*_spikebert.py")}

ROOT = Path(__file__).parent.parent

# Deprecated by torch, and used by its own tracer and compiler.
tracing = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


def copy_tracked_files(folder: Path) -> None:
    """Those of the repository, as they are on disk; links stay links."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("needs a clone of the repository")
    for name in filter(None, tracked.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(ROOT / name):
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def flags(**options: object) -> list[str]:
    """Options of a command line."""
    return [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def tiny_config(mode: str = "default", **overrides) -> SpikeBertConfig:
    if mode == "reference":
        return SpikeBertConfig.reference(**(SIZES | overrides))
    variant = {"variant": mode} if mode == "neuromorphic" else {}
    return SpikeBertConfig(**(SIZES | variant | overrides))


def make_neurons_fire(model: nn.Module, seed: int = 0) -> None:
    """Random norms and Linears, so that neither all nor none of the neurons behind them fire."""
    generator = torch.Generator().manual_seed(seed)

    def random(parameter: Tensor, mean: float, std: float) -> None:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(mean + std * noise)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) or type(module).__name__ == "SpikeBertNeuron":  # remote code, too
                if module.weight is None:
                    continue
                random(module.weight, 3.0, 0.5)
                random(module.bias, 1.5, 0.5)
            elif type(module).__name__ == "SpikeBertBatchNorm":
                random(module.weight, 1.0, 0.2)
                random(module.bias, 1.2, 0.5)
                random(module.running_mean, 0.0, 0.3)
                random(module.running_var, 1.0, 0.1)
            elif isinstance(module, nn.Linear):
                random(module.weight, 0.0, 0.3)
                random(module.bias, 0.0, 0.3)
            elif isinstance(module, nn.Embedding):
                random(module.weight, 0.0, 1.0)


def tiny_model(cls: type, mode: str = "default", dtype: torch.dtype = torch.float64, **overrides):
    """A model in eval mode with random weights that make its neurons fire."""
    torch.manual_seed(0)
    model = cls(tiny_config(mode, **overrides)).to(dtype).eval()
    make_neurons_fire(model)
    return model


def random_ids(batch: int, length: int, seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> Tensor:
    """Token ids without padding (id 0)."""
    return torch.randint(1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int) -> Tensor:
    """Attention mask of sentences of these lengths, padded on the right."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


@contextmanager
def fast_forms(enabled: bool) -> Iterator[None]:
    """The operators' fast forms on or off, and on behind it, as they are by default."""
    use_fast_forms(enabled)
    try:
        yield
    finally:
        use_fast_forms(None)


def results_of(model, fast: bool, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Outputs, those at real tokens only, and gradients of a loss that all of them enter."""
    model.zero_grad()
    with fast_forms(fast):
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, output_firing_rates=True)
    real = torch.ones_like(ids) if mask is None or model.config.variant == "published" else mask
    named = {"logits": outputs.logits} | {f"rates {i}": rates for i, rates in enumerate(outputs.firing_rates)}
    named |= {f"state {i}": state * real.unsqueeze(-1) for i, state in enumerate(outputs.hidden_states)}
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() for value in named.values()
    )
    loss.backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in named.items()} | gradients
