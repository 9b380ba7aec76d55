"""From a YAML file and `section.key=value` overrides to a `Config`, with errors that point at the line.

Only plain YAML is taken: no anchors, aliases, tags or duplicate keys, at most 1 MiB and 32 levels. Scalars follow
YAML 1.2, so that `1e-3` is a number and `no` is a word.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raydistill.config import Config
from raydistill.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
SECRET = re.compile(r"^(sk-(ant-)?[\w-]{16,}|hf_\w{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{16,}|[0-9a-f]{40})$")

Path_ = tuple[str | int, ...]


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Config:
    """The configuration in the file, with the overrides applied and local paths made absolute.

    Raises UserError, in one line, with file, line, field, what was found and what is allowed.
    """
    tree, lines = parse_yaml(read_text(Path(path)), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}:1: the file holds {describe(tree)}, expected settings such as `name: first`")
    for override in overrides or []:
        apply_override(tree, lines, override)
    return validate(tree, lines, str(path))


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: the file has {path.stat().st_size} bytes, a config has at most {MAX_BYTES}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a YAML config") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder. Give the path of a YAML config in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}. Save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty. Write at least name, data and teacher")
    return text


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Path_, str]]:
    """The plain value of a YAML document and, for every path in it, where it stands ("file:line")."""
    lines: dict[Path_, str] = {}
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                line = event.start_mark.line + 1
                raise UserError(f"{source}:{line}: anchors and aliases are not taken. Write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        column = f" at column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not YAML: {problem}{column}. Check indentation and quotes (no tabs)") from None
    return _plain_value(node, (), lines, source), lines


def _plain_value(node: Any, path: Path_, lines: dict[Path_, str], source: str) -> Any:
    if node is None:
        return None
    here = f"{source}:{node.start_mark.line + 1}"
    lines.setdefault(path, here)
    if len(path) > MAX_DEPTH:
        raise UserError(f"{here}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), f"{source}:{key_node.start_mark.line + 1}"
            if key in result:
                raise UserError(f"{line}: {dotted((*path, key))}: stands twice. Remove one")
            lines[(*path, key)] = line
            result[key] = _plain_value(value_node, (*path, key), lines, source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(item, (*path, i), lines, source) for i, item in enumerate(node.value)]
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2].startswith("python"):
        raise UserError(f"{here}: {dotted(path)}: the tag {node.tag} is not taken. Write a plain value")
    return node.value if node.style in ("'", '"', "|", ">") else scalar(node.value)


def scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core rules."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
    return text


def apply_override(tree: dict[str, Any], lines: dict[Path_, str], override: str) -> None:
    """Sets one `section.key=value`; the value is read as YAML, so that lists and numbers are what they look like."""
    name, sign, text = override.partition("=")
    keys = name.strip().split(".")
    if not sign or not all(keys):
        raise UserError(f"command line: {override!r} is not an override. Write section.key=value")
    value, _ = parse_yaml(text, "command line") if text.strip() else (None, {})
    place: Any = tree
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise UserError(f"command line: {name}: {key} is a single value, not a section")
    place[keys[-1]] = value
    for known in [known for known in lines if known[: len(keys)] == tuple(keys)]:
        del lines[known]
    lines[tuple(keys)] = "command line"


def validate(tree: dict[str, Any], lines: dict[Path_, str], source: str) -> Config:
    """The validated configuration, or UserError for the first thing that is wrong."""
    _refuse_secrets(tree, (), lines, source)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_error(error, lines, source)) from None
    return _absolute(config)


def _first_error(error: ValidationError, lines: dict[Path_, str], source: str) -> str:
    """One line for the most telling of pydantic's errors: an unknown name explains a missing one, so it comes first."""
    found = min(
        error.errors(),
        key=lambda e: (
            ["extra_forbidden", "value_error"].index(e["type"])
            if e["type"] in ("extra_forbidden", "value_error")
            else 2
        ),
    )
    path: Path_ = tuple(p for p in found["loc"] if p not in ("float", "str", "int"))
    where = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), source)
    field = dotted(path) or "the file"
    if found["type"] == "extra_forbidden":
        known = sorted(_section_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(str(path[-1]), known, 1, 0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return f"{where}: {field}: unknown setting. {hint}"
    if found["type"] == "missing":
        return f"{where}: {field}: is missing. Add it"
    if found["type"] == "value_error":
        value = "" if isinstance(found["input"], dict) else f"found {describe(found['input'])}; "
        return f"{where}: {field}: {value}{found['ctx']['error']}"
    message = found["msg"][0].lower() + found["msg"][1:]
    return f"{where}: {field}: found {describe(found['input'])}; {message.replace('input should', 'it should')}"


def _section_at(path: Path_) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for name in path:
        annotation = model.model_fields[str(name)].annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model


def _refuse_secrets(value: Any, path: Path_, lines: dict[Path_, str], source: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_secrets(item, (*path, key), lines, source)
    elif isinstance(value, str) and SECRET.match(value) and path[-1:] != ("revision",):
        where = lines.get(path, source)
        raise UserError(f"{where}: {dotted(path)}: looks like a secret. Keep it in an environment variable")


def _absolute(config: Config) -> Config:
    """Relative local paths are relative to the working folder; workers run in another one, so they become absolute."""
    data, teacher, student = config.data, config.teacher, config.student
    return config.model_copy(
        update={
            "storage": absolute_path(config.storage),
            "data": data.model_copy(
                update={
                    "train": absolute_path(data.train),
                    "test": absolute_path(data.test),
                    "validation": absolute_path(data.validation)
                    if isinstance(data.validation, str)
                    else data.validation,
                }
            ),
            "teacher": teacher.model_copy(
                update={
                    "model": absolute_model(teacher.model),
                    "cache_from": absolute_path(teacher.cache_from) if teacher.cache_from else None,
                }
            ),
            "student": student.model_copy(update={"model": absolute_model(student.model) if student.model else None}),
        }
    )


def absolute_path(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def absolute_model(model: str) -> str:
    """A folder's absolute path; a hub id (`name` or `owner/name` with no such folder) stays as it is."""
    return os.path.abspath(model) if os.path.isdir(model) or model.startswith((".", "/", "~")) else model


def describe(value: Any) -> str:
    """A value as an error message shows it, with its kind."""
    kinds = {str: "text", bool: "true/false", int: "number", float: "number", list: "list", dict: "section"}
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"


def dotted(path: Path_) -> str:
    return ".".join(str(p) for p in path)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that loads to the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
