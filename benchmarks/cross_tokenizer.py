"""Students with another tokenizer than their teacher's: python benchmarks/cross_tokenizer.py

On generated stories a teacher with 384 tokens is trained and asked once; from its cache students with a tokenizer of
1,024 tokens of their own learn spans, sorted probabilities, each at every alpha, and nothing (the control). With --text
the teacher is that of a finished benchmarks/language.py --out TEXT, with 4,096 tokens, and students are as there.
--alignment measures instead how fast rows are tokenised for a student and aligned, in processor seconds, so that other
work counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import language
import numpy as np

from raydistill.config.file import validate
from raydistill.data.documents import Document
from raydistill.data.student_rows import StudentRows
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_rows import Rules
from raydistill.data.token_shards import TokenShard
from raydistill.demo_language import language_demo_config, new_tokenizer
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress
from raydistill.stories import stories

VOCABULARY = 1024
MEASURED = ("bits_per_byte", "accuracy", "parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-cross-tokenizer"))
    parser.add_argument("--losses", default="spans,uld")
    parser.add_argument("--alphas", default="0.9,0.5,0.2")
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--text", type=Path, help="the --out of benchmarks/language.py")
    parser.add_argument("--alignment", type=int, metavar="TOKENS")
    arguments = parser.parse_args()
    if arguments.alignment:
        print(json.dumps(alignment(arguments.alignment)), flush=True)
        return
    folder, lender = arguments.folder.resolve(), None
    for loss, alpha in product(arguments.losses.split(","), map(float, arguments.alphas.split(","))):
        base = of_text(folder, arguments.text.resolve()) if arguments.text else of_stories(folder, arguments.documents)
        found = measured(folder, base, loss, alpha, lender)
        print(json.dumps({"loss": loss, "alpha": alpha, **found}), flush=True)
        lender = lender or folder / f"{loss}-{alpha:g}"


def of_stories(folder: Path, documents: int) -> dict[str, Any]:
    return language_demo_config(folder, train=documents).model_dump(mode="json", exclude_unset=True)


def of_text(folder: Path, out: Path) -> dict[str, Any]:
    """What a finished run of benchmarks/language.py trained, with the teacher as it is."""
    base = language.config_of("sampled-20", out, language.SIZES[False]).model_dump(mode="json", exclude_unset=True)
    return base | {"storage": str(folder)}


def measured(folder: Path, base: dict[str, Any], loss: str, alpha: float, lender: Path | None) -> dict[str, Any]:
    """The report of one student; what stands in the folder is kept."""
    own = folder / "own-tokenizer"
    if not own.exists():
        texts = (json.loads(line)["text"] for line in Path(base["data"]["train"]).read_text().splitlines())
        new_tokenizer(texts, VOCABULARY).save_pretrained(str(own))
    base["name"] = f"{loss}-{alpha:g}"
    base["data"]["keep_text"] = True
    base["teacher"].setdefault("next_tokens", {})["text_logprobs"] = True
    base["teacher"] |= {"cache_from": str(lender)} if lender else {}
    base["student"]["tokenizer"] = str(own)
    base["train"] |= {"loss": {"alpha": alpha, "cross_tokenizer": loss}, "metric": "nll"}
    base["evaluate"] |= {"latency_requests": 16, "control": lender is None}
    stages = ("prepare", "teach", "train", "evaluate")
    report = run_stages(validate(base, {}, "benchmark"), stages, Progress(print))
    assert report is not None
    models = {name: report[name] for name in ("teacher", "student", "control") if report.get(name)}
    return {name: {key: found[key] for key in MEASURED} for name, found in models.items()} | {
        name: report[name] for name in ("retention", "gain_over_control_ci95", "gap_closed")
    }


def alignment(tokens: int) -> dict[str, Any]:
    """Processor seconds for about so many tokens of the teacher's: its own bytes, and a student's rows with spans."""
    texts = list(stories(2000, seed=0))
    theirs, ours = new_tokenizer(texts, 384), new_tokenizer(texts, VOCABULARY)
    rules = Rules(theirs, 256, splits=True)
    each = sum(len(row.tokens_L) for one in rules.tokenised(_documents(texts)) for row in one.rows)
    many = _documents(texts * max(1, round(tokens / each)))
    seconds: dict[str, float] = {}
    started = time.process_time()
    plain = sum(len(row.tokens_L) for one in rules.tokenised(many) for row in one.rows)
    seconds["the teacher's rows"] = time.process_time() - started
    started = time.process_time()
    rows = [
        row for one in Rules(theirs, 256, True, measured=TokenBytes(theirs, "")).tokenised(many) for row in one.rows
    ]
    seconds["with their bytes"] = time.process_time() - started
    kept = [row.text for row in rows if row.text is not None]
    shard = TokenShard(
        "", np.arange(len(rows)), np.arange(len(rows)), np.cumsum([0, *(len(row.tokens_L) for row in rows)]),
        np.concatenate([row.tokens_L for row in rows]), np.concatenate([row.learnt_L for row in rows]),
    )  # fmt: skip
    made = StudentRows(ours, "", theirs, 256)
    started = time.process_time()
    found = made.made(shard, kept)
    seconds["the student's rows and spans"] = time.process_time() - started
    return {"tokens": plain, "spans": len(found.spans), **{name: round(value, 2) for name, value in seconds.items()}}


def _documents(texts: list[str]) -> list[Document]:
    return [Document(None, text, 0, number) for number, text in enumerate(texts)]


if __name__ == "__main__":
    main()
