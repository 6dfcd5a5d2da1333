"""Using a trained model: how long it thinks, along how many paths, when it stops, and which of its answers counts.

A *try* is one way of thinking about a puzzle: about one of its symmetric copies, along one path, which differs from
the others by its noise. All tries at all puzzles are rows of a batch. A row does not depend on the others, so finished
ones are taken out of it, and those of the next puzzles put in: at most so many rows at once, whatever the number of
tries. The tries at a puzzle are at the same step at the same time.

Noise is keyed by (seed, what the model reads, path, step), so a puzzle is answered alike in every batch, by every
worker, in `eval` and in `solve`.

Sources: halting by the Q head in use, Wang et al. 2025 (arXiv:2506.21734), "inference-time scaling"; voting over
relabelled copies, arXiv:2601.10679; noise on z_L before every step and the choice by the Q head, PTRM
(arXiv:2605.19943); random start states and the choice by the residual, EqR (arXiv:2605.21488); the first path that
halts, "Speed is Confidence" (arXiv:2601.19085).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hrm_ray.config.inference import AS_TRAINED, Inference, Select
from hrm_ray.errors import UserError
from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.noise import Noise, key_of, keys_of_rows, noise_of
from hrm_ray.models.recursive import Prediction, State

Checker = Callable[[np.ndarray, np.ndarray], np.ndarray]  # `Task.is_solution`


class Answer(NamedTuple):
    """What a model says of B puzzles.

    tokens [B, C] int64; logits [B, C, V], q_halt and q_continue [B] float32; steps [B] int64, ACT steps taken, over all
    tries at the puzzle. Logits may be left out; then they are [B, C, 0].
    """

    tokens: Tensor
    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor
    steps: Tensor

    @classmethod
    def of(
        cls, prediction: Prediction, steps_B: Tensor, num_cells: int, *, with_logits: bool = True
    ) -> "Answer":
        """The answer of a step; of cells that are never asked for, zeros."""
        logits = prediction.logits if with_logits else prediction.logits[..., :0]
        tokens = prediction.logits.argmax(-1)
        if num_before := num_cells - tokens.shape[1]:
            logits, tokens = F.pad(logits, (0, 0, num_before, 0)), F.pad(tokens, (num_before, 0))
        return cls(tokens, logits, prediction.q_halt, prediction.q_continue, steps_B.long())


class Answers(NamedTuple):
    """After all steps, and at the step at which the Q head would have halted; the same where puzzles end early."""

    last: Answer
    learned: Answer


class Copies(NamedTuple):
    """K symmetries of puzzles, as tensors: x -> tokens[x[cells]]; see `hrm_ray.data.tasks.base.Symmetry`.

    cells int64 [K, C] and tokens int64 [K, V], permutations.
    """

    cells: Tensor
    tokens: Tensor

    def of(self, inputs_BC: Tensor, which_B: Tensor) -> Tensor:
        """The copies number `which_B` (int64) of puzzles."""
        turned = inputs_BC.long().gather(1, self.cells[which_B])
        return self.tokens[which_B].gather(1, turned).to(inputs_BC.dtype)

    def undone(self, answer: Answer, which_B: Tensor) -> Answer:
        """The answers to the puzzles themselves, from those to their copies."""
        back, tokens = self.cells.argsort(1)[which_B], self.tokens.argsort(1)[which_B]
        B, C, V = answer.logits.shape
        logits = answer.logits.gather(1, back[:, :, None].expand(B, C, V))
        if V:
            logits = logits.gather(2, self.tokens[which_B][:, None, :].expand(B, C, V))
        return answer._replace(tokens=tokens.gather(1, answer.tokens).gather(1, back), logits=logits)


class Tries(NamedTuple):
    """What T tries at each of B puzzles came to; of R rows at work, without the second axis.

    The answers; halted [B, T] bool, whether the Q head halted there; valid [B, T] bool, whether it is known that the
    answer solves the puzzle; residual [B, T] float32, how far the last step moved the state, 0 where not asked for.
    """

    answer: Answer
    halted: Tensor
    valid: Tensor
    residual: Tensor


class Report(NamedTuple):
    """An ACT step of the R rows at work: the puzzle of each and which try at it (int64 [R]), and what it came to."""

    puzzle: Tensor
    number: Tensor
    tries: Tries


class Rows(NamedTuple):
    """What is at work: the puzzle of each row and which try at it, the key of its noise (int64 [R]), and its carry."""

    puzzle: Tensor
    number: Tensor
    key: Tensor
    carry: Carry


def at(rows: Any, index: Any) -> Any:
    """Each of the tensors in `rows` at `index`."""
    return tree_map(lambda tensor: tensor[index], rows)


def put(rows: Any, index: Any, new: Any) -> None:
    """Let each of the tensors in `rows` be as in `new` at `index`."""
    for own, other in zip(tree_leaves(rows), tree_leaves(new), strict=True):
        own[index] = other


def cat(parts: Sequence[Any]) -> Any:
    """The rows of all `parts` in line."""
    return parts[0] if len(parts) == 1 else tree_map(lambda *tensors: torch.cat(tensors), *parts)


@contextmanager
def thinking_for(model: ACT, halt_max_steps: int | None) -> Iterator[None]:
    """Inside, `model` takes at most so many steps; None: as many as before."""
    trained = model.halt_max_steps
    model.halt_max_steps = halt_max_steps or trained
    try:
        yield
    finally:
        model.halt_max_steps = trained


Kept = dict[str, Tries]  # see `Record`


class Thinker:
    """A model in evaluation mode, and how it is used.

    Args:
        use: how.
        copies: the symmetries under which a puzzle remains one, as many as `use.votes`; None: no copies.
        is_solution: checks answers; None: nothing does.
        rows_at_once: computed together at most; None: all.
        with_logits: answers have them.
        with_residual: tries have theirs, also where `use.select` does not ask for it.

    Raises:
        UserError: the model cannot be used so.
    """

    def __init__(
        self,
        model: ACT,
        use: Inference = AS_TRAINED,
        *,
        copies: Copies | None = None,
        is_solution: Checker | None = None,
        rows_at_once: int | None = None,
        with_logits: bool = True,
        with_residual: bool = False,
    ):
        self.model, self.use, self.copies, self.is_solution = model, use, copies, is_solution
        self.rows_at_once, self.with_logits = rows_at_once, with_logits
        self.with_residual = with_residual or use.select == "residual"
        self.init_std = model.inner.motion.init_std if use.init_std is None else use.init_std
        check(model, use)
        if use.paths > 1 and not (use.noise or self.init_std):
            raise UserError(f"paths={use.paths} are all alike without noise; give noise= or init_std=")
        if use.select == "valid" and is_solution is None:
            raise UserError("select=valid: nothing checks the answers to these puzzles; use select=vote or q")

    @torch.no_grad()  # and not inference_mode, under which compiled programs of training would not fit
    def think(self, batch: Batch) -> Answers:
        """The answers that count, to the puzzles of `batch`.

        `q_halt` of several that voted is of the probability with which they stand behind the answer.
        """
        select, num_tries = self.use.select, self.use.num_tries
        record = Record(len(batch.inputs), num_tries, CHOSEN_FROM.get(select, ("last", "learned")))
        has_ended = torch.zeros(len(batch.inputs), dtype=torch.bool, device=batch.inputs.device)

        def on_step(report: Report) -> Tensor | None:
            record.note(report)
            tries = report.tries
            if select in ("first_halt", "valid"):
                has_ended[report.puzzle[tries.halted if select == "first_halt" else tries.valid]] = True
                ended = has_ended[report.puzzle]
                return ended | tries.halted if self.use.halt == "learned" else ended
            return tries.halted if self.use.halt == "learned" else None

        for numbers in rounds(num_tries) if select == "valid" else [range(num_tries)]:
            self.walk(batch, on_step, puzzles=(~has_ended).nonzero()[:, 0], numbers=numbers)
        chosen = [choose(tries, select) for tries in record.kept.values()]
        return Answers(chosen[0], chosen[-1])

    @torch.no_grad()
    def survey(self, batch: Batch, depths: Sequence[int]) -> list[Kept]:
        """What the tries at the puzzles of `batch` came to after each of `depths` ACT steps, as if there had been no
        more; all tries are made, to `use.halt_max_steps` or, with `halt=learned`, until they halt."""
        record = Record(len(batch.inputs), self.use.num_tries)
        found: list[Kept] = []

        def on_step(report: Report) -> Tensor | None:
            record.note(report)
            steps, halted = report.tries.answer.steps, report.tries.halted
            ends = halted & (self.use.halt == "learned")
            if not found:
                found.extend(tree_map(torch.zeros_like, record.kept) for _ in depths)
            for depth, kept in zip(depths, found, strict=True):
                rows = ((steps == depth) | (ends & (steps < depth))).nonzero()[:, 0]
                where = report.puzzle[rows], report.number[rows]
                put(kept, where, at(record.kept, where))
            return ends

        self.walk(batch, on_step)
        return found

    @torch.no_grad()
    def walk(
        self,
        batch: Batch,
        on_step: Callable[[Report], Tensor | None],
        *,
        puzzles: Tensor | None = None,
        numbers: range | None = None,
    ) -> None:
        """Take the tries at puzzles step by step until all have ended, each at its last step or before.

        Args:
            on_step: told of every step of the rows at work; returns which of them end there, bool [R]; None: none.
            puzzles: which of `batch`, int64; None: all.
            numbers: the tries at each; None: all. Try t is path t // K of copy t % K, where there are K copies.
        """
        device = batch.inputs.device
        numbers = range(self.use.num_tries) if numbers is None else numbers
        waiting = torch.arange(len(batch.inputs), device=device) if puzzles is None else puzzles
        questions = None if self.is_solution is None else batch.inputs.cpu().numpy().astype(np.uint8)
        noise = noise_of(self.use.noise, self.model.inner.dtype, device) if self.use.noise else None
        room = self.rows_at_once or max(1, len(waiting) * len(numbers))
        rows: Rows | None = None
        with thinking_for(self.model, self.use.halt_max_steps):
            while rows or len(waiting):
                # A puzzle with all its tries at once, so that they are at the same step.
                num_next = (
                    max((room - len(rows.key)) // len(numbers), 0) if rows else max(room // len(numbers), 1)
                )
                if num_next and len(waiting):
                    begun = self._begin(batch, waiting[:num_next], numbers)
                    rows, waiting = cat([rows, begun]) if rows else begun, waiting[num_next:]
                assert rows is not None
                parts = [at(rows, slice(i, i + room)) for i in range(0, len(rows.key), room)]
                rows, report = cat([self._step(part, noise, questions) for part in parts])
                done, ends = rows.carry.halted, on_step(report)
                left = (~(done if ends is None else done | ends)).nonzero()[:, 0]
                if not len(left):
                    rows = None
                elif len(left) < len(rows.key):
                    rows = at(rows, left)

    def _begin(self, batch: Batch, puzzles: Tensor, numbers: range) -> Rows:
        """The rows of the tries `numbers` at each of `puzzles`, before their first step."""
        tries = torch.arange(numbers.start, numbers.stop, device=puzzles.device)
        puzzle, number = puzzles.repeat_interleave(len(tries)), tries.repeat(len(puzzles))
        batch, copy, path = at(batch, puzzle), number % self.use.votes, number // self.use.votes
        if self.copies:
            batch = batch._replace(inputs=self.copies.of(batch.inputs, copy))
        key = key_of(self.use.seed, keys_of_rows(batch.inputs), path)
        inner = self.model.inner
        state = inner.random_state(key, self.init_std) if self.init_std else inner.initial_state(len(puzzle))
        steps = torch.zeros_like(puzzle, dtype=torch.int32)
        return Rows(
            puzzle, number, key, Carry(state, steps, torch.zeros_like(steps, dtype=torch.bool), batch)
        )

    def _step(self, rows: Rows, noise: Noise | None, questions: np.ndarray | None) -> tuple[Rows, Report]:
        """One ACT step."""
        puzzle, number, key, carry = rows
        before = carry.state
        if noise is not None:
            drawn = noise.draw(key_of(key, carry.steps + 1), before.z_L[0].numel())
            carry = carry._replace(state=before._replace(z_L=before.z_L + drawn.view_as(before.z_L)))
        step = self.model(carry, carry.batch)
        num_cells = carry.batch.inputs.shape[1]
        answer = Answer.of(step.prediction, step.carry.steps, num_cells, with_logits=self.with_logits)
        if self.copies:
            answer = self.copies.undone(answer, number % self.use.votes)
        halted = self.model.halting.is_done(step.prediction, self.use.halt_threshold)
        valid, residual = torch.zeros_like(halted), torch.zeros_like(answer.q_halt)
        if questions is not None:
            assert self.is_solution is not None
            checked = self.is_solution(questions[puzzle.cpu().numpy()], answer.tokens.cpu().numpy())
            valid = torch.from_numpy(checked).to(halted.device)
        if self.with_residual:
            residual = _distance(before, step.carry.state)
        rows = Rows(puzzle, number, key, step.carry)
        return rows, Report(puzzle, number, Tries(answer, halted, valid, residual))


def check(model: ACT, use: Inference) -> None:
    """Raise UserError if `model` cannot be used so."""
    of_the_state = [f"{key}={value:g}" for key in ("noise", "init_std") if (value := getattr(use, key))]
    of_the_state += ["select=residual"] if use.select == "residual" else []
    if of_the_state and not model.inner.keeps_state:
        raise UserError(
            f"{of_the_state[0]}: arch={model.inner.config.name} keeps no state from step to step, so its paths are all "
            "alike; leave it out, and use votes="
        )
    if (use.halt_max_steps or 0) > model.halt_max_steps and not model.inner.keeps_state:
        raise UserError(
            f"{use.halt_max_steps} ACT steps: arch={model.inner.config.name} keeps no state from step to step, so its "
            "answer is the same after each; leave halt_max_steps= and depths= out"
        )
    of_the_q_head = ["halt=learned"] if use.halt == "learned" else []
    if use.halt_threshold != AS_TRAINED.halt_threshold:
        of_the_q_head.append(f"halt_threshold={use.halt_threshold:g}")
    if of_the_q_head and model.inner.q_head is None:
        raise UserError(f"{of_the_q_head[0]}: this model has no Q head; leave it out")
    if use.select in ("q", "first_halt"):
        q_head, why = model.inner.q_head, None
        if q_head is None:
            why = "this model has no Q head"
        elif not q_head.weight.any():
            why = "the Q head of this model was never trained (its weights are 0)"
        if why:
            raise UserError(f"select={use.select}: {why}; use select=vote")


def _distance(before: State, after: State) -> Tensor:
    """How far two states are apart (Euclidean, over z_H and z_L), float32 [R]."""
    squares = [(b.float() - a.float()).square().sum((1, 2)) for a, b in zip(before, after, strict=True)]
    return torch.stack(squares).sum(0).sqrt()


def rounds(num_tries: int) -> list[range]:
    """Tries 0, 1, 2..3, 4..7, ...: when answers are checked, most puzzles need no more than the first."""
    ends = [0, *(min(2**i, num_tries) for i in range((num_tries - 1).bit_length() + 1))]
    return [range(start, end) for start, end in pairwise(ends)]


class Record:
    """What each try at B puzzles has come to so far.

    Attributes:
        kept: `Tries` [B, T] by name: `last`, at the last step yet; `learned`, at the first step at which the Q head
            halted, and before as `last`; `proven`, at the first step with a valid answer, and before as `last`.
    """

    def __init__(
        self, num_puzzles: int, num_tries: int, names: Sequence[str] = ("last", "learned", "proven")
    ):
        self._shape, self._names = (num_puzzles, num_tries), names
        self.kept: Kept = {}

    def note(self, report: Report) -> None:
        """Take note of a step."""
        rows = report.tries
        if not self.kept:
            for name in self._names:
                self.kept[name] = tree_map(lambda part: part.new_zeros(*self._shape, *part.shape[1:]), rows)
        for name, tries in self.kept.items():
            where, now = (report.puzzle, report.number), rows
            if name != "last":
                is_open = ~(tries.halted if name == "learned" else tries.valid)[where]
                index = is_open.nonzero()[:, 0]
                where, now = (where[0][index], where[1][index]), at(rows, index)
            put(tries, where, now)


CHOSEN_FROM = {"first_halt": ("learned",), "valid": ("proven",)}  # of what a record keeps


def choose(tries: Tries, select: Select) -> Answer:
    """Of each puzzle the answer of the try that `select` prefers; its steps are those of all."""
    answer = tries.answer
    B, T = answer.q_halt.shape
    rows = torch.arange(B, device=answer.q_halt.device)
    preference = PREFERENCES[select](tries)
    winner = preference.argmax(1)
    chosen: Answer = at(answer, (rows, winner))
    if select == "vote" and T > 1:
        share = (preference[rows, winner] / T).clamp(1e-6, 1 - 1e-6)
        chosen = chosen._replace(q_halt=share.logit())
    return chosen._replace(steps=answer.steps.sum(1))


def vote(tries: Tries) -> Tensor:
    """The weight behind each answer, float32 [B, T]: every whole answer counts as much as it trusts itself (q_halt)."""
    tokens, trust = tries.answer.tokens, tries.answer.q_halt.sigmoid()
    agrees = (
        tokens == tokens[:, t, None] for t in range(tokens.shape[1])
    )  # one by one: [B, T, T, C] would be large
    return torch.stack([(same.all(-1) * trust).sum(1) for same in agrees], 1)


def _earliest(tries: Tries, happened: Tensor, when: Tensor) -> Tensor:
    """Those to which it happened first; among equals, and where it has not, the surest."""
    return tries.answer.q_halt.double().sigmoid() / 2 - torch.where(happened, when, when.max() + 1)


def _step_of_its_round(tries: Tries) -> Tensor:
    """When each try was at its step, rounds being one after the other."""
    steps = tries.answer.steps
    round_T = [i for i, numbers in enumerate(rounds(steps.shape[1])) for _ in numbers]
    return steps + torch.tensor(round_T, device=steps.device) * (steps.max() + 1)


# What is preferred [B, T], the largest; among equals the first.
PREFERENCES: dict[Select, Callable[[Tries], Tensor]] = {
    "vote": vote,
    "q": lambda tries: tries.answer.q_halt,
    "residual": lambda tries: -tries.residual,
    "first_halt": lambda tries: _earliest(tries, tries.halted, tries.answer.steps),
    "valid": lambda tries: _earliest(tries, tries.valid, _step_of_its_round(tries)),
}
