"""What is learnt of a chat, as bytes that two tokenizers share whatever their templates put around messages.

For every message that is learnt these are: a byte that stands for all that is read before it, its own text without the
spaces around it, and a byte that stands for its end. A token of a rendered chat ends in them where it ends in the
message. The last token before a message ends after the first of the two bytes, those before that stand for none; the
first token after it, the message's own spaces apart, ends after the second. So tokens are aligned by messages' texts,
and the token that ends a message with the one that ends it for the other tokenizer.

Shapes: L tokens of a chat.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from raydistill.data.chats import Messages, Segment
from raydistill.data.token_bytes import TokenBytes

MARK = b"\0"


def learnt_texts(messages: Messages, roles: Collection[str]) -> list[bytes]:
    """The own texts of the messages that are learnt."""
    return [content.strip().encode() for role, content in messages if role in roles]


def chat_bytes(texts: Sequence[bytes]) -> bytes:
    """The bytes that tokens of either side are placed in."""
    return b"".join(MARK + text + MARK for text in texts)


def mark_places(texts: Sequence[bytes]) -> list[int]:
    """Which of `chat_bytes` stand for no text."""
    found, at = list[int](), 0
    for text in texts:
        found += [at, at + len(text) + 1]
        at += len(text) + 2
    return found


def chat_ends(
    parts: Sequence[Segment], ids: Sequence[list[int]], texts: Sequence[bytes], measured: TokenBytes
) -> npt.NDArray[np.int32] | None:
    """Where in `chat_bytes` each token of a rendered chat ends, (L,).

    ids are the tokens of the parts. None where a message's text is changed, by the template or by the tokenizer.
    """
    found, at, left = list[int](), 0, iter(texts)
    before = 0  # tokens that stand before the message that comes next
    for part, tokens in zip(parts, ids, strict=True):
        if not part.is_learnt:
            found += [at] * len(tokens)
            before += len(tokens)
            continue
        text, ends_L = next(left), measured.ends(tokens, part.text)
        if ends_L is None or part.own is None:
            return None
        within_L = ends_L - len(part.text[: part.own[0]].encode())
        is_before_L, is_after_L = within_L <= 0, within_L > len(text) + part.spaces
        before += int(is_before_L.sum())
        inside_L = 1 + np.minimum(within_L, len(text)) + is_after_L
        found += (at + np.where(is_before_L, 0, inside_L)).tolist()
        if before:
            found[len(found) - len(tokens) + int(is_before_L.sum()) - 1] = at + 1
        at, before = at + len(text) + 2, 0
    return np.array(found, np.int32)
