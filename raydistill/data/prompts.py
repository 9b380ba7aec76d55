"""Prompts that a teacher answers, and its answers, as shards of a run: readable with any Parquet reader.

A shard of prompts has the columns prompt_id (the prompt's ordinal over all splits), prompt (as people read it), tokens
(as a model is given it), messages (of a chat, as JSON), and where the prompt came from (source_file, source_row). Its
shard of answers has the same prompts in the same order: prompt_id, prompt, answers (a list, for each the text, whether
it came to its end, and how many tokens were written).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.shards import RowWriter
from raydistill.data.token_rows import Answer, Tokenised, TokenPrompt
from raydistill.errors import UserError
from raydistill.record.commit import Entry, commit_shard, open_verified
from raydistill.record.store import Store, naming

PROMPTS, ANSWERS = "answers/prompts", "answers"
PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field("tokens", pa.large_list(pa.field("token", pa.int32(), nullable=False)), nullable=False),
        pa.field("messages", pa.large_string()),
        pa.field("source_file", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.int64(), nullable=False),
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field(
            "answers",
            pa.list_(pa.struct([("text", pa.large_string()), ("has_end", pa.bool_()), ("tokens", pa.int32())])),
            nullable=False,
        ),
    ]
)


@dataclass(frozen=True)
class Written:
    """What a model wrote to a prompt, and in how many tokens."""

    answer: Answer
    tokens: int


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt of a shard."""

    prompt_id: int
    prompt: TokenPrompt
    file: int
    number: int


class PromptWriter(RowWriter):
    """Takes the prompts of one split in order and commits a shard whenever one is full."""

    def __init__(self, store: Store, split: str, *, first_id: int, shard_rows: int, fingerprint: str) -> None:
        super().__init__(
            store, split, first_row_id=first_id, shard_rows=shard_rows, fingerprint=fingerprint, schema=PROMPT_SCHEMA,
            folder=PROMPTS,
        )  # fmt: skip

    def add(self, found: Tokenised) -> None:
        assert found.prompt is not None
        self.add_values((found.prompt.text, found.prompt.tokens_L, found.prompt.messages, found.file, found.number))


def read_prompts(store: Store, entry: Entry) -> list[StoredPrompt]:
    """A committed shard of prompts. Raises UserError when the file is not what the manifest says."""
    return [
        StoredPrompt(
            one["prompt_id"], TokenPrompt(one["prompt"], np.array(one["tokens"], np.int32), one["messages"]),
            one["source_file"], one["source_row"],
        )
        for one in _read(store, PROMPTS, entry)
    ]  # fmt: skip


def write_answers(
    store: Store, name: str, prompts: Sequence[StoredPrompt], written: Sequence[Sequence[Written]], fingerprint: str
) -> Entry:
    """Commits the answers to a shard's prompts."""
    rows = [
        {
            "prompt_id": one.prompt_id,
            "prompt": one.prompt.text,
            "answers": [{"text": w.answer.text, "has_end": w.answer.has_end, "tokens": w.tokens} for w in of_prompt],
        }
        for one, of_prompt in zip(prompts, written, strict=True)
    ]
    staged = store.staging(name)
    with naming(staged):
        table = pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)
        pq.write_table(table, staged, compression="zstd", write_page_checksum=True, store_schema=False)
    return commit_shard(store, staged, name, rows=len(rows), fingerprint=fingerprint)


def read_answers(store: Store, asked: Entry, entry: Entry) -> Iterator[tuple[StoredPrompt, list[Answer]]]:
    """Every prompt of a shard with its answers. Raises UserError for files that are not what their manifests say."""
    for prompt, one in zip(read_prompts(store, asked), _read(store, ANSWERS, entry), strict=True):
        if prompt.prompt_id != one["prompt_id"]:
            where = store.where(f"{ANSWERS}/{entry.file}")
            raise UserError(f"{where}: answers other prompts than its shard of prompts. Use --redo prepare")
        yield prompt, [Answer(found["text"], found["has_end"]) for found in one["answers"]]


def _read(store: Store, folder: str, entry: Entry) -> list[dict]:
    with open_verified(store, folder, entry) as source:
        return pq.ParquetFile(source).read(use_threads=False).to_pylist()
