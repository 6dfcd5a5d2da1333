"""Votes, submissions and pass@k are the published evaluator's, on any number of workers."""

import json
import lzma
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.data.dihedral import INVERSE, turned
from hrm_ray.data.tasks.arc import Plan, format_name, place
from hrm_ray.errors import UserError
from hrm_ray.evaluation.held_out import HeldOut, Pair, read_held_out
from hrm_ray.evaluation.names import Names
from hrm_ray.evaluation.pass_at_k import KS, notes, outcomes, pass_at_k
from hrm_ray.evaluation.submission import submission
from hrm_ray.evaluation.votes import Votes
from tests.data.test_arc_task import grids, plans, sha256

GOLDEN = Path(__file__).parents[1] / "golden/arc/evaluator"
RUNS = ("single", "two_ranks", "two_passes_aggregated", "two_passes_not_aggregated")
BATCH = 256


@cache
def held_out() -> HeldOut:
    return read_held_out(str(GOLDEN))


@cache
def published() -> dict:
    return {
        "metrics": json.loads((GOLDEN / "metrics.json").read_text()),
        "submissions": json.loads((GOLDEN / "submissions.json").read_text()),
        "votes": json.loads(lzma.decompress((GOLDEN / "votes.json.xz").read_bytes())),
    }


def add_pass(votes: Votes, name: str, rank: int = 0, num_ranks: int = 1) -> Votes:
    """The rows that a rank has of every batch; the last batch is filled with rows without a puzzle."""
    rows = dict(np.load(GOLDEN / f"{name}.npz"))
    padding = -len(rows["inputs"]) % BATCH
    filled = {key: np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) for key, array in rows.items()}
    share = BATCH // num_ranks
    for start in range(rank * share, len(filled["inputs"]), BATCH):
        votes.add(
            *(
                filled[key][start : start + share]
                for key in ("inputs", "preds", "puzzle_identifiers", "q_halt_logits")
            )
        )
    return votes


@cache
def votes_of(run: str) -> Votes:
    def new() -> Votes:
        return Votes(held_out().names)

    if run == "single":
        return add_pass(new(), "pass1")
    if run == "two_ranks":
        merged = new()
        merged.merge([add_pass(new(), "pass1", rank, 2).state() for rank in (0, 1)])
        return merged
    votes = add_pass(new(), "pass1") if run == "two_passes_aggregated" else new()
    return add_pass(votes, "pass2")


@pytest.mark.parametrize("run", RUNS)
def test_votes_are_the_published_ones(run):
    for task, pairs in held_out().tasks.items():
        for pair, outcome, expected in zip(
            pairs, outcomes(votes_of(run), held_out())[task], published()["votes"][run][task], strict=True
        ):
            assert sha256(pair.input) == expected["input_sha256"]
            found = votes_of(run).ranking(task, pair.input)
            assert [sha256(answer.grid) for answer in found] == [a["sha256"] for a in expected["ranking"]]
            assert [answer.num_votes for answer in found] == [a["count"] for a in expected["ranking"]]
            means = [a["mean_q"] for a in expected["ranking"]]
            np.testing.assert_allclose([answer.confidence for answer in found], means, rtol=1e-14)
            assert (outcome.place is None) == (expected["rank_of_truth"] is None)
            assert outcome.place is None or outcome.place + 1 == expected["rank_of_truth"]


@pytest.mark.parametrize("run", RUNS)
def test_pass_at_k_of_trm_is_the_published_one(run):
    found = pass_at_k(votes_of(run), held_out())
    assert {f"ARC/pass@{k}": found[f"pass@{k}"] for k in KS}.items() <= published()["metrics"][run].items()


def test_pass_at_k_of_hrm_is_what_its_notebook_prints():
    found = pass_at_k(votes_of("single"), held_out())
    lines = published()["metrics"]["hrm_notebook"][1:]
    assert [f"{k}-shot: {found[f'hrm_pass@{k}']:.2%}" for k in KS] == lines


