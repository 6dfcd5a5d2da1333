"""Compiled inner loops of mazes: search for shortest paths, check, generate.

A maze is uint8 [S] of tokens (see the package), row by row. Random decisions are keyed (see keyed_random), so every
process draws the same.
"""

import numpy as np

from hrm_ray.data.keyed_random import below, stream
from hrm_ray.machine_code import njit

WALL, FREE, START, GOAL, PATH = 1, 2, 3, 4, 5
_SHARES = 1 << 20  # a share is drawn in so many steps


@njit()
def _neighbours(cell, size, found):
    """Fill in the cells beside `cell`; returns how many there are."""
    count = 0
    row, col = cell // size, cell % size
    if row > 0:
        found[count] = cell - size
        count += 1
    if col > 0:
        found[count] = cell - 1
        count += 1
    if col < size - 1:
        found[count] = cell + 1
        count += 1
    if row < size - 1:
        found[count] = cell + size
        count += 1
    return count


@njit()
def _find(maze, token):
    """The first cell that holds `token`, or -1."""
    for cell in range(maze.size):
        if maze[cell] == token:
            return cell
    return -1


@njit()
def _search(maze, size, start, steps, paths, queue):
    """Breadth first from `start` through all that is no wall.

    Fills in `steps`, int64 [S]: of a shortest path to each cell, -1 where there is none; and `paths`, int64 [S]: the
    number of such paths, up to 2.
    """
    beside = np.empty(4, np.int64)
    steps[:] = -1
    paths[:] = 0
    steps[start], paths[start] = 0, 1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        cell = queue[head]
        head += 1
        for k in range(_neighbours(cell, size, beside)):
            other = beside[k]
            if maze[other] == WALL:
                continue
            if steps[other] < 0:
                steps[other] = steps[cell] + 1
                queue[tail] = other
                tail += 1
            if steps[other] == steps[cell] + 1:
                paths[other] = min(2, paths[other] + paths[cell])


@njit()
def num_shortest(maze, size):
    """Shortest paths from start to goal of uint8 [S]: 0, 1, or 2 for several."""
    start, goal = _find(maze, START), _find(maze, GOAL)
    if start < 0 or goal < 0:
        return 0
    steps, paths, queue = (
        np.empty(maze.size, np.int64),
        np.empty(maze.size, np.int64),
        np.empty(maze.size, np.int64),
    )
    _search(maze, size, start, steps, paths, queue)
    return paths[goal]


@njit()
def _path_length(question, answer, size, is_seen, queue):
    """Path cells of an answer that is a valid path, else -1."""
    start, num_path = -1, 0
    for cell in range(question.size):
        if answer[cell] == PATH:
            if question[cell] != FREE:
                return -1
            num_path += 1
        elif answer[cell] != question[cell]:
            return -1
        if question[cell] == START:
            if start >= 0:
                return -1
            start = cell
    if start < 0:
        return -1
    # Start, path and goal must be one connected set.
    beside = np.empty(4, np.int64)
    is_seen[:] = False
    is_seen[start] = True
    queue[0] = start
    head, tail, num_goals, num_seen = 0, 1, 0, 0
    while head < tail:
        cell = queue[head]
        head += 1
        for k in range(_neighbours(cell, size, beside)):
            other = beside[k]
            if is_seen[other] or (answer[other] != PATH and answer[other] != GOAL):
                continue
            is_seen[other] = True
            if answer[other] == GOAL:  # a path ends there
                num_goals += 1
                continue
            num_seen += 1
            queue[tail] = other
            tail += 1
    return num_path if num_goals == 1 and num_seen == num_path else -1


@njit()
def is_valid(questions, answers, size):
    """Whether each answer is a valid path; uint8 [n, S] twice -> bool [n]."""
    valid = np.empty(len(answers), np.bool_)
    is_seen, queue = np.empty(size * size, np.bool_), np.empty(size * size, np.int64)
    for i in range(len(answers)):
        valid[i] = _path_length(questions[i], answers[i], size, is_seen, queue) >= 0
    return valid


@njit()
def is_shortest(questions, answers, size):
    """Whether each answer is a valid path that no other is shorter than; uint8 [n, S] twice -> bool [n]."""
    shortest = np.zeros(len(answers), np.bool_)
    cells = size * size
    is_seen, queue = np.empty(cells, np.bool_), np.empty(cells, np.int64)
    steps, paths = np.empty(cells, np.int64), np.empty(cells, np.int64)
    for i in range(len(answers)):
        length = _path_length(questions[i], answers[i], size, is_seen, queue)
        if length >= 0:
            _search(questions[i], size, _find(questions[i], START), steps, paths, queue)
            shortest[i] = steps[_find(questions[i], GOAL)] == length + 1
    return shortest


