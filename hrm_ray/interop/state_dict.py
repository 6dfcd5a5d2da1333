"""Reading weights that somebody else saved: the tensors under the names of the bare network.

Saved are a state dict or a whole training state with one in it, by `torch.save` or as safetensors, and each wrapper
of the model (DDP, torch.compile, the head that computes the loss) put a prefix before the names. Files are read with
`weights_only=True`: nothing in them can run code.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from hrm_ray.errors import UserError
from hrm_ray.interop.files import check_regular
from hrm_ray.training.checkpoint import Tensors

COMPILED = "_orig_mod.model.inner."  # what the published code puts before the names
OUTER = {"module", "model", "inner", "network", "net"}  # of wrappers, before the names
ANYWHERE = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OF_EVERY_MODEL = {"lm_head.weight", "q_head.weight", "embed_tokens.embedding_weight"}
NOT_OF_THE_NETWORK = {"n_averaged"}  # a counter of torch.optim.swa_utils
USUAL = (
    "model",
    "model_state_dict",
    "state_dict",
    "module",
    "weights",
)  # of the state dict in a training state
AVERAGED = re.compile(r"(?:^|[._-])(?:ema|swa|shadow|averaged?)(?:$|[._-])", re.IGNORECASE)
STEPS = ("global_step", "step", "steps", "train_step", "iteration")


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        tensors: by the name in the bare network.
        averages: averaged weights kept beside them (EMA); empty if there are none.
        prefix: what stood before every name.
        step: what the training state says, None if it does not.
    """

    tensors: Tensors
    averages: Tensors
    prefix: str
    step: int | None


def read_weights(file: Path) -> Weights:
    """The weights in `file`.

    Raises:
        UserError: it cannot be read, holds code, or not the weights of such a network.
    """
    content = _read(file)
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds no state dict, but a {type(content).__name__}")
    found = dict(_state_dicts(content))
    averages = {where for where in found if AVERAGED.search(where)}
    plain = found.keys() - averages
    if not found:
        keys = ", ".join(str(key) for key in list(content)[:6]) or "nothing"
        raise UserError(f"{file} holds no state dict of an HRM or TRM; it holds: {keys}")
    where = _one(plain or averages, file)
    tensors, prefix = _bare(found[where], file)
    averaged = _bare(found[_one(averages, file)], file)[0] if averages and plain else {}
    return Weights(tensors, averaged, prefix, _step(content))


def _read(file: Path) -> Any:
    check_regular(file)
    try:
        with file.open("rb") as content:
            start = content.read(9)
        if start[8:9] == b"{":  # eight bytes of length, then JSON
            return safetensors.torch.load_file(file)
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            with zipfile.ZipFile(file) as archive:  # torch does not compare checksums
                if damaged := archive.testzip():
                    raise UserError(
                        f"{file} is damaged: {damaged} in it is not as it was written; copy it again"
                    )
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # torch's message advises to load the file without this protection.
        if culprit := re.search(r"GLOBAL ([A-Za-z_][\w.]*)", str(error)):
            raise UserError(
                f"{file} holds more than tensors ({culprit[1]}), which could run code, and is refused; save the "
                "weights alone, torch.save(model.state_dict(), FILE), where it was made"
            ) from None
    except Exception:  # damaged files make torch, zipfile and pickle raise anything
        pass
    raise UserError(f"{file} cannot be read as plain tensors: it is cut off, damaged, or no file of weights")


def _state_dicts(
    content: Mapping[Any, Any], where: str = "", depth: int = 2
) -> Iterator[tuple[str, Tensors]]:
    """All mappings of names to the tensors of such a network in a training state, by their place in it."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if OF_EVERY_MODEL & {_bare_name(name) for name in tensors}:
        yield where, tensors
    elif depth:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, f"{where}.{key}".lstrip("."), depth - 1)


def _one(places: set[str], file: Path) -> str:
    usual = [name for name in USUAL if name in places]
    if len(places) > 1 and len(usual) != 1:
        raise UserError(
            f"{file} holds several state dicts ({', '.join(sorted(places))}); save the one you mean, alone"
        )
    return usual[0] if len(places) > 1 else next(iter(places))


def _bare_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ANYWHERE]
    return ".".join(dropwhile(OUTER.__contains__, parts))


def _bare(tensors: Tensors, file: Path) -> tuple[Tensors, str]:
    """The tensors by their names in the bare network, and what stood before all of those."""
    bare: Tensors = {}
    prefixes = set()
    for name, tensor in tensors.items():
        ours = _bare_name(name)
        if ours in NOT_OF_THE_NETWORK:
            continue
        if ours in bare:
            raise UserError(f"{file} has the tensor {ours} twice, under different prefixes ({name})")
        if not (
            tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type == "cpu"
        ):
            raise UserError(f"{file}: {name} is no plain tensor of floating-point numbers ({_kind(tensor)})")
        # A copy, since some share their memory, as tied weights do.
        bare[ours] = tensor.detach().clone(memory_format=torch.contiguous_format)
        prefixes.add(name.removesuffix(ours) if name.endswith(ours) else COMPILED)
    return bare, prefixes.pop() if len(prefixes) == 1 else COMPILED


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")


def _step(content: Mapping[Any, Any]) -> int | None:
    for key in STEPS:
        value = content.get(key)
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if type(value) is int and 0 <= value < 2**63:
            return value
    return None
