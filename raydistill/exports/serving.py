"""How an exported language model is served: the commands, and Ollama's file with the chat template as it writes them.

Ollama has templates of its own and not those of tokenizers (Jinja). What stands around a message of each role is found
by rendering a few chats, and the template that is made of it is kept only if it gives the tokenizer's text for others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MODELFILE = "Modelfile"
ROLES = ("system", "user", "assistant")
MARK = "\u241f{}\u241f"  # no template knows these
Chat = Sequence[dict[str, str]]


@dataclass(frozen=True)
class ChatPieces:
    """What stands before the first message, around one of each role, and where the model is to go on."""

    begin: str
    around: dict[str, tuple[str, str]]
    answer: str

    def text(self, chat: Chat) -> str:
        """A chat whose answer is asked for."""
        found = [before + m["content"] + after for m in chat for before, after in [self.around[m["role"]]]]
        return self.begin + "".join(found) + self.answer


def chat_pieces(tokenizer: Any) -> ChatPieces | None:
    """The pieces of a tokenizer's chat template; None for one that is not made of pieces, or that is not there.

    A template that asks for a user's message first may have no piece for a system's.
    """
    if not isinstance(tokenizer.chat_template, str):
        return None
    for roles in (ROLES, ROLES[1:]):
        pieces = _pieces(tokenizer, roles)
        chats = [_chat(*("user", "assistant") * turns, "user") for turns in (0, 1, 2)]
        chats += [_chat("system", *(m["role"] for m in chat)) for chat in chats] if "system" in roles else []
        if pieces and all(pieces.text(chat) == _rendered(tokenizer, chat, answer=True) for chat in chats):
            return pieces
    return None


def _chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": MARK.format(number)} for number, role in enumerate(roles)]


def _rendered(tokenizer: Any, chat: Chat, *, answer: bool) -> str | None:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=answer)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):  # a template may refuse an order of roles
        return None


def _pieces(tokenizer: Any, roles: Sequence[str]) -> ChatPieces | None:
    """As far as chats of two turns show them."""
    order = (*roles, "user", "assistant") if roles[0] == "system" else (*roles, *roles)
    text = _rendered(tokenizer, _chat(*order), answer=False)
    asked = _rendered(tokenizer, _chat(*order[:-1]), answer=True)
    if text is None or asked is None:
        return None
    gaps = re.split("|".join(re.escape(MARK.format(number)) for number in range(len(order))), text)
    last_gap = asked.rpartition(MARK.format(len(order) - 2))[2]
    if len(gaps) != len(order) + 1:
        return None
    between = {(a, b): gap for a, b, gap in zip(order, order[1:], gaps[1:], strict=False)}
    after_user = _common_start(between["user", "assistant"], last_gap)
    after_assistant = gaps[-1]
    before_user = between["assistant", "user"].removeprefix(after_assistant)
    answer = last_gap.removeprefix(after_user)
    around = {
        "user": (before_user, after_user), "assistant": (between["user", "assistant"][len(after_user) :], gaps[-1])
    }  # fmt: skip
    first = order[0]
    if first == "system":
        after = between["system", "user"].removesuffix(before_user)
        before, begin = gaps[0], ""
        if isinstance(tokenizer.bos_token, str) and tokenizer.bos_token:
            begin = tokenizer.bos_token if before.startswith(tokenizer.bos_token) else ""
        around["system"] = (before.removeprefix(begin), after)
    else:
        begin = gaps[0].removesuffix(before_user)
    return ChatPieces(begin, around, answer)


def _common_start(one: str, other: str) -> str:
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def ollama_template(pieces: ChatPieces, *, adds_begin: bool, begin_token: str | None) -> str:
    """The pieces as Ollama writes them; a first token that the file says to add is left to it."""
    begin = pieces.begin
    if adds_begin and begin_token:
        begin = begin.removeprefix(begin_token)
    cases = [
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        for role, (before, after) in pieces.around.items()
    ]
    return begin + "{{ range .Messages }}" + "".join(cases) + "{{ end }}" + pieces.answer


def modelfile(file: str, *, context: int, template: str | None, stop: str | None) -> str:
    """Ollama's file of a model: its weights, the tokens that it reads, its chats and the token that ends an answer."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}"]
    if stop is not None:
        lines.append(f'PARAMETER stop "{stop}"')
    lines.append(f'TEMPLATE """{template if template is not None else "{{ .Prompt }}"}"""')
    return "\n".join(lines) + "\n"


def commands(format_name: str, folder: str, name: str) -> list[str]:
    """What is typed to serve an exported model that stands in a folder."""
    if format_name in ("onnx", "torchao-int4"):
        return [f"python {folder}/generate.py 'Once upon a time'"]
    if not format_name.startswith("gguf"):
        return [f"vllm serve {folder} --served-model-name {name}"]
    return [
        f"ollama create {name.lower()} -f {folder}/{MODELFILE} && ollama run {name.lower()}",
        f"vllm serve {folder}/model.gguf --tokenizer {folder} --served-model-name {name}",
    ]