@njit()
def _scatter(maze, min_walls, max_walls, state):
    """Draw walls cell by cell with a share that is drawn too; returns how many cells are free."""
    share = min_walls + (max_walls - min_walls) * below(state, _SHARES) / _SHARES
    threshold = np.int64(share * _SHARES)
    num_free = 0
    for cell in range(maze.size):
        is_wall = below(state, _SHARES) < threshold
        maze[cell] = WALL if is_wall else FREE
        num_free += not is_wall
    return num_free


@njit()
def _carve(maze, size, state, way):
    """Draw a perfect maze: its free cells are a tree, and none can be added to it. Returns how many they are.

    Only a cell beside a single free one is freed, so that no circle closes. It goes depth first, since that makes long
    ways: on from the last cell as long as that is possible, then back. A cell that is left has nothing to free beside
    it, and never will.

    Args:
        way: int64 [S], overwritten.
    """
    beside, around = np.empty(4, np.int64), np.empty(4, np.int64)
    maze[:] = WALL
    way[0] = below(state, maze.size)
    maze[way[0]] = FREE
    length = num_free = 1
    while length > 0:
        num_open = 0
        for k in range(_neighbours(way[length - 1], size, beside)):
            num_ways = 0
            for j in range(_neighbours(beside[k], size, around)):
                num_ways += maze[around[j]] == FREE
            if maze[beside[k]] == WALL and num_ways == 1:
                beside[num_open] = beside[k]
                num_open += 1
        if num_open == 0:
            length -= 1
            continue
        way[length] = beside[below(state, num_open)]
        maze[way[length]] = FREE
        length += 1
        num_free += 1
    return num_free


@njit()
def generate(
    seed, first, count, size, is_perfect, min_walls, max_walls, unique, min_path, max_path, max_tries
):
    """Mazes number first..first+count-1 of `seed`.

    The grid is drawn first (see `_carve` and `_scatter`), then a start, then a goal among the cells whose shortest path
    fits. A grid that has none is thrown away and another is tried, up to `max_tries` times.

    Returns questions and answers, uint8 [count, S]; a question that could not be made is all zeros, and so are all
    after it.
    """
    cells = size * size
    questions, answers = np.zeros((count, cells), np.uint8), np.zeros((count, cells), np.uint8)
    steps, paths = np.empty(cells, np.int64), np.empty(cells, np.int64)
    queue, beside = np.empty(cells, np.int64), np.empty(4, np.int64)
    state = np.empty(1, np.uint64)
    for i in range(count):
        is_made = False
        for attempt in range(max_tries):
            state[0] = stream(seed, first + i, attempt)
            maze = questions[i]
            if is_perfect:
                num_free = _carve(maze, size, state, queue)
            else:
                num_free = _scatter(maze, min_walls, max_walls, state)
            if num_free < 2:
                continue
            start = _nth(maze, FREE, below(state, num_free))
            _search(maze, size, start, steps, paths, queue)
            num_goals = 0
            for cell in range(cells):
                num_goals += _may_end(cell, steps, paths, unique, min_path, max_path)
            if num_goals == 0:
                continue
            chosen = below(state, num_goals)
            goal = 0
            for cell in range(cells):
                if _may_end(cell, steps, paths, unique, min_path, max_path):
                    if chosen == 0:
                        goal = cell
                        break
                    chosen -= 1
            maze[start], maze[goal] = START, GOAL
            answers[i] = maze
            cell = goal
            while steps[cell] > 1:  # back, by the first of the neighbours that lead to the start
                for k in range(_neighbours(cell, size, beside)):
                    if steps[beside[k]] == steps[cell] - 1:
                        cell = beside[k]
                        break
                answers[i, cell] = PATH
            is_made = True
            break
        if not is_made:
            questions[i] = 0
            break
    return questions, answers


@njit()
def _may_end(cell, steps, paths, unique, min_path, max_path):
    """Whether the shortest path to `cell` fits."""
    return min_path <= steps[cell] <= max_path and (paths[cell] == 1 or not unique)


@njit()
def _nth(maze, token, n):
    """The cell that is number `n` of those that hold `token`."""
    for cell in range(maze.size):
        if maze[cell] == token:
            if n == 0:
                return cell
            n -= 1
    return -1
