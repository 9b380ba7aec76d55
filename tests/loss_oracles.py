"""The losses as float64 loops, written from the papers and from nothing else. A row is a list of logits.

Each of ORACLES takes (teacher rows, student rows, labels, temperature, parameters), the parameters by the names of the
registry, and returns the sum over rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

IGNORED = -100
Row = Sequence[float]
Rows = Sequence[Row]
Oracle = Callable[[Rows, Rows, Sequence[int], float, Mapping[str, float]], float]


def log_softmax(row: Row, temperature: float) -> list[float]:
    largest = max(row)
    total = math.log(sum(math.exp((value - largest) / temperature) for value in row))
    return [(value - largest) / temperature - total for value in row]


def softmax(row: Row, temperature: float) -> list[float]:
    return [math.exp(value) for value in log_softmax(row, temperature)]


def kl(first: Row, second: Row) -> float:
    """sum_k p ln(p / q) of two distributions; 0 ln 0 is 0."""
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True) if p > 0)


def divergence(of: Callable[[Row, Row, Mapping[str, float]], float], power: int) -> Oracle:
    """temperature^power times the sum over rows of a function of both sides' probabilities."""

    def oracle(
        teacher: Rows, student: Rows, labels: Sequence[int], temperature: float, parameters: Mapping[str, float]
    ) -> float:
        rows = zip(teacher, student, strict=True)
        return temperature**power * sum(
            of(softmax(t, temperature), softmax(s, temperature), parameters) for t, s in rows
        )

    return oracle


def mix(first: Row, second: Row, weight: float) -> list[float]:
    return [weight * p + (1 - weight) * q for p, q in zip(first, second, strict=True)]


def jsd(p: Row, q: Row, beta: float) -> float:
    """GKD, equation 1, and its two limits divided by beta and 1 - beta."""
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    return beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta))


def logit_mse(teacher: Rows, student: Rows, labels: Sequence[int], temperature: float, _: Mapping[str, float]) -> float:
    return sum(
        sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / len(t) for t, s in zip(teacher, student, strict=True)
    )


def dkd(
    teacher: Rows, student: Rows, labels: Sequence[int], temperature: float, parameters: Mapping[str, float]
) -> float:
    """DKD, equations 2, 3 and 7; a row without a label takes the teacher's most likely class."""
    total = 0.0
    for t, s, label in zip(teacher, student, labels, strict=True):
        target = max(range(len(t)), key=lambda k: t[k]) if label == IGNORED else label
        p, q = softmax(t, temperature), softmax(s, temperature)
        others = [k for k in range(len(t)) if k != target]
        # The other classes' mass as a sum, not as 1 - p, which would lose it when the label is nearly certain.
        b_teacher = [p[target], sum(p[k] for k in others)]
        b_student = [q[target], sum(q[k] for k in others)]
        among_teacher = softmax([t[k] for k in others], temperature)
        among_student = softmax([s[k] for k in others], temperature)
        total += parameters["target_weight"] * kl(b_teacher, b_student)
        total += parameters["non_target_weight"] * kl(among_teacher, among_student)
    return temperature**2 * total


def correlation_distance(first: Row, second: Row) -> float:
    """1 - Pearson's correlation; 0 where the first is constant, 1 where the second alone is."""
    centred = [[value - sum(row) / len(row) for value in row] for row in (first, second)]
    sizes = [math.sqrt(sum(value**2 for value in row)) for row in (first, second)]
    norms = [math.sqrt(sum(value**2 for value in row)) for row in centred]
    constant = [norm <= 1e-5 * size for norm, size in zip(norms, sizes, strict=True)]
    if any(constant):
        return 0.0 if constant[0] else 1.0
    return 1 - sum(a * b for a, b in zip(*centred, strict=True)) / (norms[0] * norms[1])


def dist(
    teacher: Rows, student: Rows, labels: Sequence[int], temperature: float, parameters: Mapping[str, float]
) -> float:
    """N (beta mean over rows + gamma mean over classes), DIST, equations 8 and 9."""
    if not teacher:
        return 0.0
    p, q = [softmax(t, temperature) for t in teacher], [softmax(s, temperature) for s in student]
    inter = sum(correlation_distance(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    columns = list(zip(zip(*p, strict=True), zip(*q, strict=True), strict=True))
    intra = sum(correlation_distance(a, b) for a, b in columns) / len(columns)
    return len(p) * (parameters["inter_weight"] * inter + parameters["intra_weight"] * intra)


def outcomes(of: Callable[[Row, Row, float], float]) -> Oracle:
    """A divergence of the two outcomes of each class, the softmax of (logit, 0), summed over classes and rows."""

    def oracle(
        teacher: Rows, student: Rows, labels: Sequence[int], temperature: float, parameters: Mapping[str, float]
    ) -> float:
        pairs = [pair for rows in zip(teacher, student, strict=True) for pair in zip(*rows, strict=True)]
        both = [(softmax([t, 0.0], temperature), softmax([s, 0.0], temperature)) for t, s in pairs]
        return temperature**2 * sum(of(p, q, parameters.get("beta", 0.0)) for p, q in both)

    return oracle


ORACLES: dict[str, Oracle] = {
    "forward_kl": divergence(lambda p, q, _: kl(p, q), 2),
    "reverse_kl": divergence(lambda p, q, _: kl(q, p), 2),
    "jsd": divergence(lambda p, q, given: jsd(p, q, given["beta"]), 2),
    "skew_forward_kl": divergence(lambda p, q, given: kl(p, mix(p, q, given["skew"])), 2),
    "skew_reverse_kl": divergence(lambda p, q, given: kl(q, mix(p, q, 1 - given["skew"])), 2),
    "total_variation": divergence(lambda p, q, _: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2, 1),
    "logit_mse": logit_mse,
    "dkd": dkd,
    "dist": dist,
    "binary_kl": outcomes(lambda p, q, _: kl(p, q)),
    "binary_reverse_kl": outcomes(lambda p, q, _: kl(q, p)),
    "binary_jsd": outcomes(jsd),
}


def cross_entropy(student: Rows, labels: Sequence[int], label_smoothing: float = 0.0) -> float:
    """sum_n sum_k -target ln q with the target of Szegedy et al. 2016, section 7."""
    total = 0.0
    for row, label in zip(student, labels, strict=True):
        for k, logprob in enumerate(log_softmax(row, 1.0)):
            target = (1 - label_smoothing) * (k == label) + label_smoothing / len(row)
            total -= target * logprob if label != IGNORED else 0.0
    return total


def binary_cross_entropy(student: Rows, labels: Rows, label_smoothing: float = 0.0) -> float:
    total = 0.0
    for row, row_labels in zip(student, labels, strict=True):
        for logit, label in zip(row, row_labels, strict=True):
            if label != IGNORED:
                target = label * (1 - label_smoothing) + label_smoothing / 2
                present, absent = log_softmax([logit, 0.0], 1.0)
                total -= target * present + (1 - target) * absent
    return total


def standardised(row: Row) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row))
    return [(value - mean) / deviation for value in row]


def numerical_gradient(loss: Callable[[Rows], float], at_NK: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences of a function of rows, float64."""
    gradient = torch.zeros(at_NK.shape, dtype=torch.float64)
    for n, k in torch.cartesian_prod(*(torch.arange(size) for size in at_NK.shape)).tolist():
        values: list[float] = []
        for sign in (1, -1):
            moved = at_NK.double().clone()
            moved[n, k] += sign * step
            values.append(loss(moved.tolist()))
        gradient[n, k] = (values[0] - values[1]) / (2 * step)
    return gradient
