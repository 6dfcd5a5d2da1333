"""The numbers of the symmetries are the published ones."""

import numpy as np
import pytest

from hrm_ray.data.dihedral import COUNT, INVERSE, cells_of, turned

GRID = np.array([[1, 2, 3], [4, 5, 6]])
# Computed by the published code.
FORWARD = (
    [[1, 2, 3], [4, 5, 6]],
    [[3, 6], [2, 5], [1, 4]],
    [[6, 5, 4], [3, 2, 1]],
    [[4, 1], [5, 2], [6, 3]],
    [[3, 2, 1], [6, 5, 4]],
    [[4, 5, 6], [1, 2, 3]],
    [[1, 4], [2, 5], [3, 6]],
    [[6, 3], [5, 2], [4, 1]],
)


@pytest.mark.parametrize("symmetry", range(COUNT))
def test_a_symmetry_is_the_published_one_and_is_undone(symmetry):
    image = turned(GRID, symmetry)
    assert image.tolist() == FORWARD[symmetry]
    assert turned(image, INVERSE[symmetry]).tolist() == GRID.tolist()
    assert GRID.ravel()[cells_of(symmetry, 2, 3)].tolist() == image.ravel().tolist()


def test_many_grids_are_turned_at_once():
    grids = np.stack([GRID, GRID + 6])
    assert turned(grids, 1)[1].tolist() == turned(GRID + 6, 1).tolist()
