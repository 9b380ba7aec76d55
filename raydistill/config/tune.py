"""`tune`: a search over settings of the student and its training, many trials over one cache of the teacher."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from raydistill.config.section import MAX_SEED, Added, Section, Speed

SEARCHED = ("train", "student")  # the sections that a space may name settings of
# None of them depends on the loss that is searched over, as KL to the teacher or the training loss would.
RungMetric = Literal["accuracy", "macro_f1", "micro_f1", "agreement", "nll"]
KINDS = ("choice", "grid", "uniform", "loguniform", "integer")
MAX_VALUES = 1000
MAX_TRIALS = 10_000


def _is_auto_or_bool(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("it should be auto, true or false")
    return value


# Of a union pydantic would name every member.
Fused = Annotated[bool | Literal["auto"], BeforeValidator(_is_auto_or_bool)]


class Dimension(Section):
    """What one setting may be: one of five kinds."""

    choice: tuple[Any, ...] | None = Field(default=None, description="one of these values")
    grid: tuple[Any, ...] | None = Field(default=None, description="the same, by another name")
    uniform: tuple[float, float] | None = Field(default=None, description="a number from the first to the second")
    loguniform: tuple[float, float] | None = Field(default=None, description="likewise, its logarithm drawn evenly")
    integer: tuple[int, int] | None = Field(default=None, description="a whole number, both ends included")

    @model_validator(mode="after")
    def _is_one_kind(self) -> Dimension:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"takes one of {', '.join(KINDS)}, found {' and '.join(given) or 'none'}")
        if self.values is not None:
            self._check_values(given[0], self.values)
        else:
            self._check_range(given[0])
        return self

    def _check_values(self, kind: str, values: tuple[Any, ...]) -> None:
        if not values:
            raise ValueError(f"{kind} is empty. Give values, or remove the setting from the space")
        if len(values) > MAX_VALUES:
            raise ValueError(f"{kind} has {len(values)} values, the most is {MAX_VALUES}")
        seen: set[str] = set()
        for value in values:
            if (text := json.dumps(value, sort_keys=True)) in seen:
                raise ValueError(f"{kind} holds {text} twice. Remove one")
            seen.add(text)

    def _check_range(self, kind: str) -> None:
        low, high = self.ends
        if low >= high:
            raise ValueError(f"{kind} goes from {low:g} to {high:g}: the first must be below the second")
        if kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform begins at {low:g}, which has no logarithm. Begin above 0")

    @property
    def values(self) -> tuple[Any, ...] | None:
        """What a choice is among; None for a range."""
        return self.choice if self.choice is not None else self.grid

    @property
    def ends(self) -> tuple[float, float]:
        """Of a range."""
        return next(ends for ends in (self.uniform, self.loguniform, self.integer) if ends is not None)

    @property
    def size(self) -> int | None:
        """How many different values there are; None for a range of real numbers."""
        if self.values is not None:
            return len(self.values)
        return None if self.integer is None else self.integer[1] - self.integer[0] + 1

    def levels(self) -> tuple[Any, ...]:
        """The values of a grid: all of a choice; the low end, the middle and the high end of a range."""
        if self.values is not None:
            return self.values
        low, high = self.ends
        middle = math.sqrt(low * high) if self.loguniform else (low + high) / 2
        if self.integer is not None:
            return tuple(dict.fromkeys((self.integer[0], int(middle), self.integer[1])))
        return low, float(f"{middle:.6g}"), high


def _flat(space: Any) -> Any:
    """`{train: {learning_rate: …}}`, as the command line writes it, as `{train.learning_rate: …}`."""
    if not isinstance(space, dict):
        return space
    found: dict[str, Any] = {}
    for name, value in space.items():
        if isinstance(value, dict) and value and not set(value) & set(KINDS) and _holds_dimensions(value):
            found |= {f"{name}.{inner}": dimension for inner, dimension in _flat(value).items()}
        else:
            found[str(name)] = value
    return found


def _holds_dimensions(value: dict[str, Any]) -> bool:
    return all(isinstance(inner, dict) for inner in value.values())


def _of_searched_sections(space: dict[str, Dimension]) -> dict[str, Dimension]:
    if not space:
        raise ValueError("is empty. Name a setting, such as train.loss.temperature: {choice: [2.0, 4.0]}")
    for name in space:
        section, _, setting = name.partition(".")
        if section not in SEARCHED or not all(setting.split(".")):
            raise ValueError(
                f"{name}: a search is over settings of {' and '.join(SEARCHED)}, such as train.learning_rate"
            )
        if inside := next((other for other in space if other.startswith(f"{name}.")), None):
            raise ValueError(f"{inside}: stands within {name}, which is searched too. Remove one")
    return space


class Tune(Section):
    """A search. What comes out of it depends on no number of trials that run at once, nor on how often it stopped."""

    space: Annotated[
        dict[str, Dimension], BeforeValidator(_flat), AfterValidator(_of_searched_sections)
    ] = Field(description="settings of train and student by their dotted names, and what each may be")  # fmt: skip
    trials: int | None = Speed(
        None, ge=1, le=MAX_TRIALS, description="students that are tried; absent, with search: grid alone: every point"
    )
    search: Literal["grid", "random", "tpe"] = Field(default="tpe", description="how points are proposed")
    seed_points: Literal["grid"] | None = Field(
        default=None, description="tpe: its first points are the grid of choices and of ranges' ends and middles"
    )
    scheduler: Literal["asha", "median", "screen", "none"] = Field(
        default="asha", description="which trials go on: asynchronous halving, above the median, the best few, all"
    )
    metric: RungMetric = Field(default="accuracy", description="of validation; ranks trials and chooses the winner")
    data_fraction: float = Field(
        default=0.2, gt=0, le=1, description="share of train's rows, even in every label; causal_lm: of its documents"
    )
    grace_epochs: int | None = Field(
        default=None,
        ge=1,
        description="epochs before the first decision; absent: until at most half of a trial's steps were warm-up",
    )
    reduction_factor: int = Field(default=4, ge=2, le=1000, description="asha: one in so many goes on at each rung")
    keep: int = Field(default=3, ge=1, description="screen: how many trials go on after grace_epochs")
    generation: int = Field(
        default=8,
        ge=1,
        le=1000,
        description="trials in a row that are compared with each other at rungs; tpe proposes their points together",
    )
    patience: int | None = Field(default=None, ge=1, description="epochs without improvement that end a trial")
    fused: Fused = Added(
        "auto",
        description="whether trials are trained together as one stacked model; auto: those that gain from it; true: all"
        " of them, or an error that says why not",
    )
    fused_members: int = Added(8, ge=2, le=256, description="trials of a generation that a fused group has at most")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of points and of the rows in the share of train")
    max_concurrent: int | None = Speed(
        None, ge=1, le=4096, description="processes at once, each with a trial or a fused group; absent: what fits"
    )
    workers: int | None = Speed(
        None, ge=1, le=4096, description="of each trial, absent: train.workers; trials of more than one are not fused"
    )
    log_to: tuple[Literal["wandb", "mlflow"], ...] = Speed(
        (), description="where each trial is logged as a run of its own; keys and addresses come from the environment"
    )
    time_budget: float | None = Speed(None, gt=0, description="seconds after which a search ends with what it has")

    @property
    def first_rung(self) -> int:
        """Epochs before the first decision: `grace_epochs`, which stands in every config that was read."""
        return self.grace_epochs or 1

    @property
    def grid_size(self) -> int:
        """Points of the grid of all levels."""
        return math.prod(len(dimension.levels()) for dimension in self.space.values())

    @property
    def size(self) -> int | None:
        """Different points of the space; None where there are more than can be counted."""
        sizes = [dimension.size for dimension in self.space.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    @property
    def num_trials(self) -> int:
        """How many students are tried."""
        return self.grid_size if self.trials is None else self.trials

    @model_validator(mode="after")
    def _trials_fit_search(self) -> Tune:
        if self.search == "grid":
            for name, dimension in self.space.items():
                if dimension.values is None:
                    raise ValueError(f"space.{name} is a range and search: grid takes choices. Use random or tpe")
        elif self.trials is None:
            raise ValueError(f"trials is missing, and search: {self.search} would never end. Say how many")
        if self.num_trials > MAX_TRIALS:
            raise ValueError(f"the grid has {self.num_trials:,} points, the most is {MAX_TRIALS:,}. Set trials")
        if self.size is not None and self.num_trials > self.size:
            raise ValueError(f"trials: found {self.trials}, the space has {self.size} points. Set at most so many")
        return self

    @model_validator(mode="after")
    def _settings_fit_search(self) -> Tune:
        if self.seed_points is not None and self.search != "tpe":
            raise ValueError(f"seed_points means nothing with search: {self.search}; remove it")
        if self.seed_points is not None and self.grid_size > self.num_trials:
            raise ValueError(
                f"seed_points: the grid has {self.grid_size:,} points, trials are {self.trials}. Raise them"
            )
        for name, schedulers in {
            "grace_epochs": ("asha", "median", "screen"), "reduction_factor": ("asha",), "keep": ("screen",),
        }.items():  # fmt: skip
            if getattr(self, name) != type(self).model_fields[name].default and self.scheduler not in schedulers:
                raise ValueError(f"{name} means nothing with scheduler: {self.scheduler}; remove it")
        return self

    @model_validator(mode="after")
    def _groups_fit_generations(self) -> Tune:
        if self.fused_members == type(self).model_fields["fused_members"].default:
            return self
        if self.fused is False:
            raise ValueError("fused_members means nothing with fused: false; remove it")
        if self.fused_members > self.generation:
            raise ValueError(
                f"fused_members: found {self.fused_members}, a group is of one generation, which has"
                f" {self.generation} trials. Lower it, or raise generation"
            )
        return self
