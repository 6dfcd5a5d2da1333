"""Binary operations on numbers modulo p and on the permutations of five things, as a table.

They are those of Power et al. 2022 (Grokking) and of their code, openai/grok; equations come in its order. Operands are
counted from 0: a number is itself, a permutation its place among all of them in lexicographic order.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np

from hrm_ray.config.validate import nearest
from hrm_ray.errors import UserError, shown

NO_ANSWER = -1  # where an operation is not defined
PERMUTATIONS = np.array(list(permutations(range(5))))  # int64 [120, 5]
_PLACES = 5 ** np.arange(4, -1, -1)  # of the digits of a permutation, read as a number
NEVER_RUN = ("copy", "reverse", "sort")  # names of the published code whose equations it cannot make


class Operator(NamedTuple):
    """A binary operation.

    Attributes:
        name: how recipes call it, and how it is written between its operands.
        published: its name in the published code.
        function: called with a and b, int64 [n], and p; returns int64 [n], `NO_ANSWER` where it is not defined.
        other_names: by which it is known too.
        inverts: whether it divides, so that p must be prime.
        of_permutations: whether its operands are permutations, for which there is no p.
        by_answer: whether equations are listed by answer and b, not by a and b.
    """

    name: str
    published: str
    function: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    other_names: tuple[str, ...] = ()
    inverts: bool = False
    of_permutations: bool = False
    by_answer: bool = False

    def num_values(self, p: int | None) -> int:
        """How many operands there are."""
        return len(PERMUTATIONS) if self.of_permutations else p or 0

    def equations(self, p: int | None) -> np.ndarray:
        """All a, b and answers, int64 [n, 3], in the published order."""
        a, b = np.indices(2 * (self.num_values(p),)).reshape(2, -1)
        equations = np.stack([a, b, self.function(a, b, p or 0)], axis=1)
        equations = equations[equations[:, 2] != NO_ANSWER]
        return equations[np.lexsort(equations[:, [1, 2]].T)] if self.by_answer else equations


def _divide(a: np.ndarray, b: np.ndarray, p: int) -> np.ndarray:
    inverse = np.array([0, *(pow(x, -1, p) for x in range(1, p))])
    return np.where(b == 0, NO_ANSWER, a * inverse[b] % p)


def _then(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One permutation after the other, all int64 [n, 5]."""
    return np.take_along_axis(second, first, axis=1)


def _on_permutations(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    """A function of permutations, int64 [n, 5], as one of their numbers."""

    def numbered(a: np.ndarray, b: np.ndarray, p: int) -> np.ndarray:
        made = function(PERMUTATIONS[a], PERMUTATIONS[b])
        return np.searchsorted(PERMUTATIONS @ _PLACES, made @ _PLACES)

    return numbered


OPERATORS = (
    Operator("+", "+", lambda a, b, p: (a + b) % p),
    Operator("-", "-", lambda a, b, p: (a - b) % p),
    Operator("*", "*", lambda a, b, p: a * b % p),
    Operator("/", "/", _divide, inverts=True, by_answer=True),
    Operator("x^2+y", "**2+", lambda a, b, p: (a**2 + b) % p),
    Operator("x^3+y", "**3+", lambda a, b, p: (a**3 + b) % p),
    Operator("x^2+y^2", "x**2+y**2_mod_97", lambda a, b, p: (a**2 + b**2) % p),
    Operator("x^2+xy+y^2", "x**2+y**2+x*y_mod_97", lambda a, b, p: (a**2 + a * b + b**2) % p),
    Operator("x^2+xy+y^2+x", "x**2+y**2+x*y+x_mod_97", lambda a, b, p: (a**2 + a * b + b**2 + a) % p),
    Operator("x^3+xy", "x**3+x*y_mod_97", lambda a, b, p: (a**3 + a * b) % p),
    Operator("x^3+xy^2+y", "x**3+x*y**2+y_mod_97", lambda a, b, p: (a**3 + a * b**2 + b) % p),
    # By parity: of a, of a, of b.
    Operator("+*", "+*", lambda a, b, p: np.where(a % 2 == 0, a + b, a * b) % p),
    Operator("+-", "+-", lambda a, b, p: np.where(a % 2 == 0, a + b, a - b) % p),
    Operator(
        "/-",
        "(x._value//y)if(y._value%2==1)else(x-y)_mod_97",
        lambda a, b, p: np.where(b % 2 == 1, _divide(a, b, p), (a - b) % p),
        inverts=True,
    ),
    Operator("s5", "s5", _on_permutations(_then), ("xy",), of_permutations=True),
    Operator(
        "s5conj",
        "s5conj",
        _on_permutations(lambda a, b: _then(_then(a, b), np.argsort(a, axis=1))),
        ("xyx^-1",),
        of_permutations=True,
    ),
    Operator(
        "s5aba", "s5aba", _on_permutations(lambda a, b: _then(_then(a, b), a)), ("xyx",), of_permutations=True
    ),
)
_BY_NAME = {name: op for op in OPERATORS for name in (op.name, op.published, *op.other_names)}


def operator(name: str) -> Operator:
    """The operator of a name, its own or the published one. Raises UserError: there is none."""
    if name in NEVER_RUN:
        raise UserError(
            f"op={name}: the published code names it, but fails to make its equations, so nobody knows them; "
            "choose another, such as op=s5"
        )
    if name not in _BY_NAME:
        names = [op.name for op in OPERATORS]
        hint = nearest(name, _BY_NAME)
        raise UserError(
            f"op={shown(name, 60)}: no such operator; "
            + (hint if hint.startswith("did you") else f"known: {', '.join(names)}")
        )
    return _BY_NAME[name]
