"""What is done to both sides' logits before a response loss.

Shapes: N rows, K classes.
"""

import torch
import torch.nn.functional as F

# Under the variance: logits within 1e-4 of each other count as equal, and the gradient of a row whose logits all are,
# as a new head that starts at zero gives, is at most 10,000 times that of the standardised logits and not infinite.
VARIANCE_FLOOR = 1e-8


def standardise(logits_NK: torch.Tensor) -> torch.Tensor:
    """Each row's logits less their mean, over their standard deviation (divided by K), in float32.

    Logit standardisation, Sun et al. 2024, arXiv:2403.01427, section 4.2: applied to teacher and student alike before
    a loss, which then asks for the teacher's relations between classes and not for the range of its logits. The base
    temperature of the paper is the loss's own. The authors' code divides by K - 1, which is the same loss at a
    temperature larger by sqrt(K / (K - 1)). A row of equal logits becomes zeros.
    """
    return F.layer_norm(logits_NK.float(), logits_NK.shape[-1:], eps=VARIANCE_FLOOR)
