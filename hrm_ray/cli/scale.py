"""What training would take on many GPUs."""

import argparse
from typing import Any

from pydantic import PositiveInt

from hrm_ray.cli.command import KEY_VALUE, add
from hrm_ray.config.validate import Settings, read_words, validated


class ScaleOptions(Settings):
    """Of ``scale``, beside the keys of ``train``."""

    machine: str = "h200"
    groups: PositiveInt = 1000
    vocab_size: PositiveInt = 11
    seq_len: PositiveInt = 81


def scale(args: argparse.Namespace) -> None:
    from hrm_ray.config.compose import train_config
    from hrm_ray.scale import describe

    own = [word for word in args.words if word.partition("=")[0] in ScaleOptions.model_fields]
    options = validated(ScaleOptions, read_words(own, ScaleOptions), "scale")
    config = train_config([word for word in args.words if word not in own])
    print(describe(config, **options.model_dump()))


def register(commands: Any) -> None:
    p = add(
        commands,
        "scale",
        scale,
        "estimate step time and cost of a training on 1 to 512 GPUs",
        "hrm-ray scale experiment=sudoku_extreme\n"
        "hrm-ray scale experiment=sudoku_extreme_trm global_batch_size=3072\n"
        "hrm-ray scale experiment=sudoku_extreme machine=mine.yaml",
    )
    p.add_argument(
        "words",
        **KEY_VALUE,
        help="experiment=NAME and any key of train; machine=NAME or FILE, groups= of the data set (1000), vocab_size= "
        "and seq_len= of its puzzles (11, 81)",
    )
