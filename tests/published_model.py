"""The published SpikeBERT as a plain torch module, naive, with the names of the published state dict.

After the structure of github.com/Lvchangze/SpikeBERT, model/new_spikformer.py; independent of the package and of
reference_model.py. Its MLP cannot run there, since it reshapes `4D` numbers to `D`; here it is
`D -> 4D -> D`, as the shapes of its weights say.
"""

import torch
from torch import Tensor, nn


def fire(current: Tensor, tau: float, threshold: float) -> Tensor:
    """Leaky integrate-and-fire along the time axis of `[B, T, ...]`: decayed input, reset to 0."""
    spikes = torch.zeros_like(current)
    membrane = torch.zeros_like(current[:, 0])
    for t in range(current.shape[1]):
        membrane = membrane * (1 - 1 / tau) + current[:, t] / tau
        spikes[:, t] = (membrane >= threshold).to(current.dtype)
        membrane = torch.where(spikes[:, t] > 0, torch.zeros_like(membrane), membrane)
    return spikes


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, tau: float, threshold: float):
        super().__init__()
        self.heads, self.tau, self.threshold = heads, tau, threshold
        for name in ("q", "k", "v", "last"):
            setattr(self, f"{name}_m", nn.Linear(width, width))
            setattr(self, f"{name}_ln", nn.LayerNorm(width))

    def spikes(self, name: str, x: Tensor) -> Tensor:
        current = getattr(self, f"{name}_ln")(getattr(self, f"{name}_m")(x))
        return fire(current, self.tau, self.threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        q, k, v = (self.spikes(name, x) for name in ("q", "k", "v"))
        context = torch.zeros_like(x)
        size = x.shape[-1] // self.heads
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            weights = torch.einsum("btid,btjd->btij", q[..., part], k[..., part])
            context[..., part] = torch.einsum("btij,btjd->btid", weights, v[..., part]) * 0.125
        context = fire(context, self.tau, self.threshold / 2)
        out = self.spikes("last", context)
        return out, [q, k, v, context, out]


class MLP(nn.Module):
    def __init__(self, width: int, tau: float, threshold: float):
        super().__init__()
        self.tau, self.threshold = tau, threshold
        self.fc1, self.ln1 = nn.Linear(width, 4 * width), nn.LayerNorm(4 * width)
        self.fc2, self.ln2 = nn.Linear(4 * width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        inner = fire(self.ln1(self.fc1(x)), self.tau, self.threshold)
        out = fire(self.ln2(self.fc2(inner)), self.tau, self.threshold)
        return out, [inner, out]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, tau: float, threshold: float):
        super().__init__()
        self.attn = Attention(width, heads, tau, threshold)
        self.mlp = MLP(width, tau, threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        out, signals = self.attn(x)
        x = x + out
        out, more = self.mlp(x)
        return x + out, signals + more


class Transform(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc, self.ln = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.fc(x))


class PublishedSpikeBert(nn.Module):
    """Args: `num_labels` classes in stage 2, None in stage 1, which has no classifier."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        num_labels: int | None,
        steps: int,
        tau: float,
        heads: int = 8,
        threshold: float = 1.0,
    ):
        super().__init__()
        self.steps = steps
        self.emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, tau, threshold) for _ in range(depth))
        self.last_ln = nn.LayerNorm(width)
        self.transforms = nn.ModuleList(Transform(width) for _ in range(depth))
        if num_labels is not None:
            self.classifier = nn.Linear(width, num_labels)

    def forward(self, ids: Tensor) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
        """Logits `[B, C]`; each block's output and its projection, means over time, `[B, L, D]`; all spikes."""
        embedded = (self.emb(ids) >= 0).to(self.emb.weight.dtype)  # [B, L, D]
        x = torch.stack([embedded] * self.steps, dim=1)  # [B, T, L, D]
        states, projected, signals = [], [], [x]
        for block, transform in zip(self.blocks, self.transforms, strict=True):
            x, more = block(x)
            signals += more
            states.append(x.mean(1))
            projected.append(transform(states[-1]))
        logits = None
        if hasattr(self, "classifier"):
            logits = self.classifier(self.last_ln(x).mean(2)).mean(1)  # [B, T, C] -> [B, C]
        return logits, states, projected, signals
