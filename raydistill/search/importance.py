"""How much each setting tells the best trials of a search from the others."""

from __future__ import annotations

from collections.abc import Sequence

from raydistill.config.tune import Tune
from raydistill.search.points import as_optuna_knows_them
from raydistill.search.trials import Trial

FEWEST = 8  # trials with a result, below which shares would be noise


def importance(tune: Tune, trials: Sequence[Trial], choose: str) -> dict[str, float]:
    """Shares of the settings that were searched, which sum to 1; nothing of too few trials, or where all are equal.

    PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255, as Optuna has it: how unlike the best tenth's settings are to
    everyone's. A trial that was stopped counts with what it had reached.
    """
    reached = [
        (trial, trial.value(tune.metric, epoch))
        for trial in trials
        if trial.status != "failed" and (epoch := trial.chosen_epoch(tune.metric, choose)) is not None
    ]
    if len(reached) < FEWEST or len({value for _, value in reached}) == 1:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    study.add_trials(as_optuna_knows_them(tune, reached))
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), normalize=True)
    return {name: float(share) for name, share in shares.items()}
