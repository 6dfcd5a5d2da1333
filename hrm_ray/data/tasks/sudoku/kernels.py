"""Compiled inner loops of Sudoku: solve, generate, augment.

A board is uint8[S] of tokens (1 blank, digits from 2), row by row. Geometry comes in as two small tables
(Sudoku._geometry), so that the same code serves every size and box shape. Candidates are bit masks: bit d stands for
token d + 2. Random decisions are keyed (see keyed_random), so every process draws the same.
"""

import numpy as np

from hrm_ray.data.keyed_random import below, shuffle, stream
from hrm_ray.machine_code import njit

BLANK = 1
FIRST_DIGIT = 2


@njit()
def _place(cell, bit, grid, used, trail, num_placed, unit_of_cell):
    grid[cell] = bit
    for k in range(3):
        used[unit_of_cell[cell, k]] |= bit
    trail[num_placed] = cell
    return num_placed + 1


@njit()
def _undo(num_kept, grid, used, trail, num_placed, unit_of_cell):
    while num_placed > num_kept:
        num_placed -= 1
        cell = trail[num_placed]
        for k in range(3):
            used[unit_of_cell[cell, k]] &= ~grid[cell]
        grid[cell] = 0
    return num_placed


@njit()
def _candidates(cell, used, unit_of_cell, full):
    taken = used[unit_of_cell[cell, 0]] | used[unit_of_cell[cell, 1]] | used[unit_of_cell[cell, 2]]
    return full & ~taken


@njit()
def _propagate(grid, used, trail, num_placed, cells_of_unit, unit_of_cell):
    """Place everything that is forced: cells with one candidate, digits with one place in a unit.

    Returns (cells placed so far, the empty cell with fewest candidates): cell -1 when the board is full, -2 when
    it contradicts itself.
    """
    num_units, size = cells_of_unit.shape
    full = (1 << size) - 1
    while True:
        best_cell, best_count, forced = -1, size + 1, False
        for cell in range(grid.size):
            if grid[cell] != 0:
                continue
            candidates = _candidates(cell, used, unit_of_cell, full)
            if candidates == 0:
                return num_placed, -2
            count = 0
            left = candidates
            while left:
                left &= left - 1
                count += 1
            if count == 1:
                num_placed = _place(cell, candidates, grid, used, trail, num_placed, unit_of_cell)
                forced = True
            elif count < best_count:
                best_cell, best_count = cell, count
        if forced:
            continue
        if best_cell == -1:
            return num_placed, -1
        for unit in range(num_units):
            once, twice = 0, 0
            for k in range(size):
                cell = cells_of_unit[unit, k]
                if grid[cell] == 0:
                    candidates = _candidates(cell, used, unit_of_cell, full)
                    twice |= once & candidates
                    once |= candidates
            if (once | used[unit]) != full:
                return num_placed, -2
            single = once & ~twice
            if single:
                single &= -single
                for k in range(size):
                    cell = cells_of_unit[unit, k]
                    if grid[cell] == 0 and _candidates(cell, used, unit_of_cell, full) & single:
                        num_placed = _place(cell, single, grid, used, trail, num_placed, unit_of_cell)
                        break
                forced = True
        if not forced:
            return num_placed, best_cell


@njit()
def _pick(left, state):
    """One set bit of `left`: the lowest, or a random one if there is a random state (uint64[1])."""
    if state.size:
        count = 0
        rest = left
        while rest:
            rest &= rest - 1
            count += 1
        for _ in range(below(state, count)):
            left &= left - 1
    return left & -left


@njit()
def solve_one(board, cells_of_unit, unit_of_cell, limit, state, solution):
    """Search for up to `limit` solutions of `board`; the first one found goes to `solution` (uint8[S]).

    Propagation, then a branch on the cell with fewest candidates. `state` is a random state for the order of
    values, or empty for ascending order.

    Returns (number of solutions found, number of guesses): with limit 2, what it took to find the solution and
    to prove it the only one, which is our rating of difficulty.
    """
    num_cells = board.size
    grid = np.zeros(num_cells, np.int64)
    used = np.zeros(cells_of_unit.shape[0], np.int64)
    trail = np.empty(num_cells, np.int64)
    num_placed = 0
    for cell in range(num_cells):
        if board[cell] >= FIRST_DIGIT:
            bit = np.int64(1) << np.int64(board[cell] - FIRST_DIGIT)
            for k in range(3):
                if used[unit_of_cell[cell, k]] & bit:
                    return 0, 0
            num_placed = _place(cell, bit, grid, used, trail, num_placed, unit_of_cell)

    guess_cell = np.empty(num_cells, np.int64)
    guess_left = np.empty(num_cells, np.int64)
    guess_base = np.empty(num_cells, np.int64)
    depth, num_solutions, num_guesses = 0, 0, 0
    full = (1 << cells_of_unit.shape[1]) - 1
    while True:
        num_placed, cell = _propagate(grid, used, trail, num_placed, cells_of_unit, unit_of_cell)
        if cell >= 0:
            guess_cell[depth] = cell
            guess_left[depth] = _candidates(cell, used, unit_of_cell, full)
            guess_base[depth] = num_placed
            depth += 1
        elif cell == -1:
            num_solutions += 1
            if num_solutions == 1:
                for i in range(num_cells):
                    token, bit = FIRST_DIGIT, grid[i]
                    while bit > 1:
                        bit >>= 1
                        token += 1
                    solution[i] = token
            if num_solutions >= limit:
                return num_solutions, num_guesses
        while depth and guess_left[depth - 1] == 0:
            depth -= 1
        if depth == 0:
            return num_solutions, num_guesses
        num_placed = _undo(guess_base[depth - 1], grid, used, trail, num_placed, unit_of_cell)
        bit = _pick(guess_left[depth - 1], state)
        guess_left[depth - 1] ^= bit
        num_placed = _place(guess_cell[depth - 1], bit, grid, used, trail, num_placed, unit_of_cell)
        num_guesses += 1