def test_all_pairs_solved_over_all_tasks_is_as_published():
    tasks = outcomes(votes_of("single"), held_out()).values()
    found = {f"pass@{k}": sum(all(pair.within(k) for pair in pairs) for pairs in tasks) / 7 for k in KS}
    assert found == published()["metrics"]["single_all_pairs"]


@pytest.mark.parametrize("run", RUNS)
def test_submission_is_the_published_one_but_for_pairs_without_predictions(run):
    found = submission(votes_of(run), held_out())
    empty = {"attempt_1": [[0]], "attempt_2": [[0]]}
    left_out = 0
    for task, pairs in held_out().tasks.items():
        assert len(found[task]) == len(pairs)
        is_voted = [bool(votes_of(run).num_votes(task, pair.input)) for pair in pairs]
        assert [pair for pair, voted in zip(found[task], is_voted, strict=True) if not voted] == [
            empty
        ] * is_voted.count(False)
        # The published evaluator leaves such a pair out, and all after it move up.
        found[task] = [pair for pair, voted in zip(found[task], is_voted, strict=True) if voted]
        left_out += is_voted.count(False)
    assert found == published()["submissions"][run]
    assert left_out == (run != "two_passes_aggregated")
    assert bool(notes(votes_of(run), held_out())) == (run != "two_passes_aggregated")


def test_a_state_is_arrays_and_gives_the_same_votes():
    state = votes_of("single").state()
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in state.values())
    assert sum(array.nbytes for array in state.values()) < 1_000_000  # 3020 rows have twice 2.7 MB
    copy = Votes(held_out().names)
    copy.merge([state])
    assert all(np.array_equal(array, state[name]) for name, array in copy.state().items())


# Any rows


NAMES = Names(["<blank>", "a", "a|||t3|||0987654321", "b", "b|||t5|||0213456789", "<blank>"])
GRIDS = [np.array(rows, np.uint8) for rows in ([[1, 2]], [[1, 2], [3, 0]], [[0]])]


def tables(rows: list[tuple[int, int, int, float]]) -> tuple[np.ndarray, ...]:
    """Rows of (identifier, number of the input, number of the answer, q) as arrays."""
    ids, questions, answers, q = zip(*rows, strict=True)
    tokens = [np.stack([place(GRIDS[number]) for number in numbers]) for numbers in (questions, answers)]
    return *tokens, np.array(ids), np.array(q, np.float32)


PLANS = [Plan(s, tuple(map(int, c))) for s, c in ((0, "0123456789"), (3, "0987654321"), (5, "0213456789"))]
ROW = st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.floats(-30, 30, width=32))


def everything(votes: Votes) -> dict[tuple, list[tuple]]:
    """All votes, whatever their order."""
    undone = [
        np.argsort(plan.colours).astype(np.uint8)[turned(grid, INVERSE[plan.symmetry])]
        for plan in PLANS
        for grid in GRIDS
    ]
    asked = {(grid.shape, grid.tobytes()): grid for grid in undone}
    return {
        (task, key): sorted(
            (answer.grid.tolist(), answer.num_votes, answer.confidence)
            for answer in votes.ranking(task, grid)
        )
        for task in ("a", "b")
        for key, grid in asked.items()
    }


