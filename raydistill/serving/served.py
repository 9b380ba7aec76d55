"""Which model a user means by a folder, a URL or a hub id, and what it answers with."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from raydistill.errors import UserError
from raydistill.exports.folder import FACTS, ExportSource
from raydistill.exports.language_folder import LanguageExport
from raydistill.models.configuration import label_names, model_task, positions
from raydistill.models.folders import base_folder
from raydistill.models.source import ModelSource
from raydistill.record.run import Run
from raydistill.record.store import open_store, unreachable
from raydistill.stages.teachers import made_here

SETTING = "MODEL"
LONGEST = 1 << 20  # tokens, where neither the tokenizer nor the model says how many it takes


@dataclass(frozen=True)
class Served:
    """A model that answers texts. Workers can open it."""

    source: ModelSource
    task: str  # classification, multi_label or causal_lm
    labels: tuple[str, ...]  # in the order of its outputs; of a language model none
    max_length: int  # tokens that it reads of a text, or reads and writes


def find_served(location: str) -> Served:
    """The student of a run's folder, a model's folder, an exported file's, or a hub id.

    Raises UserError when it is none of these, when the run's student is not finished, and for a model of another task.
    """
    source = _source(location)
    folder = source.folder()
    task = model_task(source.setting, folder)
    labels = () if task == "causal_lm" else label_names(folder)
    return Served(source, task, labels, _max_length(folder))


def _source(location: str) -> ModelSource:
    root, _, name = location.rstrip("/").rpartition("/")
    is_remote, is_folder = "://" in location, Path(location).is_dir()
    if not is_remote and not is_folder:
        return ModelSource(SETTING, location)
    store = open_store(location)
    try:
        has_run, has_export = store.exists("config.yaml"), store.exists(FACTS)
    except Exception as error:  # each store's client raises its own kinds
        raise unreachable(SETTING, location, error) from None
    if has_run:
        return _student(Run(store), location)
    kind = _exported(store.read(FACTS), location) if has_export else ModelSource
    return kind(SETTING, name, store_url=root) if is_remote else kind(SETTING, location)


def _exported(facts: bytes, location: str) -> type[ExportSource]:
    """A classifier's file has labels. Raises UserError for a language model's that keeps nothing between two tokens."""
    try:
        found = json.loads(facts)
    except ValueError:
        raise UserError(f"{SETTING}: {location}: its {FACTS} is not JSON. Export it again") from None
    if "labels" in found:
        return ExportSource
    if found["format"] == "onnx":
        raise UserError(
            f"{SETTING}: {location}: is a language model as ONNX, which is not served here. Use the program beside it,"
            " generate.py, or another format"
        )
    return LanguageExport


def _student(run: Run, location: str) -> ModelSource:
    if run.complete("student") is None:
        again = f"raydistill run {shlex.quote(run.store.where('config.yaml'))}"
        raise UserError(f"{SETTING}: {location}: is a run without a finished student. Finish it: {again}")
    return made_here("student", run)


def _max_length(folder: Path) -> int:
    """What a run cuts its rows to stands in its student's tokenizer; of others the shorter of what both take."""
    settings = folder / "tokenizer_config.json"
    said = json.loads(settings.read_text(encoding="utf-8")).get("model_max_length") if settings.is_file() else None
    found = [int(length) for length in (said, positions(base_folder(folder))) if length is not None]
    return min([*found, LONGEST])
