"""Compiled inner loop of grids: random symmetric copies. Draws are keyed, so every process draws the same."""

import numpy as np

from hrm_ray.data.keyed_random import below, shuffle, stream
from hrm_ray.machine_code import njit


@njit()
def augment(inputs, labels, groups, num_aug, seed, cells, tokens, starts):
    """See `Grid.augment`.

    Args:
        cells: int64 [turns, S], the first is the identity.
        tokens, starts: class i of exchangeable tokens is tokens[starts[i] : starts[i + 1]], uint8.
    """
    num_rows, seq_len = inputs.shape
    num_turns = len(cells)
    new_inputs = np.empty((num_rows * (1 + num_aug), seq_len), np.uint8)
    new_labels = np.empty_like(new_inputs)
    order = np.empty(num_turns, np.int64)
    renamed = np.empty(256, np.uint8)
    state = np.empty(1, np.uint64)
    for row in range(num_rows):
        for turn in range(num_turns):
            order[turn] = turn
        state[0] = stream(seed, groups[row], 0)
        shuffle(state, order[1:])  # the original has the first
        for copy in range(1 + num_aug):
            for token in range(256):
                renamed[token] = token
            state[0] = stream(seed, groups[row], copy)
            if copy > 0:
                for i in range(len(starts) - 1):
                    _relabel(state, tokens[starts[i] : starts[i + 1]], renamed)
            turned = cells[order[copy % num_turns]]
            to = row * (1 + num_aug) + copy
            for cell in range(seq_len):
                new_inputs[to, cell] = renamed[inputs[row, turned[cell]]]
                new_labels[to, cell] = renamed[labels[row, turned[cell]]]
    return new_inputs, new_labels


@njit()
def _relabel(state, tokens, renamed):
    """Exchange the tokens of a class at random, in `renamed`."""
    drawn = tokens.copy()
    for last in range(drawn.size - 1, 0, -1):
        other = below(state, last + 1)
        drawn[last], drawn[other] = drawn[other], drawn[last]
    for i in range(tokens.size):
        renamed[tokens[i]] = drawn[i]
