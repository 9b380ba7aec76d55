"""Which trials of a search are trained together as one stacked model.

A group is made of trials whose points were proposed together and that differ in what a stack leaves to its members. It
is written down before it is trained, so that a search that goes on has the same groups, whatever it was stopped at and
however many trials were asked for since.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.config.tune import Tune
from raydistill.errors import UserError
from raydistill.models.configuration import Shape
from raydistill.record.commit import MANIFEST
from raydistill.record.fingerprint import digest, seal, unseal
from raydistill.search.trials import Trial
from raydistill.stages.checkpoints import Checkpoints
from raydistill.stages.cluster import share_for_trials
from raydistill.stages.fusable import why_not_together, why_separate
from raydistill.stages.fused import GroupState
from raydistill.stages.trial import Trials, Work, trial_config, trial_folder, trial_name
from raydistill.students.build import student_shape

FOLDER = "tune/groups"
FILE = "group.json"


@dataclass(frozen=True)
class Group:
    """Trials that are trained together, by their numbers; or were, until something forced them apart."""

    members: tuple[int, ...]
    names: tuple[str, ...]
    apart: str = ""  # why each is trained alone after all

    @property
    def folder(self) -> str:
        """Of its checkpoints."""
        return f"{FOLDER}/{self.members[0]:04d}-{digest(list(self.names))[:10]}"


class Groups:
    """The groups of a search, as far as its points are known."""

    def __init__(self, trials: Trials) -> None:
        assert trials.config.tune is not None
        self._trials, self._tune, self._store = trials, trials.config.tune, trials.run.store
        self._processes = share_for_trials(trials.config, trials.resources).processes
        self._of: dict[int, Group] = {}
        self._standing: list[Group] | None = None
        self._states: dict[str, GroupState] = {}

    def of(self, number: int) -> Group | None:
        """The group that a trial is trained in; None for one that is trained alone."""
        group = self._of.get(number)
        return None if group is None or group.apart else group

    def form(self, batch: Sequence[Trial]) -> None:
        """Takes up the groups of these trials that stand written down, and makes new ones of those that can be."""
        names = {trial.number: trial_name(trial.number, trial.point) for trial in batch}
        if self._standing is None:
            self._standing = list(self._written())
        for group in self._standing:
            if group.members[0] in names and set(group.names) <= set(names.values()):
                self._of |= dict.fromkeys(group.members, group)
        free = [trial for trial in batch if trial.number not in self._of and not self._has_begun(names[trial.number])]
        configs = {t.number: trial_config(self._trials.config, t.point, fused=True) for t in free}
        for members in grouped(configs, self._trials.source.folder(), self._tune, self._processes):
            group = Group(tuple(members), tuple(names[number] for number in members))
            self._write(group)
            self._of |= dict.fromkeys(members, group)

    def _written(self) -> Iterator[Group]:
        for folder in self._store.folders(FOLDER):
            if self._store.exists(name := f"{folder}/{FILE}"):
                try:
                    found = unseal(self._store.read(name), self._store.where(name))
                except UserError:  # it is made anew, as it was
                    continue
                yield Group(tuple(found["members"]), tuple(found["names"]), found["apart"])

    def _has_begun(self, name: str) -> bool:
        """Whether a trial stands alone: ended, or with a checkpoint of its own."""
        folder = trial_folder(name)
        return self._store.exists(f"{folder}/{MANIFEST}") or bool(self._store.folders(f"{folder}/checkpoints"))

    def _write(self, group: Group) -> None:
        self._store.write(f"{group.folder}/{FILE}", seal(asdict(group)))

    def work(self, group: Group, trials: Sequence[Trial], kept: Sequence[int]) -> Work:
        """The group as what a process trains; of its members those in `kept` alone."""
        jobs = {number: self._trials.job(number, trials[number].point, fused=True) for number in group.members}
        fingerprint = _fingerprint(group, [job.fingerprint for job in jobs.values()])
        return Work(jobs, tuple(kept), group.folder, fingerprint)

    def standing(self, group: Group, trials: Sequence[Trial]) -> GroupState:
        """Where a group stood after its newest checkpoint that verifies."""
        if group.folder not in self._states:
            plans = (self._trials.plan(trials[number].point) for number in group.members)
            fingerprint = _fingerprint(group, [plan.fingerprint for plan in plans])
            checkpoints = Checkpoints(self._store, group.folder, fingerprint, GroupState)
            step = checkpoints.newest()
            state = GroupState() if step is None else checkpoints.load(step).state
            assert isinstance(state, GroupState)
            self._states[group.folder] = state
        return self._states[group.folder]

    def split(self, group: Group, reason: str) -> None:
        """From now on each of the group's trials is trained alone, from its beginning."""
        apart = replace(group, apart=reason)
        self._write(apart)
        self._of |= dict.fromkeys(group.members, apart)
        self.clear(group)

    def clear(self, group: Group) -> None:
        """Removes the group's checkpoints: nothing goes on from them."""
        if self._store.exists(f"{group.folder}/checkpoints"):
            self._store.remove(f"{group.folder}/checkpoints")


def grouped(
    configs: Mapping[int, Config], teacher_folder: Path, tune: Tune, processes: int = 1
) -> list[list[int]]:  # fmt: skip
    """Which of these trials of a generation are trained together, by their numbers; two at least.

    As many as may be, but where processes would have nothing to do: then fewer, so that each has some.
    """
    if tune.fused is False:
        return []
    shapes: dict[str, Shape] = {}
    alike: list[tuple[Config, list[int]]] = []
    for number, config in configs.items():
        student = digest(identity(config.student))
        if student not in shapes:
            shapes[student] = student_shape(config.student, teacher_folder)
        if why_separate(config, shapes[student], tune.fused) is not None:
            continue
        kin = next((numbers for first, numbers in alike if why_not_together([first, config]) is None), None)
        if kin is None:
            alike.append((config, [number]))
        else:
            kin.append(number)
    kinds = [numbers for _, numbers in alike]
    alone = len(configs) - sum(map(len, kinds))
    counts = _counts([len(numbers) for numbers in kinds], tune, _working_on_one(tune, processes) - alone)
    parts: list[list[int]] = []
    for numbers, count in zip(kinds, counts, strict=True):
        ends = [part * len(numbers) // count for part in range(count + 1)]
        parts += [numbers[start:end] for start, end in itertools.pairwise(ends)]
    return sorted(part for part in parts if len(part) > 1)


def _working_on_one(tune: Tune, processes: int) -> int:
    """How many processes a generation has for itself: all of them where the next one waits for it."""
    generations = 1 if tune.search == "tpe" else math.ceil(tune.num_trials / tune.generation)
    return math.ceil(processes / generations)


def _counts(sizes: Sequence[int], tune: Tune, wanted: int) -> list[int]:
    """In how many parts trials of so many alike are trained, so that `wanted` processes have one, as far as that goes.

    With fused: true no part has less than two trials; else one may be left alone.
    """
    counts = [math.ceil(size / tune.fused_members) for size in sizes]
    least = 2 if tune.fused is True else 1
    while sum(counts) < wanted:
        larger = [kind for kind, size in enumerate(sizes) if size // (counts[kind] + 1) >= least]
        if not larger:
            break
        counts[max(larger, key=lambda kind: sizes[kind] / counts[kind])] += 1
    return counts


def _fingerprint(group: Group, of_members: Sequence[str]) -> str:
    """What determines a group's checkpoints."""
    return digest(dict(zip(group.names, of_members, strict=True)))
