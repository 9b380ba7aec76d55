"""What is said of a setting that is wrong: where it stands, its name, what was found and what is allowed."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from raydistill.config.run import Config

PHRASES = {
    "^(input|string) should": "it should",
    r"a valid dictionary( or instance of \w+)?": "a section of settings",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid boolean, unable to interpret input": "true or false",
}

Path_ = tuple[str | int, ...]


def first_error(error: ValidationError, lines: dict[Path_, str], source: str) -> str:
    """One line for the most telling of pydantic's errors, with the setting's place."""
    path, problem = first_problem(error)
    return f"{place_of(path, lines, source)}: {dotted(path)}: {problem}"


def first_problem(error: ValidationError) -> tuple[Path_, str]:
    """The setting that is most tellingly wrong, and how: an unknown name explains a missing one, so it comes first."""
    order = ["extra_forbidden", "value_error"]
    found = min(error.errors(), key=lambda e: order.index(e["type"]) if e["type"] in order else len(order))
    path: Path_ = found["loc"]
    message = found["msg"][0].lower() + found["msg"][1:]
    if found["type"] != "extra_forbidden" and path[-1:] in (("float",), ("str",)):  # members of a union
        path, message = path[:-1], "it should be a finite number or text"
    if found["type"] == "extra_forbidden":
        known = sorted(_section_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(str(path[-1]), known, 1, 0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return path, f"unknown setting. {hint}"
    if found["type"] == "missing":
        return path, "is missing. Add it"
    if found["type"] == "value_error":
        value = "" if isinstance(found["input"], dict) else f"found {describe(found['input'])}; "
        return path, f"{value}{found['msg'].removeprefix('Value error, ')}"
    for theirs, ours in PHRASES.items():
        message = re.sub(theirs, ours, message)
    return path, f"found {describe(found['input'])}; {message}"


def place_of(path: Path_, lines: dict[Path_, str], source: str) -> str:
    """The place of a setting, or of the section around it."""
    return next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), source)


def _section_at(path: Path_) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for name in path:
        # A number is a place in a list of sections, another name one in a section of any names.
        if name in model.model_fields:
            model = next(_sections_in(model.model_fields[str(name)].annotation))
    return model


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type is or holds, in lists and unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections_in(inner)


def describe(value: Any) -> str:
    """A value as an error message shows it, with its kind."""
    kinds = {str: "text", bool: "true/false", int: "number", float: "number", list: "list", dict: "section"}
    if value is None:
        return "nothing"
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return f"{cut(text)} ({kinds.get(type(value), type(value).__name__)})"


def dotted(path: Path_) -> str:
    """The setting's name on one line, whatever stood in the file as a name."""
    return ".".join(cut(str(p) if str(p).isprintable() else repr(p)) for p in path) or "the file"


def cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
