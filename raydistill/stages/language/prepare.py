"""Stage prepare of a language model: from the user's texts to rows of tokens, tokenised once for teacher and students.

One pass over the sources tokenises and counts, so that every mistake is found and the cost known before anything is
written; what it found is then written as shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.next_tokens import ALPHABET
from raydistill.config.run import Config
from raydistill.data.duplicates import TextIndex
from raydistill.data.token_rows import Tokenised
from raydistill.data.token_shards import TokenShardWriter
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.run import Run
from raydistill.stages.language.survey import fields_of, find_split
from raydistill.stages.language.surveyed import NOWHERE, PLACES, WRITTEN, SurveyedTexts
from raydistill.stages.language.text_plan import texts_plan
from raydistill.stages.progress import Progress

TAUGHT = ("train", WRITTEN)  # whose tokens the alphabet is ordered by


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
        "dropped": _dropped(surveyed),
        "repeated": repeated,
        "splits_long": config.data.long_documents == "split" and fields_of(config).settings == "data.text",
        "files": {split: list(source.files) for split, source in surveyed.sources.items()},
        **({"keeps_text": True} if config.data.keep_text else {}),
        **_written_facts(surveyed),
    }
    manifest = commit_manifest(run.store, "data", plan.fingerprint, entries, facts)
    for line in texts_report(facts):
        progress.say(f"prepare: {line}")
    return manifest


def _dropped(surveyed: SurveyedTexts) -> dict[str, dict[str, int]]:
    """What is not used of every source, and of the answers, by reason."""
    found = {name: survey.dropped for name, survey in surveyed.found.items()}
    found |= {f"answers for {split}": survey.dropped for split, survey in surveyed.written.items()}
    return {name: dict(sorted(dropped.items())) for name, dropped in found.items()}


def _written_facts(surveyed: SurveyedTexts) -> dict[str, Any]:
    """How many documents a model wrote the responses of, by where its prompts come from."""
    found: dict[str, Any] = {}
    if surveyed.written:
        found["asked"] = surveyed.asked
    if WRITTEN in surveyed.found:
        found["out_of_domain"] = {"asked": int(surveyed.taken.sum()), "there": len(surveyed.taken)}
    if "answered" in surveyed.found:
        found["answered"] = len(surveyed.found["answered"])
    return found


def _write(
    config: Config, run: Run, surveyed: SurveyedTexts, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, int]]:
    """Every document to its split's shard; the entries, and what stands twice."""
    writers, first = {}, 0
    for split, rows in surveyed.rows.items():
        writers[split] = TokenShardWriter(
            run.store, split, first_row_id=first, shard_rows=config.data.shard_rows, fingerprint=fingerprint,
            keeps_text=config.data.keep_text,
        )  # fmt: skip
        first += rows
    counts_V, done, started = np.zeros(surveyed.vocabulary, np.int64), 0, time.monotonic()
    total = sum(counts["documents"] for counts in surveyed.counts.values())
    with TextIndex() as index:
        for split, found in _placed(surveyed):
            writers[split].add(found)
            index.add_key(found.key, split, 0)
            if split in TAUGHT:
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


def _placed(surveyed: SurveyedTexts) -> Iterator[tuple[str, Tokenised]]:
    """Every document that has rows with its split: the sources' own, then what was written."""
    for source, found in surveyed.found.items():
        for document, split in zip(found.documents, surveyed.own_splits_of(source), strict=True):
            if split != NOWHERE:
                yield PLACES[split], document
    for split, found in surveyed.written.items():
        for document in found.documents:
            yield split, document


def texts_report(facts: dict[str, Any]) -> list[str]:
    """What is worth knowing about the data, a line each."""
    counts = facts["counts"]
    lines = [", ".join(f"{found['documents']:,} {split}" for split, found in counts.items()) + " documents"]
    lines.append(
        "tokens: " + ", ".join(f"{found['tokens']:,} {s} in {found['rows']:,} rows" for s, found in counts.items())
        + f"; {sum(found['learnt'] for found in counts.values()):,} are learnt from"
    )  # fmt: skip
    lines += _written_report(facts)
    if long := sum(found["long"] for found in counts.values()):
        what = "split into several rows" if facts["splits_long"] else "cut"
        lines.append(f"{long:,} documents are longer than data.max_length and {what}")
    for split, dropped in facts["dropped"].items():
        if dropped:
            lines.append(f"dropped from {split}: " + ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items()))
    names = {
        "train_rows_repeating_another": "train documents repeat another one",
        "validation_rows_also_in_train": "validation documents are in train too",
        "test_rows_also_in_train": "test documents are in train too: the test is easier than it looks",
        "unlabelled_rows_repeating_another": "documents that a model wrote repeat another one or stand in train",
    }
    repeated = facts["repeated"]
    return lines + [f"note: {repeated[key]:,} {text}" for key, text in names.items() if repeated.get(key)]


def _written_report(facts: dict[str, Any]) -> list[str]:
    """What a model wrote, a line each."""
    lines: list[str] = []
    if asked := facts.get("asked"):
        split_words = ", ".join(f"{count:,} for {split}" for split, count in asked.items())
        lines.append(f"the teacher answered {sum(asked.values()):,} prompts: {split_words}")
    if test := (asked or {}).get("test"):
        lines.append(f"note: the teacher wrote {test:,} test responses, which flatters it and whoever is like it")
    if out := facts.get("out_of_domain"):
        lines.append(f"{out['asked']:,} of those are of data.unlabelled's {out['there']:,}")
    if answered := facts.get("answered"):
        lines.append(f"{answered:,} responses of data.answered are for the student alone")
    return lines
