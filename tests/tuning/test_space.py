"""The space of a sweep, its points and their words."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.config.compose import train_config
from hrm_ray.config.validate import as_text, split_word
from hrm_ray.errors import UserError
from hrm_ray.tuning.config import sweep_config
from hrm_ray.tuning.space import as_sampled, in_order, suggest, words_of


def space_of(**space):
    return sweep_config({"train": "experiment=sudoku_4x4", "space": space}).space


def points(space, count=20, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [suggest(study.ask(), space) for _ in range(count)]


def test_every_kind_stays_within_its_ends():
    space = space_of(
        lr={"log": ["1e-4", 1e-2]},  # YAML reads 1e-4 as text
        weight_decay={"uniform": [0, 1], "step": 0.3},
        beta1={"uniform": [0, 0.5]},
        epochs={"int": [1, 9], "step": 4},
        global_batch_size={"log_int": [8, 512]},
        ema=[True, False],
    )
    drawn = points(space, 200)
    assert all(1e-4 <= p["lr"] <= 1e-2 for p in drawn)
    assert {round(p["weight_decay"], 9) for p in drawn} == {0, 0.3, 0.6, 0.9}
    assert {p["epochs"] for p in drawn} == {1, 5, 9}
    assert {p["ema"] for p in drawn} == {True, False}
    small = [p for p in drawn if p["global_batch_size"] <= 64]
    assert 60 < len(small) < 140  # half of them, since the logarithm is uniform


def test_a_conditional_key_is_there_only_where_its_condition_holds():
    space = space_of(
        q_temperature_anneal_ratio={"uniform": [0.1, 1], "when": {"halting": "q_learning"}},
        halting=["act", "q_learning", "fixed"],
    )
    assert in_order(space) == ["halting", "q_temperature_anneal_ratio"]
    drawn = points(space, 60)
    for point in drawn:
        assert ("q_temperature_anneal_ratio" in point) == (point["halting"] == "q_learning")
        train_config(["experiment=sudoku_4x4", *words_of(point)])  # else it would be refused
    assert any("q_temperature_anneal_ratio" in p for p in drawn)


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-12, max_value=1e6))
def test_a_number_keeps_all_its_digits_through_the_command_line(value):
    _, text = split_word(words_of({"lr": value})[0])
    assert float(text) == value


@pytest.mark.parametrize("value", [1.2345678901234567e-05, 3.3e-08, 0.1 + 0.2, 17.0])
def test_and_through_hydra(value):
    assert train_config(["experiment=sudoku_4x4", *words_of({"lr": value})]).lr == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (None, "null"), ("a b", "a b"), (3, "3"), ([1, 2], "[1,2]"), (0.1, "0.1")],
)
def test_words_of_values(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lr": {"log": [0, 1]}}, r"log: \[0, 1\] has no logarithm at 0"),
        ({"lr": {"log": [1, 0.1]}}, r"log: \[1, 0.1\] is empty; give \[LOW, HIGH\]"),
        ({"lr": {"uniform": [0, ".inf"]}}, "space.lr.*finite|uniform"),
        ({"lr": {"uniform": [0, 1], "log": [1, 2]}}, "give one of uniform"),
        ({"lr": {}}, "give one of uniform"),
        ({"lr": {"choice": []}}, "choice: .* is empty"),
        ({"lr": []}, "choice: .* is empty"),
        ({"lr": [1, 1]}, "holds a value twice"),
        ({"lr": {"log": [1, 2], "step": 1}}, "step: is for uniform and int"),
        ({"lr": {"int": [1, 5], "step": 0.5}}, "step: 0.5 is no integer"),
        ({"lr": {"lag": [1, 2]}}, "unknown key 'space.lr.lag'"),
        ({"lr": 3}, "space.lr=3: give a range, such as .*; a fixed value belongs to train: lr=3"),
        ({"lr": {"uniform": [0, 1], "when": {"arch": "trm"}}}, "'arch' is not in the space"),
        (
            {"arch": ["trm"], "lr": {"uniform": [0, 1], "when": {"arch": "trn"}}},
            "arch=trn is not among its choices; known: trm",
        ),
        (
            {
                "lr": {"choice": [1], "when": {"beta1": 0}},
                "beta1": {"choice": [0], "when": {"lr": 1}},
            },
            "the conditions of lr, beta1 go in a circle",
        ),
        ({}, "space: is empty"),
        ("lr", "give keys and their values"),
    ],
)
def test_a_mistake_is_one_line(space, message):
    with pytest.raises(UserError, match=message) as info:
        sweep_config({"train": "experiment=sudoku_4x4", "space": space})
    assert "\n" not in str(info.value)


def test_points_that_a_user_gives():
    space = space_of(lr={"log": [1e-4, 1e-2]}, epochs={"int": [1, 9], "step": 4}, ema=[True, False])
    assert as_sampled(space, {"lr": "3e-3", "epochs": 5, "ema": True}, "try_first") == {
        "lr": 3e-3,
        "epochs": 5,
        "ema": True,
    }
    for point, message in [
        ({"lr": 1}, "try_first: lr=1 is outside of 0.0001 .. 0.01, log"),
        ({"epochs": 4}, "epochs=4 is outside of 1 .. 9, integer, step 4"),
        ({"ema": 3}, r"ema=3 is outside of true \| false"),
        ({"ir": 3}, "'ir' is not in the space; known: ema, epochs, lr"),
    ]:
        with pytest.raises(UserError, match=message):
            as_sampled(space, point, "try_first")
