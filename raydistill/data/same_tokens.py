"""Whether two tokenizers make the same tokens of every text, and the first thing in which they differ if not."""

from __future__ import annotations

import json
from typing import Any

# What makes tokens of a text, in the order in which it does, by its name in a tokenizer's file.
STEPS = ("normalizer", "pre_tokenizer", "decoder")
SPECIAL = ("bos_token", "eos_token", "unk_token")  # padding is never learnt


def difference(theirs: Any, ours: Any, *, template: bool = False) -> str | None:
    """How our tokenizer differs from theirs: the first token, merge, step or special token, in words; None if in none.

    Tokens are compared by id, then what cuts a text into them. With `template` the chat template is too.
    """
    return (
        _tokens(theirs, ours)
        or _steps(_layout(theirs), _layout(ours))
        or _specials(theirs, ours)
        or (_template(theirs, ours) if template else None)
    )


def _tokens(theirs: Any, ours: Any) -> str | None:
    for number in range(min(len(theirs), len(ours))):
        one, other = theirs.convert_ids_to_tokens(number), ours.convert_ids_to_tokens(number)
        if one != other:
            return f"token {number} is {one!r} there and {other!r} here"
    if len(theirs) != len(ours):
        longer, where = (theirs, "there") if len(theirs) > len(ours) else (ours, "here")
        number = min(len(theirs), len(ours))
        return f"token {number}, {longer.convert_ids_to_tokens(number)!r}, is {where} alone"
    return None


def _layout(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer as its file says it; nothing of a slow one, whose tokens are all that can be compared."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}


def _steps(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    one, other = theirs.get("model", {}), ours.get("model", {})
    if one.get("type") != other.get("type"):
        return f"it is of type {one.get('type')} there and {other.get('type')} here"
    merges = one.get("merges") or [], other.get("merges") or []
    for number, (merge, another) in enumerate(zip(*merges, strict=False)):
        if merge != another:
            return f"merge {number} is {_words(merge)!r} there and {_words(another)!r} here"
    if len(merges[0]) != len(merges[1]):
        return f"it has {len(merges[0])} merges there and {len(merges[1])} here"
    for name in sorted({*one, *other} - {"merges", "vocab"}):
        if one.get(name) != other.get(name):
            return f"its {name} is {one.get(name)!r} there and {other.get(name)!r} here"
    if one.get("vocab") != other.get("vocab"):  # of the same tokens: the scores of a unigram model
        return "its tokens have other scores here"
    for name in STEPS:
        if theirs.get(name) != ours.get(name):
            return (
                f"its {name.replace('_', '-')} differs: {_short(theirs.get(name))} there, {_short(ours.get(name))} here"
            )
    return None


def _specials(theirs: Any, ours: Any) -> str | None:
    for name in SPECIAL:
        one, other = getattr(theirs, name), getattr(ours, name)
        if one != other:
            return f"{name} is {one!r} there and {other!r} here"
    return None


def _template(theirs: Any, ours: Any) -> str | None:
    if theirs.chat_template == ours.chat_template:
        return None
    return f"its chat template is {_short(theirs.chat_template)} there and {_short(ours.chat_template)} here"


def _words(merge: Any) -> str:
    return " ".join(merge) if isinstance(merge, list) else str(merge)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
