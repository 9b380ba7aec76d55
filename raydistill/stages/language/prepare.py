"""Stage prepare of a language model: from the user's texts to rows of tokens, tokenised once for teacher and students.

Two passes: one that counts documents, rows and tokens, so that every mistake is found and the cost known before
anything is written, and one that writes. Of a document memory holds a few numbers between the two.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.next_tokens import ALPHABET
from raydistill.config.run import Config
from raydistill.data.documents import Rules, Tokenised, read_documents, tokenise_documents
from raydistill.data.duplicates import TextIndex
from raydistill.data.sources import Dropped, Fields, Source, find_sources
from raydistill.data.splits import ValidationDraw
from raydistill.data.token_shards import TokenShardWriter
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models import find_model, tokenizer_identity
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.progress import Progress

SPLITS = ("train", "validation", "test")
COUNTS = ("documents", "rows", "tokens", "learnt", "long")


@dataclass
class Survey:
    """A first pass over a source: numbers of every usable document, and of the dropped ones by reason."""

    rows: array[int] = field(default_factory=lambda: array("l"))
    tokens: array[int] = field(default_factory=lambda: array("l"))
    learnt: array[int] = field(default_factory=lambda: array("l"))
    long: array[int] = field(default_factory=lambda: array("l"))
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    def add(self, found: Tokenised) -> None:
        self.rows.append(len(found.rows))
        self.tokens.append(sum(len(row.tokens_L) for row in found.rows))
        self.learnt.append(sum(row.learnt for row in found.rows))
        self.long.append(found.is_long)

    def counts(self, chosen: np.ndarray) -> dict[str, int]:
        """COUNTS of the chosen documents."""
        of = {name: int(np.array(getattr(self, name), np.int64)[chosen].sum()) for name in COUNTS[1:]}
        return {"documents": int(chosen.sum()), **of}


@dataclass(frozen=True)
class SurveyedTexts:
    """The sources after the first pass."""

    sources: dict[str, Source]
    found: dict[str, Survey]
    counts: dict[str, dict[str, int]]  # of every split, COUNTS
    vocabulary: int

    @property
    def rows(self) -> dict[str, int]:
        return {split: counts["rows"] for split, counts in self.counts.items()}

    @property
    def labels(self) -> list[str]:
        """None: what a language model predicts are tokens."""
        return []


def fields_of(config: Config) -> Fields:
    """The columns that documents are read from."""
    data = config.data
    columns = (("data.text", data.text),)
    if data.prompt is not None and data.response is not None:
        columns = (("data.prompt", data.prompt), ("data.response", data.response))
    return Fields(columns, len(columns), data.delimiter, data.max_row_bytes)


def rules_of(config: Config) -> Rules:
    """How documents become rows, with the teacher's tokenizer."""
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    tokenizer = load_tokenizer(folder, "teacher.model", pads=False)
    return Rules(tokenizer, config.data.max_length, splits=config.data.long_documents == "split")


def survey_texts(config: Config, progress: Progress) -> SurveyedTexts:
    """The first pass: everything about the sources that can be wrong is found here."""
    rules, fields = rules_of(config), fields_of(config)
    sources = {split: _find(config, split) for split in _splits(config)}
    found = {
        split: _survey(source, fields, rules, config.data.max_dropped, progress) for split, source in sources.items()
    }
    counts = {split: survey.counts(np.ones(len(survey.rows), bool)) for split, survey in found.items()}
    if "validation" not in sources:
        drawn = _drawn(config, found["train"])
        if not drawn.any():
            raise UserError(
                f"data.validation: a share of {config.data.validation} of {len(drawn)} documents draws none."
                " Raise it, or give a validation file"
            )
        counts |= {"train": found["train"].counts(~drawn), "validation": found["train"].counts(drawn)}
    return SurveyedTexts(sources, found, {split: counts[split] for split in SPLITS}, len(rules.tokenizer))


