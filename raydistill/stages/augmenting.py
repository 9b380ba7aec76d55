"""Augmented texts in prepare: what determines them, where their words come from, and the rows themselves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydistill.config.data import Augment
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.augment import Rules, augmented_rows
from raydistill.data.shards import read_split
from raydistill.data.sources import Row
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.masked_words import MaskedWords
from raydistill.models.folders import find_model, model_identity
from raydistill.record.commit import Entry
from raydistill.record.run import Run

MASKED_MODEL = "data.augment.model"


def augment_settings(config: Config) -> dict[str, Any]:
    """What determines the augmented texts beside train's."""
    asked = config.data.augment
    if not asked:
        return {}
    settings = {**identity(asked, skip=("model", "revision")), "mask_token": mask_token(config)}
    return {"data.augment": settings | ({"model": model_identity(_model_folder(asked))} if asked.model else {})}


def mask_token(config: Config) -> str | None:
    """The teacher's mask token, where augmenting masks words. Raises UserError when its tokenizer has none."""
    if not config.data.augment or not config.data.augment.mask:
        return None
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    token = load_tokenizer(folder, "teacher.model").mask_token
    if token is None:
        raise UserError(f"data.augment.mask: the tokenizer in {folder} has no mask token. Set data.augment.mask=0")
    return str(token)


def masked_words(config: Config) -> MaskedWords | None:
    """Where words come from, if not from train. Raises UserError for a model that has none to give."""
    asked = config.data.augment
    if not asked or asked.model is None:
        return None
    return MaskedWords(MASKED_MODEL, _model_folder(asked), candidates=asked.candidates)


def _model_folder(asked: Augment) -> Path:
    assert asked.model is not None
    return find_model(MASKED_MODEL, asked.model, asked.revision)


def augmented(config: Config, run: Run, train: list[Entry], *, first: int) -> Iterator[tuple[Row, int | bytes]]:
    """The rows made from train's shards, without the first ones, which stand, and their labels as shards hold them."""
    asked = config.data.augment
    assert asked is not None
    rules = Rules(asked.mask, asked.replace, asked.ngram, mask_token(config), asked.seed)
    read = functools.partial(read_split, run.store, train)
    return augmented_rows(
        read, rules, copies=asked.copies, keep_labels=asked.keep_labels, guess=masked_words(config), first=first
    )
