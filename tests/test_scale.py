"""The model of step time and cost, against sums by hand and its limits."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray import scale
from hrm_ray.cli import main
from hrm_ray.config.compose import train_config
from hrm_ray.errors import UserError
from hrm_ray.scale import (
    Work,
    all_reduce_s,
    fewest_puzzles,
    machine_of,
    most_useful,
    ring_s,
    step_of,
    training_of,
    work_of,
)

H200 = machine_of("h200")
WORK = Work(params=1_000_000, flops=1e9, products=100)


def test_a_model_is_counted_as_by_hand():
    """A block of width D and S tokens: attention 4 D^2, SwiGLU 3 D F a token, and 2 S^2 D of attention itself."""
    config = train_config(["experiment=quickstart", "data=unknown", "arch.puzzle_emb_ndim=0"])
    arch, S = config.arch, 16
    D, F = arch.hidden_size, 256 * math.ceil(arch.expansion * arch.hidden_size * 2 / 3 / 256)
    block = 2 * S * (4 * D * D + 3 * D * F) + 4 * S * S * D
    applied = arch.H_cycles * (arch.L_cycles * arch.L_layers + arch.H_layers)
    learned = arch.L_layers + arch.H_layers
    # Twice forward, since the target of q_continue is the next step's; the gradient takes two products for each.
    expected = block * (2 * applied + 2 * learned)
    found = work_of(config, vocab_size=5, seq_len=S)
    assert found.flops == pytest.approx(expected, rel=0.02)  # the heads are the rest
    assert found.flops > expected


def test_the_published_model_has_the_published_size():
    found = work_of(train_config(["experiment=sudoku_extreme", "data=unknown"]))
    assert found.params == 27_275_266
    assert 1e3 * step_of(found, H200, 768, 1).total == pytest.approx(80.6, abs=0.5)  # as measured


def test_a_step_by_hand():
    step = step_of(WORK, H200, 100, 8)
    assert step.compute == 13 * 1e9 / 3.5e14  # the worker with most puzzles
    assert step.launch == 100 * 6.8e-5 > step.compute
    assert step.optimizer == 28e6 / 3.9e12
    assert step.all_reduce == pytest.approx(14 * (4e6 / 8 / 3e11 + 5e-6))
    assert step.total == step.launch + step.optimizer + step.all_reduce + 2e-4
    two_machines = all_reduce_s(4e6, H200, 16)
    assert two_machines == pytest.approx(step.all_reduce + 2 * (4e6 / 2 / 4e10 + 2e-5))


def test_one_alone_sends_nothing():
    assert step_of(WORK, H200, 64, 1).all_reduce == 0 == ring_s(1e9, 1, 1.0, 1.0)


counts = st.integers(1, 600)


@given(batch=st.integers(1, 10**5), few=counts, more=counts)
def test_more_workers_compute_less_and_send_more(batch, few, more):
    few, more = sorted((few, more))
    one, other = step_of(WORK, H200, batch, few), step_of(WORK, H200, batch, more)
    assert other.compute <= one.compute and other.optimizer == one.optimizer
    if few % 8 == 0 or more <= 8:  # whole machines
        assert other.all_reduce >= one.all_reduce


@given(batch=st.integers(1, 10**6))
def test_what_is_useful_is_used_by_half(batch):
    useful = most_useful(WORK, H200, batch)
    alone = step_of(WORK, H200, batch, 1).total
    assert useful <= batch
    assert useful == 1 or alone / useful / step_of(WORK, H200, batch, useful).total >= 0.5
    double = step_of(WORK, H200, batch, 2 * useful).total
    assert 2 * useful > batch or alone / (2 * useful) / double < 0.5


def test_the_fewest_puzzles_that_keep_a_gpu_busy():
    few = fewest_puzzles(WORK, H200)
    assert step_of(WORK, H200, few, 1).compute >= step_of(WORK, H200, few, 1).launch
    assert step_of(WORK, H200, few - 1, 1).compute < step_of(WORK, H200, few - 1, 1).launch


def test_a_training_by_hand():
    """10 hours of steps, a checkpoint every half an hour that takes 18 s: 1 %; two machines lost 0.05 times an hour."""
    machine = H200.model_copy(update={"checkpoint_s": 18.0, "restart_s": 900.0, "start_s": 0.0})
    found = training_of(0.36, 100_000, machine, 16, 1800.0)
    assert found.hours == pytest.approx(10.1) and found.price == pytest.approx(10.1 * 16 * 4)
    assert found.lost == pytest.approx(2 * 0.05 * 0.5)  # half an hour each: half an interval and the restart
    assert found.spot_hours == pytest.approx(10.1 / 0.95)
    assert found.spot_price == pytest.approx(10.1 / 0.95 * 16 * 2)
    assert (
        training_of(0.36, 100_000, machine, 512, 1e6).spot_hours == math.inf
    )  # never done between two losses


def test_the_command(capsys):
    words = ["scale", "experiment=quickstart", "data=unknown", "vocab_size=5", "seq_len=16", "groups=12000"]
    assert main(words) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    by_workers = [int(row[0]) for row in rows if row[0].isdecimal()]
    assert by_workers.count(64) == 3 and by_workers.count(512) == 1  # 512 GPUs would have no puzzle each
    assert "469 steps" in text or "468 steps" in text
    assert text.count("assumed") >= 8 and text.count("measured") >= 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"flops_per_s": -1}, "flops_per_s"),
        ({"gpus": 0}, "gpus"),
        ({"nvlink": 3}, "nvlink"),
        ({"price_hour": None}, "price_hour"),
    ],
)
def test_a_machine_of_ones_own(tmp_path, capsys, change, said):
    values = yaml.safe_load((scale.MACHINES / "h200.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    assert machine_of(str(file)) == H200
    file.write_text(yaml.safe_dump({k: v for k, v in {**values, **change}.items() if v is not None}))
    assert main(["scale", "experiment=quickstart", "data=unknown", f"machine={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(file) in line


def test_a_machine_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match="machine=h20 is neither a file nor"):
        machine_of("h20")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no keys of a machine"):
        machine_of(str(tmp_path / "list.yaml"))
