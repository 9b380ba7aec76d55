"""The fused output layer and loss against the plain formula: python benchmarks/fused_linear.py [--tokens --vocabulary]

Half KL against sparse targets of 20 tokens, half cross-entropy, forward and backward, in float32. The plain formula
makes whole logits and spreads the targets over the vocabulary. Seconds are the processor's, so that other work on the
machine counts little; memory is the peak of what was allocated beside the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from raydistill.losses.fused_linear import token_loss
from raydistill.losses.token_objective import TokenObjective
from raydistill.targets import SparseTargets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random, tokens, vocabulary = torch.Generator().manual_seed(0), arguments.tokens, arguments.vocabulary
    hidden = torch.randn(tokens, arguments.width, generator=random).requires_grad_()
    head = (torch.randn(vocabulary, arguments.width, generator=random) / 16).requires_grad_()
    ids = torch.rand(tokens, vocabulary // 20, generator=random).topk(20).indices * 20
    weights = torch.rand(tokens, 20, generator=random)
    weights /= weights.sum(dim=1, keepdim=True)
    labels = torch.randint(0, vocabulary, (tokens,), generator=random)
    kept = SparseTargets(ids, weights, torch.ones_like(ids, dtype=torch.bool), entropy_N=torch.zeros(tokens))

    def plain() -> None:
        spread = torch.zeros(tokens, vocabulary).scatter_(1, ids, weights)
        logits = hidden @ head.T
        kl = F.kl_div(F.log_softmax(logits, dim=-1), spread, reduction="sum")
        (0.5 * kl + 0.5 * F.cross_entropy(logits, labels, reduction="sum")).backward()

    def fused() -> None:
        token_loss(TokenObjective(alpha=0.5), hidden, head, labels, kept, chunk=arguments.chunk).sum.backward()

    def gradients(loss: Callable[[], None]) -> list[torch.Tensor]:
        hidden.grad = head.grad = None
        loss()
        return [leaf.grad for leaf in (hidden, head) if leaf.grad is not None]

    errors = [((a - b).norm() / a.norm()).item() for a, b in zip(gradients(plain), gradients(fused), strict=True)]
    peaks: list[int] = []
    for loss in (plain, fused):
        hidden.grad = head.grad = None  # before: what is freed within would count as room
        peaks.append(peak(loss))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.rounds):
        for loss, taken in zip((plain, fused), seconds, strict=True):
            started = time.process_time()
            gradients(loss)
            taken.append(time.process_time() - started)
    middle = [statistics.median(taken) for taken in seconds]
    print(
        json.dumps(
            {
                **vars(arguments),
                "seconds_plain_and_fused": [round(value, 2) for value in middle],
                "time": round(middle[1] / middle[0], 2),
                "mebibytes_plain_and_fused": [round(value / 2**20) for value in peaks],
                "memory": round(peaks[1] / peaks[0], 3),
                "largest_relative_difference_of_gradients": max(errors),
            }
        )
    )


def peak(call: Callable[[], None]) -> int:
    """The most bytes that were allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    total = most = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


if __name__ == "__main__":
    main()
