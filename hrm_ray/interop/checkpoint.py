"""The published checkpoint layout, both ways: a file of weights with the `all_config.yaml` of its training.

`locate` says which files are meant, `state_dict` reads the weights, `config` the configuration. The names of tensors
in the bare network are the same there and here.
"""

import io
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor

from hrm_ray.config.arch import ArchConfig, architectures
from hrm_ray.data.files import write_durably, writing
from hrm_ray.data.shards import Dataset
from hrm_ray.errors import UserError
from hrm_ray.interop.config import forward_dtype, published_config, read_arch, read_config
from hrm_ray.interop.locate import WEIGHTS_FILE, locate
from hrm_ray.interop.state_dict import COMPILED, read_weights
from hrm_ray.models.recursive import RecursiveModel
from hrm_ray.published import CHECKPOINT_CONFIG
from hrm_ray.storage.storage import Storage
from hrm_ray.training.checkpoint import (
    EMA_FILE,
    MODEL_FILE,
    Checkpoint,
    DatasetInfo,
    Manifest,
    Tensors,
    step_of,
    write_manifest,
    write_tensors,
)
from hrm_ray.training.state import dataset_info

LOADABLE = (COMPILED, "model.inner.")  # prefixes that the published code reads

SUDOKU_VOCAB_SIZE, SUDOKU_CELLS = (
    11,
    81,
)  # pad, blank, nine digits: the only published family of this vocabulary
CANVAS = 900  # cells of the published mazes and ARC grids, 30x30


def import_checkpoint(source: str | Path, out: str | Path, dataset: Dataset | None = None) -> Manifest:
    """Make one of our checkpoints from a published one; to evaluate, not to resume.

    Args:
        source: the published folder, its file of weights, or where they are on Hugging Face (see `locate`).
        out: a new folder. One that is named as the checkpoints of runs are (step-00000000) says the step too, so
            that a run may start from it.
        dataset: what the model was trained on, since the published files do not say. None: 9x9 Sudoku if the
            vocabulary is Sudoku's, else a canvas of 30x30 tokens.

    Raises:
        UserError: a missing or unreadable file, another architecture, a key of the configuration that we cannot
            honour, tensors that do not fit, or a full disk.
    """
    out = _new_folder(out)
    files = locate(str(source))
    config = read_config(files.config)
    arch = read_arch(config, files.config)
    weights = read_weights(files.weights)
    data = _describe_data(arch, weights.tensors, files.weights, dataset)
    wanted = _shapes(arch, data, weights.tensors, files.weights)
    _check_fit(wanted, weights.tensors, files.weights)
    _check_fit(
        {name: wanted[name] for name in weights.averages if name in wanted}, weights.averages, files.weights
    )
    prefix = weights.prefix if weights.prefix in LOADABLE else COMPILED
    with _whole_folder(out) as aside:
        folder = Storage(aside)
        entries = [write_tensors(folder, MODEL_FILE, weights.tensors)]
        if weights.averages:
            entries.append(write_tensors(folder, EMA_FILE, weights.averages))
        manifest = Manifest(
            global_step=_step(out.name, files.step if weights.step is None else weights.step),
            arch=arch,
            dataset=data,
            config={
                "published": config,
                "prefix": prefix,
                "forward_dtype": forward_dtype(config, files.config),
            },
            metrics={},
            files=dict(entries),
        )
        write_manifest(folder, manifest)
    return manifest


def _step(name: str, published: int) -> int:
    named = step_of(name)
    return published if named is None else named


