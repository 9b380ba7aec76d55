"""Tasks of lm-evaluation-harness for the models of a report, each loaded as everywhere else: safetensors, no code."""

from __future__ import annotations

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

from raydistill.config.evaluate import Harness
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError, first_line
from raydistill.models.loading import load_language_model
from raydistill.models.source import ModelSource
from raydistill.record.fingerprint import seal, unseal
from raydistill.record.store import Store, sha256_file
from raydistill.stages.forward import DTYPES

# By task and metric: value, and stderr where the harness has one.
TaskResults = dict[str, dict[str, dict[str, float]]]
SETTING = "evaluate.harness"


def check_harness(asked: Harness) -> None:
    """Raises UserError where the package is missing, or does not know a task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{SETTING}: needs the package lm-eval. Run pip install 'raydistill[lm-eval]'")
    if asked.tasks_from is not None and not os.path.isdir(asked.tasks_from):
        raise UserError(f"{SETTING}.tasks_from: {asked.tasks_from}: no such folder. Give one with task files (.yaml)")
    known = set(_tasks(asked).all_tasks)
    for name in asked.tasks:
        if name not in known:
            like = ", ".join(difflib.get_close_matches(name, known, 3)) or "none like it"
            raise UserError(f"{SETTING}.tasks: {name}: is no task that is known; there is {like}. Mend the name")


def harness_inputs(asked: Harness) -> dict[str, Any]:
    """What determines the results beside the settings: the task files of one's own."""
    if asked.tasks_from is None:
        return {}
    folder = Path(asked.tasks_from)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".yaml", ".yml", ".py"))
    return {"harness_files": {str(path.relative_to(folder)): sha256_file(path) for path in files}}


def harness_results(source: ModelSource, asked: Harness, dtype: str) -> TaskResults:
    """What a model reaches. Raises UserError for a task that does not run, such as one whose data cannot be had."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    run: Any = simple_evaluate  # both are decorated in a way that hides what they take
    language_model: Any = HFLM
    folder, setting = source.folder(), source.setting
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_language_model(setting, folder, dtype=DTYPES[dtype]).to(device)
    held = language_model(
        pretrained=model, tokenizer=load_tokenizer(folder, setting, pads=False), batch_size=asked.batch_size,
        device=device,
    )  # fmt: skip
    try:
        found = run(
            model=held, tasks=list(asked.tasks), num_fewshot=asked.few_shot, limit=asked.limit,
            task_manager=_tasks(asked), log_samples=False, random_seed=asked.seed, numpy_random_seed=asked.seed,
            torch_random_seed=asked.seed, fewshot_random_seed=asked.seed,
        )  # fmt: skip
    except Exception as error:  # the harness and the data sets' library raise many kinds
        raise UserError(f"{SETTING}.tasks: {', '.join(asked.tasks)}: cannot be run ({first_line(error)})") from None
    return {task: _metrics(values) for task, values in sorted(found["results"].items())}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's columns "metric,filter" and "metric_stderr,filter" as value and stderr by metric."""
    found: dict[str, dict[str, float]] = {}
    for column, value in sorted(values.items()):
        metric, _, kind = column.partition(",")
        if not kind or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        name = metric.removesuffix("_stderr") + ("" if kind == "none" else f" ({kind})")
        found.setdefault(name, {})["stderr" if metric.endswith("_stderr") else "value"] = float(value)
    return {name: one for name, one in found.items() if "value" in one}


def _tasks(asked: Harness) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=asked.tasks_from)


def write_results(store: Store, name: str, fingerprint: str, found: TaskResults) -> None:
    """Keeps a model's results for a report that is stopped before its end."""
    store.write(_file(name), seal({"fingerprint": fingerprint, "results": found}))


def read_results(store: Store, name: str, fingerprint: str) -> TaskResults | None:
    """A model's results for this very report, where they stand."""
    if not store.exists(_file(name)):
        return None
    document = unseal(store.read(_file(name)), store.where(_file(name)))
    return document["results"] if document["fingerprint"] == fingerprint else None


def _file(name: str) -> str:
    return f"report/harness/{name}.json"
