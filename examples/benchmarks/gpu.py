"""What the operators and models take on a GPU, beside a copy of memory, their naive forms and a BERT; in five minutes.

    python examples/benchmarks/gpu.py --json gpu.json

Needs torch, transformers and Triton, nothing else. `norm_lif` is held against the bandwidth of a copy: forward it reads
a current and writes spikes, backward it reads the current and a gradient and writes a gradient. Models have random
weights, and their batches no padding. Without a GPU the same runs in small, to try the script.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, set_seed

from modeling_spikebert import SpikeBertConfig, SpikeBertForSequenceClassification
from modeling_spikebert.native_spikebert import forms_that_ran, use_fast_forms
from modeling_spikebert.norm_lif_spikebert import LIF, norm_lif

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"


def synchronize() -> None:
    if LARGE:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median of single runs, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    x = torch.empty(2**30 if LARGE else 2**24, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x))


def operators(bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for steps, width in ((1, 768), (4, 768), (4, 3072)):
        tokens = (2**28 if LARGE else 2**16) // (steps * width)
        x = torch.randn(steps, tokens, width, device=DEVICE, dtype=torch.bfloat16)
        weight, bias = torch.rand(2, width, device=DEVICE) + 1
        grad = torch.randn_like(x)
        leaf, weight_leaf, bias_leaf = (tensor.clone().requires_grad_() for tensor in (x, weight, bias))

        def forward(x: torch.Tensor = x, weight: torch.Tensor = weight, bias: torch.Tensor = bias) -> torch.Tensor:
            return norm_lif(x, LIF(), weight, bias)

        spikes = norm_lif(leaf, LIF(), weight_leaf, bias_leaf)

        def backward(
            spikes: torch.Tensor = spikes,
            leaves: tuple[torch.Tensor, ...] = (leaf, weight_leaf, bias_leaf),
            grad: torch.Tensor = grad,
        ) -> Any:
            return torch.autograd.grad(spikes, leaves, grad, retain_graph=True)

        size = 2 * x.numel()  # bytes of a tensor in bfloat16
        row = {"operator": "norm_lif", "T": steps, "D": width, "tokens": tokens}
        for name, run, tensors in (("forward", forward, 2), ("backward", backward, 3)):
            took = seconds(run)
            row[f"{name}_ms"] = 1e3 * took
            row[f"{name}_of_copy"] = tensors * size / took / bandwidth
        use_fast_forms(False)
        with torch.no_grad():
            row["naive_forward_ms"] = 1e3 * seconds(forward, 3)
        use_fast_forms(True)
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def models() -> list[dict[str, Any]]:
    rows = []
    batch, length = (64, 128) if LARGE else (2, 8)
    for layers, width in ((12, 768), (6, 384)):
        sizes: dict[str, Any] = {
            "num_hidden_layers": layers if LARGE else 2,
            "hidden_size": width if LARGE else 32,
            "num_attention_heads": max(1, width // 64) if LARGE else 2,
            "intermediate_size": 4 * (width if LARGE else 32),
        }
        ids = torch.randint(1000, 30000, (batch, length), device=DEVICE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.arange(batch, device=DEVICE) % 2

        def build(steps: int, sizes: dict[str, Any] = sizes) -> Any:
            set_seed(0)
            if not steps:
                return BertForSequenceClassification(BertConfig(**sizes, attn_implementation="sdpa")).to(DEVICE)
            return SpikeBertForSequenceClassification(SpikeBertConfig(**sizes, num_time_steps=steps)).to(DEVICE)

        def training_step(model: Any, inputs: dict[str, Any] = inputs, labels: torch.Tensor = labels) -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            model.zero_grad()

        @torch.inference_mode()
        def inference(model: Any, inputs: dict[str, Any] = inputs) -> None:
            with torch.autocast(DEVICE, torch.bfloat16):
                model(**inputs)

        took: dict[str, float] = {}
        for steps in (0, 1, 4):
            model = build(steps)
            name = f"T {steps}" if steps else "BERT"
            took[f"{name} training"] = seconds(lambda model=model: training_step(model.train()))
            took[f"{name} inference"] = seconds(lambda model=model: inference(model.eval()))
            if steps:
                print(f"  forms: {forms_that_ran()}", flush=True)
                use_fast_forms(False)
                took[f"{name} naive training"] = seconds(lambda model=model: training_step(model.train()), 3)
                use_fast_forms(True)
        row = {"layers": layers, "hidden": width, "batch": batch, "length": length}
        row |= {f"{name}, ms": 1e3 * value for name, value in took.items()}
        for steps in (1, 4):
            for kind in ("training", "inference"):
                row[f"T {steps} {kind} / BERT"] = took[f"T {steps} {kind}"] / took[f"BERT {kind}"]
            row[f"T {steps} naive / fast training"] = took[f"T {steps} naive training"] / took[f"T {steps} training"]
        rows.append(row)
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures as json")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if LARGE else "CPU, in small"
    print(f"{device}, torch {torch.__version__}", flush=True)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s", flush=True)
    figures = {"device": device, "torch": torch.__version__, "copy_gb_per_second": bandwidth / 1e9}
    figures |= {"operators": operators(bandwidth), "models": models()}
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
