"""The settings that a search has found, as the configuration that train and evaluate go by."""

from __future__ import annotations

from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.record.run import Run


def winning_config(config: Config, run: Run) -> Config:
    """The run's settings with the winner's: what train and evaluate go by. Raises UserError before the search's end."""
    if config.tune is None:
        return config
    return with_point(config, run.require("tune").facts["winner"]["point"])
