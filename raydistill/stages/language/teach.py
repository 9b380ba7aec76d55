"""Stage teach of language models: the teacher, fine-tuned here where it is asked for, reads train and validation once.

What it writes is the teacher cache: one shard for each data shard, of what `teacher.next_tokens` keeps of its
distribution of the next token, at every position that is learnt from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydistill.cache.hidden_shards import read_head
from raydistill.cache.language_codecs import LANGUAGE_CODECS
from raydistill.cache.next_tokens import ALPHABET, HEAD, format_facts, named
from raydistill.cache.text_logprobs import text_shard
from raydistill.config.language import NextTokens
from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.models.folders import model_identity
from raydistill.models.source import ModelSource
from raydistill.next_token import head_facts
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.language.scoring import LanguageScoringJob, sparse_format
from raydistill.stages.progress import Progress, size
from raydistill.stages.scoring import score
from raydistill.stages.teach import teacher_dtype, train_teachers
from raydistill.stages.teachers import teacher_source

SPLITS = ("train", "validation", "unlabelled")  # one that the data do not have adds nothing
FOLDER = "teacher/cache"


def teach_next_tokens(config: Config, run: Run, resources: Resources, progress: Progress) -> Manifest:
    """Writes the teacher cache; its manifest. Raises UserError for a teacher that does not fit the data."""
    data = run.require("data")
    if run.lender:
        run.require("cache")
    else:
        train_teachers(config, run, resources, progress)
    plan = next_tokens_plan(config, run, data, resources)
    if (manifest := run.begin("cache", plan)) is not None:
        progress.say(f"teach: complete, {manifest.facts['positions']:,} positions cached")
        return manifest
    if config.teacher.keeps_no_logits:
        return _commit_nothing(run, data, plan, progress)
    job = next_tokens_job(config, run, data, teacher_source(config, run), plan.inputs["teacher.dtype"])
    return score_next_tokens(config, run, replace(job, fingerprint=plan.fingerprint), resources, progress, "teach")


def next_tokens_job(config: Config, run: Run, data: Manifest, source: ModelSource, dtype: str) -> LanguageScoringJob:
    """A model's scoring into the teacher cache, without the fingerprint of what it makes."""
    settings = next_tokens(config)
    return LanguageScoringJob(
        source=source, data_url=run.home("data").root, output_url=run.store.root, folder=FOLDER, fingerprint="",
        codec=settings.codec, form=sparse_format(settings), alphabet=named(data, ALPHABET),
        head_with=data.shards(*SPLITS)[0].file, vocabulary=data.facts["vocabulary"], dtype=dtype,
        text_logprobs=settings.text_logprobs,
        tokens_per_batch=config.teacher.tokens_per_batch,
    )  # fmt: skip


def score_next_tokens(
    config: Config, run: Run, job: LanguageScoringJob, resources: Resources, progress: Progress, title: str
) -> Manifest:
    """Scores train and validation into the job's folder; its manifest. Raises what scoring raises."""
    data = run.require("data")
    share = share_for_actors(resources, actors=config.teacher.actors, cpus_per_actor=config.teacher.cpus_per_actor)
    (scored,) = score([job], data, {job.folder: SPLITS}, share, progress, title)
    entries = list(scored.entries)
    if job.codec == "hidden":
        head = committed_shard(run.store, f"{job.folder}/{HEAD}", job.fingerprint)
        if head is None:
            raise UserError(f"{run.store.where(job.folder)}/{HEAD}: is damaged. Remove it, to score again")
        entries.append(head)
    if job.text_logprobs:
        beside = [
            committed_shard(run.store, f"{job.folder}/{text_shard(e.file)}", job.fingerprint) for e in scored.entries
        ]
        if None in beside:
            raise UserError(f"{run.store.where(job.folder)}: a file was removed. Do the same command again")
        entries += [entry for entry in beside if entry is not None]
    return _commit(config, run, job, data, entries, scored.totals, progress, title)


def _commit(
    config: Config, run: Run, job: LanguageScoringJob, data: Manifest, entries: list[Entry], totals: dict[str, float],
    progress: Progress, title: str,
) -> Manifest:  # fmt: skip
    settings = next_tokens(config)
    positions = sum(found["learnt"] for split, found in data.facts["counts"].items() if split in SPLITS)
    rows, total = sum(n for split, n in data.facts["rows"].items() if split in SPLITS), sum(e.size for e in entries)
    facts = {
        "codec": settings.codec,
        **_width(run, job.folder, entries),
        **format_facts(sparse_format(settings)),
        **head_facts(job.source.folder()),
        **({"text_logprobs": True} if settings.text_logprobs else {}),
        "promise": LANGUAGE_CODECS[settings.codec].promise,
        "temperatures": "1" if sparse_format(settings) else "any",
        "vocabulary": data.facts["vocabulary"],
        "positions": positions,
        "rows": rows,
        "forwards": rows,
        "bytes_per_position": total / positions,
    }
    manifest = commit_manifest(run.store, job.folder, job.fingerprint, entries, facts)
    speed = f", {totals['tokens'] / totals['seconds']:,.0f} tokens/s for each actor" if totals["seconds"] else ""
    progress.say(
        f"{title}: {positions:,} positions of {rows:,} rows cached by codec {settings.codec}, one forward for each row,"
        f" {facts['bytes_per_position']:.1f} bytes a position, {size(total)}{speed}"
    )
    return manifest


def _commit_nothing(run: Run, data: Manifest, plan: Plan, progress: Progress) -> Manifest:
    """The cache of a student that learns from what its teacher wrote, and from no logits."""
    written = data.facts["counts"]["unlabelled"]
    facts = {
        "codec": "none", "promise": "no logits", "vocabulary": data.facts["vocabulary"], "positions": 0, "rows": 0,
        "forwards": 0, "bytes_per_position": 0.0,
    }  # fmt: skip
    manifest = commit_manifest(run.store, FOLDER, plan.fingerprint, [], facts)
    progress.say(f"teach: no logits are kept; the student learns from {written['documents']:,} prompts' answers alone")
    return manifest


def _width(run: Run, folder: str, entries: list[Entry]) -> dict[str, int]:
    """The width of hidden states, where the cache has an output head."""
    head = next((entry for entry in entries if entry.file == HEAD), None)
    return {} if head is None else {"width": read_head(run.store, folder, head).weight_VD.shape[1]}


def next_tokens(config: Config) -> NextTokens:
    """What is kept of the teacher, by the config or by default."""
    return config.teacher.next_tokens or NextTokens()


def next_tokens_plan(config: Config, run: Run, data: Manifest, resources: Resources) -> Plan:
    """Everything that determines the bytes of the cache."""
    settings, form = next_tokens(config), sparse_format(next_tokens(config))
    inputs: dict[str, Any] = {
        "data": data.fingerprint,
        "teacher": model_identity(teacher_source(config, run).folder()),
        "teacher.dtype": teacher_dtype(config, run, resources),
        "teacher.next_tokens.codec": settings.codec,
        **{f"teacher.next_tokens.{name}": value for name, value in format_facts(form).get("format", {}).items()},
    }
    if settings.text_logprobs:
        inputs["teacher.next_tokens.text_logprobs"] = True
    if form is not None:
        inputs["alphabet_sha256"] = named(data, ALPHABET).sha256
    return Plan("cache", inputs)
