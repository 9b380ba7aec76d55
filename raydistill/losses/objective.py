"""The objective of a training: which losses, with which weights.

Shapes: N rows, K classes.
"""

from dataclasses import dataclass

import torch

from raydistill.losses.response import cross_entropy_sum, forward_kl_sum
from raydistill.targets import TeacherTargets


@dataclass(frozen=True)
class Objective:
    """alpha * temperature^2 * KL(teacher || student) + (1 - alpha) * cross-entropy (Hinton et al. 2015, section 2).

    With alpha 0 no teacher is needed.
    """

    temperature: float = 1.0
    alpha: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    def __call__(
        self, student_logits_NK: torch.Tensor, labels_N: torch.Tensor, teacher: TeacherTargets | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss summed over rows, and its parts before weighting, also sums ("cross_entropy", "kl").

        "kl" includes the square of the temperature. Raises ValueError when alpha needs a teacher and there is none.
        """
        cross_entropy = cross_entropy_sum(student_logits_NK, labels_N)
        parts = {"cross_entropy": cross_entropy.detach()}
        if not self.needs_teacher:
            return cross_entropy, parts
        if teacher is None:
            raise ValueError(f"alpha {self.alpha} needs the teacher's logits and the batch carries none")
        kl = forward_kl_sum(teacher.logits_NK, student_logits_NK, temperature=self.temperature)
        parts["kl"] = kl.detach()
        return self.alpha * kl + (1 - self.alpha) * cross_entropy, parts
