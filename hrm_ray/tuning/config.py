"""Every key of a sweep, with its meaning and unit; a sweep is one YAML file, here or in `tune_configs/`."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hrm_ray.config.validate import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    abbreviated,
    in_one_line,
    is_folder_name,
    nearest,
    read_yaml_file,
    split_word,
    validated,
    value_of,
)
from hrm_ray.errors import UserError
from hrm_ray.tuning.metrics import AT_THE_END, Direction, direction_of, is_of_evaluations
from hrm_ray.tuning.space import Space, in_order

Named = dict[str, Any]  # a name, and options of what it names


DEFAULT_NAMES = {"sampler": "tpe", "pruner": "successive_halving"}
BY_DEFAULT: dict[str, Direction] = {"eval/exact_accuracy": "maximize"}


class Resources(Settings):
    """What a trial takes while it runs."""

    num_workers: PositiveInt = 1
    """Workers of a trial; of Ray Train, if more than one."""
    cpus: PositiveInt = 1
    """CPUs of each worker."""
    gpus: NonNegativeFloat | Literal["auto"] = "auto"
    """GPUs of each worker, also a part of one; auto: 1 where there are any."""

    @model_validator(mode="after")
    def _parts_are_for_one_worker(self) -> "Resources":
        if self.gpus != "auto" and self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"resources.gpus={self.gpus:g}: a part of one GPU, or a whole number of them")
        if self.num_workers > 1 and self.gpus not in ("auto", 0, 1):
            raise ValueError(
                f"resources.gpus={self.gpus:g} with resources.num_workers={self.num_workers}: several workers have a "
                "whole GPU each, or none; give 0 or 1"
            )
        return self


class Budget(Settings):
    """What a sweep may take in all its commands together; it ends well when any of them is spent."""

    cpu_hours: PositiveFloat | None = None
    """Hours of a CPU, over all of them."""
    gpu_hours: PositiveFloat | None = None
    """Hours of a GPU, over all of them."""
    wall_hours: PositiveFloat | None = None
    """Hours by the clock."""
    money: PositiveFloat | None = None
    """What CPUs and GPUs cost by price."""


class Price(Settings):
    """In any currency."""

    cpu_hour: NonNegativeFloat = 0.0
    """Of a CPU for an hour."""
    gpu_hour: NonNegativeFloat = 0.0
    """Of a GPU for an hour."""


class Repeat(Settings):
    """The finalists, trained again with other seeds."""

    seeds: PositiveInt = 3
    """New runs of each finalist."""
    top: PositiveInt = 5
    """How many of the best are finalists."""


class Population(Settings):
    """Population based training, by Ray Tune's scheduler: `num_trials` are its members."""

    interval: PositiveInt
    """Optimizer steps between two looks at the population."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share that is replaced by copies of the best share."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """Probability of a new value rather than one nearby."""


class SweepConfig(Settings):
    """A whole sweep."""

    listed_by: ClassVar[str] = "hrm-ray config show sweep"

    train: tuple[str, ...]
    """Words of hrm-ray train that hold for all trials."""
    space: Space
    """For each key that varies, its values: {log: [LOW, HIGH]}, uniform, int, log_int, or a list."""
    metric: dict[str, Direction] = Field(default_factory=lambda: dict(BY_DEFAULT))
    """What is to be best, one or several; max or min in place of what the task says. Default: eval/exact_accuracy."""
    sampler: Named = Field(default_factory=dict, validate_default=True)
    """How points are chosen: a name, or name, seed and options of Optuna's. Default: tpe."""
    pruner: Named | None = Field(default_factory=dict, validate_default=True)
    """How trials end early: a name, or name, metric if another, and options. Default: successive_halving."""
    population: Population | None = None
    """Population based training in place of a pruner."""
    num_trials: PositiveInt | None = None
    """Trials, also those that fail; null: all points of a grid, else 20."""
    max_concurrent: PositiveInt | None = None
    """Trials at once; null: as many as the cluster holds."""
    try_first: tuple[Named, ...] = ()
    """Points to begin with; the sampler chooses the keys that they leave out."""
    resources: Resources = Resources()
    """What a trial takes while it runs."""
    budget: Budget = Budget()
    """What the sweep may take in all."""
    price: Price = Price()
    """What CPUs and GPUs cost."""
    keep: PositiveInt | Literal["finished", "all"] = "finished"
    """Trials whose checkpoints stay; a number: the best so many."""
    repeat: Repeat | None = None
    """Train the finalists again with other seeds."""

    storage: str = "runs"
    """Folder that holds the sweeps."""
    run_name: str = "sweep"
    """Name of the sweep and of its folder; the name of the YAML file, if not given."""
    study: str | None = None
    """URL of a database for the study; null: the file study.log in the sweep's folder."""

    @field_validator("train", mode="before")
    @classmethod
    def _words(cls, train: Any) -> Any:
        return shlex.split(train) if isinstance(train, str) else train

    @field_validator("metric", mode="before")
    @classmethod
    def _with_directions(cls, metric: Any, info: ValidationInfo) -> Any:
        if isinstance(metric, str):
            metric = [metric]
        if isinstance(metric, (list, tuple)):
            metric = dict.fromkeys(map(str, metric))
        if isinstance(metric, Mapping):
            short = {"max": "maximize", "min": "minimize", "auto": None}
            train = info.data.get("train", ())
            return {
                str(name): short.get(str(way), way) or direction_of(str(name), train)
                for name, way in metric.items()
            }
        return metric

    @field_validator("sampler", "pruner", mode="before")
    @classmethod
    def _with_a_name(cls, value: Any, info: ValidationInfo) -> Any:
        if value in ("none", "null", False):
            return None
        if isinstance(value, Mapping):
            return {"name": DEFAULT_NAMES[str(info.field_name)], **value}
        return {"name": value} if isinstance(value, str) else value

    @field_validator("study")
    @classmethod
    def _holds_no_password(cls, study: str | None) -> str | None:
        if study is not None and urlsplit(study).password is not None:
            raise ValueError(
                "study: keep the password out of the address, which is written into the sweep's files; the database's "
                "own variable or file holds it (PGPASSWORD, ~/.pgpass)"
            )
        if study is not None and study.startswith("sqlite:///") and not study.startswith("sqlite:////"):
            return f"sqlite:///{Path(study.removeprefix('sqlite:///')).absolute()}"
        return study

    @model_validator(mode="after")
    def _fits_together(self) -> "SweepConfig":
        if not self.space:
            raise ValueError("space: is empty; give at least one key and its values")
        if not self.metric:
            raise ValueError("metric: is empty; give one, such as eval/exact_accuracy")
        for name in self.metric:
            if not is_of_evaluations(name):
                direction_of(name)
        in_order(self.space)
        several = len(self.metric) > 1
        if several and self.pruner is not None and "pruner" in self.model_fields_set:
            raise ValueError(
                f"pruner: {self.pruner.get('name')} works with one metric only; leave it out, or give one metric"
            )
        if several and (self.population or self.repeat):
            raise ValueError(f"{'population' if self.population else 'repeat'}: is for one metric")
        watched = (self.pruner or {}).get("metric")
        if watched is not None:
            try:
                direction_of(watched, self.train)
            except UserError as error:
                raise ValueError(f"pruner: {error}") from None
        if watched in AT_THE_END:
            raise ValueError(f"pruner: metric {watched} is known at the end of a run only; give another")
        if self.population and self.watched in AT_THE_END:
            raise ValueError(
                f"population: metric {self.watched} is known at the end of a run only; give another"
            )
        if self.population and self.num_trials == 1:
            raise ValueError("population: needs num_trials of at least 2, to copy from each other")
        if self.population and self.max_concurrent is not None:
            raise ValueError(
                "max_concurrent: not needed with population: members take turns on a small cluster; leave it out"
            )
        if self.population and self.resources.num_workers > 1:
            raise ValueError("population: is for trials of one worker; set resources.num_workers=1")
        if self.try_first and self.sampler["name"] == "grid":
            raise ValueError("try_first: a grid has its own points; leave one of the two out")
        if not is_folder_name(self.run_name):
            raise ValueError(
                f"run_name={self.run_name} must be a plain folder name without /; "
                "storage=DIR says where sweeps are kept"
            )
        return self

    @property
    def prunes(self) -> dict[str, Any] | None:
        """The pruner that is used: none beside a population or several metrics."""
        return None if self.population or len(self.metric) > 1 else self.pruner

    @property
    def watched_direction(self) -> Direction:
        """Which way the watched metric is better."""
        return self.metric.get(self.watched) or direction_of(self.watched, self.train)

    @property
    def watched(self) -> str:
        """The metric that the pruner or the population looks at while a trial runs."""
        return (self.prunes or {}).get("metric") or next(iter(self.metric))


