"""Sudoku the plain way: slow, obvious, and independent of what it checks. Digits are ints, 0 is a blank."""

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def units(size):
    """The cells of all rows, columns and boxes."""
    box_rows, box_cols = BOXES[size]
    lines = [[(r, c) for c in range(size)] for r in range(size)]
    lines += [[(r, c) for r in range(size)] for c in range(size)]
    for top in range(0, size, box_rows):
        for left in range(0, size, box_cols):
            lines.append([(top + i, left + j) for i in range(box_rows) for j in range(box_cols)])
    return lines


def is_valid(grid):
    """Complete, and every digit once in every unit."""
    size = len(grid)
    return all(sorted(grid[r][c] for r, c in unit) == list(range(1, size + 1)) for unit in units(size))


def solutions(grid, limit=2):
    """Up to `limit` solutions, by trying every digit in the first blank."""
    size = len(grid)
    box_rows, box_cols = BOXES[size]
    blank = next(((r, c) for r in range(size) for c in range(size) if grid[r][c] == 0), None)
    if blank is None:
        return [[row[:] for row in grid]]
    row, col = blank
    top, left = row - row % box_rows, col - col % box_cols
    seen = {grid[row][k] for k in range(size)} | {grid[k][col] for k in range(size)}
    seen |= {grid[top + i][left + j] for i in range(box_rows) for j in range(box_cols)}
    found = []
    for digit in range(1, size + 1):
        if digit not in seen:
            grid[row][col] = digit
            found += solutions(grid, limit - len(found))
            grid[row][col] = 0
            if len(found) >= limit:
                break
    return found


def to_grid(tokens, size):
    """Tokens (1 blank, digit d is d + 1) as rows of digits."""
    digits = [int(token) - 1 for token in tokens]
    return [digits[row * size : (row + 1) * size] for row in range(size)]
