"""Where in a text's bytes every token ends.

Offsets of a tokenizer count characters, and within a character of several bytes they are the same for tokens that hold
different ones of its bytes. So tokens are measured by the bytes that the vocabulary gives them, and these, one after
the other, must be the text's: of a text that the tokenizer changes first (lower case, NFC, fewer spaces) nothing is
said. Only what an unknown token stands for is told by its offsets, which are right about whole characters.

Shapes: L tokens of a text, V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.errors import UserError

SPACE = "\u2581"  # SentencePiece's sign for one
Ends = npt.NDArray[np.int32]


class TokenBytes:
    """The bytes of every token of a tokenizer. Raises UserError, naming the setting, for one that is not a fast one."""

    def __init__(self, tokenizer: Any, setting: str) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{setting}: its tokenizer is not one of the tokenizers library, which bytes of a text need. Save it"
                " with tokenizer.json"
            )
        self._tokenizer, self.unknown = tokenizer, tokenizer.unk_token_id
        layout = json.loads(tokenizer.backend_tokenizer.to_str())
        steps = _kinds(layout.get("decoder")) | _kinds(layout.get("pre_tokenizer"))
        to_bytes = _of_bytes if "ByteLevel" in steps else _of_characters
        self._bytes_V = [
            to_bytes(token or "") for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        ]
        self._added = frozenset(tokenizer.added_tokens_decoder)
        for number, added in tokenizer.added_tokens_decoder.items():
            self._bytes_V[number] = added.content.encode()

    def of(self, ids: list[int]) -> list[bytes]:
        """What each token stands for: its part of a character, where it has no more; an added token's own name."""
        return [self._bytes_V[token] for token in ids]

    def ends(self, ids: list[int], text: str) -> Ends | None:
        """The byte before which each token of a text ends, (L,); None where the tokens are not the text's own.

        A token that stands for no byte, such as a space that the tokenizer puts before a text, ends where the one
        before it does.
        """
        if self.unknown is not None and self.unknown in ids:
            return self._with_unknown(ids, text)
        return self._ends(ids, self.of(ids), text)

    def _with_unknown(self, ids: list[int], text: str) -> Ends | None:
        """Of a text with characters that the vocabulary lacks: what those are is where the tokenizer says."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if found["input_ids"] != ids:
            return None
        parts = [
            text[first:end].encode() if token == self.unknown else self._bytes_V[token]
            for token, (first, end) in zip(ids, found["offset_mapping"], strict=True)
        ]
        return self._ends(ids, parts, text)

    def _ends(self, ids: list[int], parts: list[bytes], text: str) -> Ends | None:
        """Where tokens of these bytes end in a text; None where they are not the text."""
        whole = text.encode()
        if b"".join(parts) == whole:
            return np.cumsum(np.fromiter(map(len, parts), np.int32, len(parts)), dtype=np.int32)
        return _loose_ends([(part, token in self._added) for token, part in zip(ids, parts, strict=True)], whole)


def _loose_ends(parts: list[tuple[bytes, bool]], whole: bytes) -> Ends | None:
    """As `TokenBytes.ends`, where spaces differ beside added tokens and before a text.

    A tokenizer of SentencePiece's kind puts a space there that is not the text's, and an added token may take in those
    on its left or right.
    """
    ends, at, is_beside = list[int](), 0, True
    for part, is_added in parts:
        first = at
        if is_added or is_beside:
            first = next((n for n in range(at, _spaces_end(whole, at) + 1) if whole.startswith(part, n)), at)
        if whole.startswith(part, first):
            at = first + len(part)
        elif is_beside and part.startswith(b" ") and whole.startswith(part[1:], first):
            at = first + len(part) - 1
        else:
            return None
        ends.append(at)
        is_beside = is_added
    return np.array(ends, np.int32) if at == len(whole) or (is_beside and not whole[at:].strip()) else None


def _spaces_end(whole: bytes, at: int) -> int:
    """Where what is no space begins."""
    return len(whole) - len(whole[at:].lstrip())


def _kinds(step: Any) -> set[str]:
    """The types of a step of a tokenizer's file, and of those that it is made of."""
    if not isinstance(step, dict):
        return set()
    parts = [part for name in ("decoders", "pretokenizers") for part in step.get(name) or ()]
    return {str(step.get("type"))}.union(*map(_kinds, parts))


def _byte_signs() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte: its own where it can be seen, else one from 256."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


SIGNS = _byte_signs()


def _of_bytes(token: str) -> bytes:
    return bytes(SIGNS[sign] for sign in token) if all(sign in SIGNS for sign in token) else token.encode()


def _of_characters(token: str) -> bytes:
    """A piece of SentencePiece's kind; <0x0A> is a byte of a character that the vocabulary lacks."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()