SETTABLE = ("num_trials", "max_concurrent", "budget")  # of a sweep at work


def plain(config: SweepConfig) -> dict[str, Any]:
    """As a YAML would hold it."""
    return config.model_dump(mode="json", by_alias=True) | {"pruner": config.prunes}


def with_settings(config: SweepConfig, settings: Mapping[str, Any]) -> SweepConfig:
    """`config` with some of its `SETTABLE` keys. Raises UserError if a value does not fit."""
    return validated(SweepConfig, {**plain(config), **settings}, "tune set")


def sweep_folders() -> list[Path]:
    """Where sweeps lie: beside the package in a checkout, inside it when installed."""
    package = Path(str(files("hrm_ray")))
    there = (package.parent / "tune_configs", package / "_tune_configs")
    return [folder for folder in there if folder.is_dir()]


def sweep_names() -> list[str]:
    """The sweeps that ship with hrm_ray."""
    return sorted({file.stem for folder in sweep_folders() for file in folder.glob("*.yaml")})


def load_sweep(name_or_file: str, words: Sequence[str] = ()) -> SweepConfig:
    """A sweep by name, or from a YAML file, with ``key=value`` words on top.

    Keys of a sweep (also dotted ones, ``budget.cpu_hours=2``) change it; all others are words of ``hrm-ray train``
    for every trial.

    Raises:
        UserError: no such sweep, a YAML that is not one, an unknown key, a value that does not fit.
    """
    file = _find(name_or_file)
    values = read_yaml_file(file, "sweep")
    if not isinstance(values, dict) or "space" not in values:
        raise UserError(
            f"{file} is not a sweep: it needs 'train:' and 'space:'; see tune_configs/sudoku_4x4_lr.yaml"
        )
    return sweep_config(values, words, name=file.stem, where=f"sweep {file.stem}")


