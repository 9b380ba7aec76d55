"""Projections of the student's features to the teacher's width, for the losses that compare them number by number.

Shapes: N rows, L tokens, W the student's width, V the teacher's.
"""

from collections.abc import Sequence

import torch


class Projections(torch.nn.Module):
    """One learned map from the student's width to the teacher's for each pair of widths; identity where they are equal.

    Linear with a bias, after it a LayerNorm where `layer_norm` is set (TinyBERT's W_h, Jiao et al. 2020,
    arXiv:1909.10351, section 3.1, has neither). Give its parameters to the student's optimizer. It is no
    part of the student, so the student is saved without it. Weights are normal with standard deviation
    1 / sqrt(student's width), which keeps the size of what goes in, and depend on the seed alone: torch's global random
    state is neither read nor changed. Raises ValueError for a width that is not positive.
    """

    def __init__(self, widths: Sequence[tuple[int, int]], *, seed: int, layer_norm: bool = False) -> None:
        """`widths`: pairs (student's, teacher's), in the order in which `forward` counts them."""
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.maps = torch.nn.ModuleList([_projection(*pair, random=random, layer_norm=layer_norm) for pair in widths])

    def forward(self, number: int, student_NLW: torch.Tensor) -> torch.Tensor:
        """The student's features at the teacher's width (NLV) by the map with this number.

        Where the map is learned, in the dtype of its weights (float32), unless autocast is on; else unchanged.
        """
        projection = self.maps[number]
        if isinstance(projection, torch.nn.Identity):
            return student_NLW
        return projection(student_NLW.to(next(projection.parameters()).dtype))


def _projection(student: int, teacher: int, *, random: torch.Generator, layer_norm: bool) -> torch.nn.Module:
    if student < 1 or teacher < 1:
        raise ValueError(f"projection: found the widths {student} (student) and {teacher} (teacher), expected positive")
    if student == teacher:
        return torch.nn.Identity()
    linear = torch.nn.Linear(student, teacher, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.normal_(0.0, student**-0.5, generator=random)
        linear.bias.zero_()
    return torch.nn.Sequential(linear, torch.nn.LayerNorm(teacher)) if layer_norm else linear
