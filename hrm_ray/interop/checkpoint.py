"""The published checkpoint layout, both ways: a folder with `all_config.yaml` and a `torch.save`d state dict.

The state dict is named `checkpoint`, or `step_N` as training writes it (then the newest is taken). Its keys begin
with `_orig_mod.model.inner.`, or with `model.inner.` if the model was not compiled; the names after that are ours.
Foreign files are read with `weights_only=True`: nothing in them can run code.
"""

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hrm_ray.config.arch import ArchConfig, arch_class
from hrm_ray.config.published import ARCHITECTURES as ARCH_NAMES
from hrm_ray.config.validate import validated
from hrm_ray.data.shards import Dataset
from hrm_ray.errors import UserError, first_line
from hrm_ray.machine import resolve
from hrm_ray.models.registry import build_model
from hrm_ray.training.checkpoint import Checkpoint, DatasetInfo, Manifest, write_manifest, write_tensors
from hrm_ray.training.state import dataset_info
from hrm_ray.training.storage import Storage

CONFIG_FILE = "all_config.yaml"
WEIGHTS_FILE = "checkpoint"
LOSS_NAME = "losses@ACTLossHead"
# Keys that mean the same in the published configuration and in ours.
SHARED_KEYS = (
    *("data_path", "global_batch_size", "epochs", "eval_interval", "seed", "run_name", "project_name"),
    *("lr", "lr_min_ratio", "lr_warmup_steps", "weight_decay", "beta1", "beta2"),
    *("puzzle_emb_lr", "puzzle_emb_weight_decay"),
)
COMPILED, PLAIN = "_orig_mod.model.inner.", "model.inner."

SUDOKU_VOCAB_SIZE = 11  # pad, blank, nine digits: the only published family of this vocabulary
CANVAS = 900  # cells of the published mazes and ARC grids, 30x30


def import_checkpoint(source: str | Path, out: str | Path, dataset: Dataset | None = None) -> Manifest:
    """Make one of our checkpoints from a published one; to evaluate, not to resume.

    Args:
        source: the published folder.
        out: a new folder.
        dataset: what the model was trained on, since the published files do not say. None: 9x9 Sudoku if the
            vocabulary is Sudoku's, else a canvas of 30x30 tokens.

    Raises:
        UserError: a missing or unreadable file, another architecture, tensors that do not fit.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another out=")
    config = _read_config(source)
    arch = _arch(config, source / CONFIG_FILE)
    file, step = _weights_file(source)
    prefix, weights = _strip_prefix(_read_weights(file), file)
    data = _describe_data(arch, weights, file, dataset)
    model = build_model(arch, data, resolve(device="cpu", forward_dtype="float32"))
    _check_fit(model.inner.state_dict(), weights, file)
    folder = Storage(out)
    try:
        entry = write_tensors(folder, "model.safetensors", weights)
        manifest = Manifest(
            global_step=step,
            arch=arch,
            dataset=data,
            config={
                "published": config,
                "prefix": prefix,
                "forward_dtype": config["arch"].get("forward_dtype", "bfloat16"),
            },
            metrics={},
            files=dict([entry]),
        )
        write_manifest(folder, manifest)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return manifest


def export_checkpoint(checkpoint: Checkpoint, out: str | Path) -> None:
    """Write `checkpoint` (its averaged weights, if it has any) in the published layout to the new folder `out`.

    An imported checkpoint comes out with the same configuration and keys as it had.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another out=")
    manifest = checkpoint.manifest
    weights = checkpoint.weights()
    prefix = manifest.config.get("prefix", COMPILED)
    config = manifest.config.get("published") or _published_config(manifest)
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, aside / WEIGHTS_FILE)
    (aside / CONFIG_FILE).write_text(yaml.safe_dump(config))
    aside.rename(out)


def _read_config(source: Path) -> dict[str, Any]:
    file = source / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{source} has no {CONFIG_FILE}: not a published checkpoint folder")
    try:
        config = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("arch"), dict):
        raise UserError(f"{file} has no 'arch': not a published checkpoint's configuration")
    return config


