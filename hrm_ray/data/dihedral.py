"""The eight symmetries of a square, applied to grids of any shape, numbered as in the published data sets.

0 nothing; 1, 2, 3 rotated by 90, 180, 270 degrees counter-clockwise; 4 mirrored left-right; 5 mirrored up-down;
6 transposed; 7 transposed at the other diagonal.
"""

import numpy as np

COUNT = 8
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)  # the number of the symmetry that undoes each


def turned(grid: np.ndarray, symmetry: int) -> np.ndarray:
    """`grid` [..., h, w] under a symmetry of 0..7; a view, [..., w, h] where sides change places."""
    transposed = grid.swapaxes(-1, -2)
    return (
        grid,
        transposed[..., ::-1, :],
        grid[..., ::-1, ::-1],
        transposed[..., :, ::-1],
        grid[..., :, ::-1],
        grid[..., ::-1, :],
        transposed,
        transposed[..., ::-1, ::-1],
    )[symmetry]


def cells_of(symmetry: int, height: int, width: int) -> np.ndarray:
    """int64 [height * width]: cell i of the turned grid is cell `result[i]` of the grid (both row by row)."""
    return turned(np.arange(height * width).reshape(height, width), symmetry).ravel()
