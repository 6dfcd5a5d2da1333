"""Data sets of a family that we know nothing else about, such as imported arrays."""

import numpy as np

from hrm_ray.data.tasks.base import Task
from hrm_ray.errors import UserError, shown


class Tokens(Task):
    """A data set of an unknown family (imported): shown as numbers, answers cannot be checked."""

    name = "tokens"
    checkable = False
    is_recognised = False

    def __init__(self, vocab_size: int, seq_len: int):
        self.options = {"vocab_size": vocab_size, "seq_len": seq_len}
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    @classmethod
    def of_arrays(
        cls, vocab_size: int, seq_len: int, pad_id: int, inputs: np.ndarray, labels: np.ndarray
    ) -> "Tokens":
        return cls(vocab_size, seq_len)

    def parse(self, text: str) -> np.ndarray:
        """Numbers separated by spaces or commas."""
        words = text.replace(",", " ").split()
        for position, word in enumerate(words, start=1):
            if not word.isdecimal() or len(word) > 9 or int(word) >= self.vocab_size:
                raise UserError(
                    f"token '{shown(word)}' at position {position}; allowed: 0..{self.vocab_size - 1}"
                )
        if len(words) != self.seq_len:
            raise UserError(f"{len(words)} tokens; {self.seq_len} are needed")
        return np.array(words, dtype=np.uint8)

    def to_text(self, tokens: np.ndarray) -> str:
        return " ".join(str(int(token)) for token in tokens)

    def is_solution(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        raise UserError("a data set of unknown task cannot tell whether an answer solves its question")