def _survey(source: Source, fields: Fields, rules: Rules, max_dropped: float, progress: Progress) -> Survey:
    found = Survey()
    for one in tokenise_documents(read_documents(source, fields), rules):
        if isinstance(one, Dropped):
            found.dropped[one.reason] += 1
            found.first_dropped = found.first_dropped or f"{source.files[one.file]}: row {one.number}: {one.reason}"
        else:
            found.add(one)
        if (len(found.rows) + found.dropped.total()) % 4096 == 0:
            progress.check()
    dropped, used = found.dropped.total(), len(found.rows)
    if not used:
        reason = f"; {found.first_dropped}" if dropped else ""
        raise UserError(f"{source.setting}: {source.files[0]}: has no usable rows ({dropped} dropped{reason})")
    if dropped > max_dropped * (dropped + used):
        raise UserError(
            f"{source.setting}: {found.first_dropped}; {dropped} of {dropped + used} rows cannot be used."
            " Mend the file, or raise data.max_dropped"
        )
    return found


def _drawn(config: Config, train: Survey) -> np.ndarray:
    """Which of train's usable documents are for validation: whole documents, so that none is in both."""
    share, documents = config.data.validation, len(train.rows)
    assert not isinstance(share, str)
    draw = ValidationDraw(Counter({"": documents}), share, config.data.split_seed)
    return np.array([draw.takes("") for _ in range(documents)])


def _splits(config: Config) -> list[str]:
    """The splits that have sources of their own."""
    return ["train", "test", *(["validation"] if isinstance(config.data.validation, str) else [])]


def _find(config: Config, split: str) -> Source:
    return find_sources(f"data.{split}", (getattr(config.data, split),))


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
        "data.validation": "a source" if isinstance(data.validation, str) else data.validation,
        "tokenizer_sha256": tokenizer_identity(folder),
    }


def standing_texts(config: Config, run: Run) -> Manifest | None:
    """The manifest of data that are complete for these very sources and settings, known without reading a row."""
    plan, manifest = run.plan("data"), run.complete("data")
    if plan is None or manifest is None or run.redo == "prepare":
        return None
    sources = {split: _find(config, split).identity() for split in _splits(config)}
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
        if _find(config, split).sha256 != source.sha256:
            raise UserError(f"{source.setting}: {source.files[0]}: changed while it was read. Use --redo prepare")
    facts = {
        "labels": [],
        "rows": surveyed.rows,
        "counts": surveyed.counts,
        "vocabulary": surveyed.vocabulary,
        "dropped": {split: dict(sorted(found.dropped.items())) for split, found in surveyed.found.items()},
        "repeated": repeated,
        "splits_long": config.data.long_documents == "split" and config.data.prompt is None,
        "files": {split: list(source.files) for split, source in surveyed.sources.items()},
    }
    manifest = commit_manifest(run.store, "data", plan.fingerprint, entries, facts)
    for line in texts_report(facts):
        progress.say(f"prepare: {line}")
    return manifest


def _write(
    config: Config, run: Run, surveyed: SurveyedTexts, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, int]]:
    """The second pass: every document to its split's shard; the entries, and what stands twice."""
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
            index.add(f"{found.document.prompt or ''}\n{found.document.text}", split, 0)
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
    """Every usable document with its split. Raises UserError where there are other ones than in the first pass."""
    rules, fields = rules_of(config), fields_of(config)
    for split, source in surveyed.sources.items():
        drawn = (
            _drawn(config, surveyed.found["train"])
            if split == "train" and "validation" not in surveyed.sources
            else None
        )
        number = 0
        for found in tokenise_documents(read_documents(source, fields), rules):
            if isinstance(found, Dropped):
                continue
            if number == len(surveyed.found[split].rows) or len(found.rows) != surveyed.found[split].rows[number]:
                raise UserError(
                    f"{source.setting}: {source.files[found.document.file]}: changed while it was read."
                    " Use --redo prepare"
                )
            yield "validation" if drawn is not None and drawn[number] else split, found
            number += 1


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
