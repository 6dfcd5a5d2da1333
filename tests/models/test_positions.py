"""Positions in a grid: the sum of a vector for the row, the column and the box, wherever the model comes from."""

import math

import numpy as np
import pytest
import torch

import hrm_ray
from hrm_ray import machine
from hrm_ray.config.arch import ArchConfig, arch_class
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.pipeline import build
from hrm_ray.data.recipe import load_recipe
from hrm_ray.errors import UserError
from hrm_ray.interop.checkpoint import export_checkpoint
from hrm_ray.models.registry import build_model
from hrm_ray.training.checkpoint import DatasetInfo, find
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.launch import Launch
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import ARCH, TRM, toy_config, toy_dataset

SUDOKU_6 = DatasetInfo(
    task="sudoku", task_options={"size": 6}, vocab_size=8, seq_len=36, num_puzzle_identifiers=3
)


def embedding(arch: ArchConfig, data: DatasetInfo):
    """The network, and a batch with its embedding."""
    torch.manual_seed(0)
    network = build_model(arch, data, machine.resolve(device="cpu", forward_dtype="float32")).inner
    inputs = torch.randint(1, data.vocab_size, (4, data.seq_len))
    return network, inputs, network.embed(inputs, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("puzzle_tokens", [0, 1, 3])
def test_a_position_is_the_sum_of_three_vectors(puzzle_tokens):
    """Against a plain sum; boxes of 6x6 are 2x3. A puzzle token has three vectors for itself."""
    D, P = 32, puzzle_tokens
    arch = arch_class("hrm_v1")(
        hidden_size=D, num_heads=2, H_layers=1, L_layers=1, puzzle_emb_ndim=D * P, pos_encodings="grid"
    )
    network, inputs, embedded = embedding(arch, SUDOKU_6)
    table = network.embed_pos.embedding_weight
    assert table.shape == (3 * (6 + P), D)
    rows, columns, boxes = table.split(6 + P)
    tokens = network.embed_tokens.embedding_weight
    for row in range(6):
        for column in range(6):
            cell, box = 6 * row + column, 2 * (row // 2) + column // 3
            position = rows[row] + columns[column] + boxes[box]
            expected = math.sqrt(D / 2) * (tokens[inputs[:, cell]] + position)
            torch.testing.assert_close(embedded[:, P + cell], expected)
    for leading in range(P):
        position = sum(axis[6 + leading] for axis in (rows, columns, boxes))
        # The puzzle embedding is zero before it is trained.
        torch.testing.assert_close(embedded[:, leading], (math.sqrt(D / 2) * position).expand(4, D))
    assert embedded[:, P:].shape[1] == 36


def test_positions_weigh_as_much_as_learned_ones_and_learn():
    stds = []
    for kind in ("learned", "grid"):
        arch = arch_class("trm")(hidden_size=512, pos_encodings=kind, puzzle_emb_ndim=0)
        network, _, embedded = embedding(arch, SUDOKU_6)
        stds.append(network.embed_pos().std().item())
        embedded.square().sum().backward()
        assert (network.embed_pos.embedding_weight.grad.abs().sum(1) > 0).all()
    assert stds[1] == pytest.approx(stds[0], rel=0.1)


def test_a_checkpoint_alone_says_where_cells_lie(tmp_path):
    """Loaded, without the data set, a model answers as the one that was trained."""
    recipe = load_recipe("sudoku_6x6", {"num_train": 40, "num_test": 6, "num_aug": 0})
    build(recipe, tmp_path / "built", show_progress=False)
    arch = {**TRM, "mlp_t": True, "pos_encodings": "grid"}
    parsed = TrainConfig(**toy_config(tmp_path / "built", tmp_path / "runs", arch=arch, max_steps=3))
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    questions = trainer.dataset.split("test").rows(np.arange(6))["inputs"]
    trainer.train()
    (tmp_path / "built").rename(tmp_path / "gone")
    solver = hrm_ray.load(tmp_path / "runs/toy", device="cpu", forward_dtype="float32")
    trained = trainer.state.model.inner
    assert solver.model.inner.embed_pos.rows_SA.tolist() == trained.embed_pos.rows_SA.tolist()
    inputs, identifiers = torch.from_numpy(questions).int(), torch.zeros(6, dtype=torch.int32)
    with torch.no_grad():
        expected = trained.eval().embed(inputs, identifiers)
        assert torch.equal(solver.model.inner.embed(inputs, identifiers), expected)
    assert len(solver.solve(list(questions))) == 6


def test_the_published_layout_cannot_hold_it(tmp_path):
    toy_dataset(tmp_path / "data")
    arch = {**ARCH, "pos_encodings": "grid"}
    parsed = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", arch=arch, max_steps=1))
    TrainingLoop(parsed, run_folder(parsed), World(), Hooks()).train()
    with pytest.raises(UserError, match=r"arch\.pos_encodings=grid has no published layout") as caught:
        export_checkpoint(find(str(tmp_path / "runs/toy")), tmp_path / "theirs")
    assert "\n" not in str(caught.value) and not (tmp_path / "theirs").exists()


def test_cells_that_lie_in_no_rows_are_refused_before_anything_starts(tmp_path):
    toy_dataset(tmp_path / "data", seq_len=10)
    arch = {**ARCH, "pos_encodings": "grid"}
    with pytest.raises(UserError, match=r"nothing says how the 10 cells .* use arch.pos_encodings=learned"):
        Launch(TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", arch=arch)))
    assert not (tmp_path / "runs").exists()
    Launch(TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs")))