def _arch(config: dict[str, Any], file: Path) -> ArchConfig:
    arch = dict(config["arch"])
    name = arch.pop("name", None)
    if name not in ARCH_NAMES:
        raise UserError(f"{file}: arch.name={name} cannot be imported; known: {', '.join(ARCH_NAMES)}")
    loss_type = arch.pop("loss", {}).get("loss_type", "stablemax_cross_entropy")
    kind = arch_class(ARCH_NAMES[name])
    values = {key: value for key, value in arch.items() if key in kind.model_fields}
    return validated(kind, {**values, "loss": {"loss_type": loss_type}}, str(file))


def _weights_file(source: Path) -> tuple[Path, int]:
    """The state dict and its step; 0 if its name does not say."""
    steps = {int(f.name.removeprefix("step_")): f for f in source.glob("step_*") if f.name[5:].isdigit()}
    if (source / WEIGHTS_FILE).is_file():
        return source / WEIGHTS_FILE, 0
    if not steps:
        raise UserError(f"{source} has neither '{WEIGHTS_FILE}' nor 'step_N': no weights to import")
    return steps[max(steps)], max(steps)


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{file} cannot be read as plain tensors: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{file} holds no state dict")
    return weights


def _strip_prefix(weights: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Tensor]]:
    for prefix in (COMPILED, PLAIN):
        if weights and all(name.startswith(prefix) for name in weights):
            return prefix, {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    raise UserError(f"{file}: its keys begin neither with '{COMPILED}' nor with '{PLAIN}'")


def _describe_data(
    arch: ArchConfig, weights: dict[str, Tensor], file: Path, dataset: Dataset | None
) -> DatasetInfo:
    try:
        vocab_size = len(weights["embed_tokens.embedding_weight"])
        num_identifiers = len(weights["puzzle_emb.weights"]) if arch.puzzle_emb_ndim else 1
    except KeyError as error:
        raise UserError(f"{file} has no tensor {error.args[0]}") from None
    if dataset is not None:
        info = dataset_info(dataset)
        if info.vocab_size != vocab_size:
            raise UserError(
                f"{dataset.path} does not fit {file}: vocab_size is {info.vocab_size}, the model has {vocab_size}"
            )
        return info.model_copy(update={"num_puzzle_identifiers": num_identifiers, "fingerprint": None})
    task, options, seq_len = "sudoku", {"size": 9}, 81
    if vocab_size != SUDOKU_VOCAB_SIZE:
        positions = weights.get("embed_pos.embedding_weight")
        mixer = weights.get("L_level.layers.0.mlp_t.down_proj.weight")
        known = positions if positions is not None else mixer  # what has a row for each token
        seq_len = CANVAS if known is None else len(known) - arch.num_puzzle_tokens
        task, options = "tokens", {"vocab_size": vocab_size, "seq_len": seq_len}
    return DatasetInfo(
        task=task,
        task_options=options,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=num_identifiers,
    )


def _check_fit(wanted: dict[str, Tensor], weights: dict[str, Tensor], file: Path) -> None:
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{file} has no tensor {name}, which {CONFIG_FILE} asks for")
        if name not in wanted:
            raise UserError(f"{file} has a tensor {name}, which {CONFIG_FILE} does not ask for")
        if wanted[name].shape != weights[name].shape:
            raise UserError(
                f"{file}: {name} has shape {list(weights[name].shape)}, {CONFIG_FILE} asks for "
                f"{list(wanted[name].shape)}"
            )


def _published_config(manifest: Manifest) -> dict[str, Any]:
    """Our configuration in the published words, as far as they go."""
    arch = manifest.arch.model_dump(mode="json")
    names = {ours: published for published, ours in ARCH_NAMES.items()}
    if arch["name"] not in names:
        raise UserError(f"arch {arch['name']} has no published layout; known: {', '.join(names)}")
    if arch["name"] == "trm":
        arch["H_layers"] = 0  # asked for there, and not used
    arch["name"] = names[arch["name"]]
    arch["loss"] = {"name": LOSS_NAME, **arch["loss"]}
    dtype = manifest.config.get("forward_dtype", "auto")
    arch["forward_dtype"] = "bfloat16" if dtype == "auto" else dtype
    shared = {key: manifest.config[key] for key in SHARED_KEYS if key in manifest.config}
    return {"arch": arch, **shared}
