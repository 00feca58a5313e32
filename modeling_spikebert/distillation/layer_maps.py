"""Which of the teacher's layers teaches which layer of the student; layers count from 1."""

from collections.abc import Sequence


def uniform_layer_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Evenly spread, ending at the teacher's last layer.

    The published choice, every `12 // depth`-th layer from the first, never reaches the last one at depth 6.
    """
    return [max(1, round(i * num_teacher_layers / num_student_layers)) for i in range(1, num_student_layers + 1)]


def last_layer_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """The teacher's last layers (PKD-Last, Sun et al., EMNLP 2019); a deeper student repeats the first of them."""
    return [max(1, num_teacher_layers - num_student_layers + i) for i in range(1, num_student_layers + 1)]


def skip_layer_map(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Every `num_teacher_layers // num_student_layers`-th layer from the bottom (PKD-Skip, Sun et al., EMNLP 2019).

    Where the depths do not divide, it ends below the teacher's last layer: 5 layers take 2, 4, 6, 8, 10 of 12.
    """
    stride = max(1, num_teacher_layers // num_student_layers)
    return [min(i * stride, num_teacher_layers) for i in range(1, num_student_layers + 1)]


LAYER_MAPS = {"uniform": uniform_layer_map, "last": last_layer_map, "skip": skip_layer_map}


def resolve_layer_map(
    layer_map: Sequence[int] | str | None, num_student_layers: int, num_teacher_layers: int
) -> list[int]:
    """The teacher's layer for each layer of the student.

    Args:
        layer_map: a name of `LAYER_MAPS` (`None` is "uniform"), or the layers themselves.

    Raises:
        ValueError: layers of another number than the student's, that the teacher does not have, or that do not end at
            its last.
    """
    if layer_map is None or isinstance(layer_map, str):
        return LAYER_MAPS[layer_map or "uniform"](num_student_layers, num_teacher_layers)
    layers = list(layer_map)
    if len(layers) != num_student_layers:
        raise ValueError(
            f"layer_map has {len(layers)} entries, but the student has {num_student_layers} layers. Leave it out for "
            "an even spread."
        )
    if not all(1 <= layer <= num_teacher_layers for layer in layers):
        raise ValueError(f"layer_map must lie between 1 and {num_teacher_layers}, the teacher's depth, got {layers}.")
    if layers[-1] != num_teacher_layers:
        raise ValueError(f"layer_map must end at the teacher's last layer, {num_teacher_layers}, got {layers}.")
    return layers
