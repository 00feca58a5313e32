"""Keys and values of the last layer, of student and teacher, for the attention-relation loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..fused_spikebert import unpack_tokens

# The Linears that make keys and values, by their names in BERT, DeBERTa, MPNet, DistilBERT and in later encoders.
KEY_NAMES = {"key", "key_proj", "k", "k_lin", "k_proj"}
VALUE_NAMES = {"value", "value_proj", "v", "v_lin", "v_proj"}
PACKED_NAMES = {"Wqkv"}  # ModernBERT: query, key and value side by side


def key_and_value_modules(teacher: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The modules of the teacher's last layer whose outputs are its keys and values; one and the same if packed.

    Raises:
        ValueError: there are none under the names that are known.
    """
    last = [
        [module for name, module in teacher.base_model.named_modules() if name.rpartition(".")[2] in names]
        for names in (KEY_NAMES | PACKED_NAMES, VALUE_NAMES | PACKED_NAMES)
    ]
    if not all(last):
        raise ValueError(
            f"The attention-relation loss finds no keys and values in {type(teacher).__name__}. Set "
            "attention_relation_weight=0, or take another teacher."
        )
    return last[0][-1], last[1][-1]


@contextmanager
def recorded_keys_and_values(teacher: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, a call of the teacher leaves the keys and values of its last layer, `[B, L, D]` each, in the list."""
    modules = key_and_value_modules(teacher)
    found: dict[int, Tensor] = {}
    result: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        found[id(module)] = output
        result[:] = [part for module in modules if (part := found.get(id(module))) is not None]
        if modules[0] is modules[1]:
            result[:] = list(output.chunk(3, dim=-1)[1:])

    handles = [module.register_forward_hook(keep) for module in set(modules)]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def student_keys_and_values(layer: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Keys and values of a block for the input that it was called with: means over time steps, `[B, L, D]` each.

    They are the currents in front of its key and value neurons, which are real numbers as the teacher's are. The two
    products are computed once more here, so that the block itself may take its fused path.
    """
    hidden_states, *_, tokens = args  # `[T, B, L, D]`, or packed, `[T, N, D]`
    attention = layer.attention
    spikes = attention.input_neuron(attention.input_norm(hidden_states))
    currents = [
        attention.key_norm(attention.key(spikes)).mean(0),
        attention.value_norm(attention.value(spikes)).mean(0),
    ]
    return currents if tokens is None else [unpack_tokens(current, tokens) for current in currents]