@njit()
def solve(boards, cells_of_unit, unit_of_cell):
    """Solve boards uint8[n, S]. Returns solutions uint8[n, S] (zeros where there is none), the number of solutions
    up to 2, int64[n], and the number of guesses, int64[n]."""
    num_boards = boards.shape[0]
    solutions = np.zeros_like(boards)
    num_solutions = np.empty(num_boards, np.int64)
    num_guesses = np.empty(num_boards, np.int64)
    in_order = np.empty(0, np.uint64)
    for i in range(num_boards):
        num_solutions[i], num_guesses[i] = solve_one(
            boards[i], cells_of_unit, unit_of_cell, 2, in_order, solutions[i]
        )
    return solutions, num_solutions, num_guesses


@njit()
def generate(seed, first, count, num_clues, max_tries, cells_of_unit, unit_of_cell):
    """Generate puzzles number first..first+count-1 of `seed`: one solution, exactly `num_clues` clues.

    A random full board is dug in random order, keeping the solution unique; a board that cannot be dug deep
    enough is thrown away and another is tried, up to `max_tries` times.

    Returns questions and answers, uint8[count, S]; a question that could not be made is all zeros, and so are all
    after it: there is no hope, and trying takes long.
    """
    num_cells = unit_of_cell.shape[0]
    questions = np.zeros((count, num_cells), np.uint8)
    answers = np.zeros((count, num_cells), np.uint8)
    empty = np.full(num_cells, BLANK, np.uint8)
    other = np.empty(num_cells, np.uint8)
    state = np.empty(1, np.uint64)
    in_order = np.empty(0, np.uint64)
    for i in range(count):
        for attempt in range(max_tries):
            state[0] = stream(seed, first + i, attempt)
            solve_one(empty, cells_of_unit, unit_of_cell, 1, state, answers[i])
            cells = np.arange(num_cells)
            shuffle(state, cells)
            board = answers[i].copy()
            left = num_cells
            for cell in cells:
                if left == num_clues:
                    break
                board[cell] = BLANK
                found, _ = solve_one(board, cells_of_unit, unit_of_cell, 2, in_order, other)
                if found == 1:
                    left -= 1
                else:
                    board[cell] = answers[i, cell]
            if left == num_clues:
                questions[i] = board
                break
        if questions[i, 0] == 0:
            break
    return questions, answers


@njit()
def _line_order(state, box_lines, order):
    """Draw an order of rows (or columns): whole bands change places, and lines within each band.

    Args:
        box_lines: how many lines a band has.
        order: int64[size], filled in: line i of the new board is line order[i] of the old one.
    """
    num_bands = order.size // box_lines
    bands = np.arange(num_bands)
    shuffle(state, bands)
    for band in range(num_bands):
        lines = order[band * box_lines : (band + 1) * box_lines]
        for k in range(box_lines):
            lines[k] = bands[band] * box_lines + k
        shuffle(state, lines)


@njit()
def draw_symmetry(state, box_rows, box_cols, source, digits):
    """Draw one of Sudoku's validity-preserving symmetries, uniformly: relabelling, bands, rows in bands, stacks,
    columns in stacks, and transposition where boxes are square.

    Args:
        source: int64[S], filled in: cell i of the new board is cell source[i] of the old one.
        digits: uint8[size + 2], filled in: token t becomes digits[t]; pad and blank stay.
    """
    size = box_rows * box_cols
    digits[0], digits[BLANK] = 0, BLANK
    for token in range(FIRST_DIGIT, size + FIRST_DIGIT):
        digits[token] = token
    shuffle(state, digits[FIRST_DIGIT:])
    rows = np.empty(size, np.int64)
    cols = np.empty(size, np.int64)
    _line_order(state, box_rows, rows)
    _line_order(state, box_cols, cols)
    transposed = box_rows == box_cols and below(state, 2) == 1
    for row in range(size):
        for col in range(size):
            if transposed:
                source[row * size + col] = rows[col] * size + cols[row]
            else:
                source[row * size + col] = rows[row] * size + cols[col]


@njit()
def augment(questions, answers, groups, num_aug, seed, box_rows, box_cols):
    """Each puzzle followed by `num_aug` random symmetric copies; question and answer change together.

    Args:
        questions, answers: uint8[n, S].
        groups: int64[n], the key of each puzzle: copy k of group g depends on (seed, g, k) alone.

    Returns:
        Questions and answers, uint8[n * (1 + num_aug), S]; rows of a puzzle are neighbours, the original first.
    """
    num_puzzles, num_cells = questions.shape
    copies = 1 + num_aug
    out_questions = np.empty((num_puzzles * copies, num_cells), np.uint8)
    out_answers = np.empty((num_puzzles * copies, num_cells), np.uint8)
    source = np.empty(num_cells, np.int64)
    digits = np.empty(box_rows * box_cols + FIRST_DIGIT, np.uint8)
    state = np.empty(1, np.uint64)
    for i in range(num_puzzles):
        out_questions[i * copies] = questions[i]
        out_answers[i * copies] = answers[i]
        for k in range(1, copies):
            state[0] = stream(seed, groups[i], k)
            draw_symmetry(state, box_rows, box_cols, source, digits)
            row = i * copies + k
            for cell in range(num_cells):
                out_questions[row, cell] = digits[questions[i, source[cell]]]
                out_answers[row, cell] = digits[answers[i, source[cell]]]
    return out_questions, out_answers
