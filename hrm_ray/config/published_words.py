"""What becomes of the words of the published HRM and TRM code, so that the commands of their READMEs run here.

Most of their keys are ours too and mean the same. The others are in these tables: those with another name here, and
those that we do not have. Of these, a value that asks for what is done anyway is let pass, and any other is answered
with our word for it.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hrm_ray.config.validate import NO_NONE, abbreviated, read_value
from hrm_ray.errors import UserError

# `arch.name` there, and here; the first of each is the one to write.
ARCHITECTURES = {
    "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1": "hrm_v1",
    "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1": "trm",
    "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1": "hrm_v1",  # HRM in the repository of TRM
}
KEYS = {"arch.forward_dtype": "forward_dtype"}
VALUES = {"arch": {"hrm": "hrm_v1"}, "arch.name": ARCHITECTURES, "wandb": {"disabled": "off"}}

USUAL = {  # names in other trainers, to be pointed to ours
    **{
        "learning_rate": "lr",
        "batch_size": "global_batch_size",
        "num_epochs": "epochs",
        "dataset": "data_path",
    },
    **{
        "warmup_steps": "lr_warmup_steps",
        "num_train_epochs": "epochs",
        "output_dir": "storage",
        "name": "run_name",
    },
    **{"gpus": "scaling.use_gpu", "workers": "scaling.num_workers", "precision": "forward_dtype"},
}


class Absent(NamedTuple):
    """A key that we do not have: the values that are let pass, beside null, and what is said of all others."""

    passes: tuple[Any, ...]
    answer: str | Callable[[Path], str]


def _load_checkpoint(file: Path) -> str:
    return (
        f"first hrm-ray import-checkpoint {shlex.quote(str(file))} out=runs/NAME/checkpoints/step-00000000, then give "
        "run_name=NAME resume=weights in its place"
    )


def _checkpoint_path(folder: Path) -> str:
    return f"a run lies in STORAGE/RUN_NAME; give storage={folder.parent} run_name={folder.name}"


ABSENT = {
    "evaluators": Absent(([],), "every evaluation measures accuracy; leave it out"),
    "data_paths_test": Absent(
        ([],),
        "a data set holds its own test part; leave it out, and hrm-ray eval RUN data=DIR measures on another",
    ),
    "checkpoint_path": Absent((), _checkpoint_path),
    "load_checkpoint": Absent((), _load_checkpoint),
    "checkpoint_every_eval": Absent(
        (True,), "every evaluation writes a checkpoint, and keep_last=N says how many stay; leave it out"
    ),
    "eval_save_outputs": Absent(
        ([],), "leave it out; hrm-ray eval RUN data=DIR save_outputs=[NAME,...] out=FILE.npz saves them"
    ),
    "min_eval_interval": Absent((0,), "the first evaluation is after eval_interval epochs; leave it out"),
    "freeze_weights": Absent((False,), "all weights are trained; leave it out"),
    "arch.loss.name": Absent(
        ("losses@ACTLossHead", "models.losses@ACTLossHead"), "arch.loss.loss_type=NAME chooses the loss"
    ),
    "arch.mlp_t": Absent((False,), "give arch=trm, which has it"),
    "arch.H_layers": Absent((0,), "trm has one module for both states, of arch.L_layers; leave it out"),
    "hydra": Absent((), "Hydra writes nothing here, and storage=DIR says where runs lie; leave it out"),
}


def in_our_words(key: str, text: str) -> tuple[str, str]:
    """The word ``key=text`` with our name for its key and value. Raises UserError for several data sets."""
    if key == "data_paths":
        return "data_path", _only_path(text)
    return KEYS.get(key, key), VALUES.get(key, {}).get(text, text)


def _only_path(text: str) -> str:
    paths = [path.strip().strip("'\"") for path in text.removeprefix("[").removesuffix("]").split(",")]
    if len(paths) != 1 or not paths[0]:
        raise UserError(
            f"data_paths={abbreviated(text)[1:-1]}: a run has one data set; build or import the puzzles as one, and "
            "give data_path=DIR"
        )
    return paths[0]


def is_let_pass(key: str, text: str) -> bool:
    """Whether ``key=text`` asks for what is done anyway; False also if the published code has no such key.

    Raises:
        UserError: with our word for it, if it asks for something else.
    """
    absent = ABSENT.get("hydra" if re.match(r"hydra\b", key) else key)
    if absent is None:
        return False
    try:
        value = read_value(key, text)
    except UserError:
        value = text
    if value is None or value in absent.passes:
        return True
    if text == "None":
        raise UserError(NO_NONE.format(key=key, text=text))
    answer = absent.answer if isinstance(absent.answer, str) else absent.answer(Path(text))
    raise UserError(f"{key}={abbreviated(text)[1:-1]}: {answer}")
