"""Prompts answered by vLLM, through the stage that ray.data.llm has for it; the driver commits the shards of answers.

Each answer has a seed of its own. vLLM makes batches as prompts come, so that a repeat may differ in the last bits of a
logit and, seldom, in a text; what is committed stays. This needs a GPU and the extra vllm, and was never run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from raydistill.config.data import Synthesis
from raydistill.data.prompts import StoredPrompt, Written, read_prompts, write_answers
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, committed_shard
from raydistill.record.fingerprint import digest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources
from raydistill.stages.language.answering import AnsweringJob, Decoder, new_tokens
from raydistill.stages.progress import Progress


def check_vllm() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("data.synthesis.engine: vllm needs the package vllm. Run pip install 'raydistill[vllm]'")


def answer_with_vllm(
    job: AnsweringJob, run: Run, prompts: Manifest, resources: Resources, progress: Progress
) -> list[Entry]:
    """Answers what is not committed yet; the entries of all shards in order."""
    found = {e.file: committed_shard(run.store, f"{job.folder}/{e.file}", job.fingerprint) for e in prompts.files}
    missing = {entry.file: read_prompts(run.store, entry) for entry in prompts.files if found[entry.file] is None}
    decoder = Decoder(job.source)
    texts: dict[str, dict[tuple[int, int], Written]] = {file: {} for file in missing}
    for row in _generated(job, missing, decoder, resources) if missing else ():
        progress.check()
        file, place = row["file"], int(row["place"])
        tokens = [int(token) for token in row["generated_tokens"]]
        written = decoder.written(missing[file][place].prompt.tokens_L.tolist(), tokens)
        texts[file][place, int(row["answer"])] = written
        if len(texts[file]) == len(missing[file]) * job.settings.answers:
            answers = [[texts[file][p, a] for a in range(job.settings.answers)] for p in range(len(missing[file]))]
            found[file] = write_answers(run.store, f"{job.folder}/{file}", missing[file], answers, job.fingerprint)
            del texts[file]
    return [entry for entry in found.values() if entry is not None]


def _generated(
    job: AnsweringJob, missing: dict[str, list[StoredPrompt]], decoder: Decoder, resources: Resources
) -> Iterator[dict[str, Any]]:
    """Every answer's tokens with its shard, its prompt's place there and its number, as they end."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    asked = job.settings
    tasks = [
        {
            "file": file, "place": place, "answer": answer, "tokenized_prompt": one.prompt.tokens_L.tolist(),
            "sampling_params": sampling(asked, one, answer, job.max_length, decoder.ends),
        }
        for file, prompts in missing.items()
        for place, one in enumerate(prompts)
        for answer in range(asked.answers)
    ]  # fmt: skip
    config = vLLMEngineProcessorConfig(
        model_source=str(job.source.folder()),
        engine_kwargs={"dtype": asked.dtype, "max_model_len": job.max_length, "enable_prefix_caching": True},
        concurrency=max(1, resources.gpus), chat_template_stage=False, tokenize_stage=False, detokenize_stage=False,
    )  # fmt: skip
    kept = ("file", "place", "answer", "generated_tokens")
    processor = build_processor(config, postprocess=lambda row: {name: row[name] for name in kept})
    yield from processor(ray.data.from_items(tasks)).iter_rows()


def sampling(asked: Synthesis, prompt: StoredPrompt, answer: int, max_length: int, ends: list[int]) -> dict[str, Any]:
    """The settings of one answer, by the names that vLLM has for them."""
    return {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "max_tokens": new_tokens(asked, len(prompt.prompt.tokens_L), max_length),
        "seed": int(digest([asked.seed, prompt.prompt_id, answer])[:8], 16),
        "stop_token_ids": ends,
        "detokenize": False,
    }
