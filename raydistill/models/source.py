"""Where a model is, as workers are told it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydistill.models.folders import find_model, model_identity, weight_files
from raydistill.models.loading import count_parameters, load_classifier, load_language_model
from raydistill.record.store import open_store


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a folder or hub id that the user named, or a folder in a run's store. Workers can open it."""

    setting: str
    model: str
    revision: str | None = None
    store_url: str | None = None

    def folder(self) -> Path:
        """The model's folder on this machine, fetched once per process. Raises UserError when it cannot be used."""
        if self.store_url is None:
            return find_model(self.setting, self.model, self.revision)
        return find_model(self.setting, str(self.fetched()))

    def fetched(self) -> Path:
        """The folder of a model in a store."""
        assert self.store_url is not None
        return _fetched(self.store_url, self.model)

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The classifier in eval mode. Raises UserError when it does not load."""
        return load_classifier(self.setting, self.folder(), dtype=dtype)

    def load_language(self, dtype: torch.dtype = torch.float32) -> Any:
        """The causal language model in eval mode. Raises UserError when it does not load."""
        return load_language_model(self.setting, self.folder(), dtype=dtype)

    def identity(self) -> dict[str, str]:
        """What a fingerprint holds of it."""
        return model_identity(self.folder())

    def parameters(self, model: Any) -> int:
        """How many it has; `model` is what `load` gave."""
        return count_parameters(model)

    def weights(self) -> list[Path]:
        """The files of its weights."""
        return weight_files(self.folder())

    @property
    def cpu_only(self) -> bool:
        """Whether it computes on the CPU, wherever it is asked to."""
        return False


@functools.cache
def _fetched(store_url: str, name: str) -> Path:
    return open_store(store_url).local(name)
