"""The teacher answers prompts, before the data that hold its answers are written.

Prompts are written as shards, each is answered by one task of the actor pool and committed, and what was written is
tokenised beside the documents that have responses of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydistill.config.run import Config
from raydistill.data.prompts import ANSWERS, PROMPTS, PromptWriter, read_answers
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources, share_for_actors
from raydistill.stages.language.answering import AnsweringJob
from raydistill.stages.language.survey import check_dropped, rules_of
from raydistill.stages.language.surveyed import PLACES, Survey, SurveyedTexts
from raydistill.stages.language.text_plan import answers_plan
from raydistill.stages.language.vllm_engine import answer_with_vllm
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import score


def answer_prompts(
    config: Config, run: Run, surveyed: Any, resources: Resources, progress: Progress
) -> SurveyedTexts | None:
    """Asks every prompt that `survey_texts` found; what it found with what was written. None when the data stand.

    Answers that stand for the same inputs are kept, shard by shard. Raises UserError when too few can be used.
    """
    if surveyed is None:
        return None
    assert isinstance(surveyed, SurveyedTexts)
    plan = answers_plan(config, surveyed)
    manifest = run.begin("answers", plan)
    prompts = _write_prompts(config, run, surveyed, plan.fingerprint, progress)
    if manifest is None:
        manifest = _answer(config, run, prompts, plan.fingerprint, resources, progress)
    progress.say(f"synthesis: {manifest.facts['answers']:,} answers to {manifest.facts['prompts']:,} prompts")
    written = {
        split: _read_written(config, run, split, prompts, manifest, progress)
        for split in PLACES
        if split in surveyed.asked
    }
    return replace(surveyed, written=written)


def _write_prompts(config: Config, run: Run, surveyed: SurveyedTexts, fingerprint: str, progress: Progress) -> Manifest:
    """Shards of the prompts of every split; those that stand are kept."""
    writers, first = {}, 0
    for split, count in surveyed.asked.items():
        writers[split] = PromptWriter(
            run.store, split, first_id=first, shard_rows=config.data.shard_rows, fingerprint=fingerprint
        )
        first += count
    for source, found in surveyed.found.items():
        for document, split in zip(found.documents, surveyed.asked_splits_of(source), strict=True):
            if split >= 0:
                writers[PLACES[split]].add(document)
                progress.check()
    entries = [entry for writer in writers.values() for entry in writer.close()]
    return commit_manifest(run.store, PROMPTS, fingerprint, entries)


def _answer(
    config: Config, run: Run, prompts: Manifest, fingerprint: str, resources: Resources, progress: Progress
) -> Manifest:
    """Every shard of answers, by the engine that is set; their manifest."""
    settings, teacher = config.data.synthesis, config.teacher
    assert settings is not None
    source = ModelSource("teacher.model", teacher.model, teacher.revision)
    job = AnsweringJob(source, run.store.root, ANSWERS, fingerprint, settings, config.data.max_length)
    count = sum(entry.rows for entry in prompts.files)
    progress.say(f"synthesis: the teacher writes {count * settings.answers:,} answers to {count:,} prompts")
    if settings.engine == "vllm":
        entries = answer_with_vllm(job, run, prompts, resources, progress)
    else:
        share = share_for_actors(resources, actors=teacher.actors, cpus_per_actor=teacher.cpus_per_actor)
        (scored,) = score([job], prompts, {ANSWERS: PLACES}, share, progress, "synthesis")
        entries = scored.entries
    facts = {"prompts": count, "answers": count * settings.answers}
    return commit_manifest(run.store, ANSWERS, fingerprint, entries, facts)


def _read_written(
    config: Config, run: Run, split: str, prompts: Manifest, answers: Manifest, progress: Progress
) -> Survey:
    """What was written for a split, tokenised; a prompt without any usable answer is dropped and counted."""
    rules, found = rules_of(config), Survey()
    for asked, entry in zip(prompts.shards(split), answers.shards(split), strict=True):
        progress.check()
        for prompt, written in read_answers(run.store, asked, entry):
            document = rules.answered(prompt.prompt, written, prompt.file, prompt.number)
            if document.rows:
                found.add(document)
            else:
                found.drop("an empty response", f"prompt {prompt.prompt_id}")
    found.documents.close()
    check_dropped(found, "data.synthesis", run.store.where(f"{ANSWERS}/{split}-*.parquet"), config.data.max_dropped)
    return found
