"""Every optimizer: a run of it continues bit for bit, and on two workers as on one."""

import pytest
import torch
from torch import nn

from hrm_ray.config.compose import train_config
from hrm_ray.config.optimizer import OPTIMIZERS
from hrm_ray.config.schema import TrainConfig
from hrm_ray.errors import UserError
from hrm_ray.optim.adam_atan2 import AdamATan2
from hrm_ray.training import launch
from hrm_ray.training.checkpoint import finished
from hrm_ray.training.weight_noise import noisy_weights
from tests.toy import toy_config, toy_dataset
from tests.training.test_workers import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("optimizers") / "data").path


def trained(config):
    """The files of the last checkpoint of a run."""
    launch.train(TrainConfig(**config), show_progress=False)
    folder = finished(launch.run_folder(TrainConfig(**config)))[-1]
    return folder.manifest.global_step, {
        name: folder.tensors(name) for name in ("model.safetensors", "optimizer.safetensors")
    }


NOISY = {"decay": "to_start", "update_noise": 0.1}


@pytest.mark.parametrize(
    ("name", "keys"),
    [*((name, {}) for name in OPTIMIZERS.names()), ("adamw", NOISY | {"weight_noise": 0.01})],
)
def test_a_run_continues_bit_for_bit(tmp_path, data, name, keys):
    keys = dict(keys)
    values = {
        "max_steps": 8,
        "weight_noise": keys.pop("weight_noise", 0.0),
        "optimizer": {"name": name, **keys},
    }
    step, whole = trained(toy_config(data, tmp_path / "whole", **values))
    first, _ = trained(toy_config(data, tmp_path / "parts", **values | {"max_steps": 5}))
    assert first == 5
    again, parts = trained(toy_config(data, tmp_path / "parts", **values))
    assert again == step == 8
    for file, tensors in whole.items():
        assert tensors.keys() == parts[file].keys()
        assert all(torch.equal(tensor, parts[file][key]) for key, tensor in tensors.items()), file


# That of the published code is tested elsewhere.
@pytest.mark.parametrize(("name", "keys"), [("adamw", {}), ("adamw", NOISY), ("muon", {})])
def test_two_workers_do_what_one_does(tmp_path, data, name, keys):
    noise = 0.01 if keys else 0.0
    values = {"optimizer": {"name": name, **keys}, "weight_noise": noise}
    config = toy_config(data, tmp_path / "one", max_steps=6, **values)
    one, two = run(1, config), run(2, config | {"storage": str(tmp_path / "two")})
    # Not to the last bit: sums have another order, which Muon's iterations in bfloat16 enlarge.
    rtol = {"adamw": 1e-4, "muon": 1e-2}[name]
    for key, tensor in one.weights().items():
        assert (two.weights()[key] - tensor).norm() <= rtol * tensor.norm() + 1e-5, key


def build(name, parameters, **values):
    config = TrainConfig(data_path="", optimizer={"name": name, **values}, weight_decay=0.1)
    return config.optimizer.build(parameters, config, "auto")


def moved(name, steps, **values):
    """A vector by a constant gradient of 1, its way step by step; lr 0.5, weight_decay 0.1."""
    vector = nn.Parameter(torch.linspace(-2, 2, 4096))
    optimizer = build(name, {"bias": vector}, **values)
    way = [vector.detach().clone()]
    for _ in range(steps):
        vector.grad = torch.ones(4096)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.5, 0.1
        optimizer.step()
        way.append(vector.detach().clone())
    return way