@given(rows=st.lists(st.tuples(st.integers(0, 3), ROW), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_split_of_the_rows_over_workers_gives_the_same_votes(rows):
    def merged(rows):
        parts = [Votes(NAMES) for _ in range(4)]
        for rank, part in enumerate(parts):
            if own := [row for owner, row in rows if owner == rank]:
                part.add(*tables(own))
        votes = Votes(NAMES)
        votes.merge([part.state() for part in parts])
        return votes

    whole = Votes(NAMES)
    whole.add(*tables([row for _, row in rows]))
    assert everything(merged(rows)) == everything(whole)
    counted = sum(votes for answers in everything(whole).values() for _, votes, _ in answers)
    assert counted == sum(row[0] not in (0, 5) for _, row in rows)
    # Rows that are shared out in order are seen in the same order too.
    one_after_the_other = zip(sorted(owner for owner, _ in rows), [row for _, row in rows], strict=True)
    state = merged(list(one_after_the_other)).state()
    assert all(np.array_equal(array, state[name]) for name, array in whole.state().items())


@given(question=grids(), answer=grids(), augmentations=st.lists(plans(), min_size=1, max_size=5, unique=True))
@settings(max_examples=50, deadline=None)
def test_copies_of_one_answer_vote_for_it(question, answer, augmentations):
    names = Names(["<blank>", "x", *(format_name("x", plan) for plan in augmentations)])
    copies = [(question, answer), *((p.apply(question), p.apply(answer)) for p in augmentations)]
    votes = Votes(names)
    votes.add(
        np.stack([place(q) for q, _ in copies]).astype(np.int32),
        np.stack([place(a) for _, a in copies]),
        np.arange(1, len(names)),
        np.zeros(len(copies), np.float32),
    )
    (best,) = votes.ranking("x", question)
    assert best.grid.tolist() == answer.tolist()
    assert (best.num_votes, best.confidence) == (len(copies), 0.5)
    assert pass_at_k(votes, HeldOut(names, {"x": [Pair(question, answer)]}))["hrm_pass@1"] == 1


def test_order_of_adding_does_not_decide_a_tie():
    """With float64 sums, 0.1 + (0.2 + 0.3) and (0.1 + 0.2) + 0.3 would rank by the last bit."""
    q = [-2.2, -1.4, -0.8, 0.3, 1.7, 2.9]
    votes = Votes(NAMES)
    votes.add(*tables([(1, 0, 1, x) for x in q]))
    votes.add(*tables([(1, 0, 2, x) for x in reversed(q)]))
    first, second = votes.ranking("a", GRIDS[0])
    assert first.confidence == second.confidence and first.grid.tolist() == GRIDS[1].tolist()


def test_extreme_certainty_counts_and_what_is_no_number_is_none():
    votes = Votes(NAMES)
    votes.add(*tables([(1, 0, 1, np.inf), (1, 0, 2, np.nan), (1, 0, 0, -1e30)]))
    assert [answer.confidence for answer in votes.ranking("a", GRIDS[0])] == [1, 0, 0]


@pytest.mark.parametrize("number", [-1, 6, 2**40])
def test_identifiers_of_another_build_are_refused(number):
    votes = Votes(NAMES)
    with pytest.raises(UserError, match=rf"puzzle identifier {number}, .* names 0\.\.5: .* another build"):
        votes.add(*tables([(1, 0, 0, 0.0), (number, 0, 0, 0.0)]))
    assert not votes.num_votes("a", GRIDS[0])


def test_tasks_without_solutions_have_no_pass_at_k():
    question = GRIDS[0]
    votes = Votes(NAMES)
    votes.add(*tables([(1, 0, 1, 0.0)]))
    unknown = HeldOut(NAMES, {"a": [Pair(question, None)]})
    assert pass_at_k(votes, unknown) == {}
    assert notes(votes, unknown) == ["the data set has no solutions of its test tasks: no pass@k"]
    assert submission(votes, unknown) == {
        "a": [{"attempt_1": [[1, 2], [3, 0]], "attempt_2": [[1, 2], [3, 0]]}]
    }
    partly = HeldOut(NAMES, {**unknown.tasks, "b": [Pair(question, question)]})
    assert pass_at_k(votes, partly) == {f"pass@{k}": 0 for k in KS}  # no row of b: HRM's is a mean of nothing
    assert notes(votes, partly)[0] == "1 of 2 test tasks have no solutions, and do not count"
