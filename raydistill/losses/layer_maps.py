"""Which layer of the teacher a layer of the student learns from.

Layers are the transformer's own, counted from 0; the embeddings are not one of them. Layer i's hidden states are its
output, which is `hidden_states[i + 1]` in transformers.
"""

from collections.abc import Sequence
from typing import Literal

LayerPairs = tuple[tuple[int, int], ...]
Strategy = Literal["uniform", "last", "skip", "final"]


def layer_map(strategy: Strategy | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int) -> LayerPairs:
    """Pairs (student layer, teacher layer), by a strategy or, after a check, as they are given.

    - `uniform`: the first to the first, the last to the last, those between at even distances (halves round up); a
      student of one layer learns from the last. A student may be deeper than its teacher.
    - `last`: all n layers of the student to the teacher's last n.
    - `final`: the student's last layer to the teacher's last, and no other.
    - `skip`: to every k-th layer up to the last, with k = teacher_layers // student_layers (BERT-PKD, Sun et al. 2019,
      arXiv:1908.09355, section 3.2, where 12 to 6 skips every other one; here the last is always among them).

    With 12 and 5 layers: uniform 0 3 6 8 11, last 7 8 9 10 11, skip 3 5 7 9 11. Raises ValueError for a number of
    layers that is not positive, a student too deep for the strategy, and pairs that name a layer that is not there,
    occur twice or are none at all.
    """
    for owner, layers in (("student", student_layers), ("teacher", teacher_layers)):
        if layers < 1:
            raise ValueError(f"the {owner} has {layers} layers, expected at least 1")
    if not isinstance(strategy, str):
        return _checked(tuple(strategy), student_layers, teacher_layers)
    if strategy == "uniform":
        return _uniform(student_layers, teacher_layers)
    if strategy == "final":
        return ((student_layers - 1, teacher_layers - 1),)
    if strategy not in ("last", "skip"):
        raise ValueError(f"layer map: found {strategy!r}. Use uniform, last, skip, final or pairs of layers")
    if student_layers > teacher_layers:
        raise ValueError(
            f"layer map {strategy}: the student has {student_layers} layers, the teacher {teacher_layers}."
            " Use uniform or pairs of layers"
        )
    step = 1 if strategy == "last" else teacher_layers // student_layers
    return tuple((i, teacher_layers - 1 - step * (student_layers - 1 - i)) for i in range(student_layers))


def _uniform(student_layers: int, teacher_layers: int) -> LayerPairs:
    """i * (teacher_layers - 1) / (student_layers - 1), rounded; int(i * teacher / student) never reaches the last."""
    if student_layers == 1:
        return ((0, teacher_layers - 1),)
    gaps = student_layers - 1
    return tuple((i, (2 * i * (teacher_layers - 1) + gaps) // (2 * gaps)) for i in range(student_layers))


def _checked(pairs: LayerPairs, student_layers: int, teacher_layers: int) -> LayerPairs:
    if not pairs:
        raise ValueError("layer map: found no pairs of layers. Give at least one, or uniform, last, skip or final")
    for pair in pairs:
        if len(pair) != 2 or any(type(layer) is not int for layer in pair):
            raise ValueError(f"layer map: found {pair!r}, expected a pair of whole numbers (student, teacher)")
        for owner, layer, layers in (("student", pair[0], student_layers), ("teacher", pair[1], teacher_layers)):
            if not 0 <= layer < layers:
                raise ValueError(
                    f"layer map: the {owner} has no layer {layer}, it has {layers}, counted from 0 to {layers - 1}"
                )
    twice = [pair for pair in pairs if pairs.count(pair) > 1]
    if twice:
        raise ValueError(f"layer map: the pair {twice[0]} occurs twice. Give it once, with a larger weight")
    return pairs
