"""Time and memory of each loss against its obvious eager formula: python benchmarks/losses.py [--rows N --classes K]

Each loss runs forward and backward in turn with the formula that its paper's readers would write, on logits made
here; "time" is the ratio of the medians (below 1: ours is faster). Memory is the peak of what was allocated beside the
inputs and the student's gradient, as a multiple of the bytes of both sides' logits. With --limit the script fails
where a loss takes more than 1.05 times the formula's time or more than twice its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from raydistill.losses.multilabel import binary_cross_entropy_sum
from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.losses.response import cross_entropy_sum
from raydistill.losses.transforms import standardise

TEMPERATURE = 2.0
MOST_TIME, MOST_MEMORY = 1.05, 2.0
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return F.softmax(logits / TEMPERATURE, dim=-1)


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits / TEMPERATURE, dim=-1)


def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL of two sides given as log-probabilities, the way TRL and torchtune write it."""
    return F.kl_div(second, first, reduction="sum", log_target=True) * TEMPERATURE**2


def mixed(first: torch.Tensor, second: torch.Tensor, weight: float) -> torch.Tensor:
    logs = torch.log(torch.tensor([weight, 1 - weight], device=first.device))
    return torch.logsumexp(torch.stack([first + logs[0], second + logs[1]]), dim=0)


def jsd(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    middle = mixed(t, s, 0.5)
    return 0.5 * kl(t, middle) + 0.5 * kl(s, middle)


def dkd(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the authors' mdistiller."""
    target = F.one_hot(labels, teacher.shape[1]).bool()

    def both(probs: torch.Tensor) -> torch.Tensor:
        return torch.stack([(probs * target).sum(1), (probs * ~target).sum(1)], dim=1)

    among = [logprobs(side - 1000.0 * TEMPERATURE * target) for side in (teacher, student)]
    return kl(both(probabilities(teacher)).log(), both(probabilities(student)).log()) + 8 * kl(*among)


def correlations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def dist(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """As the authors' code."""
    t, s = probabilities(teacher), probabilities(student)
    return len(t) * (2 * (1 - correlations(t, s).mean()) + 2 * (1 - correlations(t.T, s.T).mean()))


def outcomes(logits: torch.Tensor) -> torch.Tensor:
    """log sigmoid and log (1 - sigmoid)."""
    return torch.stack([F.logsigmoid(logits / TEMPERATURE), F.logsigmoid(-logits / TEMPERATURE)])


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return F.one_hot(labels, classes).float()


EAGER: dict[str, Loss] = {
    "forward_kl": lambda t, s, _: kl(logprobs(t), logprobs(s)),
    "reverse_kl": lambda t, s, _: kl(logprobs(s), logprobs(t)),
    "jsd": lambda t, s, _: jsd(logprobs(t), logprobs(s)),
    "skew_forward_kl": lambda t, s, _: kl(logprobs(t), mixed(logprobs(t), logprobs(s), 0.1)),
    "skew_reverse_kl": lambda t, s, _: kl(logprobs(s), mixed(logprobs(t), logprobs(s), 0.9)),
    "total_variation": lambda t, s, _: TEMPERATURE / 2 * (probabilities(t) - probabilities(s)).abs().sum(),
    "logit_mse": lambda t, s, _: F.mse_loss(s, t, reduction="sum") / t.shape[1],
    "dkd": dkd,
    "dist": lambda t, s, _: dist(t, s),
    "binary_kl": lambda t, s, _: kl(outcomes(t), outcomes(s)),
    "binary_reverse_kl": lambda t, s, _: kl(outcomes(s), outcomes(t)),
    "binary_jsd": lambda t, s, _: jsd(outcomes(t), outcomes(s)),
    "cross_entropy": lambda _, s, labels: F.cross_entropy(s, labels, reduction="sum", label_smoothing=0.1),
    "binary_cross_entropy": lambda _, s, labels: F.binary_cross_entropy_with_logits(
        s, one_hot(labels, s.shape[1]), weight=one_hot(labels, s.shape[1]) != -100, reduction="sum"
    ),
    "standardise": lambda _, s, __: (((s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-7)) ** 3).sum(),
}


def ours(kind: str) -> Loss:
    """The project's own by the same name."""
    if kind == "cross_entropy":
        return lambda _, s, labels: cross_entropy_sum(s, labels, label_smoothing=0.1)
    if kind == "binary_cross_entropy":
        return lambda _, s, labels: binary_cross_entropy_sum(s, one_hot(labels, s.shape[1]))
    if kind == "standardise":
        return lambda _, s, __: (standardise(s) ** 3).sum()
    return lambda t, s, labels: RESPONSE_LOSSES[kind](t, s, labels, temperature=TEMPERATURE, parameters={})


def once(loss: Loss, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    started = time.perf_counter()
    loss(*inputs).backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(loss: Loss, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> int:
    """The most that was allocated at a time; the gradient is there before."""
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        once(loss, inputs)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", action="store_true")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.rows, arguments.classes)
    teacher, student = (3 * torch.randn(shape, generator=generator).to(arguments.device) for _ in range(2))
    labels = torch.randint(arguments.classes, shape[:1], generator=generator).to(arguments.device)
    inputs = (teacher, student.requires_grad_(), labels)
    student.grad = torch.zeros_like(student)
    print(f"{arguments.rows} rows, {arguments.classes} classes, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'loss':<22}{'ms':>9}{'eager ms':>10}{'time':>7}{'memory':>8}{'eager memory':>14}")
    over: list[str] = []
    for kind, eager in EAGER.items():
        loss = ours(kind)
        seconds = [(once(loss, inputs), once(eager, inputs)) for _ in range(arguments.repeats + 2)][2:]
        mine, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
        memory = [peak_bytes(each, inputs) / (teacher.nbytes + student.nbytes) for each in (loss, eager)]
        print(
            f"{kind:<22}{mine * 1e3:>9.3f}{theirs * 1e3:>10.3f}{mine / theirs:>7.2f}{memory[0]:>8.2f}{memory[1]:>14.2f}"
        )
        if mine > MOST_TIME * theirs or memory[0] > MOST_MEMORY * 1.02:
            over.append(kind)
    if arguments.limit and over:
        sys.exit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
