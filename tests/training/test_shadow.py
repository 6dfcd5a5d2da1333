"""What a checkpoint has of the puzzle embedding is the whole table, though only rows that moved are copied."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_ray.config.schema import TrainConfig
from hrm_ray.training import shadow
from hrm_ray.training.checkpoint import MODEL_FILE, finished
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.training.shadow import Shadow
from hrm_ray.world import World
from tests.toy import toy_config, toy_dataset

ROWS = st.lists(st.integers(0, 19), max_size=20)


@settings(deadline=None)
@given(st.lists(st.one_of(ROWS, st.none()), max_size=8), st.integers(1, 30))
def test_a_shadow_is_the_table(steps, at_once):
    """Rows move, some several times before a copy (None), some after."""
    table = torch.zeros(20, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "ROW_BYTES", at_once * 12)
        follower = Shadow(table)
        for number, rows in enumerate([*steps, None], start=1):
            if rows is None:
                assert torch.equal(follower.follow(table), table)
                assert not follower.stale.any()
            else:
                table[rows] = float(number)
                follower.stale[rows] = True


def test_only_stale_rows_are_copied():
    table = torch.zeros(20, 3)
    follower = Shadow(table)
    table += 1
    follower.stale[[3, 7]] = True
    assert follower.follow(table).any(1).nonzero()[:, 0].tolist() == [3, 7]


@pytest.fixture
def config(tmp_path):
    toy_dataset(tmp_path / "data", num_identifiers=200)
    every = {"checkpoint_interval": 3, "checksum_interval": 2, "log_interval": 1, "keep_last": 20}
    return toy_config(
        tmp_path / "data", tmp_path / "runs", eval_interval=None, on_nonfinite="rollback", **every
    )


class Watched(TrainingLoop):
    """Keeps the table of every step that is saved; after step 11, the first time, the weights are not finite."""

    tables: ClassVar[dict[int, torch.Tensor]] = {}  # by step, of all attempts

    def _step(self, step):
        super()._step(step)
        if step == 11 and step not in self.state.skipped_steps:
            with torch.no_grad():
                self.state.model.inner.lm_head.weight.fill_(torch.nan)

    def _save(self):
        super()._save()
        table = self.state.model.inner.puzzle_emb.weights
        self.tables[self.state.global_step] = table.clone()


def test_checkpoints_hold_the_whole_table(config, monkeypatch):
    """Through two starts and a rollback; a comparison of the weights between two checkpoints takes nothing away."""
    monkeypatch.setattr(Watched, "tables", {})
    for max_steps in (5, 20):
        parsed = TrainConfig(**{**config, "max_steps": max_steps})
        loop = Watched(parsed, run_folder(parsed), World(), Hooks())
        loop.train()
    assert loop.state.num_rollbacks == 1
    checkpoints = finished(loop.run)
    assert [c.step for c in checkpoints] == [3, 5, 6, 9, 12, 15, 18, 20]
    before = torch.zeros_like(Watched.tables[3])
    for checkpoint in checkpoints:
        table = checkpoint.tensors(MODEL_FILE)["puzzle_emb.weights"]
        assert torch.equal(table, Watched.tables[checkpoint.step])
        assert 0 < (table != before).any(1).sum() < len(table)  # rows moved, and others did not
        before = table
