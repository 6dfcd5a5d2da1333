"""Stopping early, thinking longer, and voting."""

import numpy as np
import pytest
import torch

from hrm_ray.data.tasks.base import Symmetry, get_task
from hrm_ray.errors import UserError
from hrm_ray.evaluation.evaluate import copies_on
from hrm_ray.halting.base import Halting
from hrm_ray.models.act import ACT
from hrm_ray.models.inference import Answer, every_step, think, think_and_vote, thinking_for, vote
from hrm_ray.models.recursive import Prediction, State
from tests.golden_cases import FOLDER as GOLDEN
from tests.golden_cases import batch_of, model_of


def model_and_batch():
    model = model_of("hrm_base").eval()
    with torch.no_grad():
        model.inner.q_head.weight.mul_(8)  # so that puzzles halt at different steps
        model.inner.q_head.bias.zero_()
    return model, batch_of(np.load(GOLDEN / "hrm_base" / "eval.npz"))


def test_stopping_early_gives_what_the_full_run_says_it_would():
    model, batch = model_and_batch()
    answers = think(model, batch)
    stopped = think(model, batch, stops_early=True)
    assert len(set(answers.learned.steps.tolist())) > 1
    assert answers.last.steps.tolist() == [4] * 8
    assert torch.equal(stopped.last.steps, answers.learned.steps)
    assert torch.equal(stopped.last.tokens, answers.learned.tokens)
    torch.testing.assert_close(stopped.last.q_halt, answers.learned.q_halt, rtol=1e-4, atol=1e-5)


def test_every_step_and_where_the_q_head_would_halt():
    model, batch = model_and_batch()
    answers, halts = zip(*every_step(model, batch), strict=True)
    expected = think(model, batch)
    assert [answer.steps.tolist() for answer in answers] == [[step] * 8 for step in (1, 2, 3, 4)]
    assert torch.equal(answers[-1].logits, expected.last.logits)
    first = torch.stack([*halts[:-1], torch.ones(8, dtype=torch.bool)]).int().argmax(0)
    assert torch.equal(first + 1, expected.learned.steps)
    chosen = torch.stack([answer.tokens for answer in answers])[first, torch.arange(8)]
    assert torch.equal(chosen, expected.learned.tokens)


def test_finished_puzzles_are_not_computed():
    model, batch = model_and_batch()
    sizes = []
    model.inner.register_forward_hook(lambda module, args, output: sizes.append(len(args[1])))
    stopped = think(model, batch, stops_early=True).last
    assert sizes == [int((stopped.steps > step).sum()) for step in range(int(stopped.steps.max()))]
    assert sizes[-1] < 8


def test_thinking_longer_than_in_training():
    model, batch = model_and_batch()
    with thinking_for(model, 7):
        assert think(model, batch).last.steps.tolist() == [7] * 8
    assert think(model, batch).last.steps.tolist() == [4] * 8
    golden = np.load(GOLDEN / "hrm_base" / "eval.npz")["logits"]
    with thinking_for(model, 2):
        np.testing.assert_allclose(think(model, batch).last.logits, golden[1], atol=2.5e-5)


def answer(tokens, q_halt) -> Answer:
    B = len(tokens)
    return Answer(
        torch.tensor(tokens),
        torch.zeros(B, 2, 3),
        torch.tensor(q_halt),
        torch.zeros(B),
        torch.full((B,), 2),
    )


def test_whole_answers_vote_with_their_trust():
    copies = (
        answer([[1, 1], [1, 1]], [0.0, 0.0]),
        answer([[1, 2], [1, 2]], [0.4, 3.0]),
        answer([[1, 1], [1, 1]], [0.0, 0.0]),
    )
    won = vote(copies)
    # 0.5 + 0.5 against 0.6; 0.5 + 0.5 against 0.95: in both the two that agree.
    assert won.tokens.tolist() == [[1, 1], [1, 1]]
    assert won.steps.tolist() == [6, 6]
    torch.testing.assert_close(won.q_halt.sigmoid(), torch.full((2,), 1 / 3))
    assert vote((copies[0], copies[1])).tokens.tolist() == [[1, 2], [1, 2]]


def test_a_copy_is_answered_in_its_own_labels_and_read_back():
    """A model that copies its clues answers every relabelling alike once it is read back."""

    seen = []

    class Copies(torch.nn.Module):
        dtype = torch.float32

        def embed(self, inputs, identifiers):
            seen.append(inputs.clone())
            return inputs

        def forward(self, state, inputs):
            return State(inputs, inputs)

        def predict(self, inputs):
            zeros = torch.zeros(len(inputs))
            return Prediction(torch.nn.functional.one_hot(inputs.long(), 6).float(), zeros, zeros)

    real, batch = model_and_batch()
    model = ACT(Copies(), 1, Halting())
    model.inner.initial_state, model.inner.reset = real.inner.initial_state, real.inner.reset
    task = get_task("sudoku", size=4)
    copies = copies_on(torch.device("cpu"), task.symmetries(5))
    voted = think_and_vote(model, batch, copies=copies).last
    assert torch.equal(voted.tokens, batch.inputs.long())
    assert len(seen) == 5 and not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(voted.q_halt.sigmoid(), torch.full((8,), 0.5))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_relabelled_sudoku_is_the_same_sudoku(size):
    task = get_task("sudoku", size=size)
    relabelings = np.stack([symmetry.tokens for symmetry in task.symmetries(9)])
    assert relabelings.shape == (9, size + 2)
    assert (relabelings[0] == np.arange(size + 2)).all()
    assert len({tuple(row) for row in relabelings}) == 9
    assert all((a.tokens == b).all() for a, b in zip(task.symmetries(12), relabelings, strict=False))
    question, solution, _ = next(zip(*puzzles(task), strict=True))
    for relabeling in relabelings:
        assert sorted(relabeling) == list(range(size + 2)) and (relabeling[:2] == [0, 1]).all()
        assert task.is_solution(relabeling[question][None], relabeling[solution][None]).all()


def puzzles(task):
    clues = {4: 8, 6: 18, 9: 40}[task.size]
    questions, solutions = task.generate(0, 0, 1, clues, 1000)
    return questions, solutions, [None]


def test_a_task_without_copies_says_so():
    with pytest.raises(UserError, match="votes=3: task tokens has no symmetric copies"):
        get_task("tokens", vocab_size=6, seq_len=16).symmetries(3)


def test_a_copy_is_undone_in_cells_and_tokens():
    random = np.random.default_rng(0)
    copy = copies_on(torch.device("cpu"), [Symmetry(random.permutation(16), random.permutation(6))])[0]
    _, batch = model_and_batch()
    turned = copy.of(batch).inputs.long()
    assert not torch.equal(turned, batch.inputs.long())
    logits = torch.nn.functional.one_hot(turned, 6).float()
    none = torch.zeros(len(turned))
    answer = copy.undone(Answer(turned, logits, none, none, none.long()))
    assert torch.equal(answer.tokens, batch.inputs.long())
    assert torch.equal(answer.logits.argmax(-1), batch.inputs.long())
