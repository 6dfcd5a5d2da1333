"""Files of tensors are those of the safetensors library, and what is no such file is refused, whatever it says."""

import io
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.training import tensor_file
from hrm_ray.training.tensor_file import DTYPES, pieces, read

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@st.composite
def files_of_tensors(draw):
    """Some tensors, also transposed, without elements, and larger than a piece is in these tests."""
    tensors = {}
    for name in draw(st.lists(st.text(max_size=5), max_size=6, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(tensors))).to(dtype)
        tensors[name] = tensor.transpose(0, 1) if len(shape) > 1 and draw(st.booleans()) else tensor
    return tensors


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PIECE_BYTES", 24)
        yield


@settings(deadline=None)
@given(files_of_tensors())
def test_a_file_is_the_librarys_and_is_read_back(tensors):
    content = b"".join(pieces(tensors))
    assert content == safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    again = read(io.BytesIO(content), len(content))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)


def test_every_bit_is_kept():
    bits = torch.randint(-(2**31), 2**31, (100,), dtype=torch.int32)
    content = b"".join(pieces({"w": bits.view(torch.float32)}))  # NaN of every kind among them
    assert torch.equal(read(io.BytesIO(content), len(content))["w"].view(torch.int32), bits)


def test_no_tensor_is_copied_to_be_written():
    tensor = torch.zeros(100)
    _, *views = pieces({"w": tensor})
    tensor += 1
    assert b"".join(views) == tensor.numpy().tobytes() and len(views) > 2


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"w": 3},
        {"w": {**ENTRY, "dtype": "F3"}},
        {"w": {**ENTRY, "shape": [-2]}},
        {"w": {**ENTRY, "shape": [3]}},
        {"w": {**ENTRY, "shape": [10**15], "data_offsets": [0, 4 * 10**15]}},
        {"w": {**ENTRY, "shape": [10**15] * 9}},
        {"w": {**ENTRY, "data_offsets": [4, 12]}},
        {"w": {**ENTRY, "data_offsets": [0, 2**70]}},
        {"w": ENTRY, "v": ENTRY},
        {"w": ENTRY, "v": {**ENTRY, "data_offsets": [8, 16]}},
    ],
)
def test_a_header_that_does_not_fit_is_refused(header):
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    with pytest.raises(ValueError):
        read(io.BytesIO(content), len(content))


@given(st.data())
@settings(deadline=None)
def test_what_is_cut_short_is_refused(data):
    content = b"".join(pieces({"w": torch.ones(20), "b": torch.ones(3, dtype=torch.bool)}))
    size = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(ValueError):
        read(io.BytesIO(content[:size]), len(content))
