"""The settings of a loss as what a language model is trained with."""

from __future__ import annotations

from raydistill.config.loss import LOSS_PARAMETERS, WITHOUT_TEMPERATURE, Loss
from raydistill.config.train import Train
from raydistill.config.training import Training
from raydistill.losses.token_objective import TokenObjective


def language_objective(role: str, settings: Training) -> TokenObjective:
    """What a teacher, a student or its control is trained with."""
    if not isinstance(settings, Train):
        return TokenObjective()
    if role == "control":
        return TokenObjective(label_smoothing=settings.loss.label_smoothing)
    return token_objective(settings.loss)


def token_objective(loss: Loss) -> TokenObjective:
    """The student's objective. Raises ValueError for a loss that is not a sum over positions."""
    parameters = {name: value for name in LOSS_PARAMETERS if (value := getattr(loss, name)) is not None}
    return TokenObjective(
        temperature=1.0 if loss.kind in WITHOUT_TEMPERATURE else loss.temperature, alpha=loss.alpha, kind=loss.kind,
        parameters=parameters, label_smoothing=loss.label_smoothing, always_response=loss.alpha_end is not None,
        cross_tokenizer=loss.cross_tokenizer,
    )  # fmt: skip
