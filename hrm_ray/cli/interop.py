"""Published checkpoints, both ways."""

import argparse
from typing import Any

from hrm_ray.cli.command import KEY_VALUE, add, options_of
from hrm_ray.cli.data import OutOptions
from hrm_ray.jobs.copy import check_lasts


class ImportOptions(OutOptions):
    """Of ``import-checkpoint``; `data` says which task the model was trained on."""

    data: str | None = None


def import_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.data.shards import open_dataset
    from hrm_ray.interop.checkpoint import import_checkpoint
    from hrm_ray.training.checkpoint import EMA_FILE

    options: ImportOptions = options_of(args)
    check_lasts("out", options.out)
    dataset = open_dataset(options.data) if options.data else None
    manifest = import_checkpoint(args.source, options.out, dataset)
    averaged = ", averaged weights" if EMA_FILE in manifest.files else ""
    print(
        f"{options.out}: {manifest.arch.name}, task {manifest.dataset.task}, step {manifest.global_step}{averaged}"
    )


def export_checkpoint(args: argparse.Namespace) -> None:
    from hrm_ray.interop.checkpoint import export_checkpoint
    from hrm_ray.training.checkpoint import find

    options: OutOptions = options_of(args)
    check_lasts("out", options.out)
    export_checkpoint(find(args.checkpoint), options.out)
    print(f"{options.out}: written in the published layout")


def register(commands: Any) -> None:
    p = add(
        commands,
        "import-checkpoint",
        import_checkpoint,
        "convert a checkpoint from the published layout",
        "hrm-ray import-checkpoint sapientinc/HRM-checkpoint-sudoku-extreme out=checkpoints/published\n"
        "hrm-ray import-checkpoint checkpoints/my-run/step_26040 out=checkpoints/mine data=data/sudoku-9x9",
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="folder with all_config.yaml and the weights, the file of weights, or OWNER/NAME[/FOLDER] on Hugging Face",
    )
    p.add_argument("words", **KEY_VALUE, help="out=DIR [data=DIR]")
    p.set_defaults(options=ImportOptions)
    p = add(
        commands,
        "export-checkpoint",
        export_checkpoint,
        "write a checkpoint in the published layout",
        "hrm-ray export-checkpoint runs/quickstart out=published",
    )
    p.add_argument("checkpoint", help="checkpoint folder, or run folder (then its best)")
    p.add_argument("words", **KEY_VALUE, help="out=DIR")
    p.set_defaults(options=OutOptions)
