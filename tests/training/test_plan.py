"""When each schedule ends, and what is said of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.training.plan import Plan

EXAMPLES = SimpleNamespace(num_groups=1000, info=SimpleNamespace(mean_puzzle_examples=1.0))


def plan(total_steps: int, **values) -> Plan:
    """Of a run of 1,000 groups in batches of 10: 100 steps an epoch."""
    halting = {"name": "q_learning", **values.pop("halting", {})}
    values = {"lr_warmup_steps": 10, **values}
    epochs = total_steps // 100
    config = TrainConfig(data_path="", global_batch_size=10, epochs=epochs, halting=halting, **values)
    made = Plan.of(config, EXAMPLES)
    assert (made.total_steps, made.steps_per_epoch) == (total_steps, 100)
    return made


@pytest.mark.parametrize("total_steps", [1_000, 100_000])
def test_durations_are_ratios_of_the_run(total_steps):
    """The two published scenarios: warm-up for a tenth, the penalty falls until half, the temperature to the end."""
    p = plan(total_steps)
    tenth, half = total_steps // 10, total_steps // 2
    halting = p.config.halting
    assert halting.is_warming_up(tenth, total_steps) and not halting.is_warming_up(tenth + 1, total_steps)

    def annealed(step):
        return halting.annealed(step, total_steps)

    assert annealed(0) == {"expansion_penalty": 0.1, "q_temperature": 1.0, "epsilon": 0.2}
    assert annealed(half)["expansion_penalty"] == 0.001 < annealed(half - 1)["expansion_penalty"]
    assert annealed(total_steps)["q_temperature"] == 0.1 < annealed(total_steps - 1)["q_temperature"]
    said = "; ".join(p.describe())
    assert f"{total_steps} steps, 100 an epoch" in said
    assert f"Q-learning: warm-up to step {tenth}" in said
    assert f"expansion_penalty: 0.1 to 0.001 at step {half}" in said
    assert f"q_temperature: 1 to 0.1 at step {total_steps}" in said


def test_numbers_of_steps_become_ratios_with_one_warning_each():
    p = plan(10_000, halting={"expansion_anneal_steps": 2_500, "dqn_warmup_steps": 500})
    halting = p.config.halting.in_ratios(10_000)
    assert (halting.expansion_anneal_ratio, halting.dqn_warmup_ratio) == (0.25, 0.05)
    before, after = (p.values(step)["train/expansion_penalty"] for step in (2_499, 2_500))
    assert after == 0.001 < before
    assert p.warnings() == [
        "expansion_anneal_steps=2500 of 10000 steps is taken as expansion_anneal_ratio=0.25; give that instead",
        "dqn_warmup_steps=500 of 10000 steps is taken as dqn_warmup_ratio=0.05; give that instead",
    ]
    assert plan(1_000).warnings() == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"halting": {"dqn_warmup_steps": 2000}},
            "dqn_warmup_steps=2000 is longer than the run's 1000 steps",
        ),
    ],
)
def test_a_duration_longer_than_the_run(values, said):
    with pytest.raises(UserError, match=said):
        plan(1_000, **values)


def test_a_run_shorter_than_its_warmup_stays_in_it_and_says_so():
    """As published: there it does not get past the warm-up either."""
    p = plan(1_000, lr_warmup_steps=2_000)
    assert (p.lr(1), p.lr(1_000)) == (p.config.lr / 2_000, p.config.lr / 2)
    (said,) = p.warnings()
    assert said.startswith("lr_warmup_steps=2000 is longer than the run's 1000 steps")
    assert plan(1_000, lr_warmup_steps=1_000).warnings() == []


def test_warmup_and_weight_decay_by_ratio():
    p = plan(
        1_000, lr_warmup_ratio=0.2, weight_decay=1.0, weight_decay_end=0.1, weight_decay_anneal_ratio=0.5
    )
    assert p.lr(199) < p.lr(200) == p.config.lr
    assert (p.weight_decay(0), p.weight_decay(500), p.weight_decay(999)) == (1.0, 0.1, 0.1)
    assert p.values(500)["train/weight_decay"] == 0.1


def test_depth_grows_to_that_of_the_architecture():
    arch = {"name": "trm", "H_cycles": 2, "L_cycles": 2, "hidden_size": 32, "num_heads": 2}
    p = plan(1_000, arch=arch, curriculum={"depth": [[0.3, 1, 1], [0.6, 1, 2]]})
    assert [p.depth(step) for step in (1, 300, 301, 600, 601, 1_000)] == [(1, 1)] * 2 + [(1, 2)] * 2 + [
        None
    ] * 2
    assert (
        p.depths(1) == {(1, 1), (1, 2), None} and p.depths(302) == {(1, 2), None} and p.depths(700) == {None}
    )
    short = plan(1_000, arch=arch, curriculum={"depth": [[0.3, 1, 1], [0.6, 1, 2]]}, max_steps=300)
    assert short.depths(1) == {(1, 1)}
    assert "H x L cycles: 1 x 1 to step 300, 1 x 2 to step 600, then 2 x 2" in p.describe()
    assert plan(1_000).depth(1) is None


@pytest.mark.parametrize(
    ("arch", "depth", "said"),
    [
        ({"name": "trm"}, [[0.6, 1, 1], [0.3, 1, 2]], "its shares of the run must rise"),
        ({"name": "trm"}, [[0.3, 4, 1]], "4 and 1 cycles until 0.3 of the run are more than arch.H_cycles=3"),
        ({"name": "transformer"}, [[0.3, 1, 1]], "arch=transformer has no H_cycles"),
        ({"name": "trm"}, [[1, 1, 1]], "less than 1"),
    ],
)
def test_a_depth_that_cannot_be(arch, depth, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(data_path="", arch=arch, curriculum={"depth": depth})


def test_more_and_more_puzzles_are_taken():
    p = plan(1_000, curriculum={"rating": [0.25, 0.5]})
    assert [p.easiest(step) for step in (0, 250, 500, 1_000)] == [0.25, 0.625, 1.0, 1.0]
    assert p.values(250)["train/easiest"] == 0.625
    assert "the easiest 0.25 of the puzzles, up to all at step 500" in p.describe()
    assert plan(1_000).easiest(1) == 1.0 and "train/easiest" not in plan(1_000).values(1)


def test_fewer_and_fewer_cells_are_filled_in():
    p = plan(1_000, curriculum={"filled": [0.8, 0.5]})
    assert [p.filled(step) for step in (0, 250, 500, 1_000)] == [0.8, 0.4, 0.0, 0.0]
    assert p.filled(499) > 0 and p.values(250)["train/filled"] == 0.4
    assert "filled in: 0.8 of the open cells, down to 0 at step 500" in p.describe()
    assert plan(1_000).filled(1) == 0.0 and "train/filled" not in plan(1_000).values(1)


@pytest.mark.parametrize(
    ("filled", "said"),
    [
        (0.7, r"curriculum\.filled: give \[SHARE,UNTIL\]"),
        ([0.7], "give .SHARE,UNTIL."),
        ([0.7, 0.5, 1], "give .SHARE,UNTIL."),
        ([0, 0.5], "greater than 0"),
        ([1.5, 0.5], "less than or equal to 1"),
        ([0.7, "half"], "valid number"),
    ],
)
def test_a_share_that_cannot_be_filled_in(filled, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(data_path="", curriculum={"filled": filled})
    with pytest.raises(ValueError, match=said.replace("filled", "rating")):
        TrainConfig(data_path="", curriculum={"rating": filled})


def test_supervision_steps_make_the_run_shorter():
    config = TrainConfig(
        data_path="", global_batch_size=10, epochs=10, supervision_steps=4, lr_warmup_steps=0
    )
    p = Plan.of(config, EXAMPLES)
    assert (p.total_steps, p.steps_per_epoch, p.epoch(250)) == (250, 25, 10)


def test_evaluations_become_rarer():
    """As openai/grok spaces those of epochs: from a run of its loggers' arithmetic."""
    golden = json.loads(Path("tests/golden/grok/schedule.json").read_text())
    for name, spacing in (("train_epochs_logged", 0.01), ("val_epochs_evaluated", 0.02)):
        published = [epoch for epoch in golden[name] if epoch > 0]
        p = plan(10_000, eval_spacing=spacing, max_steps=published[-1])
        assert [step for step in range(1, p.last_step + 1) if p.evaluates(step)] == published
    p = plan(100_000, eval_spacing=0.01, eval_interval_steps=10)
    steps = [step for step in range(1, 100_001) if p.evaluates(step)]
    assert steps[:100] == list(range(10, 1001, 10)) and steps[100] == 1010 and steps[-1] == 100_000
    before, gaps = np.array(steps[:-2]), np.diff(steps[:-1])
    assert (gaps >= 10).all() and (gaps <= np.maximum(10, 0.01 * before)).all() and len(steps) < 600
    assert [p.num_evaluations(step) for step in (9, 10, 19, 1010)] == [0, 1, 1, 101]
    assert [step for step in steps if p.saves(step)] == [100_000]
