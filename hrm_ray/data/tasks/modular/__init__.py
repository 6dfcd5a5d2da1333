"""Equations `a op b = c` of modular arithmetic and of permutations, on which models grok (Power et al. 2022).

A question is five tokens, `<eos> a op b =`. The answer c is the label of the last cell; the other cells have none. With
`predict_end`, as published, it is six, `<eos> a op b = c`, and the last two cells have the labels c and `<eos>`. Only a
causal model can learn that: any other sees the answer.

The compact vocabulary holds what the operator needs: `<eos>`, `=`, the operator, and its operands. The published one
(openai/grok) has 239 tokens, for all operators.
"""

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from hrm_ray.config.validate import nearest
from hrm_ray.data.drawing import Cell
from hrm_ray.data.tasks.base import Task
from hrm_ray.data.tasks.modular.operators import NEVER_RUN, OPERATORS, PERMUTATIONS, Operator, operator
from hrm_ray.errors import UserError, shown

EOS, EQUALS = 0, 1
# Cells of a question. The answer is predicted at SIGN, the end in the cell behind it.
A, OP, B, SIGN = 1, 2, 3, 4
PUBLISHED_P = 97
LARGEST_P = 253  # beside EOS, EQUALS and the operator in 256 tokens
VOCABULARIES = ("compact", "published")
_FEW = 0.05  # share of the equations below which people are warned


