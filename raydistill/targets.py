"""What a batch carries from the teacher's cache to a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's outputs for the rows of a batch, in the batch's order.

    Shapes: logits_NK float32, N rows, K classes in the order of the data's labels.
    """

    logits_NK: torch.Tensor

    def to(self, device: torch.device) -> TeacherTargets:
        return TeacherTargets(self.logits_NK.to(device, non_blocking=True))
