"""From a point of the space to the run that it stands for, or the reason why there is none."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna

from hrm_ray.config import published_words
from hrm_ray.config.compose import CHOSEN_BY_NAME, GROUPS, aliases, effective, train_config
from hrm_ray.config.schema import TrainConfig
from hrm_ray.config.validate import abbreviated, as_text, known_keys, nearest, split_word
from hrm_ray.data.shards import Dataset, open_dataset
from hrm_ray.errors import UserError
from hrm_ray.evaluation.scores import reported
from hrm_ray.models.registry import coordinates_of
from hrm_ray.training.plan import Plan, check_data
from hrm_ray.training.state import dataset_info
from hrm_ray.tuning.config import SweepConfig
from hrm_ray.tuning.metrics import AT_THE_END
from hrm_ray.tuning.space import Point, suggest, words_of

NUM_SAMPLES = 12  # points that are looked at before a sweep starts
OF_THE_SWEEP = {  # keys that a sweep sets for its trials, and by which of its own
    "storage": "storage=DIR",
    "run_name": "run_name=NAME",
    "scaling": "resources.num_workers=N and resources.cpus=N",
    "scaling.mode": "resources.num_workers=N",
    "scaling.num_workers": "resources.num_workers=N",
    "scaling.cpus_per_worker": "resources.cpus=N",
    "scaling.use_gpu": "resources.gpus=N",
}


class Refused(UserError):
    """The configuration does not allow this point."""


@dataclass(frozen=True)
class Points:
    """The runs of a sweep.

    Attributes:
        config: the sweep.
        gpus: of each worker.
    """

    config: SweepConfig
    gpus: float = 0.0

    def words(self, point: Point) -> list[str]:
        """The exact words of ``hrm-ray train`` for a trial, without the folder of its run.

        Keys of a space that change nothing beside the values of others are not among them.
        """
        scaling = self.config.resources
        words = [*self.config.train, *words_of(point)]
        if "best_metric" not in map(_key, words) and self._best_metric:
            words.append(f"best_metric={self._best_metric}")
        words += [f"scaling.num_workers={scaling.num_workers}", f"scaling.cpus_per_worker={scaling.cpus}"]
        words.append(f"scaling.use_gpu={as_text(self.gpus > 0)}")
        with suppress(UserError):  # `run` says why such a point cannot be
            words = effective(words)
        return words

    @property
    def _best_metric(self) -> str | None:
        """That of the sweep, if a run can choose its best checkpoint by it."""
        metric, direction = next(iter(self.config.metric.items()))
        return metric if metric.startswith("eval/") and direction == "maximize" else None

    def run(self, point: Point, storage: str, run_name: str) -> TrainConfig:
        """The configuration of a trial.

        Raises:
            Refused: by the configuration.
            UserError: something else is wrong, with the data.
        """
        try:
            config = train_config([*self.words(point), f"storage={storage}", f"run_name={run_name}"])
        except UserError as error:
            raise Refused(str(error)) from None
        self.plan(config)
        if config.wandb == "off" or config.wandb_group is not None:
            return config
        return config.model_copy(update={"wandb_group": self.config.run_name})

    def plan(self, config: TrainConfig) -> Plan:
        """Its length and when it evaluates.

        Raises:
            Refused: the model or the schedules do not fit the data.
            UserError: there is nothing to evaluate.
        """
        dataset = self._dataset(config.data_path)
        evaluated = [name for name in (*self.config.metric, self.config.watched) if name.startswith("eval/")]
        if evaluated and "test" not in dataset.splits:
            raise UserError(
                f"metric {evaluated[0]} is never reported: {config.data_path} has no test part; build it with "
                "num_test=N, or give a metric of training, such as metric=train/lm_loss"
            )
        known = reported(dataset, has_q_head=config.arch.has_q_head)
        if strange := [name for name in evaluated if name not in known]:
            raise UserError(
                f"metric {strange[0]} is not reported for task {dataset.task.name}; {nearest(strange[0], known)}"
            )
        try:
            check_data(config, dataset)
            coordinates_of(config.arch, dataset_info(dataset))
            return Plan.of(config, dataset.split("train"))
        except UserError as error:
            raise Refused(str(error)) from None

    def _dataset(self, path: str) -> Dataset:
        if path not in self._datasets:
            self._datasets[path] = open_dataset(path)
        return self._datasets[path]

    @cached_property
    def _datasets(self) -> dict[str, Dataset]:
        return {}

    def sampled(self) -> list[tuple[Point, TrainConfig | str]]:
        """Some points of the space, each with its run or why it is refused: the ends and choices, and random ones."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for key, values in self.config.space.items():
            for value in _ends(values.distribution):
                study.enqueue_trial({key: value})
        found: list[tuple[Point, TrainConfig | str]] = []
        for _ in range(len(study.get_trials(deepcopy=False)) + NUM_SAMPLES):
            point = suggest(study.ask(), self.config.space)
            try:
                found.append((point, self.run(point, "runs", "point")))
            except UserError as error:
                found.append((point, str(error)))
        return found

    def check_keys(self) -> None:
        """Raise UserError for keys that no configuration has, or that the sweep itself sets."""
        known = {*known_keys(TrainConfig), *GROUPS, *aliases()}
        known |= {
            key
            for group, (_, all_kinds) in CHOSEN_BY_NAME.items()
            for kind in all_kinds().values()
            for key in known_keys(kind, f"{group}.")
        }
        known |= published_words.ABSENT.keys()  # which train_config answers
        given = {_key(word): "train" for word in self.config.train}
        for key in self.config.space:
            if key in given:
                raise UserError(f"{key} is among the words of train: and in the space; leave one out")
        for key, where in {**given, **dict.fromkeys(self.config.space, "space")}.items():
            name = aliases().get(key, key)
            if name in OF_THE_SWEEP:
                raise UserError(f"{where}: {key} is set by the sweep; give {OF_THE_SWEEP[name]} to it")
            if name not in known:
                hint = nearest(key, known - published_words.ABSENT.keys(), TrainConfig.listed_by)
                raise UserError(f"{where}: unknown key {abbreviated(key)}; {hint}")


def _key(word: str) -> str:
    key, text = split_word(word)
    return published_words.in_our_words(key.lstrip("+"), text)[0]


def _ends(values: optuna.distributions.BaseDistribution) -> Sequence[Any]:
    if isinstance(values, optuna.distributions.CategoricalDistribution):
        return values.choices
    return values.low, values.high  # type: ignore[attr-defined]


def checked(points: Points) -> list[tuple[Point, TrainConfig | str]]:
    """`points.sampled()`, of which at least one can run.

    Raises:
        UserError: a key is unknown, or every point is refused.
    """
    points.check_keys()
    found = points.sampled()
    reasons = [run for _, run in found if isinstance(run, str)]
    if len(reasons) == len(found):
        raise UserError(f"every point of the space is refused, the first since: {reasons[0]}")
    return found


def value_of(summary: Mapping[str, Any], metric: str) -> float | None:
    """The value of a trial: of its best checkpoint, as ``hrm-ray eval`` prints it; else of the last report."""
    if metric in AT_THE_END:
        return summary.get(metric)
    for part in ("best", "final"):
        if metric in (summary.get(part) or {}):
            return float(summary[part][metric])
    return None
