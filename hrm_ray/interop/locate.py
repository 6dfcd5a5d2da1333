"""Which files a published checkpoint is made of: its configuration and its weights.

A user gives the folder, the file of weights, or where they are on Hugging Face (``OWNER/NAME``, with or without a
folder or file inside). Weights have all kinds of names: the published code writes `step_N`, its authors publish
`checkpoint`, others write `model.pt`, `pytorch_model.bin` or `model.safetensors`. Nothing is opened here.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hrm_ray.errors import UserError, first_line
from hrm_ray.interop.files import check_regular
from hrm_ray.manifest import MANIFEST
from hrm_ray.published import CHECKPOINT_CONFIG, HUB, is_hub_id
from hrm_ray.training.checkpoint import FOLDER, MODEL_FILE

WEIGHTS_FILE = "checkpoint"
HUB_TIMEOUT_S = 20
SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
STEP = re.compile(r"(?:^|[^A-Za-z])step[-_=]?(\d{1,18})(?!\d)")
# What lies beside weights: outputs that the published code saves, and other parts of a trainer's state.
BESIDE = re.compile(
    r"all_preds|optimi[sz]er|scheduler|rng_state|scaler|training_args|^\.|^(LICEN[SC]E|README)$"
)


class Files(NamedTuple):
    """The two files of a checkpoint, on this machine; `step` is what their names say, 0 if they do not."""

    config: Path
    weights: Path
    step: int


def locate(source: str) -> Files:
    """Find the checkpoint that `source` means, and fetch it if it is on Hugging Face.

    Raises:
        UserError: there is none, no configuration with it, or several files might be the weights.
    """
    path = Path(source).expanduser()
    if os.path.lexists(path):
        return _local(path)
    hub = HUB.fullmatch(source)
    if hub is None or not is_hub_id(source):
        raise UserError(f"{source}: no such file or folder, and no Hugging Face id (OWNER/NAME)")
    return _fetch(hub["repo"], hub["inside"] or "", hub["revision"])


def _local(path: Path) -> Files:
    if path.name == CHECKPOINT_CONFIG:
        path = path.parent
    if path.is_dir() and (
        ((path / MANIFEST).is_file() and (path / MODEL_FILE).is_file()) or (path / FOLDER).is_dir()
    ):
        raise UserError(f"{path} is a checkpoint or run of hrm_ray already; use it as it is")
    if not path.is_dir():
        check_regular(path)
    folder = path if path.is_dir() else path.parent
    around = [folder, folder.absolute().parent]  # some save each step in a folder of its own
    configs = [place / CHECKPOINT_CONFIG for place in around if (place / CHECKPOINT_CONFIG).exists()]
    if not configs:
        below = sorted(str(config.parent) for config in folder.glob(f"*/{CHECKPOINT_CONFIG}"))
        raise _no_config(str(path), below)
    name = (
        choose((f.name for f in folder.iterdir() if not f.is_dir()), str(folder))
        if folder == path
        else path.name
    )
    weights = folder / name
    return Files(configs[0], weights, step_of(str(weights.absolute())))


def _fetch(repo: str, inside: str, revision: str | None) -> Files:
    import huggingface_hub  # a second to import

    where = f"{repo}/{inside}".rstrip("/")
    try:
        info = huggingface_hub.model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
        files = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
        given = PurePosixPath(inside)
        if not any(given == file or given in file.parents for file in files):
            raise UserError(f"{repo} has no {inside}; it has: {', '.join(map(str, files[:9]))}")
        folder = given.parent if given in files else given
        configs = [f for f in (place / CHECKPOINT_CONFIG for place in (folder, folder.parent)) if f in files]
        if not configs:
            below = sorted(f"{repo}/{f.parent}" for f in files if f.name == CHECKPOINT_CONFIG)
            raise _no_config(where, below)
        weights = given
        if given not in files:
            weights = folder / choose((f.name for f in files if f.parent == folder), where)
        config, local = (
            Path(huggingface_hub.hf_hub_download(repo, str(name), revision=info.sha))  # both of one commit
            for name in (configs[0], weights)
        )
    except UserError:
        raise
    except Exception as error:  # the hub, its HTTP client and the network raise some twenty unrelated types
        raise UserError(
            f"{where}: no such file or folder here, and no model that Hugging Face gives us "
            f"({type(error).__name__}: {first_line(error)}); check the path, or the id and the network"
        ) from None
    return Files(config, local, step_of(str(weights)))


def _no_config(where: str, below: list[str]) -> UserError:
    if below:
        return UserError(
            f"{where} has no {CHECKPOINT_CONFIG}, but folders with one; give {' or '.join(below[:9])}"
        )
    return UserError(
        f"{where} has no {CHECKPOINT_CONFIG}: not a published checkpoint folder; put the configuration of its training "
        "beside the weights, which alone do not say how they are computed with"
    )


def choose(names: Iterable[str], where: str) -> str:
    """The file of weights among the names of a folder: `checkpoint`, else that of the last step, else the only one.

    Raises:
        UserError: there is none, or several and nothing says which.
    """
    names = sorted(names)
    weights = [name for name in names if _may_be_weights(name)]
    if WEIGHTS_FILE in weights:
        return WEIGHTS_FILE
    steps = {name: step_of(name) for name in weights if STEP.search(name)}
    if len(steps) == len(weights) > 1:
        weights = [name for name, step in steps.items() if step == max(steps.values())]
    if not weights:
        raise UserError(f"{where} has no file of weights (it has: {', '.join(names)}); give the file itself")
    if len(weights) > 1:
        raise UserError(
            f"{where} has several files of weights; give one: {where}/{f' or {where}/'.join(weights[:9])}"
        )
    return weights[0]


def _may_be_weights(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    return (suffix in SUFFIXES or not suffix or name.startswith("step_")) and not BESIDE.search(name)


def step_of(path: str) -> int:
    """The step that the name of a file says, or that of its folder; 0 if neither does."""
    for part in reversed(PurePosixPath(path).parts[-2:]):
        if found := STEP.findall(part):
            return int(found[-1])
    return 0
