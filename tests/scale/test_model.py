"""The model of docs/scale.md against numbers worked out by hand, its limits, and what must grow with what."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.config.compose import train_config
from hrm_ray.scale.machine import Machine, load_machine
from hrm_ray.scale.model import (
    all_reduce_s,
    crowding,
    efficiency,
    evaluation_s,
    fastest_workers,
    first,
    most_useful_workers,
    smallest_useful_batch,
    step,
    training,
)
from hrm_ray.scale.work import Model, Pass, Puzzles, Work
from hrm_ray.training import plan

# Four workers in a machine; a step of one puzzle is a second of products and half a second of launches.
ROUND = {
    "flops_per_s": 1e9,
    "launch_s": 0.005,
    "optimizer_bytes_per_s": 28e6,
    "crowded": 2.5,
    "inside_bytes_per_s": 8e6,
    "inside_latency_s": 0.01,
    "between_bytes_per_s": 4e6,
    "between_latency_s": 0.1,
    "data_s": 0.125,
    "copy_bytes_per_s": 1e6,
    "store_bytes_per_s": 1e5,
    "start_s": 50,
    "price_per_hour": 4,
    "spot_price_per_hour": 1,
    "interruptions_per_hour": 0.1,
    "replace_s": 200,
}
WORDS = ["data=d", "arch.puzzle_emb_ndim=0", "arch.halt_max_steps=2", "epochs=10", "global_batch_size=8"]
WORDS += ["eval_interval=5", "checkpoint_interval_s=100", "lr_warmup_steps=1"]
PASSES = Model(1_000_000, Pass(1e9, 100), Pass(0.25e9, 40))
WORK = Work(train_config(WORDS), Puzzles("", 4, 10, 1, 800, 12), PASSES, last_step=1000, num_evaluations=2)


def machine(*, runs_ahead: bool = False, workers: int = 4, **values: float) -> Machine:
    numbers = {key: {"value": value, "source": "assumed"} for key, value in (ROUND | values).items()}
    return Machine.model_validate({"about": "", "workers": workers, "runs_ahead": runs_ahead, **numbers})


def work(*words: str) -> Work:
    return replace(WORK, config=train_config([*WORDS, *words]))


@pytest.fixture(autouse=True)
def small_batches_in_evaluations(monkeypatch):
    """As small as in training, so that numbers can be counted by hand."""
    monkeypatch.setattr(plan, "LEAST_CELLS", 1)


def test_one_step_by_hand():
    """8 puzzles: 8 s of products, 0.5 s of launches, 28 MB at 28 MB/s for the optimizer."""
    found = step(machine(), WORK, 1, 8)
    assert (found.products, found.launches, found.optimizer, found.exchange) == (8, 0.5, 1, 0)
    assert found.seconds == pytest.approx(8 + 0.5 + 1 + 0.125)
    assert step(machine(runs_ahead=True), WORK, 1, 8).seconds == pytest.approx(8 + 1 + 0.125)
    assert step(machine(runs_ahead=True, launch_s=0.2), WORK, 1, 8).seconds == pytest.approx(20 + 1 + 0.125)


def test_a_shared_step_by_hand():
    """Of 8 workers, on two machines, each has a puzzle; four side by side compute 2.5 times as long.

    4 MB of gradients in 1 + 1 buckets and two messages more: inside 2 * 3/4 * 4 MB at 8 MB/s and 4 messages over 6 hops
    of 0.01 s; between 2 * 1/2 * 4 MB at 4 MB/s and 4 messages over 2 hops of 0.1 s.
    """
    assert WORK.num_messages == 4
    found = step(machine(), WORK, 8, 8)
    assert found.computing == pytest.approx(2.5 * (1 + 0.5 + 1))
    assert found.exchange == pytest.approx((0.75 + 0.24) + (1 + 0.8))
    assert found.seconds == pytest.approx(6.25 + 2.79 + 0.125)


def test_the_puzzle_embedding_is_gathered():
    """3 * 8 rows of 10 + 1 numbers: half of what an all-reduce of them would send, in one message more."""
    w = replace(work("arch.puzzle_emb_ndim=10", "supervision_steps=3"), model=PASSES)
    by_hand = all_reduce_s(machine(), 8, 4e6 + 3 * 8 * 11 * 4 / 2, 5)
    assert step(machine(), w, 8, 8).exchange == pytest.approx(by_hand)


def test_a_batch_that_is_computed_in_parts_is_launched_as_often():
    assert step(machine(), work("micro_batch_size=3"), 1, 8).launches == pytest.approx(3 * 0.5)
    assert step(machine(), work("micro_batch_size=3"), 1, 8).products == pytest.approx(8)
    found = step(machine(), work("supervision_steps=2"), 1, 8)
    assert (found.products, found.launches, found.optimizer) == (16, 1, 1)


@pytest.mark.parametrize(("workers", "times"), [(1, 1), (2, 1.5), (4, 2.5), (5, 2.5), (100, 2.5)])
def test_neighbours_slow_a_worker_down(workers, times):
    assert crowding(machine(), workers) == pytest.approx(times)
    assert crowding(machine(workers=1), workers) == 1


def test_an_evaluation_by_hand():
    """12 puzzles, 2 ACT steps each: two batches of 8 with 2 s of products and 0.2 s of launches an ACT step."""
    assert evaluation_s(machine(), WORK, 1, 8) == pytest.approx(2 * 2 * 2.2)
    assert evaluation_s(machine(), WORK, 4, 8) == pytest.approx(2.5 * 2 * 2 * (0.5 + 0.2))
    assert evaluation_s(machine(), work("num_eval_examples=8"), 1, 8) == pytest.approx(2 * 2.2)
    assert evaluation_s(machine(), work("micro_batch_size=4"), 1, 8) == pytest.approx(3 * 2 * 1.2)


def test_an_evaluation_takes_more_at_once_where_batches_are_small(monkeypatch):
    monkeypatch.setattr(plan, "LEAST_CELLS", 40)  # four of these puzzles
    assert evaluation_s(machine(), WORK, 1, 2) == evaluation_s(machine(), work("micro_batch_size=4"), 1, 8)
    monkeypatch.setattr(plan, "LEAST_CELLS", 4096)  # more than there are
    assert evaluation_s(machine(), WORK, 1, 8) == pytest.approx(2 * (12 / 4 + 0.2))


def test_a_training_by_hand():
    """1000 steps of 9.625 s, 2 evaluations, a checkpoint every 100 s; spot machines go once in 10 hours."""
    found = training(machine(), WORK, 1, 8)
    size = 4 * (3 * 1_000_000 + 8 * 2 * 10 * 512)
    assert (found.start, found.steps, found.evaluations) == (50, pytest.approx(9625), pytest.approx(17.6))
    assert found.checkpoints == pytest.approx(96.25 * size / 1e6)
    assert found.cost == pytest.approx(4 * found.seconds / 3600)
    assert found.lost == pytest.approx(100 / 2 + size / 1e5 + 200 + 50)
    assert found.spot == pytest.approx(found.seconds / (1 - 0.1 / 3600 * found.lost))
    assert found.spot_cost == pytest.approx(found.spot / 3600)
    # Two machines are interrupted twice as often, and all eight workers are paid.
    found = training(machine(), WORK, 8, 8)
    assert found.spot == pytest.approx(found.seconds / (1 - 0.2 / 3600 * found.lost))
    assert found.cost == pytest.approx(8 * 4 * found.seconds / 3600)


@pytest.mark.parametrize(
    ("words", "interval"),
    [
        (["checkpoint_interval_s=null"], 9625 / 2),  # at evaluations
        (["checkpoint_interval_s=null", "checkpoint_interval=7"], 7 * 9.625),
        (["checkpoint_interval=7"], 7 * 9.625),
        (["checkpoint_interval=70"], 100),
    ],
)
def test_checkpoints_are_written_whenever_any_rule_says_so(words, interval):
    assert training(machine(), work(*words), 1, 8).save_interval == pytest.approx(interval)


def test_training_puzzles_are_evaluated_too_where_that_is_asked_for():
    assert work("eval_train=true").num_evaluated == work().num_evaluated + 800
    assert work("eval_train=true", "num_eval_examples=3").num_evaluated == 6


def test_an_evaluation_that_is_longer_than_the_interval_is_what_is_lost():
    long = replace(WORK, puzzles=replace(WORK.puzzles, num_test=8000))
    found = training(machine(), long, 1, 8)
    assert found.lost - training(machine(), WORK, 1, 8).lost == pytest.approx(1000 * 2 * 2.2 / 2 - 50)


def test_interruptions_may_come_faster_than_work_is_done():
    found = training(machine(interruptions_per_hour=60), WORK, 1, 8)
    assert found.spot == found.spot_cost == math.inf and found.cost < math.inf
    never = training(machine(interruptions_per_hour=0), WORK, 1, 8)
    assert never.spot == never.seconds


def test_half_efficiency_by_hand():
    """8 puzzles take 8 s alone. On n workers, a machine for each: ceil(8 / n) s, and 2 (n - 1) / n s for 4 MB."""
    free = {"launch_s": 0, "optimizer_bytes_per_s": 1e30, "between_latency_s": 0, "data_s": 0}
    m = machine(workers=1, **free)
    assert efficiency(m, WORK, 2, 8) == pytest.approx(8 / (2 * (4 + 1)))
    assert efficiency(m, WORK, 4, 8) == pytest.approx(8 / (4 * (2 + 1.5)))  # 0.57
    assert efficiency(m, WORK, 5, 8) == pytest.approx(8 / (5 * (2 + 1.6)))  # 0.44
    assert most_useful_workers(m, WORK, 8) == 4
    assert fastest_workers(m, WORK, 8) == 8  # 2.75 s
    assert (
        smallest_useful_batch(m, WORK, 8) == 16
    )  # two puzzles each: 16 / (8 * (2 + 1.75)) = 0.53; one: 0.36
    unlimited = machine(workers=1, **free | {"between_bytes_per_s": 1e30})
    assert most_useful_workers(unlimited, WORK, 8) == fastest_workers(unlimited, WORK, 8) == 8
    assert smallest_useful_batch(machine(crowded=9), WORK, 4) is None


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_first(limit):
    assert first(lambda n: n >= limit, 100) == limit
    assert first(lambda n: False, limit) is None
    assert first(lambda n: True, 0) is None


WORKERS, BATCH = st.integers(1, 3000), st.integers(1, 4000)
VALUES = st.floats(1e-9, 1e9)


@given(WORKERS)
def test_one_worker_says_nothing_and_no_link_takes_no_time(n):
    assert all_reduce_s(machine(), 1, 1e9, 99) == 0
    free = machine(inside_bytes_per_s=1e37, between_bytes_per_s=1e37, inside_latency_s=0, between_latency_s=0)
    assert all_reduce_s(free, n, 1e9, 99) < 1e-20


@given(WORKERS, VALUES, st.integers(1, 50))
def test_an_all_reduce_grows_with_workers_bytes_and_messages(n, size, messages):
    m = machine()
    assert all_reduce_s(m, n + 1, size, messages) >= all_reduce_s(m, n, size, messages)
    assert all_reduce_s(m, n, 2 * size, messages) >= all_reduce_s(m, n, size, messages)
    assert all_reduce_s(m, n, size, messages + 1) >= all_reduce_s(m, n, size, messages)
    # Each worker sends less than twice the bytes in each of the two rings.
    assert all_reduce_s(m, n, size, 0) <= 2 * size / 8e6 + 2 * size / 4e6


@given(WORKERS, BATCH, st.booleans())
def test_a_step_grows_with_the_batch_and_computing_shrinks_with_workers(n, batch, runs_ahead):
    m = machine(runs_ahead=runs_ahead, crowded=1)
    assert step(m, WORK, n, batch + n).seconds > step(m, WORK, n, batch).seconds
    assert step(m, WORK, n + 1, batch).computing <= step(m, WORK, n, batch).computing
    found = step(m, WORK, n, batch)
    assert found.computing >= max(found.products, found.launches)
    assert found.seconds >= found.computing + found.exchange


@given(WORKERS, BATCH)
def test_no_worker_does_more_than_its_share(n, batch):
    assert efficiency(machine(crowded=1), WORK, n, batch) <= 1 + 1e-9
    assert efficiency(machine(), WORK, 1, batch) == 1


@given(st.integers(1, 64), st.floats(0, 20), st.floats(0, 20))
def test_more_interruptions_cost_more(n, some, more):
    few, many = (training(machine(interruptions_per_hour=rate), WORK, n, 64) for rate in sorted((some, more)))
    assert few.seconds <= few.spot <= many.spot
    assert few.seconds == many.seconds


@given(st.integers(1, 64), st.integers(1, 500))
def test_a_whole_training_has_the_same_puzzles_whatever_the_batch(n, batch):
    found = training(machine(), WORK, n, batch)
    assert 0 <= 8000 - found.num_steps * batch < batch
    assert found.seconds == pytest.approx(found.start + found.steps + found.evaluations + found.checkpoints)


def test_the_measured_step_of_an_h200_comes_out():
    """80.6 ms (docs/performance.md): 768 puzzles of the 27M model."""
    w = Work.of(train_config(["experiment=sudoku_extreme"]), Puzzles("", 11, 81, 1, 1000, 0))
    found = step(load_machine("h200"), w, 1, 768)
    assert found.seconds == pytest.approx(80.6e-3, rel=0.005)
    assert found.optimizer == pytest.approx(0.196e-3, rel=0.005)


def test_the_measured_step_of_the_quickstart_on_an_h200_waits_for_launches():
    """13.6 ms, compiled (docs/performance.md); recorded as a CUDA graph it takes 2.0."""
    w = Work.of(train_config(["experiment=sudoku_4x4"]), Puzzles("", 6, 16, 1, 12000, 0))
    found = step(load_machine("h200"), w, 1, 256)
    assert found.seconds == pytest.approx(13.6e-3, rel=0.03)
    assert found.products < 2.0e-3
