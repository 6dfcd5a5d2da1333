"""Winner takes all, against every path by itself."""

import torch

from hrm_ray.config.arch import LossConfig
from hrm_ray.halting.base import Control
from hrm_ray.models.act import Step
from hrm_ray.models.losses import act_loss, cross_entropy
from hrm_ray.models.noise import key_of
from hrm_ray.models.recursive import Prediction, State
from hrm_ray.models.winner import along
from hrm_ray.training.step import LossModule
from tests.models.test_hrm import batch, built

LOSS = "stablemax_cross_entropy"


def test_the_path_with_the_lowest_loss_is_learned_from():
    """Step by step, the gradient too; some slots begin at the second step, and each path from a start of its own."""
    keys = {"H_cycles": 2, "L_cycles": 1, "init_std": 1.0, "noise": 0.1, "damping": 0.9}
    act, data, won = built("trm", **keys), batch(), []
    module = LossModule(act, LossConfig(loss_type=LOSS), num_paths=3)
    carry = along(act.initial_carry(data), 3)
    for step in range(3):
        control = Control(torch.full((8,), 4), keys=key_of(7, step, torch.arange(8)))
        paths = []
        for path in range(3):
            own = carry._replace(state=State(carry.state.z_H, carry.state.z_L[:, path]))
            paths.append(act(own, data, control._replace(keys=key_of(control.keys, path))))
        losses = [cross_entropy(p.prediction.logits, p.carry.batch.labels, LOSS).sum(1) for p in paths]
        winner = torch.stack(losses).argmin(0)
        won += winner.tolist()

        def of_winner(tensors, winner=winner):
            return torch.stack(tensors)[winner, torch.arange(8)]

        prediction = Prediction(*map(of_winner, zip(*(p.prediction for p in paths), strict=True)))
        expected, _, _ = act_loss(Step(paths[0].carry, prediction, None), LOSS)
        gradients = torch.autograd.grad(expected, list(act.parameters()), allow_unused=True)
        loss, _, after, _ = module(carry, data, control, None)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        for own, other in zip(
            torch.autograd.grad(loss, list(act.parameters()), allow_unused=True), gradients, strict=True
        ):
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-4 * float(other.abs().max()) + 1e-6)
        z_H = of_winner([p.carry.state.z_H for p in paths])
        torch.testing.assert_close(after.state.z_H, z_H, rtol=1e-3, atol=1e-4)
        z_L = torch.stack([p.carry.state.z_L for p in paths], 1)
        torch.testing.assert_close(after.state.z_L, z_L, rtol=1e-3, atol=1e-4)
        assert torch.equal(after.steps, paths[0].carry.steps)
        carry = after._replace(halted=torch.arange(8) % 2 == step % 2)
    assert set(won) == {0, 1, 2}


def test_a_slot_does_not_depend_on_the_others():
    act, data = built("trm", H_cycles=1, L_cycles=1, init_std=1.0), batch()
    module, rows = LossModule(act, LossConfig(loss_type=LOSS), num_paths=4), slice(2, 5)
    control = Control(torch.full((8,), 4), keys=key_of(0, torch.arange(8)))
    carry = along(act.initial_carry(data), 4)
    _, _, whole, _ = module(carry, data, control, None)
    _, _, part, _ = module(carry.rows(rows), data.rows(rows), control.rows(rows), None)
    for own, other in zip(part.state, whole.rows(rows).state, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
