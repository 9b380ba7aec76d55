"""The points of a search, generation by generation: a function of the settings and of earlier results alone.

No two trials have the same point. Nothing is kept between two calls, so that a search that goes on after a stop
proposes what it would have proposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from raydistill.config.tune import Dimension, Tune
from raydistill.search.rungs import generation_end
from raydistill.search.space import Point, draw, every_point, grid, point_id, rounded
from raydistill.search.trials import Trial

ATTEMPTS = 200  # draws of a point that is new, before the space is gone through in order


def next_points(tune: Tune, trials: Sequence[Trial]) -> list[Point] | None:
    """The points of the trials up to the end of the generation; none at the search's end, None while it must wait.

    Only TPE waits: until every trial of earlier generations has ended, or stands at the screen.
    """
    if len(trials) >= tune.num_trials:
        return []
    end = generation_end(tune, len(trials))
    if tune.search == "tpe" and not all(_is_told(tune, trial) for trial in _earlier(tune, trials)):
        return None
    taken, points = {point_id(trial.point) for trial in trials}, list[Point]()
    while len(trials) + len(points) < end:
        points.append(_propose(tune, trials, points, taken))
        taken.add(point_id(points[-1]))
    return points


def _earlier(tune: Tune, trials: Sequence[Trial]) -> Sequence[Trial]:
    """The trials of the generations before the one that comes next."""
    return trials[: len(trials) // tune.generation * tune.generation]


def _is_told(tune: Tune, trial: Trial) -> bool:
    return trial.has_ended or (tune.scheduler == "screen" and len(trial.curve) >= tune.first_rung)


def _propose(tune: Tune, trials: Sequence[Trial], mates: Sequence[Point], taken: set[str]) -> Point:
    number = len(trials) + len(mates)
    if tune.search == "grid":
        return next(itertools.islice(grid(tune.space), number, None))
    if tune.search == "tpe":
        point = _by_tpe(tune, trials, mates, number)
        if point_id(point) not in taken:
            return point
    for attempt in range(ATTEMPTS):
        point = draw(tune.space, np.random.default_rng([tune.seed, number, attempt]))
        if point_id(point) not in taken:
            return point
    return next(point for point in every_point(tune.space) if point_id(point) not in taken)


def _by_tpe(tune: Tune, trials: Sequence[Trial], mates: Sequence[Point], number: int) -> Point:
    """The point that a tree of Parzen estimators proposes, Bergstra et al. 2011, as Optuna has it.

    It is told the results of earlier generations; of its own generation it knows the points.
    """
    if tune.seed_points == "grid" and number < tune.grid_size:
        return next(itertools.islice(grid(tune.space), number, None))
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {name: _distribution(tune.space[name]) for name in sorted(tune.space)}
    seed = int(np.random.SeedSequence([tune.seed, number]).generate_state(1)[0])
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True), direction="maximize"
    )  # fmt: skip
    earlier = _earlier(tune, trials)
    for trial in earlier:
        study.add_trial(_told(tune, trial, kinds))
    for point in [*(trial.point for trial in trials[len(earlier) :]), *mates]:
        study.add_trial(
            optuna.trial.create_trial(
                params=_encoded(tune, point), distributions=kinds, state=optuna.trial.TrialState.RUNNING
            )
        )
    proposed = study.ask(kinds).params
    return {name: _decoded(tune.space[name], proposed[name]) for name in sorted(tune.space)}


def _told(tune: Tune, trial: Trial, kinds: dict[str, Any]) -> Any:
    """An ended trial as Optuna knows them: complete, pruned or failed."""
    from optuna.trial import TrialState, create_trial

    # At the screen all count by what they reached there, whatever those that went on reached later.
    values = trial.values(tune.metric)[: tune.first_rung if tune.scheduler == "screen" else None]
    finite = {epoch: value for epoch, value in enumerate(values, 1) if np.isfinite(value)}
    state, outcome = TrialState.PRUNED, None
    if trial.status == "failed" or not finite:
        state = TrialState.FAIL
    elif trial.status == "finished" or tune.scheduler == "screen":
        state, outcome = TrialState.COMPLETE, max(finite.values())
    return create_trial(
        params=_encoded(tune, trial.point), distributions=kinds, state=state, value=outcome, intermediate_values=finite
    )


def as_optuna_knows_them(tune: Tune, reached: Sequence[tuple[Trial, float]]) -> list[Any]:
    """Trials, each with the value that it stands for, as complete trials of an Optuna study."""
    from optuna.trial import create_trial

    kinds = {name: _distribution(tune.space[name]) for name in sorted(tune.space)}
    return [
        create_trial(params=_encoded(tune, trial.point), distributions=kinds, value=value) for trial, value in reached
    ]


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.values is not None:
        return CategoricalDistribution(list(range(len(dimension.values))))
    low, high = dimension.ends
    if dimension.integer is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=dimension.loguniform is not None)


def _encoded(tune: Tune, point: Any) -> dict[str, Any]:
    """A point as Optuna takes it: the place of a choice, whatever its values are."""
    found: dict[str, Any] = {}
    for name in sorted(tune.space):
        values = tune.space[name].values
        found[name] = point[name] if values is None else _place(values, point[name])
    return found


def _place(values: tuple[Any, ...], value: Any) -> int:
    """Of a value: 1 and true are equal to Python, and not here."""
    return [point_id({"": known}) for known in values].index(point_id({"": value}))


def _decoded(dimension: Dimension, value: Any) -> Any:
    if dimension.values is not None:
        return dimension.values[value]
    return int(value) if dimension.integer is not None else rounded(value, *dimension.ends)
