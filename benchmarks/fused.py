"""Students trained as one stack against as many trained alone: python benchmarks/fused.py [--members 8 16]

A BERT of 2 layers learns from logits made here, rows of 10 to 30 tokens. In turns, on the same batches: as many steps
of the ordinary loop's engine as there are members, and one step of their stack, losses and meters included. A table has
the medians in milliseconds of processor time, which other work on the machine disturbs least, the ratio in processor
and in wall time, and the seconds that it takes to begin (weights made, imports done, no Ray). "trials" is the ratio of
trials per hour where each takes --steps steps, beginning included. With --limit the script fails below that ratio.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raydistill.config.training import Training
from raydistill.engine import Engine
from raydistill.fused.optimizer import MemberOptimizer
from raydistill.fused.stack import Stack
from raydistill.losses.objective import Objective
from raydistill.losses.stacked import Targets, stacked_losses
from raydistill.stages.meter import Meter
from raydistill.targets import TeacherTargets

CLASSES, SHORTEST, LONGEST = 77, 10, 30
CPU = torch.device("cpu")
Step = Callable[[dict[str, torch.Tensor], Targets], None]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    members: int
    width: int
    precision: str


def student(seed: int, case: Case, options: argparse.Namespace) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": options.vocabulary, "hidden_size": case.width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 4 * case.width, "num_labels": CLASSES, "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": options.dropout, "attn_implementation": "eager",
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**sizes)).train()


def batch(options: argparse.Namespace) -> tuple[dict[str, torch.Tensor], Targets]:
    lengths = torch.randint(SHORTEST, LONGEST + 1, (options.rows,))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, options.vocabulary, mask.shape) * mask
    labels = torch.randint(0, CLASSES, (options.rows,))
    targets = Targets(labels, TeacherTargets(torch.randn(options.rows, CLASSES)))
    return {"input_ids": ids, "attention_mask": mask}, targets


def alone(case: Case, options: argparse.Namespace, objective: Objective) -> Step:
    """A step of one training as the ordinary loop takes it."""
    engine = Engine(student(0, case, options), Training(), precision=case.precision, device=CPU)
    meter = Meter(objective.part_names, CPU)

    def step(inputs: dict[str, torch.Tensor], targets: Targets) -> None:
        torch.manual_seed(0)
        loss, parts = objective(engine.logits(inputs), targets.labels, targets.teacher)
        meter.add(loss.detach(), parts, len(targets.labels))
        engine.backward(loss, len(targets.labels))
        engine.step(1e-4)
        meter.end_step(0.0)

    return step


def stacked(case: Case, options: argparse.Namespace, objectives: list[Objective]) -> Step:
    """A step of all members together."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    stack = Stack((student(n, case, options) for n in range(case.members)), device=CPU, dtype=dtype)
    optimizer = MemberOptimizer(stack, weight_decay=[0.01] * case.members, clip=[1.0] * case.members)
    meters = [Meter(o.part_names, CPU) for o in objectives]

    def step(inputs: dict[str, torch.Tensor], targets: Targets) -> None:
        shared = [0] * case.members
        losses, parts = stacked_losses(objectives, stack.logits([inputs], shared, [0]), [targets], shared)
        (torch.stack(losses).sum() / len(targets.labels)).backward()
        optimizer.step([1e-4] * case.members)
        for meter, loss, own in zip(meters, losses, parts, strict=True):
            meter.add(loss.detach(), own, len(targets.labels))
            meter.end_step(0.0)

    return step


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the processor and of the wall."""
    processor, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - processor, time.perf_counter() - wall


def line(case: Case, options: argparse.Namespace) -> tuple[str, float]:
    """A line of the table, and its ratio of trials per hour."""
    objectives = [Objective(temperature=2.0 + 0.5 * n, alpha=0.9) for n in range(case.members)]
    steps: dict[str, Step] = {}
    begins = {
        "alone": timed(lambda: steps.update(alone=alone(case, options, objectives[0])))[0],
        "stack": timed(lambda: steps.update(stack=stacked(case, options, objectives)))[0],
    }
    found: dict[str, list[tuple[float, float]]] = {"alone": [], "stack": []}
    for number in range(options.rounds + 2):
        inputs, targets = batch(options)
        taken = {
            "alone": timed(lambda i=inputs, t=targets: [steps["alone"](i, t) for _ in range(case.members)]),
            "stack": timed(lambda i=inputs, t=targets: steps["stack"](i, t)),
        }
        if number >= 2:  # the first ones make oneDNN's kernels
            for name, times in taken.items():
                found[name].append(times)
    processor, wall = (
        {name: statistics.median(t[which] for t in times) for name, times in found.items()} for which in (0, 1)
    )
    whole = {
        "alone": case.members * begins["alone"] + options.steps * processor["alone"],
        "stack": begins["stack"] + options.steps * processor["stack"],
    }
    trials = whole["alone"] / whole["stack"]
    cells = (
        f"{case.members}", f"{case.width}", case.precision, f"{processor['alone'] * 1e3:.0f}",
        f"{processor['stack'] * 1e3:.0f}", f"{processor['alone'] / processor['stack']:.2f}",
        f"{wall['alone'] / wall['stack']:.2f}", f"{case.members * begins['alone']:.1f}", f"{begins['stack']:.1f}",
        f"{trials:.2f}",
    )  # fmt: skip
    return " | ".join(("", *cells, "")).strip(), trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="of a trial, for the ratio of trials per hour")
    parser.add_argument("--limit", type=float, help="fail where fewer trials per hour come out of the stack")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        print_table(options)


def print_table(options: argparse.Namespace) -> None:
    alone(Case(1, 32, "fp32"), options, Objective())  # imports
    print(
        "members | width | precision | alone, ms | stack, ms | ratio | ratio, wall | begin alone, s | stack, s | trials"
    )
    slowest = float("inf")
    for width in options.widths:
        for precision in options.precisions:
            for members in options.members:
                text, trials = line(Case(members, width, precision), options)
                slowest = min(slowest, trials)
                print(text, flush=True)
    if options.limit is not None and slowest < options.limit:
        sys.exit(f"{slowest:.2f} times the trials per hour, expected {options.limit}")


if __name__ == "__main__":
    main()
