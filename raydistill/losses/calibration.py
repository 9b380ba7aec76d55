"""The temperature at which a model's probabilities fit the labels best.

Shapes: N rows, K classes.
"""

import torch

from raydistill.losses.response import IGNORED_LABEL

# A model that is right on every row has no finite best temperature, one that knows nothing has no largest.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


def fit_temperature(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> float:
    """The temperature from 0.01 to 100 that minimises the mean of -log softmax(logits / temperature)[label].

    Temperature scaling, Guo et al. 2017, arXiv:1706.04599, section 4.2; fit it on held-out rows, and divide the
    teacher's logits by it before distilling. Rows with the label -100 do not count. The objective is convex in
    1 / temperature, so its slope is searched for a zero there: Newton's steps, halving the bracket where a step leaves
    it or gains too little. In float64, to a relative 1e-10. Logits equal within each row fit at every temperature: 1.
    Raises ValueError on a shape mismatch, without a labelled row, on a label outside the classes or a logit that is
    not finite.
    """
    if logits_NK.shape[:1] != labels_N.shape:
        raise ValueError(f"{logits_NK.shape[0]} rows of logits but labels of shape {tuple(labels_N.shape)}")
    labelled_N = labels_N != IGNORED_LABEL
    logits_NK, labels_N = logits_NK.detach()[labelled_N].double(), labels_N[labelled_N].long()
    if len(labels_N) == 0:
        raise ValueError("a temperature is fitted to labelled rows and every row's label is -100")
    if labels_N.min() < 0 or labels_N.max() >= logits_NK.shape[1]:
        raise ValueError(f"labels must be from 0 to {logits_NK.shape[1] - 1}, found {labels_N.unique().tolist()}")
    if not logits_NK.isfinite().all():
        raise ValueError("logits must be finite to fit a temperature")
    # Relative to the label's own, so that a certain row's slope is not lost beside large logits.
    margins_NK = logits_NK - logits_NK.gather(1, labels_N.unsqueeze(1))
    slope, _ = _slope_and_curvature(margins_NK, 1.0)
    if slope == 0:
        return 1.0
    end = 1 / LOWEST_TEMPERATURE if slope < 0 else 1 / HIGHEST_TEMPERATURE
    if _slope_and_curvature(margins_NK, end)[0] * slope >= 0:
        return 1 / end
    return 1 / _zero_of_slope(margins_NK, *sorted((1.0, end)))


def fit_label_temperature(logits_NK: torch.Tensor, labels: torch.Tensor) -> float:
    """fit_temperature where labels are classes, (N,), and fit_binary_temperature where they are sets, (N, K)."""
    return (fit_binary_temperature if labels.ndim > 1 else fit_temperature)(logits_NK, labels)


def fit_binary_temperature(logits_NK: torch.Tensor, labels_NK: torch.Tensor) -> float:
    """fit_temperature for sets of labels: each class of each row is a question, sigmoid(logit / temperature) its yes.

    labels_NK are 1, 0, or -100 where that is unknown. A sigmoid is the softmax of (0, logit), so that this is
    fit_temperature of N K rows with two classes. Raises ValueError as it does, and on a shape mismatch.
    """
    if logits_NK.shape != labels_NK.shape:
        raise ValueError(f"logits {tuple(logits_NK.shape)} and labels {tuple(labels_NK.shape)} differ")
    yes = logits_NK.detach().flatten()
    return fit_temperature(torch.stack([torch.zeros_like(yes), yes], dim=1), labels_NK.flatten())


def _slope_and_curvature(margins_NK: torch.Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL by 1 / temperature: mean and variance of the margins under it."""
    probs_NK = torch.softmax(margins_NK * inverse, dim=1)
    slope_N1 = (probs_NK * margins_NK).sum(dim=1, keepdim=True)
    curvature = (probs_NK * (margins_NK - slope_N1) ** 2).sum(dim=1).mean()
    return slope_N1.mean().item(), curvature.item()


def _zero_of_slope(margins_NK: torch.Tensor, low: float, high: float) -> float:
    """Where the rising slope is 0, which it is between low and high."""
    inverse, last_step = 1.0, high - low
    for _ in range(200):
        slope, curvature = _slope_and_curvature(margins_NK, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = -slope / curvature if curvature > 0 else high - low
        if not low <= inverse + step <= high or abs(step) > last_step / 2:
            step = (low + high) / 2 - inverse
        if abs(step) <= 1e-10 * inverse:
            return inverse + step
        inverse, last_step = inverse + step, abs(step)
    raise AssertionError(f"no zero of the slope between {low} and {high}")
