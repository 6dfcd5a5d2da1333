"""Draw a figure of runs."""

import argparse
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from hrm_ray.cli.command import add
from hrm_ray.cli.plot_file import check_kind, is_plot
from hrm_ray.config.validate import Settings, read_words, validated
from hrm_ray.errors import UserError
from hrm_ray.jobs.copy import check_lasts

KINDS = ("grokking",)


class PlotOptions(Settings):
    """Words of `plot`; all others are runs."""

    listed_by: ClassVar[str] = "hrm-ray plot --help"

    out: str = "grokking.png"
    """File to write, .png, .svg or .pdf."""
    percent: bool | None = None
    """Whether accuracies in the files of others are in percent; null: as these say themselves."""
    chance: float | None = Field(default=None, gt=0, lt=1)
    """Accuracy of a guess, for runs of others that do not say it."""

    @field_validator("out")
    @classmethod
    def _is_a_plot(cls, out: str) -> str:
        check_kind(out)
        return out


def plot(args: argparse.Namespace) -> None:
    from hrm_ray.data.files import check_replaceable, whole_file, writing
    from hrm_ray.grokking.figure import draw
    from hrm_ray.grokking.read import read_run
    from hrm_ray.grokking.verdict import judge

    own = [word for word in args.words if word.partition("=")[0] in PlotOptions.model_fields]
    options = validated(PlotOptions, read_words(own, PlotOptions), "plot")
    out = Path(options.out)
    check_lasts("out", options.out)
    check_replaceable(out, "out", "plot", is_plot)
    paths = [word for word in args.words if word not in own]
    if not paths:
        raise UserError("hrm-ray plot grokking needs a run: its folder, or a file with its history")
    runs = [read_run(path, percent=options.percent, chance=options.chance) for path in paths]
    names = [run.name for run in runs]
    runs = [
        run if names.count(run.name) == 1 else run._replace(name=path)
        for run, path in zip(runs, paths, strict=True)
    ]
    with writing(out), whole_file(out) as file:
        file.write(draw(runs, out.suffix.removeprefix(".")))
    for run in runs:
        print(f"{run.name}: {judge(run.history, run.source).text}")
    print(out)


def register(commands: Any) -> None:
    p = add(
        commands,
        "plot",
        plot,
        "draw the accuracy and loss of runs over their steps, and say which have grokked",
        "hrm-ray plot grokking runs/grokking_quick\n"
        "hrm-ray plot grokking runs/seed-0 runs/seed-1 out=seeds.svg\n"
        "hrm-ray plot grokking runs/grokking_quick theirs/logs/metrics.csv chance=0.0103\n"
        "hrm-ray plot grokking theirs/logs/training_history.json percent=true",
    )
    p.add_argument("kind", choices=KINDS, help="the figure")
    p.add_argument(
        "words",
        nargs="+",
        metavar="RUN|key=value",
        help="run folders, training_history.json files, metrics.csv files of openai/grok; out=FILE.png, percent=true, "
        "chance=NUMBER",
    )
