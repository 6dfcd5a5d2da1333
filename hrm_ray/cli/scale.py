"""How long a training would take on many workers, and what it would cost."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from hrm_ray.cli.command import KEY_VALUE, add
from hrm_ray.config.validate import PositiveInt, Settings, read_words, split_word, validated

if TYPE_CHECKING:
    from hrm_ray.scale.work import Work

PUBLISHED = ("sudoku_extreme", "sudoku_extreme_trm")  # what is shown if no experiment is given


class ScaleOptions(Settings):
    """Words of `scale`; all others are words of `train`."""

    listed_by: ClassVar[str] = "hrm-ray scale --help"

    machine: str = "h200"
    """A machine that ships, or a YAML file with its numbers."""
    workers: tuple[PositiveInt, ...] | None = None
    """Numbers of workers to show; null: 1, 2, 8, 64 and 512."""


def scale(args: argparse.Namespace) -> None:
    from hrm_ray.scale import report
    from hrm_ray.scale.machine import load_machine

    own = [word for word in args.words if split_word(word)[0] in ScaleOptions.model_fields]
    options = validated(ScaleOptions, read_words(own, ScaleOptions), "scale")
    machine = load_machine(options.machine)
    found = _works([word for word in args.words if word not in own])
    if args.json:
        print(
            json.dumps([report.plain(name, machine, work, options.workers) for name, work in found.items()])
        )
        return
    for name, work in found.items():
        print(report.text(name, machine, work, options.workers), end="\n\n")
    print(report.numbers(machine))
    print("What these numbers mean, and where the model departs: docs/scale.md.")


def _works(words: Sequence[str]) -> "dict[str, Work]":
    from hrm_ray.config.compose import train_config
    from hrm_ray.scale.work import Work, puzzles_of

    keys = [split_word(word)[0] for word in words]
    is_chosen = any(key in ("experiment", "data", "data_path") for key in keys)
    configs = [
        train_config([*chosen, *words])
        for chosen in ([[]] if is_chosen else [[f"experiment={name}"] for name in PUBLISHED])
    ]
    return {str(config.run_name): Work.of(config, puzzles_of(config.data_path)) for config in configs}


def register(commands: argparse._SubParsersAction) -> None:
    p = add(
        commands,
        "scale",
        scale,
        "predict time and cost of a training on 1 to 512 workers",
        "hrm-ray scale\n"
        "hrm-ray scale experiment=sudoku_extreme workers=[1,4,16]\n"
        "hrm-ray scale experiment=sudoku_extreme_trm machine=l40s global_batch_size=3072\n"
        "hrm-ray scale experiment=quickstart machine=cpu workers=[1,2] --json\n"
        "hrm-ray scale machine=my_machine.yaml",
    )
    p.add_argument(
        "words",
        **KEY_VALUE,
        help="machine=NAME (h200, l40s, cpu) or FILE.yaml, workers=[1,8], and words of train; without experiment= the "
        "published trainings of HRM and TRM",
    )
    p.add_argument("--json", action="store_true", help="print one JSON array, an object a training")