def sweep_config(
    values: Mapping[str, Any], words: Sequence[str] = (), *, name: str = "sweep", where: str = "sweep"
) -> SweepConfig:
    """A sweep from a mapping, as its YAML would hold it. For `words` and what is raised, see `load_sweep`."""
    with in_one_line(where):
        return _sweep_config(values, words, name, where)


def _sweep_config(values: Mapping[str, Any], words: Sequence[str], name: str, where: str) -> SweepConfig:
    train = values.get("train", ())
    mine = [word for word in words if _first(word) in SweepConfig.model_fields and _first(word) != "train"]
    more = [word for word in words if word not in mine]
    values = override(values, mine, SweepConfig.model_fields)
    if isinstance(train, str):
        train = shlex.split(train)
    if isinstance(train, (list, tuple)) and (train or more):
        values["train"] = _last_of_each([*map(str, train), *more])
    if values.get("run_name") is None:
        values["run_name"] = name
    _check_names(values, where)
    return validated(SweepConfig, values, where)


def override(values: Mapping[str, Any], words: Sequence[str], keys: Collection[str]) -> dict[str, Any]:
    """`values` with ``key=value`` words on top, of `keys` only; a dotted key changes a part of a value.

    Raises:
        UserError: another key, or no YAML.
    """
    changed = {str(key): value for key, value in values.items()}
    for word in words:
        key, text = split_word(word)
        first, _, rest = key.partition(".")
        if first not in keys:
            raise UserError(f"unknown key {abbreviated(key)}; {nearest(first, keys, SweepConfig.listed_by)}")
        _put(changed, first, rest, value_of(SweepConfig, first, text))
    return changed


def _last_of_each(words: Sequence[str]) -> list[str]:
    """The words without those whose key is given again later."""
    last = {word.partition("=")[0]: word for word in words}
    return list(last.values())


def _first(word: str) -> str:
    return split_word(word)[0].partition(".")[0]


def _check_names(values: Mapping[str, Any], where: str) -> None:
    """pydantic would name the key of a range as one of the sweep."""
    space = values.get("space")
    if not isinstance(space, Mapping):
        raise UserError(
            f"{where}: space={abbreviated(space)}: give keys and their values, such as lr: {{log: [1e-4, 1e-2]}}"
        )
    for key, kind in space.items():
        if not isinstance(kind, (Mapping, list, tuple)):
            raise UserError(
                f"{where}: space.{key}={abbreviated(kind)}: give a range, such as {{log: [1e-4, 1e-2]}}, or a list of "
                f"values; a fixed value belongs to train: {key}={abbreviated(kind)}"
            )


def _put(values: dict[str, Any], first: str, rest: str, value: Any) -> None:
    """Set `first`, or `rest` inside of it; a key of the space may hold dots itself."""
    if not rest:
        values[first] = value
        return
    inside = values.get(first)
    if isinstance(inside, str):  # a name alone
        inside = {"name": inside}
    values[first] = {**inside, rest: value} if isinstance(inside, Mapping) else {rest: value}


def _find(name_or_file: str) -> Path:
    file = Path(name_or_file)
    if file.suffix not in (".yaml", ".yml"):
        there = [folder / f"{name_or_file}.yaml" for folder in sweep_folders()]
        found = [candidate for candidate in there if candidate.is_file()]
        if not found:
            raise UserError(f"unknown sweep '{name_or_file}'; {nearest(name_or_file, sweep_names())}")
        return found[0]
    return file
