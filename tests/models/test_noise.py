"""Noise by key: the generator of the data, the normal distribution, and nothing but the key."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hrm_ray.data import keyed_random
from hrm_ray.models.noise import Noise, key_of, keys_of_rows, mix

CPU = torch.device("cpu")
INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), INT64, INT64)
def test_streams_are_those_of_the_data(seed, first, second):
    expected = keyed_random.stream(seed, np.uint64(first % 2**64), np.uint64(second % 2**64))
    assert key_of(seed, torch.tensor([first]), torch.tensor([second])).item() % 2**64 == int(expected)
    x = torch.tensor([second])
    assert mix(x).item() % 2**64 == int(keyed_random.mix(np.uint64(second % 2**64))) and x.item() == second


@settings(deadline=None)
@given(INT64, st.integers(1, 50))
def test_numbers_are_quantiles_chosen_by_sixteen_bits(key, count):
    """By plain arithmetic of whole numbers."""
    numbers = Noise(2.0, torch.float32, CPU).draw(torch.tensor([key]), count)[0]
    words = [keyed_random.mix(np.uint64((key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64)) for i in range(13)]
    bits = np.array(words, np.uint64).view(np.int16)[:count].astype(int) + 2**15
    np.testing.assert_allclose(numbers, 2 * stats.norm.ppf((bits + 0.5) / 2**16), rtol=1e-5)


def test_they_are_normal_and_independent():
    keys = key_of(3, torch.arange(400))
    drawn = Noise(1.0, torch.float32, CPU).draw(keys, 1001)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    nearby = [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[:, 4:], drawn[:, :-4])]
    for one, other in nearby:
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 4 / np.sqrt(one.numel())


def test_a_number_depends_on_its_key_and_place_alone():
    keys, noise = key_of(0, torch.arange(9)), Noise(0.3, torch.float32, CPU)
    whole = noise.draw(keys, 30)
    assert torch.equal(noise.draw(keys[[7, 2]], 11), whole[[7, 2], :11])
    half = Noise(0.3, torch.bfloat16, CPU).draw(keys, 30)
    torch.testing.assert_close(half, whole.bfloat16(), rtol=0, atol=0)


def test_keys_of_rows_tell_them_apart():
    rows = torch.cat([torch.eye(81).int(), 2 * torch.eye(81).int(), torch.zeros(1, 81).int()])
    keys = keys_of_rows(rows)
    assert len(set(keys.tolist())) == len(rows)
    assert torch.equal(keys_of_rows(rows[5:9].long()), keys[5:9])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_draws_the_same(dtype):
    rows, device = torch.arange(5 * 81).view(5, 81).int() % 11, torch.device("cuda")
    keys = key_of(1, keys_of_rows(rows), 3)
    assert torch.equal(key_of(1, keys_of_rows(rows.cuda()), 3).cpu(), keys)
    assert torch.equal(
        Noise(0.3, dtype, device).draw(keys.cuda(), 99).cpu(), Noise(0.3, dtype, CPU).draw(keys, 99)
    )
