"""Grids of several shapes in one frame, as in the published data sets of ARC.

A grid lies anywhere in a frame of fixed size, row by row. The row below it and the column to its right hold end marks,
where the frame has them; their common corner does not. All else is padding.
"""

import numpy as np

PAD, END = 0, 1


def place(cells: np.ndarray, height: int, width: int, row: int = 0, col: int = 0) -> np.ndarray:
    """The frame uint8 [height * width] in which cells (uint8 [h, w], all above END) lie, the first at (row, col).

    Raises:
        ValueError: they do not fit.
    """
    bottom, right = row + cells.shape[0], col + cells.shape[1]
    if min(row, col) < 0 or bottom > height or right > width:
        raise ValueError(f"{cells.shape[0]}x{cells.shape[1]} cells do not fit at ({row}, {col})")
    frame = np.full((height + 1, width + 1), PAD, np.uint8)
    frame[row:bottom, col:right] = cells
    frame[bottom, col:right] = END
    frame[row:bottom, right] = END
    return frame[:height, :width].reshape(-1)


def shapes(is_cell: np.ndarray) -> np.ndarray:
    """Height and width of the grid that each frame (bool [n, height, width]: what is a cell) holds; int64 [n, 2].

    It is the largest rectangle of cells whose first cell is the first of the frame; of equally large ones the one with
    the fewest rows; (0, 0) if there is none.
    """
    height, width = is_cell.shape[1:]
    runs = np.where(is_cell.all(axis=2), width, is_cell.argmin(axis=2))
    widths = np.minimum.accumulate(runs, axis=1)
    heights = (widths * np.arange(1, height + 1)).argmax(axis=1) + 1
    found = np.stack([heights, widths[np.arange(len(is_cell)), heights - 1]], axis=1)
    return np.where(found[:, 1:] == 0, 0, found)
