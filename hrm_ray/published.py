"""How the layouts of the published HRM and TRM code are recognised, where this project's was expected.

A hint names the command that converts what the user has; None: it is not of a published layout.
"""

import re
import shlex
from pathlib import Path

DATASET_FILE = "dataset.json"
SPLITS = ("train", "test")
CHECKPOINT_CONFIG = "all_config.yaml"
# OWNER/NAME, perhaps as an address, a revision (/tree/REVISION), and what lies inside.
HUB = re.compile(
    r"(?:https?://huggingface\.co/|hf://)?(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?]+))?(?:/(?P<inside>[^?]+?))?/?(?:\?[^?]*)?"
)


def dataset_hint(folder: Path) -> str | None:
    """What to do with `folder` if it is a data set in the published layout, or one split of it."""
    if any((folder / split / DATASET_FILE).is_file() for split in SPLITS):
        return (
            f"{folder} is in the published layout: hrm-ray data import-npy {shlex.quote(str(folder))} out=DIR"
        )
    if (folder / DATASET_FILE).is_file():
        parent = folder.resolve().parent if folder.name in ("", "..") else folder.parent
        return (
            f"{folder} is one split of a data set in the published layout; give the folder around it: "
            f"hrm-ray data import-npy {shlex.quote(str(parent))} out=DIR"
        )
    return None


def checkpoint_hint(path: Path) -> str | None:
    """What to do with `path` if it is a published checkpoint: its folder, or its file of weights."""
    folder = path.parent if path.is_file() else path
    if (folder / CHECKPOINT_CONFIG).is_file():
        command = f"hrm-ray import-checkpoint {shlex.quote(str(path))} out=DIR"
        return f"{path} is in the published layout: {command}, and give DIR"
    if is_hub_id(str(path)):
        return (
            f"{path}: no such folder; give a checkpoint or a run folder, or if it is on Hugging Face: "
            f"hrm-ray import-checkpoint {path} out=DIR, and give DIR"
        )
    return None


def is_hub_id(text: str) -> bool:
    """Whether `text` may name something on Hugging Face; a path whose first folder exists is a path."""
    return HUB.fullmatch(text) is not None and ("://" in text or not Path(Path(text).parts[0]).exists())
