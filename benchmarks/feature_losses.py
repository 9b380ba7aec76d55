"""Time and memory of the feature losses against their plain formulas: python benchmarks/feature_losses.py

Forward and backward, ours and the formula as one would write it in a line or two of torch, in turns on the same inputs;
the table has the medians, their ratio, and the largest memory beyond the inputs in multiples of the inputs' size. The
plain formulas multiply by the mask, so a NaN in the padding reaches them. Exits with 1 when a loss and its formula
disagree by more than 1e-3, and with --limit when a loss takes more than 1.05 times the formula's time or allocates more
than twice its inputs. On a CPU the memory is read from torch's profiler, which may write to stderr.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from raydistill.losses.features import attention_kl_sum, attention_mse_sum, hidden_cosine_sum, hidden_mse_sum
from raydistill.losses.relations import relation_kl_sum, rkd_angle_sum, rkd_distance_sum

MOST_TIME, MOST_MEMORY = 1.05, 2.0
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    ours: Loss
    plain: Loss
    teacher: torch.Tensor
    student: torch.Tensor

    def seconds(self, loss: Loss) -> float:
        leaf = self.student.detach().requires_grad_()
        started = now(leaf)
        loss(self.teacher, leaf).backward()
        return now(leaf) - started

    def extra_memory(self, loss: Loss) -> float:
        """The peak beyond the inputs over the inputs' size, the student's gradient included."""
        leaf = self.student.detach().requires_grad_()
        size = sum(tensor.numel() * tensor.element_size() for tensor in (self.teacher, leaf))
        if leaf.is_cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss(self.teacher, leaf).backward()
            return (torch.cuda.max_memory_allocated() - before) / size
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss(self.teacher, leaf).backward()
        # The profiler's table adds up what each operation took; the peak is in the single allocations, in their order.
        results = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
        held = peak = 0
        for _, change in changes:
            held += change
            peak = max(peak, held)
        return peak / size


def now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def plain_hidden_mse(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    tokens = (student.float() - teacher.float()).pow(2).mean(dim=-1)
    return ((tokens * mask).sum(dim=1) / mask.sum(dim=1)).sum()


def plain_hidden_cosine(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    tokens = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return ((tokens * mask).sum(dim=1) / mask.sum(dim=1)).sum()


def plain_attention_mse(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()
    squares = (student.float() - teacher.float()).pow(2) * pairs
    return (squares.sum(dim=(1, 2, 3)) / (teacher.shape[1] * mask.sum(dim=1) ** 2)).sum()


def plain_attention_kl(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).float()
    terms = F.kl_div(student.float().clamp_min(1e-30).log(), teacher.float(), reduction="none") * pairs
    return (terms.sum(dim=(1, 2, 3)) / (teacher.shape[1] * mask.sum(dim=1))).sum()


def plain_relation(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    def logprobs(vectors: torch.Tensor) -> torch.Tensor:
        split = vectors.float().unflatten(2, (heads, -1)).transpose(1, 2)
        scores = split @ split.transpose(2, 3) / split.shape[3] ** 0.5
        return scores.masked_fill(mask[:, None, None, :] == 0, -1e9).log_softmax(dim=-1)

    queries = F.kl_div(logprobs(student), logprobs(teacher), reduction="none", log_target=True).sum(dim=-1)
    return ((queries.mean(dim=1) * mask).sum(dim=1) / mask.sum(dim=1)).sum()


def plain_rkd_distance(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The differences themselves: the matrix product of the authors' code loses small distances."""

    def distances(vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors.float()
        found = (vectors[:, None] - vectors[None]).pow(2).sum(dim=-1).clamp_min(1e-12).sqrt()
        found = found * (1 - torch.eye(len(vectors), device=vectors.device))
        return found / (found.sum() / (len(vectors) * (len(vectors) - 1)))

    return F.smooth_l1_loss(distances(student), distances(teacher), reduction="sum") / (len(student) - 1)


def plain_rkd_angle(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """The authors' code, https://github.com/lenscloth/RKD, with the paper's mean."""

    def cosines(vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors.float()
        directions = F.normalize(vectors[None] - vectors[:, None], p=2, dim=2)
        return torch.bmm(directions, directions.transpose(1, 2))

    rows = len(student)
    return F.smooth_l1_loss(cosines(student), cosines(teacher), reduction="sum") / ((rows - 1) * (rows - 2))


def cases(arguments: argparse.Namespace) -> list[Case]:
    torch.manual_seed(0)
    rows, length, heads = arguments.rows, arguments.length, arguments.heads
    made = {"device": arguments.device}
    mask = (torch.arange(length, **made) < torch.randint(1, length + 1, (rows, 1), **made)).long()
    dtype = getattr(torch, arguments.dtype)
    wide, also = (torch.randn(rows, length, arguments.teacher_width, **made).to(dtype) for _ in range(2))
    narrow = torch.randn(rows, length, arguments.student_width, **made).to(dtype)
    scores = (
        torch.randn(rows, heads, length, length, **made).masked_fill(mask[:, None, None, :] == 0, -1e9)
        for _ in range(2)
    )
    maps, other_maps = (score.softmax(dim=-1).to(dtype) for score in scores)

    def masked(name: str, ours: Callable, plain: Callable, teacher: torch.Tensor, student: torch.Tensor) -> Case:
        return Case(name, lambda t, s: ours(t, s, mask), lambda t, s: plain(t, s, mask), teacher, student)

    return [
        masked("hidden_mse", hidden_mse_sum, plain_hidden_mse, wide, also),
        masked("hidden_cosine", hidden_cosine_sum, plain_hidden_cosine, wide, also),
        masked("attention_mse", attention_mse_sum, plain_attention_mse, maps, other_maps),
        masked("attention_kl", attention_kl_sum, plain_attention_kl, maps, other_maps),
        Case(
            "relation_kl",
            lambda t, s: relation_kl_sum(t, s, mask, relation_heads=heads),
            lambda t, s: plain_relation(t, s, mask, heads),
            wide,
            narrow,
        ),
        Case("rkd_distance", rkd_distance_sum, plain_rkd_distance, wide[:, 0].clone(), narrow[:, 0].clone()),
        Case("rkd_angle", rkd_angle_sum, plain_rkd_angle, wide[:, 0].clone(), narrow[:, 0].clone()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--teacher-width", type=int, default=768)
    parser.add_argument("--student-width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12, help="attention heads, and relation heads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", action="store_true")
    arguments = parser.parse_args()
    print(f"{'loss':<14}{'ours ms':>10}{'plain ms':>10}{'ratio':>8}{'ours memory':>14}{'plain memory':>14}")
    wrong: list[str] = []
    for case in cases(arguments):
        ours, plain = (loss(case.teacher, case.student).item() for loss in (case.ours, case.plain))
        if abs(ours - plain) > 1e-3 * abs(plain) + 1e-6:
            wrong.append(f"{case.name}: ours {ours}, plain {plain}")
        for loss in (case.ours, case.plain):
            case.seconds(loss)
        times = [(case.seconds(case.ours), case.seconds(case.plain)) for _ in range(arguments.repeats)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        memory = [case.extra_memory(loss) for loss in (case.ours, case.plain)]
        if arguments.limit and (medians[0] > MOST_TIME * medians[1] or memory[0] > MOST_MEMORY):
            wrong.append(f"{case.name}: {medians[0] / medians[1]:.2f} times the time, {memory[0]:.1f} times the inputs")
        print(
            f"{case.name:<14}{1000 * medians[0]:>10.3f}{1000 * medians[1]:>10.3f}{medians[0] / medians[1]:>8.2f}"
            f"{memory[0]:>13.1f}x{memory[1]:>13.1f}x",
            flush=True,
        )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
