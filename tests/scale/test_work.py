"""What is counted of a model and a run, against formulas, torch's own buckets, and what was measured."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hrm_ray.config.compose import train_config
from hrm_ray.errors import UserError
from hrm_ray.machine import resolve
from hrm_ray.models.layers import swiglu_width
from hrm_ray.models.registry import build_model
from hrm_ray.scale.work import BUCKET, FIRST_BUCKET, Model, Puzzles, Work, puzzles_of
from hrm_ray.training.plan import Plan
from tests.toy import toy_dataset

SUDOKU = Puzzles("9x9", 11, 81, 1, 1000, 422_786)


def work(*words: str, puzzles: Puzzles = SUDOKU) -> Work:
    return Work.of(train_config(["data=d", *words]), puzzles)


def block_flops(D: int, S: int, width: int) -> float:
    """A multiply and an add for each weight and token, and twice the width of them for each pair of tokens."""
    return 2 * S * (4 * D * D + 3 * D * width) + 4 * S * S * D


def head_flops(D: int, C: int, V: int) -> float:
    return 2 * C * D * V + 2 * D * 2


def test_products_of_hrm_are_those_of_its_formula():
    """Forward, and again for the target of q_continue; backward, twice the last update of each module."""
    block = block_flops(512, 82, swiglu_width(512, 4))
    updates = 2 * 2 * 4 + 2 * 4  # layers of L and H that are applied
    heads, q_head = head_flops(512, 81, 11), 2 * 512 * 2
    forward, backward = updates * block + heads, 2 * (8 * block + heads)
    counted = work("arch=hrm_v1").model
    assert counted.num_params == 27_275_266  # as published
    assert counted.evaluation.flops == forward
    assert counted.training.flops == pytest.approx(forward + updates * block + q_head + backward, rel=1e-6)
    # Of a layer six products: four of its matrices, two of attention; and the two heads.
    assert counted.evaluation.products == updates * 6 + 2


def test_products_of_trm_are_those_of_its_formula():
    """One pass, and backward through the whole last cycle."""
    block = block_flops(512, 97, swiglu_width(512, 4))
    per_cycle = 2 * (6 + 1)
    heads = head_flops(512, 81, 11)
    counted = work("arch=trm").model
    assert counted.evaluation.flops == 3 * per_cycle * block + heads
    expected = 3 * per_cycle * block + heads + 2 * (per_cycle * block + heads)
    assert counted.training.flops == pytest.approx(expected, rel=1e-6)


def test_each_path_of_a_puzzle_is_a_pass_more():
    """Without gradients, as in evaluation; and a working state more in the carry."""
    one, four = (work("arch=trm", "arch.init_std=1", f"paths.train={number}") for number in (1, 4))
    assert four.model.training.flops - one.model.training.flops == 4 * one.model.evaluation.flops
    assert four.checkpoint_bytes(2) - one.checkpoint_bytes(2) == 4 * 2 * 3 * 97 * 512


@pytest.mark.parametrize("arch", ["hrm_v1", "trm", "trm_mlp", "transformer"])
@pytest.mark.parametrize("halting", ["act", "q_learning", "fixed"])
def test_every_model_can_be_counted_and_nothing_is_drawn(arch, halting):
    before = torch.get_rng_state()
    config = train_config(
        ["data=d", f"arch={arch}", f"halting={halting}", "arch.hidden_size=32", "arch.num_heads=2"]
    )
    small = Puzzles("4x4", 6, 16, 3, 10, 0)
    counted = Model.of(config.arch, small, config.halting)
    assert before.equal(torch.get_rng_state())
    assert counted.num_params == sum(
        p.numel() for p in build_model(config.arch, small, resolve(device="cpu"), config.halting).parameters()
    )
    assert counted.training.flops > counted.evaluation.flops > 0


def test_positions_in_a_grid_are_counted(tmp_path, monkeypatch):
    """Vectors of 4 rows, columns and boxes in place of those of 16 cells."""
    monkeypatch.chdir(tmp_path)
    words, puzzles = ["arch.hidden_size=32", "arch.num_heads=2", "arch.puzzle_emb_ndim=0"], "data/sudoku-4x4"
    learned, grid = (
        work(*words, f"arch.pos_encodings={kind}", puzzles=puzzles_of(puzzles)).model.num_params
        for kind in ("learned", "grid")
    )
    assert learned - grid == (16 - 3 * 4) * 32


def test_a_checkpoint_has_the_size_that_was_measured():
    """338 MB with 32 slots (docs/performance.md)."""
    assert work("arch=hrm_v1").checkpoint_bytes(32) == pytest.approx(338e6, rel=0.005)
    hrm = work("arch=hrm_v1", "ema=true")
    assert hrm.checkpoint_bytes(32) - work("arch=hrm_v1").checkpoint_bytes(32) == hrm.gradient_bytes


@pytest.mark.parametrize("arch", ["hrm_v1", "trm_mlp"])
def test_messages_are_the_buckets_of_ddp_and_three(arch):
    found = work(f"arch={arch}")
    model = build_model(found.config.arch, SUDOKU, resolve(device="cpu"))
    buckets, _ = dist._compute_bucket_assignment_by_size(
        list(model.parameters())[::-1], [FIRST_BUCKET, BUCKET], [False] * len(list(model.parameters()))
    )
    assert abs(found.num_messages - 3 - len(buckets)) <= 1  # DDP's may be fuller than full
    assert work(f"arch={arch}", "arch.puzzle_emb_ndim=0").num_messages == found.num_messages - 1


def test_rows_of_the_puzzle_embedding():
    assert work("arch=hrm_v1").embedding_bytes(10) == 10 * 4 * (512 + 1)
    assert work("arch=hrm_v1", "supervision_steps=3").embedding_bytes(10) == 30 * 4 * (512 + 1)
    assert work("arch=hrm_v1", "arch.puzzle_emb_ndim=0").embedding_bytes(10) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["epochs=100", "eval_interval=10"],
        ["epochs=100", "eval_interval=7"],
        ["epochs=100", "eval_interval=null"],
        ["epochs=100", "eval_interval_steps=9"],
        ["epochs=100", "eval_interval_steps=9", "eval_spacing=0.1"],
        ["epochs=100", "eval_interval=10", "max_steps=37"],
        ["epochs=100", "eval_interval=10", "supervision_steps=2"],
        ["epochs=1", "eval_interval=1", "global_batch_size=1000"],
    ],
)
def test_evaluations_are_as_many_as_the_plan_says(words):
    found = work(
        "arch.hidden_size=32", "arch.num_heads=2", "lr_warmup_steps=1", "global_batch_size=128", *words
    )
    split = SimpleNamespace(num_groups=1000, info=SimpleNamespace(mean_puzzle_examples=1.0))
    plan = Plan.of(found.config, split)
    assert found.last_step == plan.last_step
    assert found.num_evaluations == sum(plan.evaluates(step) for step in range(1, plan.last_step + 1))


def test_without_test_puzzles_nothing_is_evaluated():
    assert (
        work(
            "arch.hidden_size=32", "arch.num_heads=2", puzzles=Puzzles("", 11, 81, 1, 1000, 0)
        ).num_evaluations
        == 0
    )


def test_a_larger_batch_takes_fewer_steps():
    found = work("arch.hidden_size=32", "arch.num_heads=2", "global_batch_size=100", "epochs=10")
    assert [found.num_steps(batch) for batch in (100, 200, 1000, 10**9)] == [100, 50, 10, 1]


def test_puzzles_are_those_of_the_data_set(tmp_path):
    toy_dataset(tmp_path / "d", num_train=12, num_test=5, puzzles_per_group=2, num_identifiers=7)
    found = puzzles_of(str(tmp_path / "d"))
    assert found == Puzzles(f"data set {tmp_path / 'd'}", 6, 16, 7, 12, 10)


def test_puzzles_of_a_data_set_that_is_not_there_are_those_of_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert puzzles_of("data/sudoku-9x9") == Puzzles("recipe sudoku_9x9", 11, 81, 1, 1000, 422_786)
    assert puzzles_of("data/sudoku-4x4") == Puzzles("recipe sudoku_4x4", 6, 16, 1, 12_000, 500)
    with pytest.raises(UserError, match="no dataset folder data/mine; build one"):
        puzzles_of("data/mine")
    with pytest.raises(UserError, match="sudoku_extreme_full does not say how many"):
        puzzles_of("data/sudoku-extreme-full")
