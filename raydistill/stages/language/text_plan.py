"""What determines a language model's data, and the answers that are written for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.student_rows import check_texts
from raydistill.data.tokens import load_tokenizer
from raydistill.models.configuration import end_tokens
from raydistill.models.folders import CHAT_TEMPLATE, find_model, model_identity, tokenizer_identity
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan, digest
from raydistill.record.run import Run
from raydistill.stages.language.survey import fields_of, find_split, own_splits
from raydistill.stages.language.surveyed import SurveyedTexts


def texts_plan(config: Config, surveyed: SurveyedTexts) -> Plan:
    """Everything that determines the bytes of the data shards."""
    inputs = {
        "sources_sha256": {split: source.identity() for split, source in sorted(surveyed.sources.items())},
        "counts": surveyed.own_counts,
    }
    return Plan("data", inputs | _settings(config))


def _settings(config: Config) -> dict[str, Any]:
    """The settings that determine the data shards, and the tokenizer."""
    data = config.data
    names = ("delimiter", "max_row_bytes", "shard_rows", "split_seed", "max_length", "long_documents")
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    return {
        "task": config.task,
        "data.columns": fields_of(config).names,
        **{f"data.{name}": getattr(data, name) for name in names},
        **({"data.keep_text": True} if data.keep_text else {}),
        **({"data.txt_documents": data.txt_documents} if data.txt_documents != "file" else {}),
        "data.validation": "a source" if isinstance(data.validation, str) else data.validation,
        "tokenizer_sha256": tokenizer_identity(folder),
        **_chat_settings(config, folder),
        **_written_settings(config, folder),
    }


def _written_settings(config: Config, folder: Path) -> dict[str, Any]:
    """What determines what models wrote: the teacher as it is, with its settings."""
    data, found = config.data, dict[str, Any]()
    if data.unlabelled_share is not None:
        found["data.unlabelled_share"] = data.unlabelled_share
    if data.synthesis is not None:
        tokenizer = load_tokenizer(folder, "teacher.model", pads=False)
        found["data.synthesis"] = identity(data.synthesis)
        found["teacher"] = {**model_identity(folder), "end_tokens": end_tokens(folder, tokenizer.eos_token_id)}
    return found


def _chat_settings(config: Config, folder: Path) -> dict[str, Any]:
    """What determines how chats are written; a template in a file of its own is of the tokenizer's identity."""
    if config.data.messages is None:
        return {}
    roles = {"data.learnt_roles": list(config.data.learnt_roles)}
    if (folder / CHAT_TEMPLATE).is_file():
        return roles
    template = load_tokenizer(folder, "teacher.model", pads=False).chat_template
    return {**roles, "chat_template_sha256": digest(template)}


def standing_texts(config: Config, run: Run) -> Manifest | None:
    """The manifest of data that are complete for these very sources and settings, known without reading a row."""
    plan, manifest = run.plan("data"), run.complete("data")
    if manifest is not None and run.lender and config.data.keep_text:
        check_texts(manifest, run.lender.where("data"))
    if plan is None or manifest is None or run.redo == "prepare":
        return None
    sources = {split: find_split(config, split).identity() for split in own_splits(config)}
    asked = {"sources_sha256": dict(sorted(sources.items())), **_settings(config)}
    return manifest if all(plan.inputs.get(name) == value for name, value in asked.items()) else None


def answers_plan(config: Config, surveyed: SurveyedTexts) -> Plan:
    """Everything that determines the answers: which prompts stand in which shard follows from all that the data do."""
    return Plan("answers", texts_plan(config, surveyed).inputs)
