"""What every section of the settings is, and which of its fields determine a result."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")  # of runs and stages
MAX_SEED = 2**32 - 1  # the largest that numpy, torch and transformers all take


def Speed(default: Any, **bounds: Any) -> Any:
    """A Field that changes speed or robustness only and therefore stays out of fingerprints."""
    return Field(default=default, json_schema_extra={"speed": True}, **bounds)


def Added(default: Any, **bounds: Any) -> Any:
    """A Field that came after runs were made: at its default it stays out of fingerprints, so that they go on."""
    return Field(default=default, json_schema_extra={"added": True}, **bounds)


def is_speed(section: type[BaseModel], name: str) -> bool:
    """Whether a field is marked `Speed`."""
    return _has_mark(section.model_fields[name], "speed")


def _has_mark(field: FieldInfo, mark: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


class Section(BaseModel):
    """One block of settings: closed, frozen, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `epochs: true` as 1.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("true and false do not fit here; write a number or a word")
        return value


def identity(section: Section, *, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a section that determine its result: nested, JSON types.

    Those marked `Speed` stay out, and those marked `Added` while they have their default.
    """
    result: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name in skip or _has_mark(field, "speed") or (_has_mark(field, "added") and value == field.default):
            continue
        result[name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return identity(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
