"""Compiled inner loops of ARC: draw augmentations and translations, write grids into their frames.

The grids of a task lie one behind the other: `cells` uint8 [all cells], `shapes` int64 [2 E, 2] (height and width;
input and output of E examples in turn), `starts` int64 [2 E] (where each begins in `cells`).

Draws come from one of two generators. *Keyed*: a stream of its own for each (seed, task, purpose), see keyed_random.
*Published*: numpy's legacy Mersenne twister, as the published builders use it, one stream through the whole build; its
state is `words` uint32 [624] and `position` int64 [1], as in ``RandomState.get_state``.
"""

import numpy as np

from hrm_ray.data.keyed_random import mix, stream
from hrm_ray.machine_code import njit

SIDE, END, FIRST_COLOUR = 30, 1, 2
_NUM_WORDS, _MIDDLE = 624, 397
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)
_OTHER = np.uint64(0x9AE16A3B2F90404F)


# Draws


@njit()
def _twist(words):
    """The next 624 words of MT19937 (Matsumoto and Nishimura 1998)."""
    for i in range(_NUM_WORDS):
        y = (words[i] & np.uint32(0x80000000)) | (words[(i + 1) % _NUM_WORDS] & np.uint32(0x7FFFFFFF))
        word = words[(i + _MIDDLE) % _NUM_WORDS] ^ (y >> np.uint32(1))
        words[i] = word ^ np.uint32(0x9908B0DF) if y & np.uint32(1) else word


@njit()
def _next_word(words, position):
    if position[0] == _NUM_WORDS:
        _twist(words)
        position[0] = 0
    y = words[position[0]]
    position[0] += 1
    y ^= y >> np.uint32(11)
    y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
    y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
    return y ^ (y >> np.uint32(18))


@njit()
def up_to(most, words, position, state):
    """An integer of 0..most: published if there are `words`, else keyed, from `state` (uint64 [1])."""
    if most == 0:
        return 0
    if words.size == 0:
        state[0] += _GOLDEN
        return np.int64(((mix(state[0]) >> _32) * np.uint64(most + 1)) >> _32)
    mask = 1
    while mask < most:
        mask = mask * 2 + 1
    while True:  # as numpy's legacy functions: masked words, until one is not too large
        value = np.int64(_next_word(words, position)) & mask
        if value <= most:
            return value


@njit()
def shuffled(count, words, position, state):
    """The order in which a shuffle leaves 0..count-1, as ``RandomState.shuffle`` does."""
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        other = up_to(last, words, position, state)
        order[last], order[other] = order[other], order[last]
    return order


# Augmentations


@njit()
def _walk(symmetry, height, width):
    """Where the cells of a turned grid lie in the grid of `height` x `width` (see `dihedral`).

    Returns (first, down, right): cell (row, col) of the turned grid is cell first + row * down + col * right.
    """
    last, corner = height * width - 1, (height - 1) * width
    if symmetry == 0:
        return 0, width, 1
    if symmetry == 1:
        return width - 1, -1, width
    if symmetry == 2:
        return last, -width, -1
    if symmetry == 3:
        return corner, 1, -width
    if symmetry == 4:
        return width - 1, width, -1
    if symmetry == 5:
        return corner, -width, 1
    if symmetry == 6:
        return 0, 1, width
    return last, -1, -width


@njit()
def _swaps(symmetry):
    """Whether height and width change places."""
    return symmetry == 1 or symmetry == 3 or symmetry >= 6


