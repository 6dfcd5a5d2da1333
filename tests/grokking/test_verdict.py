"""What is said of histories: made up ones, that of Power et al.'s code, and of a run that could not grok."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.grokking.history import History, Source
from hrm_ray.grokking.verdict import judge

MOD_97 = Source(chance=1 / 97, num_train=4704, num_test=4705, weight_decay=1.0)


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
    }


@pytest.mark.parametrize(("train", "test"), [(50, 50), (50, 60), (50, 40), (1, 3)])
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
            ["500 answers of training are wrong on purpose"],
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
    rising = judge(history(np.linspace(0, 0.5, 100), np.full(100, 0.01)), MOD_97)
    assert rising.text.endswith("it is too short: training still rises")
    seen_once = judge(history([0.6], [0.01]), MOD_97)
    assert seen_once.text.endswith("it may be too short, and was evaluated too rarely to tell")
    assert judge(history([], []), MOD_97).text == "nothing was evaluated, so there is no verdict"


def test_few_validation_equations_may_be_right_by_luck():
    source = Source(1 / 97, 60, 100)
    assert "chance level" in judge(jumps(50, None, plateau=0.04), source).text
    assert "chance level" not in judge(jumps(50, None, plateau=0.06), source).text


accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(accuracies, st.data())
def test_a_verdict_agrees_with_its_numbers(train, data):
    test = data.draw(st.lists(st.floats(0, 1), min_size=len(train), max_size=len(train)))
    verdict = judge(history(train, test), MOD_97)
    assert verdict.best_test_acc == max(test)
    assert (verdict.outcome in ("grokked", "at once")) == (max(test) >= 0.9)
    if verdict.outcome == "memorised only":
        assert max(train) >= 0.9 > max(test)
    if verdict.outcome == "grokked":
        assert verdict.gap > 0
    for split, values in (("train", train), ("test", test)):
        for level in (0.9, 0.99):
            step = verdict.steps[f"{split}_{level * 100:.0f}"]
            assert step == next((10 * (i + 1) for i, value in enumerate(values) if value >= level), None)
