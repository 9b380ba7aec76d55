"""What determines a stage's outputs, as one sealed document, and its sha256.

`plan.json` stands in a stage's folder before any work is done. Its `inputs` name everything that determines the
outputs, the fingerprint of the stage before it among them, so that fingerprints chain. What only changes speed stays
out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from raydistill.errors import UserError

SCHEMA = 1


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def seal(document: dict[str, Any]) -> bytes:
    """The document as readable JSON with its own checksum in it, so that a flipped bit is found on reading."""
    return (
        json.dumps({**document, "check": digest(document)}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    )


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The document that was sealed. Raises UserError naming the file when it is not intact or from a newer version."""
    try:
        document = json.loads(data)
        intact = document.pop("check") == digest(document)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: is damaged: not a sealed JSON document. Set it aside with verify --repair") from None
    if not intact:
        raise UserError(f"{where}: is damaged: its content has another checksum. Set it aside with verify --repair")
    if document.get("schema", SCHEMA) > SCHEMA:
        raise UserError(
            f"{where}: has format {document['schema']}, this version reads up to {SCHEMA}. Upgrade raydistill"
        )
    return document


@dataclass(frozen=True)
class Plan:
    """A stage and everything that determines what it makes."""

    stage: str
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest({"stage": self.stage, "schema": SCHEMA, "inputs": self.inputs})

    def sealed(self) -> bytes:
        facts = {"stage": self.stage, "schema": SCHEMA, "inputs": self.inputs, "fingerprint": self.fingerprint}
        return seal(facts)

    @staticmethod
    def unsealed(data: bytes, where: str) -> Plan:
        document = unseal(data, where)
        try:
            return Plan(document["stage"], document["inputs"])
        except KeyError:
            raise UserError(f"{where}: is damaged: not a plan. Set it aside with verify --repair") from None


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two nested values differ, as (dotted name, old, new); None when they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else (path, old, new)
