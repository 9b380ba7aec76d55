"""From a YAML file and `section.key=value` overrides to a `Config`, with errors that point at the line.

Only plain YAML is taken: no anchors, aliases, tags or duplicate keys, at most 1 MiB, 32 levels and 10,000 values.
Scalars follow YAML 1.2, so that `1e-3` is a number and `no` is a word.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raydistill.config.data import Augment
from raydistill.config.evaluate import Evaluate
from raydistill.config.messages import Path_, cut, describe, dotted, first_error, place_of
from raydistill.config.points import check_space, with_first_rung
from raydistill.config.run import Config
from raydistill.config.tune import Tune
from raydistill.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 10_000
YAML_HINT = "Check indentation (no tabs), and quote text that begins with a sign such as * or &"
SECRET = re.compile(
    r"(sk-(ant-)?[\w-]{16,}|hf_\w{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_\w{16,}|[0-9a-f]{40})$|(?!hf:)\w+://[^/@]*:[^/@]+@"
)


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
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give the path of a YAML config") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder. Give the path of a YAML config in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}. Save it as UTF-8") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: the file has more than {MAX_BYTES} bytes. Give the path of a YAML config")
    if not text.strip():
        raise UserError(f"{path}: the file is empty. Write at least name, data and teacher")
    return text


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Path_, str]]:
    """The plain value of a YAML document and, for every path in it, where it stands ("file:line")."""
    lines: dict[Path_, str] = {}
    try:
        _refuse_more_than_plain(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: PyYAML on %YAML 9…9 and \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        column = f" at column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not YAML: {problem}{column}. {YAML_HINT}") from None
    return _plain_value(node, (), lines, source), lines


def _refuse_more_than_plain(text: str, source: str) -> None:
    """Refuses what would be costly or dangerous to build, while it is read and before it is built."""
    depth = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        here = f"{source}:{event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise UserError(f"{here}: anchors and aliases are not taken. Write the value out, or quote its * or &")
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{here}: the tag {event.tag!r:.80} is not taken. Write a plain value, or quote its !")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{here}: nested deeper than {MAX_DEPTH} levels. No setting is that deep")
        if values > MAX_VALUES:
            raise UserError(f"{here}: more than {MAX_VALUES} values. No config needs as many")


def _plain_value(node: Any, path: Path_, lines: dict[Path_, str], source: str) -> Any:
    if node is None:
        return None
    lines.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise UserError(f"{line}: {dotted(path)}: has a list or a section as a name. Write name: value")
            if key in result:
                raise UserError(f"{line}: {dotted((*path, key))}: stands twice. Remove one")
            lines[(*path, key)] = line
            result[key] = _plain_value(value_node, (*path, key), lines, source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(item, (*path, i), lines, source) for i, item in enumerate(node.value)]
    return node.value if node.style in ("'", '"', "|", ">") else scalar(node.value)


def scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core rules."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,400}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
    return text


def apply_override(tree: dict[str, Any], lines: dict[Path_, str], override: str) -> None:
    """Sets one `section.key=value`; the value is read as YAML, so that lists and numbers are what they look like."""
    name, sign, text = override.partition("=")
    keys = name.strip().split(".")
    if not sign or not all(keys):
        raise UserError(f"command line: {cut(repr(override))} is not an override. Write section.key=value")
    value, _ = parse_yaml(text, f"command line: {dotted(tuple(keys))}") if text.strip() else (None, {})
    place: Any = tree
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise UserError(f"command line: {dotted(tuple(keys))}: {dotted((key,))} is a single value, not a section")
    place[keys[-1]] = value
    for known in [known for known in lines if known[: len(keys)] == tuple(keys)]:
        del lines[known]
    lines[tuple(keys)] = "command line"


def validate(tree: dict[str, Any], lines: dict[Path_, str], source: str) -> Config:
    """The validated configuration, or UserError for the first thing that is wrong."""
    _check_texts(tree, (), lines, source)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(first_error(error, lines, source)) from None
    if config.tune is not None:
        check_space(config, lines, source)
    return _absolute(with_first_rung(config))


def _check_texts(value: Any, path: Path_, lines: dict[Path_, str], source: str) -> None:
    """Refuses what no setting may hold: secrets, which a run would keep in clear, and NUL, which no path can hold."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_texts(item, (*path, key), lines, source)
    elif isinstance(value, str):
        where = f"{place_of(path, lines, source)}: {dotted(path)}"
        if SECRET.match(value) and not any(str(part).endswith("revision") for part in path):
            raise UserError(f"{where}: looks like a secret. Keep it in an environment variable")
        if "\0" in value:
            raise UserError(f"{where}: holds a NUL character. Remove it")


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
                    "unlabelled": tuple(map(absolute_path, data.unlabelled)),
                    "augment": _absolute_augment(data.augment) if data.augment else None,
                }
            ),
            "teacher": teacher.model_copy(
                update={
                    "model": absolute_model(teacher.model),
                    "members": tuple(
                        member.model_copy(update={"model": absolute_model(member.model)}) for member in teacher.members
                    ),
                    "cache_from": absolute_path(teacher.cache_from) if teacher.cache_from else None,
                }
            ),
            "student": student.model_copy(update={"model": absolute_model(student.model) if student.model else None}),
            "tune": _absolute_space(config.tune) if config.tune else None,
            "evaluate": _absolute_evaluate(config.evaluate),
        }
    )


def _absolute_evaluate(evaluate: Evaluate) -> Evaluate:
    sets = {name: one.model_copy(update={"path": absolute_path(one.path)}) for name, one in evaluate.sets.items()}
    models = {name: absolute_model(model) for name, model in evaluate.models.items()}
    return evaluate.model_copy(update={"sets": sets, "models": models})


def _absolute_space(tune: Tune) -> Tune:
    """With absolute paths of the students that are tried."""
    if (models := tune.space.get("student.model")) is None or models.values is None:
        return tune
    values = {
        kind: tuple(map(absolute_model, getattr(models, kind))) for kind in ("choice", "grid") if getattr(models, kind)
    }
    return tune.model_copy(update={"space": {**tune.space, "student.model": models.model_copy(update=values)}})


def _absolute_augment(augment: Augment) -> Augment:
    return augment.model_copy(update={"model": absolute_model(augment.model) if augment.model else None})


def absolute_path(path: str) -> str:
    if "://" in path:
        return path
    try:
        return os.path.abspath(os.path.expanduser(path))
    except FileNotFoundError:
        raise UserError(f"{path}: the working folder is gone. Change to another, or give absolute paths") from None


def absolute_model(model: str) -> str:
    """A folder's absolute path; a hub id (`name` or `owner/name` with no such folder) stays as it is."""
    is_path = os.path.isdir(model) or model.startswith((".", "/", "~"))
    return absolute_path(model) if is_path else model


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that loads to the same configuration."""
    tree = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `scalar` would take for something else; PyYAML itself knows YAML 1.1, where 1e3 is text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if not text.isprintable() else None if isinstance(scalar(text), str) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
