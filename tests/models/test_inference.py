"""Stopping early, thinking longer, thinking along paths, and whose answer counts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.config.inference import Inference
from hrm_ray.config.validate import validated
from hrm_ray.data.tasks.base import Symmetry, get_task
from hrm_ray.errors import UserError
from hrm_ray.evaluation.evaluate import copies_on, thinker_of
from hrm_ray.evaluation.survey import steps_spent
from hrm_ray.halting.base import Halting
from hrm_ray.models.act import ACT
from hrm_ray.models.inference import CHOSEN_FROM, Answer, Thinker, Tries, at, choose, rounds, thinking_for
from hrm_ray.models.noise import Noise, key_of, keys_of_rows
from hrm_ray.models.recursive import Prediction, State
from tests.golden_cases import FOLDER as GOLDEN
from tests.golden_cases import batch_of, model_of

CPU = torch.device("cpu")
SELECTIONS = ["vote", "q", "residual", "first_halt", "valid"]


def model_and_batch():
    model = model_of("hrm_base").eval()
    with torch.no_grad():
        model.inner.q_head.weight.mul_(8)  # so that puzzles halt at different steps
        model.inner.q_head.bias.zero_()
    return model, batch_of(np.load(GOLDEN / "hrm_base" / "eval.npz"))


def think(model, batch, **use):
    return Thinker(model, Inference(**use)).think(batch)


def test_stopping_early_gives_what_the_full_run_says_it_would():
    model, batch = model_and_batch()
    answers = think(model, batch)
    stopped = think(model, batch, halt="learned")
    assert len(set(answers.learned.steps.tolist())) > 1
    assert answers.last.steps.tolist() == [4] * 8
    assert torch.equal(stopped.last.steps, answers.learned.steps)
    assert torch.equal(stopped.last.tokens, answers.learned.tokens)
    torch.testing.assert_close(stopped.last.q_halt, answers.learned.q_halt, rtol=1e-4, atol=1e-5)


def test_every_step_and_where_the_q_head_would_halt():
    model, batch = model_and_batch()
    tries = [kept["last"] for kept in Thinker(model).survey(batch, range(1, 5))]
    expected = think(model, batch)
    assert [t.answer.steps[:, 0].tolist() for t in tries] == [[step] * 8 for step in (1, 2, 3, 4)]
    assert torch.equal(tries[-1].answer.logits[:, 0], expected.last.logits)
    halts = [t.halted[:, 0] for t in tries[:-1]]
    first = torch.stack([*halts, torch.ones(8, dtype=torch.bool)]).int().argmax(0)
    assert torch.equal(first + 1, expected.learned.steps)
    chosen = torch.cat([t.answer.tokens for t in tries], 1)[torch.arange(8), first]
    assert torch.equal(chosen, expected.learned.tokens)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_the_threshold_of_halting(threshold):
    model, batch = model_and_batch()
    answers = [kept["last"].answer for kept in Thinker(model).survey(batch, range(1, 5))]
    sure = [(a.q_halt - a.q_continue).sigmoid()[:, 0] > threshold for a in answers[:-1]]
    first = torch.stack([*sure, torch.ones(8, dtype=torch.bool)]).int().argmax(0)
    stopped = think(model, batch, halt="learned", halt_threshold=threshold).last
    assert torch.equal(stopped.steps, first + 1) and 4 < stopped.steps.sum() < 32
    assert torch.equal(think(model, batch, halt_threshold=threshold).learned.steps, first + 1)
    tokens = torch.cat([a.tokens for a in answers], 1)[torch.arange(8), first]
    assert torch.equal(stopped.tokens, tokens)


def test_finished_puzzles_are_not_computed():
    model, batch = model_and_batch()
    sizes = []
    model.inner.register_forward_hook(lambda module, args, output: sizes.append(len(args[1])))
    stopped = think(model, batch, halt="learned").last
    assert sizes == [int((stopped.steps > step).sum()) for step in range(int(stopped.steps.max()))]
    assert sizes[-1] < 8


def test_thinking_longer_than_in_training():
    model, batch = model_and_batch()
    with thinking_for(model, 7):
        assert think(model, batch).last.steps.tolist() == [7] * 8
    assert think(model, batch, halt_max_steps=7).last.steps.tolist() == [7] * 8
    assert think(model, batch).last.steps.tolist() == [4] * 8
    golden = np.load(GOLDEN / "hrm_base" / "eval.npz")["logits"]
    np.testing.assert_allclose(think(model, batch, halt_max_steps=2).last.logits, golden[1], atol=2.5e-5)


def plainly(model, batch, use, checks=None):
    """Every try at every puzzle by itself, with nothing shared: (tokens, q_halt, halts, residual) of each step."""
    task, found = get_task("sudoku", size=4), []
    symmetries = task.symmetries(use.votes) if use.votes > 1 else [Symmetry(np.arange(16), np.arange(6))]
    for puzzle in range(len(batch.inputs)):
        found.append([])
        for t in range(use.num_tries):
            symmetry, path = symmetries[t % use.votes], t // use.votes
            row = batch.rows(slice(puzzle, puzzle + 1))
            inputs = torch.from_numpy(symmetry.tokens[row.inputs.numpy()[:, symmetry.cells]].astype(np.int32))
            row = row._replace(inputs=inputs)
            key = key_of(use.seed, keys_of_rows(inputs), path)
            carry = model.initial_carry(row)
            shape = carry.state.z_L.shape
            state = carry.state
            if use.init_std:
                drawn = Noise(use.init_std, torch.float32, CPU).draw(key_of(key, 0), 2 * shape[1] * shape[2])
                state = State(*drawn.view(2, *shape).unbind(0))
            carry = carry._replace(halted=torch.zeros(1, dtype=torch.bool))
            steps = []
            for step in range(1, (use.halt_max_steps or 4) + 1):
                drawn = Noise(use.noise, torch.float32, CPU).draw(key_of(key, step), shape[1] * shape[2])
                noisy = State(state.z_H, state.z_L + drawn.view(shape))
                with torch.no_grad():
                    out = model(carry._replace(state=noisy), row)
                carry, before, state = out.carry, state, out.carry.state
                moved = [(a - b).square().sum() for a, b in zip(before, state, strict=True)]
                tokens = out.prediction.logits[0].argmax(-1).numpy()
                back = np.argsort(symmetry.tokens)[tokens][np.argsort(symmetry.cells)]
                halts = bool(model.halting.is_done(out.prediction))
                steps.append((back, float(out.prediction.q_halt), halts, float(sum(moved)) ** 0.5))
            found[-1].append(steps)
    return found


@pytest.mark.parametrize(
    "use",
    [
        Inference(paths=3, noise=0.5),
        Inference(paths=2, votes=3, noise=0.7, init_std=0.5, seed=5),
        Inference(paths=4, init_std=1.0, halt_max_steps=3),
    ],
    ids=["noise", "copies", "starts"],
)
def test_tries_are_what_each_is_by_itself(use):
    """Whatever is computed together; a puzzle has more tries than 5 in the second case."""
    model, batch = model_and_batch()
    batch = batch.rows(slice(3))
    copies = copies_on(CPU, get_task("sudoku", size=4).symmetries(use.votes)) if use.votes > 1 else None
    expected, sizes = plainly(model, batch, use), []
    model.inner.register_forward_hook(lambda module, args, output: sizes.append(len(args[1])))
    for rows_at_once in (None, 5, 7):
        thinker = Thinker(model, use, copies=copies, rows_at_once=rows_at_once, with_residual=True)
        sizes.clear()
        kept = thinker.survey(batch, range(1, (use.halt_max_steps or 4) + 1))
        assert max(sizes) <= (rows_at_once or 3 * use.num_tries)
        for puzzle, tries in enumerate(expected):
            for number, steps in enumerate(tries):
                for own, (tokens, q_halt, halts, residual) in zip(kept, steps, strict=True):
                    last = at(own["last"], (puzzle, number))
                    assert (last.answer.tokens.numpy() == tokens).all() and bool(last.halted) == halts
                    np.testing.assert_allclose(
                        [last.answer.q_halt, last.residual], [q_halt, residual], rtol=2e-3
                    )
        by_try = kept[-1]["last"].answer.tokens.unbind(1)
        assert len({tuple(tokens.flatten().tolist()) for tokens in by_try}) > 1  # they differ


def checker(questions, tokens):
    """A check that some answers of the untrained model pass."""
    return (tokens.astype(int) + questions).sum(1) % 5 == 0


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(SELECTIONS),
    st.sampled_from(["max", "learned"]),
    st.integers(1, 6),
    st.integers(1, 20),
    st.data(),
)
def test_a_puzzle_is_answered_alike_in_every_company(select, halt, paths, rows_at_once, data):
    """And a survey says of each depth and number of paths what they alone come to."""
    model, batch = model_and_batch()
    depths = sorted(data.draw(st.sets(st.integers(1, 5), min_size=1)))
    depth, number = data.draw(st.sampled_from(depths)), data.draw(st.integers(1, paths))
    use = Inference(halt=halt, select=select, noise=0.7, paths=number, halt_max_steps=depth)
    alone = Thinker(model, use, is_solution=checker, rows_at_once=rows_at_once).think(batch)
    some = torch.tensor(data.draw(st.permutations(range(8)))[:3])
    others = Thinker(model, use, is_solution=checker).think(at(batch, some))
    wide = use.model_copy(update={"paths": paths, "halt_max_steps": depths[-1]})
    thinker = Thinker(model, wide, is_solution=checker, rows_at_once=rows_at_once, with_residual=True)
    kept = at(thinker.survey(batch, depths)[depths.index(depth)], (slice(None), slice(number)))
    chosen = choose(kept[CHOSEN_FROM.get(select, ("last",))[0]], select)
    for answer, rows in ((chosen, slice(None)), (others.last, some)):
        assert torch.equal(answer.tokens, alone.last.tokens[rows])
        torch.testing.assert_close(answer.q_halt, alone.last.q_halt[rows], rtol=2e-3, atol=2e-4)
    assert torch.equal(others.last.steps, alone.last.steps[some])
    assert torch.equal(steps_spent(kept, select), alone.last.steps)


def tries_of(tokens, q_halt, **columns) -> Tries:
    """Tries [B, T] from lists."""
    q = torch.tensor(q_halt)
    zeros, steps = torch.zeros_like(q), columns.get("steps", torch.full_like(q, 2).long().tolist())
    answer = Answer(torch.tensor(tokens), torch.zeros(*q.shape, 2, 3), q, zeros, torch.tensor(steps))
    halted, valid = (torch.tensor(columns.get(name, (zeros > 0).tolist())) for name in ("halted", "valid"))
    return Tries(answer, halted, valid, torch.tensor(columns.get("residual", zeros.tolist())))


def test_whole_answers_vote_with_their_trust():
    tokens = [[[1, 1], [1, 2], [1, 1]]] * 2
    tries = tries_of(tokens, [[0.0, 0.4, 0.0], [0.0, 3.0, 0.0]])
    won = choose(tries, "vote")
    # 0.5 + 0.5 against 0.6; 0.5 + 0.5 against 0.95: in both the two that agree.
    assert won.tokens.tolist() == [[1, 1], [1, 1]]
    assert won.steps.tolist() == [6, 6]
    torch.testing.assert_close(won.q_halt.sigmoid(), torch.full((2,), 1 / 3))
    assert choose(at(tries, (slice(None), slice(2))), "vote").tokens.tolist() == [[1, 2], [1, 2]]


def test_what_is_selected():
    tries = tries_of(
        [[[1], [2], [3], [4]]],
        [[0.5, 3.0, -1.0, 2.0]],
        residual=[[0.3, 0.2, 0.1, 0.4]],
        steps=[[3, 2, 4, 2]],
        halted=[[True, True, False, True]],
        valid=[[False, False, True, True]],
    )
    chosen = {select: choose(tries, select) for select in SELECTIONS}
    # 2 and 4 halt at step 2, and 2 is surer; 3 and 4 are valid and of one round, in which 4 is so earlier.
    assert {select: answer.tokens.item() for select, answer in chosen.items()} == {
        "vote": 2,
        "q": 2,
        "residual": 3,
        "first_halt": 2,
        "valid": 4,
    }
    assert {answer.steps.item() for answer in chosen.values()} == {11}
    assert chosen["residual"].q_halt == -1
    none = tries._replace(
        halted=torch.zeros(1, 4, dtype=torch.bool), valid=torch.zeros(1, 4, dtype=torch.bool)
    )
    assert [choose(none, select).tokens.item() for select in ("first_halt", "valid")] == [2, 2]


@settings(deadline=None)
@given(st.integers(1, 1000))
def test_tries_that_are_checked_come_in_growing_rounds(num_tries):
    made = [number for numbers in rounds(num_tries) for number in numbers]
    assert made == list(range(num_tries))
    assert all(0 < len(numbers) <= max(1, numbers.start) for numbers in rounds(num_tries))


def test_one_path_without_noise_is_what_the_model_says():
    """Whatever is selected, bit for bit."""
    model, batch = model_and_batch()
    expected = think(model, batch)
    for select in ("vote", "q", "residual"):
        for own, other in zip(think(model, batch, select=select, seed=7), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    first = think(model, batch, select="first_halt").last
    assert torch.equal(first.tokens, expected.learned.tokens) and torch.equal(
        first.steps, expected.learned.steps
    )


def test_a_model_trained_from_random_starts_is_used_from_them():
    """Unless it is told otherwise; and its paths differ without noise."""
    model, batch = model_and_batch()
    own = think(model, batch).last
    random = think(model, batch, init_std=0.7).last
    model.inner.motion = model.inner.motion.model_copy(update={"init_std": 0.7})
    assert not torch.equal(own.logits, random.logits)
    assert torch.equal(think(model, batch).last.logits, random.logits)
    assert torch.equal(think(model, batch, init_std=0).last.logits, own.logits)
    voted = think(model, batch, paths=5, select="q").last
    assert not torch.equal(voted.logits, random.logits) and voted.steps.tolist() == [20] * 8


def test_answers_without_logits():
    model, batch = model_and_batch()
    answer = Thinker(model, Inference(paths=2, noise=1.0), with_logits=False).think(batch).last
    assert answer.logits.shape == (8, 16, 0)
    assert torch.equal(answer.tokens, think(model, batch, paths=2, noise=1.0).last.logits.argmax(-1))


def test_a_model_that_cannot():
    model, _ = model_and_batch()
    with torch.no_grad():
        model.inner.q_head.weight.zero_()
    for select in ("q", "first_halt"):
        with pytest.raises(UserError, match=f"select={select}: the Q head of this model was never trained"):
            Thinker(model, Inference(select=select))
    model.inner.__class__.keeps_state = False
    try:
        for use, said in (
            ({"noise": 0.3, "paths": 4}, "noise=0.3: arch="),
            ({"select": "residual"}, "select=res"),
        ):
            with pytest.raises(UserError, match=said):
                Thinker(model, Inference(**use))
    finally:
        del model.inner.__class__.keeps_state
    for alike in ({}, {"init_std": 0}):
        with pytest.raises(UserError, match="paths=4 are all alike without noise; give noise= or init_std="):
            Thinker(model, Inference(paths=4, **alike))
    with pytest.raises(UserError, match="select=valid: task tokens cannot check answers"):
        thinker_of(model, get_task("tokens", vocab_size=6, seq_len=16), Inference(select="valid"))


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ({"noise": -1}, "noise=-1: .*greater than or equal to 0"),
        ({"init_std": float("nan")}, "init_std=nan"),
        ({"paths": 0, "noise": 1}, "paths=0"),
        ({"halt_threshold": 1}, "halt_threshold=1: .*less than 1"),
        ({"select": "best"}, "select='best'"),
    ],
)
def test_what_makes_no_sense_is_one_line(use, said):
    with pytest.raises(UserError, match=said) as error:
        validated(Inference, use, "solve")
    assert "\n" not in str(error.value)


def test_a_copy_is_answered_in_its_own_labels_and_read_back():
    """A model that copies its clues answers every relabelling alike once it is read back."""

    seen = []

    class Copying(torch.nn.Module):
        dtype = torch.float32

        def use_depth(self, depth):
            pass

        def embed(self, inputs, identifiers):
            seen.append(inputs.clone())
            return inputs

        def forward(self, state, inputs, keys):
            return State(inputs, inputs)

        def predict(self, inputs):
            zeros = torch.zeros(len(inputs))
            return Prediction(torch.nn.functional.one_hot(inputs.long(), 6).float(), zeros, zeros)

    real, batch = model_and_batch()
    model = ACT(Copying(), 1, Halting())
    for name in ("initial_state", "reset", "motion"):
        setattr(model.inner, name, getattr(real.inner, name))
    copies = copies_on(CPU, get_task("sudoku", size=4).symmetries(5))
    voted = Thinker(model, Inference(votes=5), copies=copies).think(batch).last
    assert torch.equal(voted.tokens, batch.inputs.long())
    assert torch.equal(voted.logits.argmax(-1), batch.inputs.long())
    by_puzzle = seen[0].view(8, 5, 16)
    assert torch.equal(by_puzzle[:, 0], batch.inputs) and not torch.equal(by_puzzle[:, 0], by_puzzle[:, 1])
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
    symmetries = [Symmetry(random.permutation(16), random.permutation(6)) for _ in range(3)]
    copies, which = copies_on(CPU, symmetries), torch.arange(8) % 3
    _, batch = model_and_batch()
    turned = copies.of(batch.inputs, which).long()
    for row, kind in enumerate(which.tolist()):
        cells, tokens = symmetries[kind]
        assert (turned[row].numpy() == tokens[batch.inputs[row].numpy()[cells]]).all()
    logits = torch.nn.functional.one_hot(turned, 6).float()
    none = torch.zeros(len(turned))
    answer = copies.undone(Answer(turned, logits, none, none, none.long()), which)
    assert torch.equal(answer.tokens, batch.inputs.long())
    assert torch.equal(answer.logits.argmax(-1), batch.inputs.long())
