"""The two kinds of models that a student can be, and how each is read from its folder with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.data.tokens import load_tokenizer
from raydistill.models.loading import load_classifier, load_language_model


@dataclass(frozen=True)
class ModelKind:
    """How a model is read, and whether its tokenizer must know how to pad."""

    read: Callable[[str, Path], Any]
    pads: bool

    def load(self, setting: str, folder: Path) -> tuple[Any, Any]:
        """The model in eval mode and its tokenizer. Raises UserError for either that does not load."""
        return self.read(setting, folder), load_tokenizer(folder, setting, pads=self.pads)


CLASSIFIER = ModelKind(load_classifier, pads=True)
LANGUAGE_MODEL = ModelKind(load_language_model, pads=False)
