"""The feature losses as float64 loops over plain lists, written from the papers; no torch operation in a formula."""

import math
from collections.abc import Callable
from itertools import permutations

import torch

Vector = list[float]


def hidden_mse_oracle(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> float:
    """TinyBERT, arXiv:1909.10351, section 3.1: MSE over a row's real tokens and the width, summed over rows."""
    total = 0.0
    for t_row, s_row, real in zip(teacher.tolist(), student.tolist(), mask.tolist(), strict=True):
        squares = [
            (t - s) ** 2
            for t_token, s_token, is_real in zip(t_row, s_row, real, strict=True)
            if is_real
            for t, s in zip(t_token, s_token, strict=True)
        ]
        total += sum(squares) / len(squares) if squares else 0.0
    return total


def cosine(a: Vector, b: Vector) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def hidden_cosine_oracle(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> float:
    """DistilBERT, arXiv:1910.01108, section 2: 1 - cos, averaged over a row's real tokens, summed over rows."""
    total = 0.0
    for t_row, s_row, real in zip(teacher.tolist(), student.tolist(), mask.tolist(), strict=True):
        losses = [1 - cosine(t, s) for t, s, is_real in zip(t_row, s_row, real, strict=True) if is_real]
        total += sum(losses) / len(losses) if losses else 0.0
    return total


def attention_oracle(
    teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor, of_query: Callable[[Vector, Vector], float]
) -> float:
    """The mean over heads and a row's real queries of a measure of two lists over the real keys, summed over rows."""
    total = 0.0
    for t_heads, s_heads, real in zip(teacher.tolist(), student.tolist(), mask.tolist(), strict=True):
        if len(t_heads) != len(s_heads):
            t_heads, s_heads = [average(t_heads)], [average(s_heads)]
        places = [place for place, is_real in enumerate(real) if is_real]
        values = [
            of_query([t[query][key] for key in places], [s[query][key] for key in places])
            for t, s in zip(t_heads, s_heads, strict=True)
            for query in places
        ]
        total += sum(values) / len(values) if values else 0.0
    return total


def average(heads: list[list[Vector]]) -> list[Vector]:
    length = range(len(heads[0]))
    return [[sum(head[q][k] for head in heads) / len(heads) for k in length] for q in length]


def mean_square(t: Vector, s: Vector) -> float:
    return sum((a - b) ** 2 for a, b in zip(t, s, strict=True)) / len(t)


def kl(p: Vector, q: Vector) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(scores: Vector) -> Vector:
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def relations(tokens: list[Vector], heads: int) -> list[list[Vector]]:
    """MiniLMv2, arXiv:2012.15828, section 3.1: softmax(A_r A_r^T / sqrt(d_r)) for each relation head."""
    depth = len(tokens[0]) // heads
    found: list[list[Vector]] = []
    for head in range(heads):
        parts = [token[head * depth : (head + 1) * depth] for token in tokens]
        found.append(
            [softmax([sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(depth) for b in parts]) for a in parts]
        )
    return found


def relation_oracle(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor, heads: int) -> float:
    """1 / (A_r |x|) sum over heads and tokens of KL(teacher's relation || student's), summed over rows."""
    total = 0.0
    for t_row, s_row, real in zip(teacher.tolist(), student.tolist(), mask.tolist(), strict=True):
        t_tokens = [token for token, is_real in zip(t_row, real, strict=True) if is_real]
        s_tokens = [token for token, is_real in zip(s_row, real, strict=True) if is_real]
        if not t_tokens:
            continue
        pairs = zip(relations(t_tokens, heads), relations(s_tokens, heads), strict=True)
        sums = sum(kl(p, q) for t_head, s_head in pairs for p, q in zip(t_head, s_head, strict=True))
        total += sums / (heads * len(t_tokens))
    return total


def huber(x: float, y: float) -> float:
    """RKD, arXiv:1904.05068, equation of l_delta in section 3.2.1."""
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def minus(a: Vector, b: Vector) -> Vector:
    return [x - y for x, y in zip(a, b, strict=True)]


def normalised_distances(rows: list[Vector]) -> dict[tuple[int, int], float]:
    pairs = list(permutations(range(len(rows)), 2))
    distances = {(i, j): math.sqrt(sum(x * x for x in minus(rows[i], rows[j]))) for i, j in pairs}
    mean = sum(distances.values()) / len(pairs)
    return {pair: distance / mean if mean else 0.0 for pair, distance in distances.items()}


def rkd_distance_oracle(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """The number of rows times the mean over ordered pairs of different rows."""
    if len(student) < 2:
        return 0.0
    t, s = normalised_distances(teacher.tolist()), normalised_distances(student.tolist())
    return len(student) * sum(huber(t[pair], s[pair]) for pair in t) / len(t)


def rkd_angle_oracle(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """The number of rows times the mean over ordered triples (i, j, k) of different rows of cos at the vertex j."""
    if len(student) < 3:
        return 0.0
    t, s = teacher.tolist(), student.tolist()
    triples = list(permutations(range(len(s)), 3))
    losses = [
        huber(*(cosine(minus(rows[i], rows[j]), minus(rows[k], rows[j])) for rows in (t, s))) for i, j, k in triples
    ]
    return len(s) * sum(losses) / len(triples)


def finite_difference(of_student: Callable[[torch.Tensor], float], student: torch.Tensor) -> torch.Tensor:
    """The gradient of a function of a float64 tensor, by central differences of 1e-5."""
    gradient = torch.zeros_like(student, dtype=torch.float64)
    for place in range(student.numel()):
        values: list[float] = []
        for step in (1e-5, -1e-5):
            moved = student.double().clone()
            moved.view(-1)[place] += step
            values.append(of_student(moved))
        gradient.view(-1)[place] = (values[0] - values[1]) / 2e-5
    return gradient
