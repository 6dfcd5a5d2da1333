"""The configuration of the published code, `all_config.yaml`, and ours.

What always holds: a key that changes what the model computes is honoured, or the checkpoint is refused by its name.
Known to be without effect on inference are `NO_EFFECT`; what our models always do are `ALWAYS`.
"""

import json
from pathlib import Path
from typing import Any, get_args

import yaml

from hrm_ray.config.arch import ArchConfig, LossType, StateConfig, arch_class
from hrm_ray.config.published_words import ARCHITECTURES
from hrm_ray.config.validate import as_text, validated
from hrm_ray.errors import UserError
from hrm_ray.interop.files import read_bytes
from hrm_ray.training.checkpoint import Manifest

LOSS_NAME = "losses@ACTLossHead"
# Without default there. H_layers is asked for by TRM too, which does not use it.
REQUIRED = (
    *("H_cycles", "L_cycles", "L_layers", "halt_max_steps"),
    *("hidden_size", "num_heads", "expansion", "pos_encodings"),
)
NO_EFFECT = {
    *("batch_size", "forward_dtype", "halt_exploration_prob", "puzzle_emb_dropout", "grid_token_dropout"),
    *("vocab_size", "seq_len", "num_puzzle_identifiers"),  # of the data; the tensors have their own sizes
}
ALWAYS: dict[str, Any] = {"causal": False, "mlp_t": False, "halt_max_steps_eval": None, "dropout": 0}
# Values that no published model has, of keys that are shared.
OURS_ALONE: dict[str, Any] = {"pos_encodings": "grid"}
FORWARD_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}  # in which we compute
# Keys that mean the same in the published configuration and in ours.
SHARED_KEYS = (
    *("global_batch_size", "epochs", "eval_interval", "seed", "run_name", "project_name", "ema", "ema_rate"),
    *("lr", "lr_min_ratio", "lr_warmup_steps", "weight_decay", "beta1", "beta2"),
    *("puzzle_emb_lr", "puzzle_emb_weight_decay"),
)

_MAX_BYTES = 1_000_000


def read_config(file: Path) -> dict[str, Any]:
    """The content of an `all_config.yaml`, as JSON has it.

    Raises:
        UserError: it is unreadable, or not the configuration of a published checkpoint.
    """
    content = read_bytes(file, _MAX_BYTES)
    try:
        config = json.loads(json.dumps(yaml.safe_load(content), default=str))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError, RecursionError, AttributeError):  # numbers, dates and knots that are none
        raise UserError(f"{file} is no valid YAML of plain values") from None
    if not isinstance(config, dict) or not isinstance(config.get("arch"), dict):
        raise UserError(f"{file} has no 'arch': not a published checkpoint's configuration")
    return config


def read_arch(config: dict[str, Any], file: Path) -> ArchConfig:
    """Our architecture for the published one in `config`, which is from `file`.

    Raises:
        UserError: it is another, or has a key that we cannot honour.
    """
    arch = dict(config["arch"])
    name = arch.pop("name", None)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{file}: arch.name={name!r} cannot be imported; known: {', '.join(ARCHITECTURES)}")
    kind = arch_class(ARCHITECTURES[name])
    required = [key for key in (*REQUIRED, "H_layers") if key in kind.model_fields]
    if missing := [key for key in required if key not in arch]:
        raise UserError(f"{file}: arch.{missing[0]} is not given, without which the model is not known")
    loss = arch.pop("loss", None)  # of training only
    if "H_layers" not in kind.model_fields:
        arch.pop("H_layers", None)
    values: dict[str, Any] = {"puzzle_emb_ndim": 0}  # the default there
    known_keys = (
        kind.model_fields.keys() - StateConfig.model_fields.keys()
    )  # those may mean something else there
    for key, value in arch.items():
        if key in OURS_ALONE and value == OURS_ALONE[key]:
            raise UserError(f"{file}: arch.{key}={value} is known here, but not to the published code")
        if key in known_keys:
            values[key] = value
        elif key in ALWAYS and (value is ALWAYS[key] or value == ALWAYS[key]):
            continue
        elif key not in NO_EFFECT:
            given = " ".join(f"arch.{key}={as_text(value)}".split())[:80]
            here = f"here it is always {as_text(ALWAYS[key])}" if key in ALWAYS else "it is not known here"
            raise UserError(
                f"{file}: {given} may change what the model computes, and {here}; take the key out if you know that it "
                "does not change the answers"
            )
    if isinstance(loss, dict) and loss.get("loss_type") in get_args(LossType):
        values["loss"] = {"loss_type": loss["loss_type"]}
    return validated(kind, values, f"{file}: arch")


def forward_dtype(config: dict[str, Any], file: Path) -> str:
    """The precision in which the model is used. Raises UserError for one that is not known."""
    name = config["arch"].get("forward_dtype", "bfloat16")
    if not isinstance(name, str) or name not in FORWARD_DTYPES:
        raise UserError(f"{file}: arch.forward_dtype={name!r} is unknown; known: {', '.join(FORWARD_DTYPES)}")
    return FORWARD_DTYPES[name]


def published_config(manifest: Manifest) -> dict[str, Any]:
    """The configuration of a checkpoint of this project in the published words, as far as they go.

    Raises:
        UserError: its architecture, or a value of it, has no published layout.
    """
    arch = manifest.arch.model_dump(mode="json", exclude={"noise"})  # which is of training only
    published = next((theirs for theirs, ours in ARCHITECTURES.items() if ours == arch["name"]), None)
    if published is None:
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise UserError(f"arch {arch['name']} has no published layout; known: {known}")
    for key, value in OURS_ALONE.items():
        if arch[key] == value:
            raise UserError(
                f"arch.{key}={value} has no published layout: the published code does not know it"
            )
    for key in ("init_std", "damping"):
        if arch.pop(key) != StateConfig.model_fields[key].default:
            raise UserError(
                f"arch.{key}={getattr(manifest.arch, key):g} has no published layout: the code there would use the "
                "model otherwise than it was trained"
            )
    shared = {key: manifest.config[key] for key in SHARED_KEYS if key in manifest.config}
    data = manifest.config.get("data_path")
    if arch["name"] == "trm":
        arch["H_layers"] = 0  # asked for there, and not used
        arch["puzzle_emb_len"] = (
            manifest.arch.num_puzzle_tokens
        )  # there also without puzzle embeddings, unless 0
        shared["data_paths"] = [data]
    else:
        shared["data_path"] = data
    arch["name"] = published
    arch["loss"] = {"name": LOSS_NAME, "loss_type": manifest.arch.loss.loss_type}  # all that its head takes
    dtype = manifest.config.get("forward_dtype", "auto")
    arch["forward_dtype"] = "bfloat16" if dtype == "auto" else dtype
    return {"arch": arch, **shared}