class Modular(Task):
    """See the module.

    Args:
        op: the operator, by one of its names.
        p: the modulus; None: 97, or nothing where operands are permutations.
        predict_end: whether c and the closing token are predicted, as published.
        vocabulary: "compact" or "published".
        noise: how many answers of the training examples have been replaced, so that they may be wrong.

    Attributes:
        chance: share of the most frequent answer, the best guess without the operands.
        equations: a, b and c of all equations as tokens, uint8 [n, 3], in the published order.
    """

    name = "modular"
    ignore_label_id = EQUALS  # which is no answer
    is_padded = False
    meaning = ("op", "p")

    def __init__(
        self,
        op: str = "+",
        p: int | None = None,
        predict_end: bool = False,
        vocabulary: str = "compact",
        noise: int = 0,
    ):
        self.operator = operator(op)
        self.p = modulus(self.operator, p)
        if vocabulary not in VOCABULARIES:
            raise UserError(f"vocabulary={shown(str(vocabulary))}: {nearest(str(vocabulary), VOCABULARIES)}")
        if vocabulary == "published" and self.p not in (PUBLISHED_P, None):
            raise UserError(
                f"p={self.p}: the published equations are modulo {PUBLISHED_P}; leave p or draws=published out"
            )
        self.options = {
            "op": self.operator.name,
            "p": self.p,
            "predict_end": predict_end,
            "vocabulary": vocabulary,
            "noise": noise,
        }
        self.predict_end, self.noise = predict_end, noise
        self.answers_are_inputs = predict_end
        values = _permutations() if self.p is None else _numbers(self.p)
        self.symbols = (
            [*_published()] if vocabulary == "published" else ["<eos>", "=", self.operator.name, *values]
        )
        sign = self.operator.published if vocabulary == "published" else self.operator.name
        self.op_token, self.first_value = self.symbols.index(sign), self.symbols.index(values[0])
        self.token_of = {symbol: self.first_value + i for i, symbol in enumerate(values)}
        self.vocab_size = len(self.symbols)
        self.answer_cells = 2 if predict_end else 1
        self.seq_len = self.width = SIGN + self.answer_cells
        self.equations = (self.first_value + self.operator.equations(self.p)).astype(np.uint8)
        self.chance = float(np.bincount(self.equations[:, 2]).max() / len(self.equations))

    @cached_property
    def _answers(self) -> np.ndarray:
        """The answer to each pair of tokens, `EQUALS` where there is none; uint8 [256, 256]."""
        answers = np.full((256, 256), EQUALS, np.uint8)
        a, b, c = self.equations.T
        answers[a, b] = c
        return answers

    def examples(self, equations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, uint8 [n, seq_len] twice, of equations uint8 [n, 3] as tokens."""
        a, b, c = equations.T
        inputs = np.full((len(equations), self.seq_len), EOS, np.uint8)
        inputs[:, A], inputs[:, OP], inputs[:, B], inputs[:, SIGN] = a, self.op_token, b, EQUALS
        labels = np.full_like(inputs, self.ignore_label_id)
        labels[:, SIGN] = c
        if self.predict_end:
            inputs[:, SIGN + 1], labels[:, SIGN + 1] = c, EOS
        return inputs, labels

    # Text

    def parse(self, text: str) -> np.ndarray:
        """A question `3 + 5` or `3 + 5 =`, or an answer `8`; with `predict_end` also a question `3 + 5 = 8`."""
        for sign in (self.operator.name, self.operator.published):
            a, found, rest = text.partition(sign)
            if found:
                b, _, c = rest.partition("=")
                return self._question(a.strip(), b.strip(), c.strip())
        if text.strip() in self.token_of:
            return self.examples(np.array([[EOS, EOS, self.token_of[text.strip()]]], np.uint8))[1][0]
        raise UserError(
            f"no equation: '{shown(text)}'; write a question as '{self._some[0]} {self.operator.name} {self._some[1]}'"
        )

    def _question(self, a: str, b: str, c: str) -> np.ndarray:
        values = [self._value(symbol) for symbol in (a, b)] + [self._value(c) if c else EOS]
        if self._answers[values[0], values[1]] == EQUALS:
            raise UserError(f"{a} {self.operator.name} {b} has no answer: {b} has no inverse")
        if c and not self.predict_end:
            raise UserError(f"its answer, {c}, is given already; write '{a} {self.operator.name} {b}'")
        return self.examples(np.array([values], np.uint8))[0][0]

    def _value(self, symbol: str) -> int:
        if symbol not in self.token_of:
            kind = "permutation of the digits 01234" if self.p is None else f"number from 0 to {self.p - 1}"
            raise UserError(f"'{shown(symbol)}' is no {kind}")
        return self.token_of[symbol]

    @property
    def _some(self) -> list[str]:
        """Two operands."""
        return [*self.token_of][-2:]

    def to_text(self, tokens: np.ndarray) -> str:
        """A question as `3 + 5`, or as `3 + 5 = 8` where its answer is among its tokens; an answer as `8`."""
        if tokens[SIGN] != EQUALS:
            return self.cell(int(tokens[SIGN])).symbol
        text = " ".join(self.cell(token).symbol for token in tokens[A:SIGN].tolist())
        has_answer = self.predict_end and tokens[-1] != EOS
        return f"{text} = {self.cell(int(tokens[-1])).symbol}" if has_answer else text

    def cell(self, token: int) -> Cell:
        return Cell(self.symbols[token] if token < self.vocab_size else "?")

    def render(self, tokens: np.ndarray, given: np.ndarray | None = None) -> str:
        """An answer to a `given` question as a whole equation, `3 + 5 = 8`."""
        if given is None:
            return self.to_text(tokens)
        asked = self.to_text(given).partition(" = ")[0]
        return f"{asked} = {self.cell(int(tokens[SIGN])).symbol}"

    # Rules

    def contradiction(self, question: np.ndarray) -> str | None:
        if question[SIGN] == EQUALS:
            return None
        a, b = self._some
        return f"it is an answer, no question; write '{a} {self.operator.name} {b}'"

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Whether the answer, without what follows it, is right."""
        answers = self._answers[inputs[:, A], inputs[:, B]]
        return self._are_questions(inputs) & (outputs[:, SIGN] == answers)

    def _are_questions(self, inputs: np.ndarray) -> np.ndarray:
        signs = inputs[:, [0, OP, SIGN]] == (EOS, self.op_token, EQUALS)
        return signs.all(axis=1) & (self._answers[inputs[:, A], inputs[:, B]] != EQUALS)

    def labels_fit(self, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """With `noise`, any operand may be the answer."""
        if not self.noise:
            return self.is_solution(inputs, labels)
        return self._are_questions(inputs) & np.isin(labels[:, SIGN], [*self.token_of.values()])

    def about(self, num_examples: Mapping[str, int]) -> list[str]:
        """Counts of equations, and a warning if training has too few to do more than memorise them."""
        num_train, num_test = (num_examples.get(split, 0) for split in ("train", "test"))
        share = num_train / (num_train + num_test)
        lines = [
            f"{num_train + num_test:,} equations: {num_train:,} to train on ({100 * share:.3g} %), "
            f"{num_test:,} to validate"
        ]
        if share < _FEW:
            lines.append(
                f"warning: {num_train:,} equations are so few that a model can only memorise them and stays at chance "
                f"({self.chance:.1%}) on the others; give a larger train_fraction, such as 0.5 for half of them"
            )
        return lines


def modulus(op: Operator, p: int | None) -> int | None:
    """The p that is meant. Raises UserError: it does not fit the operator, or the vocabulary."""
    if op.of_permutations:
        if p is not None:
            raise UserError(f"p={p} does nothing with op={op.name}, which is of permutations; leave it out")
        return None
    if p is None:
        return PUBLISHED_P
    primes = [n for n in range(2, LARGEST_P + 1) if is_prime(n)]
    if not 2 <= p <= LARGEST_P:
        raise UserError(
            f"p={p}: choose 2 to {LARGEST_P}, for a vocabulary has 256 tokens; the largest prime is {primes[-1]}"
        )
    if op.inverts and p not in primes:
        nearby = [n for n in primes if n < p][-1:] + [n for n in primes if n > p][:1]
        raise UserError(
            f"p={p} is no prime, and op={op.name} divides; choose p={' or p='.join(map(str, nearby))}"
        )
    return p


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _numbers(p: int) -> list[str]:
    return [str(number) for number in range(p)]


def _permutations() -> list[str]:
    return ["".join(map(str, digits)) for digits in PERMUTATIONS.tolist()]


def _published() -> list[str]:
    """The published vocabulary of 239 tokens."""
    signs = sorted([*(op.published for op in OPERATORS), *NEVER_RUN])
    return ["<eos>", "=", *signs, *_numbers(PUBLISHED_P), *_permutations()]
