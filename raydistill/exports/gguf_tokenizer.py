"""A tokenizer as a GGUF file holds it: its tokens and their types, merges or scores, and what stands before a text.

llama.cpp knows two kinds of BPE, which cut texts as the tokenizers of transformers do under conditions that are checked
here: "gpt2", on bytes by merges, after one of the rules in SPLITS; and "llama", on characters by scores, as
SentencePiece does (Kudo & Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from raydistill.errors import UserError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of how a text is cut before merges, by the rule of a tokenizer.json: a pattern, or digits alone.
SPLITS = {f"{CONTRACTIONS}|\\p{{N}}{{1,3}}|{OTHERS}": "llama-bpe", f"{CONTRACTIONS}|\\p{{N}}|{OTHERS}": "qwen2"}
WHOLE_PIECES = ("llama-bpe",)  # those that look a piece up as a whole before they merge
SPACE = "\u2581"


@dataclass(frozen=True)
class GgufTokenizer:
    """What a file says of its tokenizer. types are gguf.TokenType; merges are of model "gpt2", scores of "llama"."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    adds_begin: bool
    adds_end: bool
    adds_space: bool
    chat_template: str | None


def gguf_tokenizer(tokenizer: Any, size: int) -> GgufTokenizer:
    """The tokenizer of a model with `size` rows of embeddings. Raises UserError for one that llama.cpp would cut texts
    otherwise with.
    """
    if not tokenizer.is_fast:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    if file["model"]["type"] != "BPE":
        raise _refused(f"it is {file['model']['type']}, and only BPE is held")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in file["model"]["merges"]]
    on_bytes = "ByteLevel" in [step["type"] for step in _steps(file, "pre_tokenizer", "pretokenizers")]
    pre = _bytes_rule(file) if on_bytes else "default"
    adds_space = False if on_bytes else _adds_space(file)
    begin, end = _ends(tokenizer)
    tokens, types = _tokens(tokenizer, file, size, on_bytes)
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return GgufTokenizer(
        "gpt2" if on_bytes else "llama", pre, tokens, types, [" ".join(pair) for pair in merges] if on_bytes else [],
        [] if on_bytes else _scores(tokens, types, merges), {k: v for k, v in special.items() if v is not None}, begin,
        end, adds_space, tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )  # fmt: skip


def _refused(reason: str) -> UserError:
    return UserError(
        f"export.formats: gguf: the student's tokenizer is of no kind that llama.cpp cuts texts alike with: {reason}."
        " Leave the format out, and serve safetensors"
    )


def _steps(file: dict[str, Any], part: str, several: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer.json, which is nothing, one step, or a sequence."""
    found = file.get(part)
    if found is None:
        return []
    return found[several] if found["type"] == "Sequence" else [found]


def _bytes_rule(file: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer on bytes cuts texts into pieces."""
    if any(step["type"] != "NFC" for step in _steps(file, "normalizer", "normalizers")):
        raise _refused(f"it changes texts by {file['normalizer']['type']}")
    *before, last = _steps(file, "pre_tokenizer", "pretokenizers")
    pre = None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last["use_regex"] and not before:
            pre = "gpt-2"
        elif last["use_regex"] and [(s["type"], s.get("individual_digits")) for s in before] == [("Digits", True)]:
            pre = "smollm"
        elif not last["use_regex"] and [s["type"] for s in before] == ["Split"] and before[0]["behavior"] == "Isolated":
            pre = SPLITS.get(before[0]["pattern"].get("Regex", ""))
    if pre is None:
        rule = json.dumps(file["pre_tokenizer"])
        raise _refused(f"its rule is not known there, {rule[:120]}{' …' if len(rule) > 120 else ''}")
    if bool(file["model"].get("ignore_merges")) != (pre in WHOLE_PIECES):
        raise _refused(f"ignore_merges is {file['model'].get('ignore_merges')}, which {pre} is not")
    return pre


def _adds_space(file: dict[str, Any]) -> bool:
    """Whether a tokenizer on characters puts a space before a text; it must write spaces as SentencePiece does."""
    normal = _steps(file, "normalizer", "normalizers")
    pieces = _steps(file, "pre_tokenizer", "pretokenizers")
    replaces = [s for s in normal if s["type"] == "Replace"]
    prepends = [s for s in normal if s["type"] == "Prepend"]
    by_normalizer = (
        len(replaces) == 1 and replaces[0]["content"] == SPACE and replaces[0]["pattern"] == {"String": " "}
        and len(normal) == 1 + len(prepends) and all(s["prepend"] == SPACE for s in prepends)
        and all(s["type"] == "Split" and s["pattern"] == {"String": " "} for s in pieces)
    )  # fmt: skip
    by_pieces = (
        not normal and [s["type"] for s in pieces] == ["Metaspace"] and pieces[0]["replacement"] == SPACE
        and not pieces[0].get("split", True)
    )  # fmt: skip
    if not file["model"].get("byte_fallback") or not (by_normalizer or by_pieces):
        raise _refused("it works on characters, and not as SentencePiece's BPE with bytes for what it does not know")
    return bool(prepends) if by_normalizer else pieces[0].get("prepend_scheme", "always") != "never"


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether it puts its first and its last token around a text, and nothing else."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = tokenizer("a")["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and found[0] != plain[0] else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and found[-1] != plain[-1] else []
    if found != [*begin, *plain, *end]:
        raise _refused(f"it puts other tokens around a text than its first and last, {found}")
    return bool(begin), bool(end)


def _tokens(tokenizer: Any, file: dict[str, Any], size: int, on_bytes: bool) -> tuple[list[str], list[int]]:
    """Every row of the embeddings has a token; those that the tokenizer does not know are unused."""
    from gguf import TokenType

    names = {number: name for name, number in tokenizer.get_vocab().items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    types = [int(TokenType.NORMAL if number in names else TokenType.UNUSED) for number in range(size)]
    for token in file["added_tokens"]:
        types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if not on_bytes:
        for number, name in enumerate(tokens):
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                types[number] = int(TokenType.BYTE)
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """The later a piece is merged the lower its score; of pieces that nothing is merged into, below all others.

    llama.cpp joins any two pieces that make a third, the best score first; so a merge must stand there for all pairs
    that make a piece, and those of one piece beside each other.
    """
    from gguf import TokenType

    known = {name for name, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    ranks: dict[str, int] = {}
    before = ""
    for rank, (left, right) in enumerate(merges):
        if left + right in ranks and before != left + right:
            raise _refused(f"its merges are not those of a SentencePiece model, by {left + right!r}")
        before = left + right
        ranks.setdefault(before, rank)
    pairs = set(merges)
    for name in known:
        for cut in range(1, len(name)):
            if name[:cut] in known and name[cut:] in known and (name[:cut], name[cut:]) not in pairs:
                raise _refused(f"it does not merge {name[:cut]!r} and {name[cut:]!r}, as SentencePiece would")
    lowest = float(-len(merges) - 1)
    return [
        -float(ranks[name]) if name in ranks else lowest if kind == TokenType.NORMAL else 0.0
        for name, kind in zip(tokens, types, strict=True)
    ]
