"""What the names of an ARC data set's puzzle identifiers mean: which task, and how its copy is brought back."""

from collections.abc import Sequence

import numpy as np

from hrm_ray.data.dihedral import INVERSE
from hrm_ray.data.tasks.arc import BLANK_NAME, FIRST_COLOUR, NUM_COLOURS, read_name


class Names:
    """The names as arrays, some 20 bytes a name: a million are read once, in seconds, and looked up by number.

    Number 0, and every one that is called "<blank>", is no puzzle.

    Args:
        names: as in `identifiers.json`: number i is called names[i].

    Attributes:
        tasks: the number of each task, by its name.
        task_of: int32[n], the task of each identifier; -1: it is no puzzle.
        is_original: bool[n], whether it is a task as it is.
        undoes: uint8[n], the symmetry that undoes that of the copy.
        colours: uint8[n, 12], of each token the colour in the task as it is.

    Raises:
        UserError: a name that cannot be understood, see `read_name`.
    """

    def __init__(self, names: Sequence[str]):
        self.tasks: dict[str, int] = {}
        self.task_of = np.full(len(names), -1, np.int32)
        self.is_original = np.zeros(len(names), bool)
        copies, symmetries, colours = [], [], bytearray()
        for number, name in enumerate(names):
            if number == 0 or name == BLANK_NAME:
                continue
            task, plan = read_name(name)
            self.task_of[number] = self.tasks.setdefault(task, len(self.tasks))
            self.is_original[number] = plan is None
            if plan:
                copies.append(number)
                symmetries.append(plan.symmetry)
                colours += bytes(plan.colours)
        self.undoes = np.zeros(len(names), np.uint8)
        self.undoes[copies] = np.array(INVERSE)[symmetries]
        self.colours = np.zeros((len(names), FIRST_COLOUR + NUM_COLOURS), np.uint8)
        self.colours[:, FIRST_COLOUR:] = np.arange(NUM_COLOURS)
        images = np.frombuffer(colours, np.uint8).reshape(-1, NUM_COLOURS)
        self.colours[copies, FIRST_COLOUR:] = np.argsort(images, axis=1)

    def __len__(self) -> int:
        return len(self.task_of)