def test_weights_decay_to_zero_or_to_their_start():
    # A constant gradient moves Adam by lr a step.
    start, one, two = moved("adamw", 2)
    torch.testing.assert_close(one, start * 0.95 - 0.5)
    torch.testing.assert_close(two, one * 0.95 - 0.5)
    start, one, two = moved("adamw", 2, decay="to_start")
    torch.testing.assert_close(one, start - 0.5)
    torch.testing.assert_close(two, one + 0.05 * (start - one) - 0.5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_updates_have_noise_of_their_size(name):
    noisy, quiet = moved(name, 2, update_noise=0.2), moved(name, 2)
    noise = (noisy[1] - quiet[1]) / 0.5
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(
        0.2, abs=0.01
    )
    second = noisy[2] - quiet[2] - (noisy[1] - quiet[1])
    assert torch.corrcoef(torch.stack([noise, second]))[0, 1].abs() < 0.1  # others at the next step
    assert all(torch.equal(*pair) for pair in zip(noisy, moved(name, 2, update_noise=0.2), strict=True))


def test_weights_have_noise_during_a_step_alone():
    model = nn.Linear(64, 64)
    before = [p.detach().clone() for p in model.parameters()]
    with noisy_weights(model, 0.1, seed=0, supervision_step=3):
        noise = model.weight.detach() - before[0]
        model(torch.ones(1, 64)).sum().backward()
    assert noise.std().item() == pytest.approx(0.1, abs=0.005)
    assert all(torch.equal(p.detach(), own) for p, own in zip(model.parameters(), before, strict=True))
    with noisy_weights(model, 0.1, seed=0, supervision_step=4):
        assert not torch.allclose(model.weight.detach() - before[0], noise, atol=0.01)


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_as_adamw_does():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(8))
    same, head = nn.Parameter(vector.detach().clone()), nn.Parameter(torch.randn(2, 8))
    named = {"up.weight": matrix, "q_head.weight": head, "bias": vector}
    optimizer, adamw = build("muon", named, ns_steps=12), build("adamw", {"bias": same})
    before = matrix.detach().clone()
    matrix.grad = torch.randn(8, 32)
    vector.grad = same.grad = torch.randn(8)
    head.grad = torch.randn(2, 8)
    for group in (*optimizer.param_groups, *adamw.param_groups):
        group["lr"], group["weight_decay"] = 0.5, 0.0  # as the loop sets them at every step
    optimizer.step()
    adamw.step()
    assert torch.equal(vector, same)
    moved = torch.linalg.svdvals((before - matrix).detach())
    assert moved.min() / moved.max() > 0.5  # all directions alike, up to the few iterations
    assert set(optimizer.state[matrix]) == {"momentum_buffer"}
    assert "exp_avg" in optimizer.state[vector] and "exp_avg" in optimizer.state[head]
    optimizer.zero_grad()
    assert matrix.grad is None and vector.grad is None


def test_an_optimizer_is_chosen_by_name():
    assert OPTIMIZERS.names() == ["adam", "adam_atan2", "adamw", "muon"]
    assert isinstance(build("adam_atan2", {"bias": nn.Parameter(torch.ones(2))}), AdamATan2)
    config = train_config(["experiment=sudoku_4x4", "optimizer=muon", "optimizer.momentum=0.9"])
    assert (config.optimizer.name, config.optimizer.momentum) == ("muon", 0.9)
    assert train_config(["experiment=sudoku_4x4"]).optimizer.name == "adam_atan2"
    assert config == TrainConfig.model_validate(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    "words, problem",
    [
        (["optimizer=adamv"], "unknown optimizer 'adamv'; did you mean 'adam'"),
        (["optimizer=adam", "optimizer.decay=to_zero"], "optimizer.decay='to_zero': input should be 'l2'"),
        (
            ["optimizer=adamw", "optimizer.decay=l2"],
            "optimizer.decay='l2': input should be 'to_zero' or 'to_start'",
        ),
        (
            ["optimizer.momentum=0.9"],
            "has no effect with optimizer=adam_atan2; it is of optimizer=muon",
        ),
        (["optimizer=muon", "optimizer.momentun=0.9"], "did you mean 'optimizer.momentum'"),
        (["optimizer=muon", "optimizer.momentum=1"], "optimizer.momentum=1"),
        (["optimizer.name=sgd"], "optimizer.name=sgd is unknown"),
    ],
)
def test_a_mistake_is_one_line(words, problem):
    with pytest.raises(UserError) as caught:
        train_config(["experiment=sudoku_4x4", *words])
    assert problem in str(caught.value)
    with pytest.raises(UserError):
        OPTIMIZERS.find("sgd")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_key_that_the_optimizer_does_not_look_at_is_refused(name):
    key = "bias_correction=inside"
    said = rf"^{key.partition('=')[0]} has no effect with optimizer={name}; leave it out, or add optimizer=adam_atan2$"
    with pytest.raises(UserError, match=said):
        train_config(["experiment=sudoku_4x4", f"optimizer={name}", key])
    assert train_config(["experiment=sudoku_4x4", f"optimizer={name}", "beta1=0.8"]).beta1 == 0.8
    train_config(["experiment=sudoku_4x4", key])


def test_a_run_does_not_change_its_optimizer(tmp_path, data):
    config = toy_config(data, tmp_path, max_steps=2)
    trained(config)
    with pytest.raises(UserError, match="was trained with optimizer=adam_atan2, not adamw"):
        trained(config | {"optimizer": {"name": "adamw"}, "max_steps": 4})
    assert trained(config | {"max_steps": 3})[0] == 3  # with its own it goes on


def test_a_run_does_not_change_its_kind_of_decay(tmp_path, data):
    config = toy_config(data, tmp_path, optimizer={"name": "adamw"}, max_steps=2)
    trained(config)
    with pytest.raises(UserError, match=r"optimizer\.decay=to_zero, not to_start"):
        trained(config | {"optimizer": {"name": "adamw", "decay": "to_start"}, "max_steps": 4})
