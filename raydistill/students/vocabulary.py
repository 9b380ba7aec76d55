"""A tokenizer of the tokens that train uses, and those that any text needs, in the place of all.

A text whose tokens are all kept gives the same tokens as before; another text gives smaller ones. Why, by kind of
tokenizer, as the `tokenizers` library has them:

WordPiece takes the longest piece that fits, from the left. Where it took a kept piece before, no longer one has come,
so it takes it again. A word that it cannot write is the unknown token; of such words in train the pieces that it took
before it gave up are kept too, so that it gives up again. Other words go on with shorter pieces.

BPE joins, again and again, the pair whose merge stands first in its list. With a token all merges that make it are
kept, and the parts of each. So every merge that was used is there; it stood first among more before, so it stands first
among fewer; and where no merge was left before, none is left. Other words miss some merge and stay in smaller pieces.

Unigram takes the pieces with the largest sum of log-probabilities, and the first of equals. The best sum is among
fewer now, and none of the others is new. A character without a piece costs the smallest log-probability of all less
10, so the least likely piece is kept as well.

Single characters (bytes in byte-level BPE, `<0x00>` to `<0xFF>` where there is byte fallback) are kept in all their
forms, so that a word can need the unknown token only where the vocabulary had no piece for one of its characters.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.data.shards import DataShard
from raydistill.data.tokens import CHUNK_ROWS, load_tokenizer
from raydistill.errors import UserError

SETTING = "student.trim_vocabulary"
KINDS = ("BPE", "Unigram", "WordPiece")
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What some tokenizers keep beside tokenizer.json, with the ids of all tokens in it.
OTHER_FILES = (
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model",
    "added_tokens.json",
)  # fmt: skip


def check_trimmable(tokenizer: Any) -> None:
    """Raises UserError for a tokenizer that is none of the library's WordPiece, BPE and Unigram."""
    kind = type(tokenizer.backend_tokenizer.model).__name__ if tokenizer.is_fast else "none"
    if kind not in KINDS:
        raise UserError(
            f"{SETTING}: {type(tokenizer).__name__} has no model in tokenizer.json that can be trimmed (found {kind},"
            f" expected {', '.join(KINDS)}). Save it as a fast tokenizer, or remove trim_vocabulary"
        )


def trimmed_tokenizer(
    tokenizer: Any, shards: Iterable[DataShard], *, max_length: int, min_count: int, needed: Iterable[int] = ()
) -> tuple[Any, list[int]]:
    """The tokenizer without the tokens that the rows use less than min_count times, and the old ids of those it has.

    A row counts up to max_length tokens and to the end of the word that is cut there. `needed` are ids that are kept
    whatever the rows use. Ids follow the order that they had: token i is the old token kept[i].
    Raises UserError where the tokenizer cannot be trimmed, or the new one does not do what this module says.
    """
    check_trimmable(tokenizer)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    counts, attempted = np.zeros(len(tokenizer), np.int64), set[int]()
    sample: list[str] = []
    for shard in shards:
        sample = sample or shard.texts
        for start in range(0, len(shard.texts), CHUNK_ROWS):
            texts = shard.texts[start : start + CHUNK_ROWS]
            used = _used(tokenizer, texts, max_length)
            counts += np.bincount(np.concatenate(used), minlength=len(counts))
            if document["model"]["type"] == "WordPiece":
                unknown = [text for text, ids in zip(texts, used, strict=True) if tokenizer.unk_token_id in ids]
                attempted |= _attempted(tokenizer.backend_tokenizer, document["model"], unknown)
    kept = {int(i) for i in np.flatnonzero(counts >= min_count)} | attempted | set(needed)
    kept = sorted(_closed(document, kept | set(tokenizer.all_special_ids)))
    trimmed = _rebuilt(tokenizer, document, kept)
    _check_same(tokenizer, trimmed, kept, sample, max_length)
    return trimmed, kept


def _used(tokenizer: Any, texts: list[str], max_length: int) -> list[npt.NDArray[np.int64]]:
    """The ids of each text up to the end of the word that truncation cuts; without words' borders, all."""
    found = []
    for encoding in tokenizer(texts, truncation=False, verbose=False).encodings:
        ids, words, end = encoding.ids, encoding.word_ids, max_length
        while end < len(ids) and (tokenizer.truncation_side != "right" or words[end] == words[end - 1]):
            end += 1
        found.append(np.array(ids[:end], np.int64))
    return found


