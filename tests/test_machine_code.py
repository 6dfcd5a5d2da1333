"""Functions compiled by numba, where the folder that keeps them cannot be used."""

import numba
import pytest

from hrm_ray import machine_code
from hrm_ray.machine_code import njit


def double(x):
    return 2 * x


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_code, "_said", False)
    return tmp_path


def test_what_was_compiled_is_kept(cache, recwarn):
    assert njit()(double)(3) == 6
    again = njit()(double)
    assert again(3) == 6 and sum(again.stats.cache_hits.values()) == 1
    assert not list(recwarn)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_what_was_kept_is_damaged(cache, recwarn, suffix, content):
    njit()(double)(3)
    (file,) = cache.rglob(f"*.{suffix}")
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    assert njit()(double)(3) == 6
    mended = njit()(double)
    assert mended(3) == 6 and sum(mended.stats.cache_hits.values()) == 1
    assert not list(recwarn)


def test_the_disk_is_full(cache, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._open_for_write", full)
    with pytest.warns(UserWarning, match="cannot be kept.*; set NUMBA_CACHE_DIR") as said:
        assert njit()(double)(3) == 6
        assert njit()(double)(4) == 8
    assert len(said) == 1


def test_no_folder_can_be_written(cache, monkeypatch):
    """As where root has installed the package, and its user has no home."""
    monkeypatch.setattr(machine_code.FunctionCache._impl_class, "_locator_classes", [])
    with pytest.warns(UserWarning, match="cannot be kept.*; set NUMBA_CACHE_DIR") as said:
        assert njit()(double)(3) == 6
        assert njit()(double)(4) == 8
    assert len(said) == 1
