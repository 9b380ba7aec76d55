"""Several trainings as one: students of one form over the same batches and cached logits, each with its own settings.

A member of a group has the losses, the metrics and the curves that it has when it is trained alone. Members with the
same seed share their batches and what dropout draws; members with other seeds have batches of their own.

Shapes: M members, B batches of a step (one for each seed), N rows, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raydistill.config.training import Training
from raydistill.data.loader import Batch, Split
from raydistill.data.order import steps_per_epoch
from raydistill.fused.optimizer import MemberOptimizer
from raydistill.fused.stack import Stack
from raydistill.losses.stacked import Targets, stacked_losses
from raydistill.record.store import Store, open_store
from raydistill.stages.checkpoints import Checkpoints, State
from raydistill.stages.job import TrainingJob, build_model, open_split
from raydistill.stages.member import MemberReport, objective_at
from raydistill.stages.steps import dropout_seed, learning_rate, training_device
from raydistill.stages.validation import SCALARS, VALIDATION_TOKENS, batch_sums, metrics_of

Metrics = dict[str, float]


@dataclass
class GroupState(State):
    """Where a group stands: who is left, what each member reached after each epoch and took, and why some failed."""

    members: list[str] = field(default_factory=list[str])
    history: dict[str, list[Metrics]] = field(default_factory=dict[str, list[Metrics]])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    steps_of: dict[str, int] = field(default_factory=dict[str, int])
    seconds_of: dict[str, float] = field(default_factory=dict[str, float])


class FusedGroup:
    """The trainings of `jobs`, by their members' names, as one stacked model.

    They may differ in what `fusable.OWN` names. `folder` is the group's in the run, for its checkpoints, which
    `fingerprint` names; a group that was stopped goes on from the newest one, with the members that were left then.
    Who drops members decides by `history`, and says so again to a group that goes on: a drop is kept by the next
    checkpoint only.
    `post` is told of a member's points as `run_training` tells of its own, with its name. `build` makes a member's
    first model and its tokenizer.
    """

    def __init__(
        self,
        jobs: Mapping[str, TrainingJob],
        *,
        folder: str,
        fingerprint: str,
        post: Callable[[str, dict[str, Any]], None] = lambda member, update: None,
        stopped: Callable[[], bool] = lambda: False,
        build: Callable[[TrainingJob], tuple[Any, Any]] = build_model,
    ) -> None:
        self._jobs, self._post, self._stopped = dict(jobs), post, stopped
        self._first = next(iter(self._jobs.values()))
        self._device = training_device()
        store = open_store(self._first.run_url)
        self._checkpoints = Checkpoints(store, folder, fingerprint, GroupState)
        newest = self._checkpoints.newest()
        checkpoint = None if newest is None else self._checkpoints.load(newest)
        self._state = GroupState(members=list(self._jobs), history={name: [] for name in self._jobs})
        if checkpoint is not None:
            assert isinstance(checkpoint.state, GroupState)
            self._state = checkpoint.state
        self._stack, tokenizer = self._built(build)
        self._optimizer = self._new_optimizer()
        if checkpoint is not None:
            self._restore(checkpoint.weights(), checkpoint.optimizer_state())
        self._rows, self._validation = (
            open_split(self._first, splits, tokenizer) for splits in (self._first.splits, ("validation",))
        )
        settings = self._first.settings
        self._per_pass = steps_per_epoch(self._rows.rows, settings.batch_size)
        self._per_epoch = steps_per_epoch(self._first.epoch_rows, settings.batch_size)
        self._total = self._per_epoch * settings.epochs
        self._reports = {name: self._report_of(name, store) for name in self._state.members}
        self.first_step_at: float | None = None  # when the first step of this process began, seconds since 1970

    def _built(self, build: Callable[[TrainingJob], tuple[Any, Any]]) -> tuple[Stack, Any]:
        tokenizers: list[Any] = []

        def models() -> Iterator[Any]:
            for name in self._state.members:
                model, tokenizer = build(self._jobs[name])
                tokenizers.append(tokenizer)
                yield model

        dtype = torch.bfloat16 if self._first.precision == "bf16" else torch.float32
        return Stack(models(), device=self._device, dtype=dtype), tokenizers[0]

    def _new_optimizer(self) -> MemberOptimizer:
        settings = self._settings()
        return MemberOptimizer(
            self._stack, weight_decay=[s.weight_decay for s in settings], clip=[s.clip for s in settings],
            steps=self._state.step,
        )  # fmt: skip

    def _report_of(self, name: str, store: Store) -> MemberReport:
        return MemberReport(
            self._jobs[name], store, self._state.step, self._device, lambda update: self._post(name, update)
        )

    def _restore(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        for number, name in enumerate(self._state.members):
            own = f"{name}/"
            for values, put in ((weights, self._stack.load), (moments, self._optimizer.restore)):
                put(number, {key.removeprefix(own): value for key, value in values.items() if key.startswith(own)})

    @property
    def members(self) -> tuple[str, ...]:
        """Who is still trained."""
        return tuple(self._state.members)

    @property
    def history(self) -> dict[str, list[Metrics]]:
        """Validation's metrics of every member, the dropped ones too, after each of its epochs."""
        return self._state.history

    @property
    def failed(self) -> dict[str, str]:
        """Members that were dropped because their loss was not finite, with what is said of it."""
        return self._state.failed

    @property
    def step(self) -> int:
        """Optimiser steps of each member that is left so far."""
        return self._state.step

    def taken(self, member: str) -> tuple[int, float]:
        """A member's optimiser steps and its part of the seconds that they took, those before a stop too."""
        return self._state.steps_of.get(member, 0), self._state.seconds_of.get(member, 0.0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self._state.members or self._state.step >= self._total

    def epoch(self) -> dict[str, Metrics] | None:
        """Trains to the end of the next epoch; what every member then reaches on validation, also in `history`.

        None after a request to stop; the state is saved in both cases. A member whose loss is not finite is dropped
        and stands in `failed`.
        """
        assert not self.finished, "the group has ended"
        while True:
            for rows, batches in self._steps_of_pass():
                self._step(rows, batches)
                done = self._state.step % self._per_epoch == 0
                if done or not self._state.members:
                    return self._end_of_epoch()
                every = self._first.settings.checkpoint_every
                if self._stopped():
                    self._save()
                    return None
                if every and self._state.step % every == 0:
                    self._save()

    def drop(self, members: Sequence[str]) -> None:
        """Ends these members' trainings: what they cost until now is all that they cost."""
        if not members:
            return
        left = [number for number, name in enumerate(self._state.members) if name not in members]
        if len(left) == len(self._state.members):
            return
        for name in members:
            if name in self._reports:
                self._reports.pop(name).close()
        self._state.members = [self._state.members[number] for number in left]
        if left:
            self._stack.keep(left)
            self._optimizer.keep(left)

    def weights(self, member: str) -> dict[str, torch.Tensor]:
        """A member's weights by the names of its model, on the CPU."""
        return self._stack.member_weights(self._state.members.index(member))

    def close(self) -> None:
        """Lets go. All that counts was saved after the last epoch, and another group may have gone on from there."""
        for report in self._reports.values():
            report.leave()
        for split in (self._rows, self._validation):
            split.close()

    def _settings(self) -> list[Training]:
        return [self._jobs[name].settings for name in self._state.members]

    def _seeds(self) -> list[int]:
        """The members' different seeds, each once."""
        return list(dict.fromkeys(settings.seed for settings in self._settings()))

    def _steps_of_pass(self) -> Iterator[tuple[int, dict[int, Batch]]]:
        """(rows, the batch of every seed) of the steps that are left of this pass over the rows."""
        settings, step = self._first.settings, self._state.step
        seeds = self._seeds()
        passes = [
            self._rows.training_steps(
                seed=seed, epoch=step // self._per_pass, batch_size=settings.batch_size,
                first_step=step % self._per_pass, rank=0, world=1, accumulation=1, by_length=settings.group_by_length,
            )
            for seed in seeds
        ]  # fmt: skip
        for steps in zip(*passes, strict=True):
            needed = set(self._seeds())
            batches = {s: next(micro()) for s, (_, micro) in zip(seeds, steps, strict=True) if s in needed}
            yield steps[0][0], batches

    def _step(self, rows: int, batches: dict[int, Batch]) -> None:
        self.first_step_at = self.first_step_at or time.time()
        started = time.perf_counter()
        step, settings, seeds = self._state.step, self._settings(), self._seeds()
        batch_of = [seeds.index(s.seed) for s in settings]
        objectives = [objective_at(self._jobs[name], step, self._total) for name in self._state.members]
        chosen = [batches[seed] for seed in seeds]
        dropout = [dropout_seed(seed, step, 0) for seed in seeds]
        logits_MNK = self._stack.logits([batch.inputs for batch in chosen], batch_of, dropout)
        targets = [self._targets(batch) for batch in chosen]
        losses, parts = stacked_losses(objectives, logits_MNK, targets, batch_of)
        (torch.stack(losses).sum() / rows).backward()
        rates = [learning_rate(s, step, self._total) for s in settings]
        norm_M = self._optimizer.step(rates)
        self._state.step = step + 1
        log_every = self._first.settings.log_every
        due = self._state.step % log_every == 0 or self._state.step % self._per_epoch == 0
        share = (time.perf_counter() - started) / len(objectives)
        for number, name in enumerate(self._state.members):
            report, mine = self._reports[name], targets[batch_of[number]]
            if due:
                report.look(objectives[number], logits_MNK[number], mine, rows)
            report.add(losses[number].detach(), parts[number], rows, share, rates[number], norm_M[number])
            self._state.steps_of[name] = self._state.step
            self._state.seconds_of[name] = self._state.seconds_of.get(name, 0.0) + share
        self._state.seconds += time.perf_counter() - started
        if due:
            self._report()

    def _targets(self, batch: Batch) -> Targets:
        teacher = None if batch.teacher is None else batch.teacher.to(self._device)
        return Targets(batch.labels_N.to(self._device), teacher)

    def _report(self) -> None:
        """Adds a point to every member's curves; who is not finite is dropped."""
        broken: dict[str, str] = {}
        for name in self._state.members:
            if problem := self._reports[name].point(self._state.step, self._per_epoch, self._total):
                broken[name] = problem
        self._state.failed |= broken
        self.drop(list(broken))

    def _end_of_epoch(self) -> dict[str, Metrics]:
        found = self.metrics(self._validation) if self._state.members else {}
        for name, values in found.items():
            self._state.history[name].append(values)
            self._reports[name].validation(self._state.step, self._per_epoch, values)
        self._save()
        return found

    def metrics(self, split: Split) -> dict[str, Metrics]:
        """What every member that is left reaches on a split."""
        members, classes, sets = len(self._state.members), len(self._first.labels), False
        sums = torch.zeros(members, SCALARS + 3 * classes, dtype=torch.float64, device=self._device)
        with torch.no_grad():
            for batch in split.length_batches(VALIDATION_TOKENS[self._device.type]):
                sets = batch.labels_N.ndim > 1
                logits_MNK = self._stack.logits([batch.inputs], [0] * members)
                sums += torch.stack([batch_sums(own_NK, batch, classes) for own_NK in logits_MNK])
        found = (metrics_of(own, split, sets=sets) for own in sums)
        return dict(zip(self._state.members, found, strict=True))

    def _save(self) -> None:
        """Commits the group's state and its members' curves. A group in which all failed goes on to fail again."""
        self._report()
        if not self._state.members:
            return
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self._state.members):
            self._reports[name].save()
            weights |= {f"{name}/{key}": value for key, value in self._stack.member_weights(number).items()}
            moments |= {f"{name}/{key}": value for key, value in self._optimizer.state(number).items()}
        self._checkpoints.save(self._state, weights, moments)
