"""Stage prepare of a language model: from the user's texts to rows of tokens, tokenised once for teacher and students.

One pass over the sources tokenises and counts, so that every mistake is found and the cost known before anything is
written; what it found is then written as shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.next_tokens import ALPHABET
from raydistill.config.run import Config
from raydistill.data.documents import Tokenised
from raydistill.data.duplicates import TextIndex
from raydistill.data.token_shards import TokenShardWriter
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.folders import CHAT_TEMPLATE, find_model, tokenizer_identity
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.fingerprint import Plan, digest
from raydistill.record.run import Run
from raydistill.stages.language.survey import (
    SPLITS,
    SurveyedTexts,
    drawn_documents,
    fields_of,
    find_split,
    own_splits,
)
from raydistill.stages.progress import Progress


def texts_plan(config: Config, surveyed: SurveyedTexts) -> Plan:
    """Everything that determines the bytes of the data shards."""
    inputs = {
        "sources_sha256": {split: source.identity() for split, source in sorted(surveyed.sources.items())},
        "counts": surveyed.counts,
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
        **({"data.txt_documents": data.txt_documents} if data.txt_documents != "file" else {}),
        "data.validation": "a source" if isinstance(data.validation, str) else data.validation,
        "tokenizer_sha256": tokenizer_identity(folder),
        **_chat_settings(config, folder),
    }


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
    if plan is None or manifest is None or run.redo == "prepare":
        return None
    sources = {split: find_split(config, split).identity() for split in own_splits(config)}
    asked = {"sources_sha256": dict(sorted(sources.items())), **_settings(config)}
    return manifest if all(plan.inputs.get(name) == value for name, value in asked.items()) else None


def prepare_texts(config: Config, run: Run, surveyed: SurveyedTexts | None, progress: Progress) -> Manifest:
    """Writes the data shards; their manifest. What stands complete for the same inputs is kept.

    `surveyed` is what `survey_texts` found; None when the data stand already. Raises UserError when they stand there
    for other inputs.
    """
    plan = texts_plan(config, surveyed) if surveyed else None
    manifest = run.begin("data", plan) if plan else run.require("data")
    if manifest is not None:
        progress.say(f"prepare: complete, {texts_report(manifest.facts)[0]}")
        return manifest
    assert surveyed is not None
    assert plan is not None
    entries, repeated = _write(config, run, surveyed, plan.fingerprint, progress)
    for split, source in surveyed.sources.items():
        if find_split(config, split).sha256 != source.sha256:
            raise UserError(f"{source.setting}: {source.files[0]}: changed while it was read. Use --redo prepare")
    facts = {
        "labels": [],
        "rows": surveyed.rows,
        "counts": surveyed.counts,
        "vocabulary": surveyed.vocabulary,
        "dropped": {split: dict(sorted(found.dropped.items())) for split, found in surveyed.found.items()},
        "repeated": repeated,
        "splits_long": config.data.long_documents == "split" and fields_of(config).settings == "data.text",
        "files": {split: list(source.files) for split, source in surveyed.sources.items()},
    }
    manifest = commit_manifest(run.store, "data", plan.fingerprint, entries, facts)
    for line in texts_report(facts):
        progress.say(f"prepare: {line}")
    return manifest


def _write(
    config: Config, run: Run, surveyed: SurveyedTexts, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, int]]:
    """Every document to its split's shard; the entries, and what stands twice."""
    writers, first = {}, 0
    for split, rows in surveyed.rows.items():
        writers[split] = TokenShardWriter(
            run.store, split, first_row_id=first, shard_rows=config.data.shard_rows, fingerprint=fingerprint
        )
        first += rows
    counts_V, done, started = np.zeros(surveyed.vocabulary, np.int64), 0, time.monotonic()
    total = sum(counts["documents"] for counts in surveyed.counts.values())
    with TextIndex() as index:
        for split, found in _placed(config, surveyed):
            writers[split].add(found)
            index.add_key(found.key, split, 0)
            if split == "train":
                for row in found.rows:
                    counts_V += np.bincount(row.tokens_L[row.learnt_L], minlength=surveyed.vocabulary)
            done += 1
            if done % 1024 == 0:
                progress.check()
                progress.counts("prepare", done, total, "documents", started)
        repeated = index.report()
    entries = [entry for writer in writers.values() for entry in writer.close()]
    name = f"data/{ALPHABET}"
    alphabet = committed_shard(run.store, name, fingerprint)
    entries.append(alphabet or Alphabet.by_counts(counts_V).write(run.store, name, fingerprint))
    return entries, repeated


def _placed(config: Config, surveyed: SurveyedTexts) -> Iterator[tuple[str, Tokenised]]:
    """Every usable document with its split."""
    for split, found in surveyed.found.items():
        draws = split == "train" and "validation" not in surveyed.sources
        drawn = drawn_documents(config, found) if draws else np.zeros(len(found.rows), bool)
        for document, is_drawn in zip(found.documents, drawn, strict=True):
            yield "validation" if is_drawn else split, document


def texts_report(facts: dict[str, Any]) -> list[str]:
    """What is worth knowing about the data, a line each."""
    counts = facts["counts"]
    lines = [", ".join(f"{counts[split]['documents']:,} {split}" for split in SPLITS) + " documents"]
    lines.append(
        "tokens: " + ", ".join(f"{counts[s]['tokens']:,} {s} in {counts[s]['rows']:,} rows" for s in SPLITS)
        + f"; {sum(counts[s]['learnt'] for s in SPLITS):,} are learnt from"
    )  # fmt: skip
    if long := sum(counts[split]["long"] for split in SPLITS):
        what = "split into several rows" if facts["splits_long"] else "cut"
        lines.append(f"{long:,} documents are longer than data.max_length and {what}")
    for split, dropped in facts["dropped"].items():
        if dropped:
            lines.append(f"dropped from {split}: " + ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items()))
    names = {
        "train_rows_repeating_another": "train documents repeat another one",
        "validation_rows_also_in_train": "validation documents are in train too",
        "test_rows_also_in_train": "test documents are in train too: the test is easier than it looks",
    }
    repeated = facts["repeated"]
    return lines + [f"note: {repeated[key]:,} {text}" for key, text in names.items() if repeated.get(key)]
