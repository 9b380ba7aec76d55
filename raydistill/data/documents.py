"""The user's documents for a language model: texts, prompts with responses, and chats.

A prompt that is asked has no response, or another one beside its own: the teacher writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raydistill.data.chats import WRITER, Messages, asking, read_messages
from raydistill.data.readers import Fields
from raydistill.data.sources import Dropped, Reason, Source, read_values

# Which prompts are asked: none; those without a response; those with one too; all of them, whatever response they have.
Asks = Literal["never", "missing", "all", "only"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text (prompt is None), a prompt with its response, or a chat, and where it stands.

    Of a prompt without a response, or a chat that ends before one, text is None.
    """

    prompt: str | None
    text: str | None
    file: int
    number: int
    messages: Messages = ()
    is_asked: bool = False


def read_documents(source: Source, fields: Fields, asks: Asks = "never") -> Iterator[Document | Dropped]:
    """Every row of the source in order; `fields` names a column of texts or chats, or of prompts and their responses.

    Where prompts are asked, a column of texts alone holds prompts.
    """
    for file, number, values in read_values(source, fields):
        if values is None:
            yield Dropped("malformed", file, number)
        elif not fields.texts:
            yield _read_chat(values[0], file, number, fields.max_row_bytes, asks)
        elif len(values) == 1 and asks == "never":
            reason = _problem(values, fields.max_row_bytes)
            yield Dropped(reason, file, number) if reason else Document(None, values[0], file, number)
        else:
            yield _read_prompt(values, file, number, fields.max_row_bytes, asks)


def _read_prompt(values: tuple[Any, ...], file: int, number: int, max_bytes: int, asks: Asks) -> Document | Dropped:
    prompt, text = values if len(values) == 2 else (values[0], None)
    if asks == "only" or text is None or (isinstance(text, str) and not text.strip()):
        text = None
    if text is None and asks == "never":
        return Dropped("no response", file, number)
    if reason := _problem((prompt,) if text is None else (prompt, text), max_bytes):
        return Dropped(reason, file, number)
    return Document(prompt, text, file, number, is_asked=text is None or asks == "all")


def _read_chat(value: Any, file: int, number: int, max_bytes: int, asks: Asks) -> Document | Dropped:
    if (messages := read_messages(value)) is None:
        return Dropped("messages are malformed", file, number)
    if asks == "only":
        messages = asking(messages)
    has_response = asks == "never" or (bool(messages) and messages[-1][0] == WRITER)
    text = "\n".join(content for _, content in messages)
    if reason := _problem((text,), max_bytes):
        return Dropped(reason, file, number)
    is_asked = asks == "all" or (asks != "never" and not has_response)
    return Document(None, text if has_response else None, file, number, messages, is_asked)


def _problem(values: tuple[Any, ...], max_bytes: int) -> Reason | None:
    """What is wrong with a row."""
    if any(value is None for value in values):
        return "null text"
    if not all(isinstance(value, str) for value in values):
        return "text is not text"
    if not values[-1].strip():
        return "empty text"
    try:
        return "over max_row_bytes" if sum(len(value.encode()) for value in values) > max_bytes else None
    except UnicodeEncodeError:
        return "text is not text"