def export_checkpoint(checkpoint: Checkpoint, out: str | Path) -> None:
    """Write `checkpoint` (its averaged weights, if it has any) in the published layout to the new folder `out`.

    An imported checkpoint comes out with the same configuration as it had.

    Raises:
        UserError: its architecture has no published layout, or `out` exists or cannot be written.
    """
    out = _new_folder(out)
    manifest = checkpoint.manifest
    config = manifest.config.get("published") or published_config(manifest)
    prefix = manifest.config.get("prefix", COMPILED)
    content = io.BytesIO()  # torch hides what the disk says
    torch.save({prefix + name: tensor for name, tensor in checkpoint.weights().items()}, content)
    with _whole_folder(out) as aside:
        write_durably(aside / WEIGHTS_FILE, content.getvalue())
        write_durably(aside / CHECKPOINT_CONFIG, yaml.safe_dump(config).encode())


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder that gets the name `out` when all is in it; if something is raised before, it is deleted."""
    aside = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(out):
            aside.mkdir(parents=True)
            yield aside
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _new_folder(out: str | Path) -> Path:
    if "://" in str(out):
        raise UserError(f"out={out}: give a local folder, and copy it there")
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; choose another out=")
    return out


def _describe_data(arch: ArchConfig, weights: Tensors, file: Path, dataset: Dataset | None) -> DatasetInfo:
    vocab_size = _num_rows("embed_tokens.embedding_weight", weights, file)
    num_identifiers = _num_rows("puzzle_emb.weights", weights, file) if arch.puzzle_emb_ndim else 1
    if dataset is not None:
        info = dataset_info(dataset)
        if info.vocab_size != vocab_size:
            raise UserError(
                f"{dataset.path} does not fit {file}: vocab_size is {info.vocab_size}, the model has {vocab_size}"
            )
        return info.model_copy(update={"num_puzzle_identifiers": num_identifiers, "fingerprint": None})
    seq_len = SUDOKU_CELLS if vocab_size == SUDOKU_VOCAB_SIZE else CANVAS
    for name in ("embed_pos.embedding_weight", "L_level.layers.0.mlp_t.down_proj.weight"):
        if name in weights:  # they have a row for each token
            seq_len = _num_rows(name, weights, file) - arch.num_puzzle_tokens
    task, options = "sudoku", {"size": 9}
    if (vocab_size, seq_len) != (SUDOKU_VOCAB_SIZE, SUDOKU_CELLS):
        task, options = "tokens", {"vocab_size": vocab_size, "seq_len": seq_len}
    return DatasetInfo(
        task=task,
        task_options=options,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=num_identifiers,
    )


def _num_rows(name: str, weights: Tensors, file: Path) -> int:
    if name not in weights:
        raise UserError(f"{file} has no tensor {name}, which {CHECKPOINT_CONFIG} asks for")
    if weights[name].ndim != 2 or not weights[name].numel():
        raise UserError(f"{file}: {name} has shape {list(weights[name].shape)}, not [rows, columns]")
    return len(weights[name])


def _shapes(arch: ArchConfig, data: DatasetInfo, weights: Tensors, file: Path) -> Tensors:
    """The tensors of the network that `arch` describes, without their numbers."""
    # Layers are counted first, since a network of millions of them would take hours to make.
    for module in ("H", "L"):
        there = len({m[1] for name in weights if (m := re.match(rf"{module}_level\.layers\.(\d+)\.", name))})
        if getattr(arch, f"{module}_layers", there) != there:
            asked = getattr(arch, f"{module}_layers")
            raise UserError(f"{file} has {there} {module} layers, {CHECKPOINT_CONFIG} asks for {asked}")
    architectures()  # so that all classes are known
    try:
        with torch.device("meta"):
            network = RecursiveModel.classes[type(arch)](
                arch,
                vocab_size=data.vocab_size,
                seq_len=data.seq_len,
                num_puzzle_identifiers=data.num_puzzle_identifiers,
            )
    except (RuntimeError, ArithmeticError, TypeError, ValueError):  # sizes beyond all bounds
        raise UserError(
            f"{file} does not fit {CHECKPOINT_CONFIG}, which describes an impossible model"
        ) from None
    return network.state_dict()


def _check_fit(wanted: dict[str, Tensor], weights: Tensors, file: Path) -> None:
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{file} has no tensor {name}, which {CHECKPOINT_CONFIG} asks for")
        if name not in wanted:
            raise UserError(f"{file} has a tensor {name}, which {CHECKPOINT_CONFIG} does not ask for")
        if wanted[name].shape != weights[name].shape:
            raise UserError(
                f"{file}: {name} has shape {list(weights[name].shape)}, {CHECKPOINT_CONFIG} asks for "
                f"{list(wanted[name].shape)}"
            )
