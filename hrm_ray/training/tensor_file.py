"""Tensors in files of the safetensors format, written and read piece by piece: of a large table no copy is made.

What `pieces` gives are the bytes that `safetensors.torch.save` makes, which takes memory for all of them, and more than
once. The format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from pydantic import BaseModel, NonNegativeInt, TypeAdapter
from torch import Tensor

Tensors = dict[str, Tensor]
Piece = bytes | memoryview

# By their names, in the order in which a file holds them: those of the widest elements first.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PIECE_BYTES = 2**23  # few enough to be in a cache still when they are written after being hashed


class Stream(Protocol):
    """What bytes are read from, as of an open file."""

    def readinto(self, memory: memoryview, /) -> int: ...


class Entry(BaseModel):
    """What the header says of a tensor; its bytes are counted from the end of the header."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


HEADER = TypeAdapter(dict[str, Entry])


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of the file that holds `tensors`.

    Those of a tensor that is contiguous and on the CPU are views of its memory: it must not change meanwhile.
    """
    names_of = {dtype: name for name, dtype in DTYPES.items()}
    order = list(names_of)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": names_of[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield from _bytes_of(tensors[name].detach().cpu().contiguous())


def read(stream: Stream, num_bytes: int) -> Tensors:
    """The tensors of a file, each in memory of its own.

    Args:
        num_bytes: of the file; no more memory than that is taken, whatever the header says.

    Raises:
        ValueError: it is no such file, or is cut short. It may be longer.
    """
    length = int.from_bytes(_take(stream, 8), "little")
    if length > num_bytes:
        raise ValueError("the header is longer than the file")
    header = HEADER.validate_json(_take(stream, length))
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name} has the unknown type {entry.dtype}")
        dtype, start = DTYPES[entry.dtype], end
        end += math.prod(entry.shape) * dtype.itemsize
        if entry.data_offsets != (start, end) or 8 + length + end > num_bytes:
            raise ValueError(f"the bytes of {name} are not where they should be")
        tensors[name] = torch.empty(entry.shape, dtype=dtype)
        for piece in _bytes_of(tensors[name]):
            _fill(piece, stream)
    return tensors


def _take(stream: Stream, size: int) -> bytearray:
    taken = bytearray(size)
    _fill(memoryview(taken), stream)
    return taken


def _fill(memory: memoryview, stream: Stream) -> None:
    while memory:
        size = stream.readinto(memory)
        if not size:
            raise ValueError("the file is cut short")
        memory = memory[size:]


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The memory of a contiguous tensor on the CPU, in pieces."""
    for piece in tensor.reshape(-1).view(torch.uint8).split(PIECE_BYTES):
        yield memoryview(piece.numpy())
