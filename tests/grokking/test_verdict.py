"""What is said of histories: made up ones, that of Power et al.'s code, and of a run that could not grok."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.grokking.history import History, Source
from hrm_ray.grokking.verdict import is_chance, judge

MOD_97 = Source(chance=1 / 97, num_train=4704, num_test=4705, weight_decay=1.0)
MOD_97_NOISY = dataclasses.replace(MOD_97, noise=235)


def history(train, test, steps=None) -> History:
    steps = np.arange(10.0, 10 * len(train) + 1, 10) if steps is None else np.array(steps, float)
    unknown = np.full(len(train), np.nan)
    columns = {
        "train_loss": unknown,
        "train_acc": np.array(train),
        "test_loss": unknown,
        "test_acc": np.array(test),
    }
    return History(steps, steps, columns)


def jumps(train: int, test: int | None, num: int = 200, plateau: float = 0.01, end: float = 1.0) -> History:
    """A row every 10 steps; the accuracies jump in rows `train` and `test`."""
    rows = np.arange(num)
    late = np.full(num, plateau) if test is None else np.where(rows >= test, end, plateau)
    return history(np.where(rows >= train, 1.0, 0.3), late)


def test_a_late_jump_is_grokking():
    """Numbers of openai/grok, + at 50 %, seed 0, decay 1: 99 % at steps 600 and 2,440, above chance long before."""
    verdict = judge(jumps(59, 243, 250, plateau=0.47), MOD_97)
    assert verdict.outcome == "grokked" and verdict.gap == 1840
    assert verdict.steps == {"train_99": 600, "train_90": 600, "test_99": 2440, "test_90": 2440}
    assert verdict.text == (
        "grokked at step 2,440: validation passed 99 % there, 1,840 steps after training (step 600), "
        "when it was at 47.0 %"
    )
    assert verdict.summary() == {
        "outcome": "grokked",
        "verdict": verdict.text,
        **{"train_99_step": 600, "train_90_step": 600, "test_99_step": 2440, "test_90_step": 2440},
        "gap_steps": 1840,
        "best_test_acc": 1.0,
        "chance": 1 / 97,
        "num_train": 4704,
        "num_test": 4705,
        "weight_decay": 1.0,
        "noise": 0,
        "finished": True,
    }


@pytest.mark.parametrize(("train", "test"), [(50, 50), (50, 60), (50, 40), (1, 0)])
def test_no_delay_worth_the_name(train, test):
    verdict = judge(jumps(train, test), MOD_97)
    assert verdict.outcome == "at once"
    assert verdict.text.startswith("generalised at once, no delay: validation passed 99 % at step")


def test_of_noisy_answers_validation_may_stop_short_of_99_percent():
    verdict = judge(jumps(50, 150, end=0.95), MOD_97)
    assert verdict.outcome == "grokked" and verdict.steps["test_99"] is None
    assert verdict.text.endswith("; 99 % was not reached (best 95.0 %)")


def test_47_equations_are_memorised_only():
    """The run that was taken for one that generalises: 0.5 percent for a half; at the end 0.54 to 0.67 percent."""
    random = np.random.default_rng(0)
    steps = np.unique(np.geomspace(1, 96_000, 700).astype(int))
    test = random.binomial(9362, 0.006, len(steps)) / 9362
    test[400] = 0.0104
    verdict = judge(
        history(np.where(steps > 80, 1.0, steps / 80), test, steps), Source(1 / 97, 47, 9362, 1.0)
    )
    assert verdict.outcome == "memorised only" and verdict.gap is None
    assert "validation stayed at chance level (best 1.04 %, chance 1.03 %) up to step 96,000" in verdict.text
    assert "47 of 9,409 equations (0.50 %) are too few to find the rule" in verdict.text
    assert "train_data_pct in percent, where 0.5 is half a percent" in verdict.text


@pytest.mark.parametrize(
    ("made", "source", "said"),
    [
        (
            jumps(50, None),
            MOD_97,
            ["stayed at chance level", "may be too short, published runs go on to 100,000"],
        ),
        (jumps(50, None, plateau=0.3), MOD_97, ["came to 30.0 % only, chance 1.03 %"]),
        (jumps(50, 185, end=0.6), MOD_97, ["too short: validation still rises"]),
        (jumps(50, None), Source(1 / 97, 1882, 7527), ["1,882 of 9,409 equations (20.0 %) may be too few"]),
        (
            jumps(50, None),
            Source(1 / 97, 4704, 4705, 0.0),
            ["without weight decay it takes up to 1,000,000 steps"],
        ),
        (
            jumps(50, None),
            Source(1 / 97, 4704, 4705, 1.0, 500),
            ["500 answers of training were replaced"],
        ),
        (jumps(50, None), Source(), ["came to 1.00 % only up to step 2,000"]),
    ],
)
def test_why_it_may_have_memorised_only(made, source, said):
    verdict = judge(made, source)
    assert verdict.outcome == "memorised only"
    assert all(text in verdict.text for text in said), verdict.text


def test_did_not_learn():
    verdict = judge(jumps(500, None), MOD_97)
    assert verdict.outcome == "did not learn"
    assert verdict.text.startswith(
        "did not learn: by step 2,000 training reached 30.0 %, validation 1.00 %. Why"
    )
    assert verdict.text.endswith(
        "Why that may be: the learning rate, its warm-up, weight decay or noise may not fit"
    )
    assert judge(history([], []), MOD_97).text == "nothing was evaluated, so there is no verdict"


@pytest.mark.parametrize(
    "train",
    [
        [0.2, 0.3, 0.5],
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        np.linspace(0, 0.5, 100),
        np.linspace(0.1, 0.13, 1000),
        [0.1] * 80 + [math.nan] * 40 + [0.3] * 20,
    ],
)
@pytest.mark.parametrize("spaced", [np.linspace, np.geomspace])
def test_training_that_still_rises_is_too_short(train, spaced):
    """However its evaluations are spaced."""
    made = history(train, np.full(len(train), 0.01), spaced(10, 5000, len(train)))
    assert judge(made, MOD_97).text.endswith("it is too short: training still rises")


@pytest.mark.parametrize("train", [[0.6], [0.2, 0.6], [math.nan, 0.2, math.nan, 0.6]])
def test_one_or_two_rows_are_too_few_to_tell(train):
    verdict = judge(history(train, [0.01] * len(train)), MOD_97)
    assert verdict.text.endswith("it may be too short, and was evaluated too rarely to tell")


def test_a_delay_that_cannot_be_seen_is_not_denied():
    unknown = judge(history([math.nan] * 40, [0.01] * 30 + [1.0] * 10), MOD_97)
    assert unknown.text == (
        "generalised: validation passed 99 % at step 310; the accuracy of training is not known, so neither is a delay"
    )
    noisy = judge(history([0.5] * 20 + [0.95] * 20, [0.01] * 30 + [1.0] * 10), MOD_97_NOISY)
    assert noisy.text.endswith(
        "; training never, as 235 answers of training were replaced, so there is no delay to be told"
    )
    rare = judge(jumps(1, 3), MOD_97)
    assert rare.text == (
        "generalised: validation passed 99 % at step 40, training at step 20; evaluated too rarely to tell a delay"
    )
    first = judge(history([1.0], [1.0], [1000]), MOD_97)
    assert {made.outcome for made in (unknown, noisy, rare, first)} == {"generalised"}
    never = judge(history([0.5] * 40, [0.01] * 30 + [1.0] * 10), MOD_97)
    assert never.text == "generalised at once, no delay: validation passed 99 % at step 310, training never"


def test_what_is_not_known_has_no_verdict():
    unknown = judge(history([math.nan] * 40, [0.3] * 40), MOD_97)
    assert unknown.outcome == "unknown" and "the accuracy of training is not known" in unknown.text
    for made in (history([], []), history([1.0] * 9, [math.nan] * 9)):
        alone = judge(made, Source(1 / 97, 9409, 0))
        assert alone.outcome == "unknown" and "no validation equations" in alone.text


@pytest.mark.parametrize(
    ("made", "begin"),
    [
        (jumps(500, None), "did not learn so far: by step 2,000"),
        (jumps(50, 185, end=0.6), "memorised only so far: training passed"),
        (history([0.6], [0.01]), "did not learn so far: by step 10"),
    ],
)
def test_of_a_run_that_is_not_finished_nothing_is_guessed(made, begin):
    text = judge(made, dataclasses.replace(MOD_97, finished=False, num_train=47)).text
    assert text.startswith(begin) and text.endswith(". Why that may be: it is not finished")


def test_few_validation_equations_may_be_right_by_luck():
    source = Source(1 / 97, 60, 100)
    assert "chance level" in judge(jumps(50, None, plateau=0.04), source).text
    assert "chance level" not in judge(jumps(50, None, plateau=0.06), source).text


@pytest.mark.parametrize(
    ("best", "source", "is_luck"),
    [
        (0.6, Source(0.2, 13, 12), False),
        (0.4, Source(0.2, 13, 12), True),
        (0.03, Source(1 / 97, 4704, 4705), True),
        (0.035, Source(1 / 97, 4704, 4705), False),
        (0.21, Source(0.2), True),
        (0.25, Source(0.2), False),
        (0.01, Source(), False),
    ],
)
def test_what_may_be_luck(best, source, is_luck):
    assert is_chance(best, source) == is_luck


accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(accuracies, st.data())
def test_a_verdict_agrees_with_its_numbers(train, data):
    test = data.draw(st.lists(st.floats(0, 1), min_size=len(train), max_size=len(train)))
    verdict = judge(history(train, test), MOD_97)
    assert verdict.best_test_acc == max(test)
    assert (verdict.outcome in ("grokked", "at once", "generalised")) == (max(test) >= 0.9)
    if verdict.outcome == "memorised only":
        assert max(train) >= 0.9 > max(test)
    if verdict.outcome == "grokked":
        assert verdict.gap > 0
    for split, values in (("train", train), ("test", test)):
        for level in (0.9, 0.99):
            step = verdict.steps[f"{split}_{level * 100:.0f}"]
            assert step == next((10 * (i + 1) for i, value in enumerate(values) if value >= level), None)
