"""A point of the search space as a configuration of its own, and the check that every point is one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from raydistill.config.cross_tokenizer import crossings
from raydistill.config.messages import Path_, describe, dotted, first_problem, place_of
from raydistill.config.run import Config
from raydistill.config.section import is_speed
from raydistill.config.tune import Dimension
from raydistill.errors import UserError

# A space with more corners than this is checked by pairs of settings.
MOST_CORNERS = 2000
Point = Mapping[str, Any]


def with_point(config: Config, point: Point) -> Config:
    """The run that a point stands for: its values in the place of the config's, and no search.

    A point without features takes none from the cache either. Raises ValidationError for a point that is no
    configuration, and ValueError for a name that leads nowhere.
    """
    tree = config.model_dump(mode="json", exclude_none=True, exclude={"tune"})
    for name, value in point.items():
        *sections, key = name.split(".")
        place: Any = tree
        for section in sections:
            place = _inside(place, section, name)
        if isinstance(place, list):
            _inside(place, key, name)
            place[int(key)] = value
        else:
            place[key] = value
    for part in _parts_of_train(tree["train"]):
        loss = part.get("loss")
        if isinstance(loss, dict) and not loss.get("features"):
            loss.pop("features_from", None)
    return Config.model_validate(tree)


def _parts_of_train(train: dict[str, Any]) -> list[dict[str, Any]]:
    """The section and its stages, as far as they are sections."""
    stages = train.get("stages")
    return [part for part in (train, *(stages if isinstance(stages, list | tuple) else ())) if isinstance(part, dict)]


def _inside(place: Any, section: str, name: str) -> Any:
    if isinstance(place, list):
        if not section.isdecimal() or int(section) >= len(place):
            raise ValueError(f"{name}: there is no {section} among {len(place)}, counted from 0")
        return place[int(section)]
    found = place.setdefault(section, {})
    if section.isdecimal():
        raise ValueError(f"{name}: {section} is a place in a list, and there is none. Name one of its settings")
    if not isinstance(found, dict | list):
        raise ValueError(f"{name}: {section} is a single value, not a section")
    return found


def check_space(config: Config, lines: dict[Path_, str], source: str) -> None:
    """Tries the points of a space as configurations. Raises UserError, naming the setting, for the first that is none.

    Tried are all combinations of choices and of ranges' ends; where those are too many, all of every two settings.
    """
    assert config.tune is not None
    space = config.tune.space
    for name in space:
        if _is_speed(config, name):
            raise _wrong(name, "changes speed alone, so that there is nothing to find. Remove it", lines, source)
    for point in corners(space):
        try:
            made = with_point(config, point)
        except ValidationError as error:
            path, problem = first_problem(error)
            raise _of_point(point, path, problem, lines, source) from None
        except ValueError as error:
            name, _, problem = str(error).partition(": ")
            raise _wrong(name, problem, lines, source) from None
        if crossings(made) != crossings(config):
            name = next((name for name in point if name.startswith("train.")), next(iter(point)))
            problem = "rows and cache are made for one train.loss.cross_tokenizer, which no trial may change. Remove it"
            raise _wrong(name, problem, lines, source)
        epochs, grace = made.train.all_epochs, config.tune.first_rung
        if grace >= epochs and config.tune.scheduler in ("asha", "screen"):
            where = place_of(("tune", "grace_epochs"), lines, source)
            raise UserError(
                f"{where}: tune.grace_epochs: found {grace}, a trial has {epochs} epochs, so that none could be"
                " stopped. Lower it, or set tune.scheduler=none"
            )


def with_first_rung(config: Config) -> Config:
    """The config with `tune.grace_epochs`, where it is absent: the first epoch by which half the steps were no warm-up,
    the first stage's.

    Before that trials hardly differ, or those of a high learning rate lead that are last in the end. A shorter training
    has its first rung before its last epoch.
    """
    tune = config.tune
    if tune is None or tune.grace_epochs is not None or tune.scheduler == "none":
        return config
    trains = [with_point(config, point).train for point in corners(tune.space)]
    begins = [train.trainings[0] for train in trains]
    wanted = max(math.ceil(round(2 * train.warmup * train.epochs, 9)) for train in begins)
    grace = max(1, min(wanted, min(train.all_epochs for train in trains) - 1))
    return config.model_copy(update={"tune": tune.model_copy(update={"grace_epochs": grace})})


def corners(space: Mapping[str, Dimension]) -> Iterator[dict[str, Any]]:
    """All combinations of choices and of ranges' ends; where those are too many, all of every two settings."""
    values = {name: d.values if d.values is not None else d.ends for name, d in space.items()}
    total = 1
    for choices in values.values():
        total *= len(choices)
    if total <= MOST_CORNERS:
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))
        return
    first = {name: choices[0] for name, choices in values.items()}
    for one, other in itertools.combinations(values, 2):
        for pair in itertools.product(values[one], values[other]):
            yield {**first, one: pair[0], other: pair[1]}


def _of_point(point: Mapping[str, Any], path: Path_, problem: str, lines: dict[Path_, str], source: str) -> UserError:
    """The error of a point, as one of the setting in the space that it is about, or of those together."""
    field = ".".join(map(str, path))
    for name in point:
        if field == name or field.startswith(f"{name}."):
            inner = field.removeprefix(name).removeprefix(".")
            return _wrong(name, f"{inner}: {problem}" if inner else problem, lines, source)
    about = [name for name in point if name.startswith(f"{field}.")] or list(point)
    if len(about) == 1:
        return _wrong(about[0], f"{describe(point[about[0]])}: {dotted(path)}: {problem}", lines, source)
    values = ", ".join(f"{name}={describe(point[name]).rpartition(' (')[0]}" for name in about)
    what = f"{values}: {dotted(path)}: {problem}" if path else f"{values}: {problem}"
    return UserError(f"{place_of(('tune', 'space', about[0]), lines, source)}: tune.space: {what}")


def _wrong(name: str, problem: str, lines: dict[Path_, str], source: str) -> UserError:
    where = place_of(("tune", "space", name), lines, source)
    return UserError(f"{where}: {dotted(('tune', 'space', name))}: {problem}")


def _is_speed(config: Config, name: str) -> bool:
    """Whether a setting, or the section that it is in, stays out of fingerprints."""
    place: Any = config
    for part in name.split("."):
        if not isinstance(place, BaseModel) or part not in type(place).model_fields:
            return False
        if is_speed(type(place), part):
            return True
        place = getattr(place, part)
    return False
