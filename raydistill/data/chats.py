"""Chats as text by a tokenizer's template, and which parts of it are learnt.

A template is rendered for the first message, for the first two, and so on: what is added is that message, with what the
template puts around it. Of a message that is learnt and that the model is to write, what the template puts
before its own text (the generation prompt) is read and not learnt; what ends it is learnt, so that the model ends too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

Messages = tuple[tuple[str, str], ...]
WRITER = "assistant"  # whose messages templates put a generation prompt before


@dataclass(frozen=True)
class Segment:
    """A part of a rendered chat, and whether it is learnt.

    own: of a learnt part, the characters that are the message itself without the spaces around it; None where the
    template writes another text. spaces: how many of the message's spaces follow it.
    """

    text: str
    is_learnt: bool
    own: tuple[int, int] | None = None
    spaces: int = 0


def read_messages(value: Any) -> Messages | None:
    """(role, content) of every message of a list, or of one written as JSON; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    pairs = [(one.get("role"), one.get("content")) if isinstance(one, dict) else (None, None) for one in value]
    if not all(isinstance(role, str) and isinstance(content, str) for role, content in pairs):
        return None
    return tuple((str(role), str(content)) for role, content in pairs)


def written_messages(messages: Messages) -> str:
    """Messages as `read_messages` reads them."""
    return json.dumps([{"role": role, "content": content} for role, content in messages], ensure_ascii=False)


def asking(messages: Messages) -> Messages:
    """The chat up to the response that the model is to write, without the one that it has."""
    return messages[:-1] if messages[-1][0] == WRITER else messages


def segments(tokenizer: Any, messages: Messages, learnt_roles: Collection[str]) -> list[Segment] | None:
    """The chat from its first part to its last.

    None for a chat that the template refuses, or whose earlier messages it writes otherwise once later ones follow.
    """
    found: list[Segment] = []
    before = ""
    for number, (role, content) in enumerate(messages, 1):
        is_learnt, is_last = role in learnt_roles, number == len(messages)
        whole = _rendered(tokenizer, messages[:number])
        if whole is None and not is_learnt and not is_last:
            continue  # such as a system message that some templates take with the user's first one alone
        if whole is None or not whole.startswith(before):
            return None
        start = _rendered(tokenizer, messages[: number - 1], prompts=True) if is_learnt and role == WRITER else None
        if start is not None and start.startswith(before) and whole.startswith(start):
            found.append(Segment(start.removeprefix(before), False))
            before = start
        text, own, spaces = whole.removeprefix(before), None, 0
        if is_learnt and (own := _own(tokenizer, messages[:number], whole, len(before))) is not None:
            behind = content[len(content.rstrip()) :]
            spaces = len(behind) if text.startswith(behind, own[1]) else 0
        found.append(Segment(text, is_learnt, own, spaces))
        before = whole
    return found


def _own(tokenizer: Any, messages: Messages, whole: str, begin: int) -> tuple[int, int] | None:
    """Where in what stands from `begin` on the last message's own text is; templates may leave out spaces around it.

    It comes after all that the chat has in common with one whose last message says something else.
    """
    *before, (role, content) = messages
    said = content.strip()
    other = _rendered(tokenizer, (*before, (role, "b" if said.startswith("a") else "a"))) or ""
    common = next((place for place, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), begin)
    place = whole.find(said, max(begin, common))
    return None if place < 0 else (place - begin, place - begin + len(said))


def prompt_segments(tokenizer: Any, messages: Messages, learnt_roles: Collection[str]) -> list[Segment] | None:
    """A chat that the model is to go on with: `segments` of what stands there, and the generation prompt."""
    found, whole = segments(tokenizer, messages, learnt_roles), _rendered(tokenizer, messages, prompts=True)
    before = "".join(part.text for part in found or ())
    if found is None or whole is None or not whole.startswith(before):
        return None
    return [*found, Segment(whole.removeprefix(before), False)]


def prompt_of(tokenizer: Any, message: str) -> str:
    """A user's message as a template writes it, up to where the model is to answer. Raises what the template does."""
    chat = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _rendered(tokenizer: Any, messages: Messages, *, prompts: bool = False) -> str | None:
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompts)
    except Exception:  # a template raises what its author chose
        return None