@njit()
def _sums(cells, shapes, starts):
    """What a task's hash is made of.

    The hash of an example is linear in the colours of its cells: each place in a turned grid has a random factor. So
    the factors of cells of one colour are summed once, and exchanging colours costs no more than ten products.

    Returns:
        uint64 [8 symmetries, E, 2, 11]: for both halves of the hash, what the shapes give, then each colour's sum.
    """
    sums = np.zeros((8, len(shapes) // 2, 2, 11), np.uint64)
    for symmetry in range(8):
        for grid in range(len(shapes)):
            of_example = sums[symmetry, grid // 2]
            height, width = shapes[grid]
            rows, cols = (width, height) if _swaps(symmetry) else (height, width)
            first, down, right = _walk(symmetry, height, width)
            place = 1 + (grid % 2) * 2048  # below 1024 + 1 are cells, above shapes
            shape = np.uint64(place + 1024 + rows * 32 + cols)
            of_example[0, 0] += mix(shape * _GOLDEN)
            of_example[1, 0] += mix(mix(shape * _GOLDEN) + _OTHER)
            for row in range(rows):
                for col in range(cols):
                    factor = mix(np.uint64(place + row * 32 + col) * _GOLDEN)
                    colour = 1 + cells[starts[grid] + first + row * down + col * right]
                    of_example[0, colour] += factor
                    of_example[1, colour] += mix(factor + _OTHER)
    return sums


@njit()
def _task_hash(plan, sums):
    """128 bits of a task under a plan (symmetry, then the ten images of the colours), whatever the order of its
    examples; equal tasks have equal ones, and others practically never."""
    first, second = np.uint64(0), np.uint64(0)
    for example in range(sums.shape[1]):
        x, y = sums[plan[0], example, 0], sums[plan[0], example, 1]
        here, there = x[0], y[0]
        for colour in range(1, 11):
            image = np.uint64(plan[colour])
            here += x[colour] * image
            there += y[colour] * image
        first += mix(here)
        second += mix(there ^ mix(here))
    return first, second


@njit()
def draw_plans(num_aug, cells, shapes, starts, words, position, seed, key):
    """Plans of a task: the identity, and up to `num_aug` others, each making another task of it.

    A trial draws a symmetry, then the order of colours 1 to 9. It is kept if no earlier one gave the same task; at most
    5 * num_aug trials are made. Trial k is keyed by (seed, key, k).

    Returns:
        uint8 [1 + kept, 11].
    """
    plans = np.empty((1 + num_aug, 11), np.uint8)
    plans[0, 0] = 0
    plans[0, 1:] = np.arange(10)
    sums = _sums(cells, shapes, starts)
    seen = {_task_hash(plans[0], sums)}
    num_plans = 1
    state = np.empty(1, np.uint64)
    for trial in range(5 * num_aug):
        if num_plans == 1 + num_aug:
            break
        state[0] = stream(seed, key, trial)
        plan = plans[num_plans]
        plan[0] = up_to(7, words, position, state)
        plan[1] = 0
        plan[2:] = 1 + shuffled(9, words, position, state)
        task = _task_hash(plan, sums)
        if task not in seen:
            seen.add(task)
            num_plans += 1
    return plans[:num_plans].copy()


@njit()
def draw_places(plans, shapes, examples, moves, words, position, seed, key):
    """Where the grids of every example of every augmented copy of a task lie in their frames.

    One example of each copy, drawn at random, stays at (0, 0); so do all, if not `moves`. Draws are made either way.
    Those of copy k are keyed by (seed, key, k).

    Args:
        plans: uint8 [P, 11].
        examples: int64 [E], which ones of the task.

    Returns:
        uint8 [P, E, 2], row and column.
    """
    places = np.zeros((len(plans), len(examples), 2), np.uint8)
    state = np.empty(1, np.uint64)
    for p in range(len(plans)):
        state[0] = stream(seed, key, p)
        kept = up_to(len(examples) - 1, words, position, state)
        if not moves:
            continue
        swaps = _swaps(plans[p, 0])
        for e in range(len(examples)):
            if e == kept:
                continue
            grid = 2 * examples[e]
            height, width = (
                max(shapes[grid, 0], shapes[grid + 1, 0]),
                max(shapes[grid, 1], shapes[grid + 1, 1]),
            )
            if swaps:
                height, width = width, height
            places[p, e, 0] = up_to(SIDE - height, words, position, state)
            places[p, e, 1] = up_to(SIDE - width, words, position, state)
    return places


@njit()
def _put(frame, symmetry, tokens, top, left, cells, height, width):
    """Write one augmented grid and its end marks into a frame uint8 [900], pads around it; colours become `tokens`."""
    rows, cols = (width, height) if _swaps(symmetry) else (height, width)
    first, down, right = _walk(symmetry, height, width)
    frame[:] = 0
    for row in range(rows):
        start, cell = (top + row) * SIDE + left, first + row * down
        for col in range(cols):
            frame[start + col] = tokens[cells[cell]]
            cell += right
        if left + cols < SIDE:
            frame[start + cols] = END
    if top + rows < SIDE:
        start = (top + rows) * SIDE + left
        frame[start : start + cols] = END


@njit()
def expand(plans, places, examples, cells, shapes, starts, inputs, labels):
    """Write the tokens of every example of every augmented copy of a task.

    Args:
        plans: uint8 [P, 11]; places: uint8 [P, E, 2]; examples: int64 [E].
        inputs, labels: uint8 [P * E, 900], filled in.
    """
    tokens = np.empty(10, np.uint8)
    for p in range(len(plans)):
        tokens[:] = FIRST_COLOUR + plans[p, 1:]
        for e in range(len(examples)):
            row = p * len(examples) + e
            for answer in range(2):
                grid = 2 * examples[e] + answer
                height, width = shapes[grid]
                start = starts[grid]
                _put(
                    labels[row] if answer else inputs[row],
                    plans[p, 0],
                    tokens,
                    places[p, e, 0],
                    places[p, e, 1],
                    cells[start : start + height * width],
                    height,
                    width,
                )


@njit()
def translated(inputs, labels, keys):
    """Examples whose grids lie at (0, 0), uint8 [n, 900] twice, moved to a place drawn by `keys`, uint64 [n]."""
    moved_inputs, moved_labels = np.zeros_like(inputs), np.zeros_like(labels)
    no_words, position, state = np.empty(0, np.uint32), np.zeros(1, np.int64), np.empty(1, np.uint64)
    for i in range(len(inputs)):
        height, width = 0, 0  # of the larger grid
        for cell in range(SIDE * SIDE):
            if inputs[i, cell] >= FIRST_COLOUR or labels[i, cell] >= FIRST_COLOUR:
                height = max(height, cell // SIDE + 1)
                width = max(width, cell % SIDE + 1)
        state[0] = keys[i]
        top = up_to(SIDE - height, no_words, position, state)
        left = up_to(SIDE - width, no_words, position, state)
        for row in range(SIDE - top):
            for col in range(SIDE - left):
                cell, there = row * SIDE + col, (top + row) * SIDE + left + col
                moved_inputs[i, there] = inputs[i, cell]
                moved_labels[i, there] = labels[i, cell]
    return moved_inputs, moved_labels
