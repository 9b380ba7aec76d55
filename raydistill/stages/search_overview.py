"""What a person who waits for a search sees of it in a terminal."""

from __future__ import annotations

from raydistill.report.pictures import short, text_of
from raydistill.search.trials import Trial, winner
from raydistill.stages.progress import Overview
from raydistill.stages.search import Search

MOST = 16  # trials that are shown: those that are being trained, then the best


def overview(search: Search, choose: str) -> Overview:
    """The search as it stands."""
    tune, trials = search.tune, list(search.trials)
    names = sorted(tune.space)
    best = winner(trials, tune.metric, choose)
    ended = sum(trial.has_ended for trial in trials)
    title = f"{ended} of {tune.num_trials} trials ended, {sum(trial.steps for trial in trials):,} steps"
    if best is not None:
        title += f"; trial {best.number} leads"
    running = [trial for trial in trials if trial.number in search.live]
    others = sorted((t for t in trials if t.number not in search.live), key=lambda t: _rank(t, search, choose))
    return Overview(
        title,
        ("trial", *map(short, names), "epoch", tune.metric, "state"),
        tuple(_row(trial, names, search, choose) for trial in [*running, *others][:MOST]),
    )


def _rank(trial: Trial, search: Search, choose: str) -> tuple[float, int]:
    """Best first; those that reached nothing last."""
    metric = search.tune.metric
    epoch = trial.chosen_epoch(metric, choose)
    return (float("inf") if epoch is None else -trial.value(metric, epoch)), trial.number


def _row(trial: Trial, names: list[str], search: Search, choose: str) -> tuple[str, ...]:
    epoch = trial.chosen_epoch(search.tune.metric, choose)
    value = "" if epoch is None else f"{trial.curve[epoch - 1][search.tune.metric]:.4f}"
    state = trial.status
    if not trial.has_ended:
        state = "running" if trial.number in search.live else "waiting" if trial.curve else "not begun"
    settings = (text_of(trial.point[name]) for name in names)
    return (str(trial.number), *settings, f"{len(trial.curve)} of {trial.epochs}", value, state)