def _attempted(backend: Any, model: dict[str, Any], texts: list[str]) -> set[int]:
    """The pieces that WordPiece takes of the words that it then gives up."""
    vocabulary, prefix, found = model["vocab"], model["continuing_subword_prefix"], set()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words = [(normal, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(normal)
        for word in {word for word, _ in words if len(word) <= model["max_input_chars_per_word"]}:
            taken, start = [], 0
            while start < len(word):
                pieces = ((end, (prefix if start else "") + word[start:end]) for end in range(len(word), start, -1))
                end, piece = next(((e, p) for e, p in pieces if p in vocabulary), (None, ""))
                if end is None:
                    found |= set(taken)
                    break
                taken.append(vocabulary[piece])
                start = end
    return found


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _merges(model: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(left, right, what they make) of every merge of BPE, in order."""
    skipped = len(model["continuing_subword_prefix"] or "")
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right[skipped:]


def _closed(document: dict[str, Any], kept: set[int]) -> set[int]:
    """The ids with those that any text needs, and those without which the kept ones would not come about."""
    model = document["model"]
    vocabulary = _vocabulary(model)
    marks = (model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or "")
    kept = kept | {token["id"] for token in document["added_tokens"]} | set(_processor_ids(document["post_processor"]))
    for piece, number in vocabulary.items():
        bare = piece.removeprefix(marks[0]).removesuffix(marks[1])
        if len(piece) == 1 or len(bare) == 1 or BYTE_PIECE.fullmatch(piece):
            kept.add(number)
    if model["type"] == "Unigram":
        kept.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
        # Some architectures' tokenizers expect the unknown token at its place, behind others.
        kept |= set(range(min(model["unk_id"] or 0, 16) + 1))
    elif model.get("unk_token") in vocabulary:
        kept.add(vocabulary[model["unk_token"]])
    if model["type"] == "BPE":
        parts: dict[str, set[str]] = {}
        for left, right, made in _merges(model):
            parts.setdefault(made, set()).update((left, right))
        names = {number: piece for piece, number in vocabulary.items()}
        open_ids = [number for number in kept if number in names]
        while open_ids:
            new = {vocabulary[part] for part in parts.get(names[open_ids.pop()], ())} - kept
            kept |= new
            open_ids += new
    return kept


def _processor_ids(processor: dict[str, Any] | None) -> Iterator[int]:
    """The ids that a post-processor puts around a text."""
    for part in (processor or {}).get("processors", [processor] if processor else []):
        for token in part.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (part[name][1] for name in ("sep", "cls") if name in part)


def _rebuilt(tokenizer: Any, document: dict[str, Any], kept: list[int]) -> Any:
    """The tokenizer of the kept ids, which become 0, 1, 2 and so on; loaded as users will load it."""
    new = {old: number for number, old in enumerate(kept)}
    _renumber(document, new)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(name)
        for file in OTHER_FILES:
            (folder / file).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in facts:
            facts["added_tokens_decoder"] = {new[int(n)]: t for n, t in facts["added_tokens_decoder"].items()}
            path.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(folder, SETTING)


def _renumber(document: dict[str, Any], new: dict[int, int]) -> None:
    """Leaves only the ids that have a new number, and gives them those, everywhere in tokenizer.json."""
    model = document["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        if model["type"] == "BPE":
            stays = {piece for piece, number in model["vocab"].items() if number in new}
            merges = [(left, right) for left, right, made in _merges(model) if {left, right, made} <= stays]
            model["merges"] = merges
        ordered = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["vocab"] = {piece: new[number] for piece, number in ordered if number in new}
    for token in document["added_tokens"]:
        token["id"] = new[token["id"]]
    processor = document["post_processor"]
    for part in (processor or {}).get("processors", [processor] if processor else []):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name][1] = new[part[name][1]]
    document["padding"] = document["truncation"] = None


def _check_same(old: Any, new: Any, kept: list[int], texts: list[str], max_length: int) -> None:
    """Compares both tokenizers, on the texts whose tokens are all kept. Raises UserError when they differ."""
    same = new.convert_ids_to_tokens(list(range(len(new)))) == old.convert_ids_to_tokens(kept)
    if same:
        options = {"truncation": True, "max_length": max_length, "verbose": False}
        pairs = zip(old(texts, **options)["input_ids"], new(texts, **options)["input_ids"], strict=True)
        all_kept = set(kept)
        same = all(a == [kept[number] for number in b] for a, b in pairs if all_kept.issuperset(a))
    if not same:
        raise UserError(
            f"{SETTING}: {type(old).__name__} does not give the same tokens once it is trimmed. Remove trim_vocabulary"
        )
