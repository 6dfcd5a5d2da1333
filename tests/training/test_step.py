"""What one optimizer step hands to whom."""

import numpy as np
import pytest
import torch

from hrm_ray.batch import make_batch
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.sampler import PADDING
from hrm_ray.errors import UserError
from hrm_ray.models.act import IGNORE
from hrm_ray.models.losses import METRICS, act_loss
from hrm_ray.optim.sign_sgd import sparse_sign_sgd
from hrm_ray.training.driver import run_folder
from hrm_ray.training.hooks import Hooks
from hrm_ray.training.launch import Launch
from hrm_ray.training.loop import TrainingLoop
from hrm_ray.world import World
from tests.toy import TRM, toy_config, toy_dataset


def test_what_is_remembered_is_what_happened(tmp_path):
    """The memory of Q-learning against what the model said and the carry became, step by step."""
    toy_dataset(tmp_path / "data", vocab_size=3, num_identifiers=5)  # easy, so that some answers are right
    halting = {"name": "q_learning", "dqn_warmup_ratio": 0.0, "replay_max_age": 32}
    parsed = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", halting=halting, lr=3e-3))
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    said = []
    trainer.state.model.register_forward_hook(lambda module, args, step: said.append(step))
    while trainer.state.global_step < 20:
        trainer._step(trainer.state.global_step + 1)
    memory = trainer.state.learner.memory
    assert len(said) == 20
    for step, output in enumerate(said, 1):
        labels = output.carry.batch.labels
        right = (output.prediction.logits.argmax(-1) == labels) | (labels == IGNORE)
        assert torch.equal(memory.exact[:, step], right.all(-1))
        assert torch.equal(memory.halted[:, step], output.carry.halted)
        assert torch.equal(memory.is_last[:, step], output.carry.steps == 4)
        assert torch.equal(memory.states[:, step], output.carry.state.z_H[:, 0])
        assert (memory.written[:, step] == step).all()
    # All of them vary, and differ from each other: a swap would be seen.
    flags = [memory.exact[:, 1:21], memory.halted[:, 1:21], memory.is_last[:, 1:21]]
    assert all(0 < flag.float().mean() < 1 for flag in flags[1:])
    assert not torch.equal(flags[1], flags[2])


def test_supervision_steps_go_on_over_the_ends_of_optimizer_steps(tmp_path):
    """Two optimizer steps of three ACT steps see the batches and draws of six steps of one."""
    toy_dataset(tmp_path / "data")

    def seen(supervision_steps: int, num_steps: int) -> list:
        values = toy_config(tmp_path / "data", tmp_path / str(supervision_steps))
        parsed = TrainConfig(**values, supervision_steps=supervision_steps)
        trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
        batches = []
        trainer.state.model.register_forward_pre_hook(lambda module, args: batches.append(args[1:]))
        for step in range(1, num_steps + 1):
            trainer._step(step)
        return batches

    several, single = seen(3, 2), seen(1, 6)
    assert len(several) == len(single) == 6
    for (batch, control), (other, other_control) in zip(several, single, strict=True):
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(control.draws, other_control.draws)


def test_cells_are_filled_in_where_the_answer_is_known(tmp_path):
    split, ids = toy_dataset(tmp_path / "data").split("train"), np.array([3, PADDING, 5])
    filled = np.random.default_rng(0).random((3, 16)) < 0.5
    plain, batch = (make_batch(split, ids, 0, filled=cells) for cells in (None, filled))
    given = torch.from_numpy(filled) & (plain.labels != IGNORE)
    assert torch.equal(batch.inputs, torch.where(given, plain.labels.int(), plain.inputs))
    assert torch.equal(batch.labels, plain.labels) and batch.inputs.dtype == torch.int32
    assert torch.equal(batch.inputs[1], plain.inputs[1]) and not torch.equal(batch.inputs, plain.inputs)


def test_questions_are_filled_in_until_their_time_and_never_in_evaluations(tmp_path):
    dataset = toy_dataset(tmp_path / "data")
    values = toy_config(tmp_path / "data", tmp_path / "runs", supervision_steps=2, eval_interval=1)
    parsed = TrainConfig(**values, curriculum={"filled": [1.0, 0.5]})
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    offered, asked = [], []
    trainer.state.model.register_forward_pre_hook(
        lambda module, args: (offered if module.training else asked).append(args[1])
    )
    trainer.train()
    assert len(offered) == 24  # of 12 steps
    shares = []
    for supervision_step, batch in enumerate(offered, 1):
        ids = trainer.stepper.sampler.ids(supervision_step)
        plain = make_batch(dataset.split("train"), ids, 0)
        is_open = (plain.labels != IGNORE) & (plain.labels != plain.inputs)
        changed = batch.inputs != plain.inputs
        assert not (changed & ~is_open).any() and torch.equal(batch.labels, plain.labels)
        shares.append(float(changed.sum() / is_open.sum()))
    expected = [1 - 2 * ((i // 2 + 1) / 12) for i in range(10)]  # linear in the optimizer steps
    assert shares[:10] == pytest.approx(expected, abs=0.25) and shares[10:] == [0.0] * 14
    test = make_batch(dataset.split("test"), np.arange(24), 0)
    rows = {tuple(row.tolist()) for batch in asked for row in batch.inputs}
    assert rows == {tuple(row.tolist()) for row in test.inputs}


def test_a_curriculum_that_the_data_do_not_allow_is_refused_before_anything_starts(tmp_path):
    toy_dataset(tmp_path / "data")
    values = toy_config(tmp_path / "data", tmp_path / "runs", curriculum={"filled": [0.7, 0.5]})
    with pytest.raises(UserError, match=r"^curriculum\.filled: an answer of task tokens is not its question"):
        Launch(TrainConfig(**values))
    values["curriculum"] = {"rating": [0.7, 0.5]}
    with pytest.raises(
        UserError, match=r"^curriculum\.rating: .*data has no ratings; build it with keep_ratings=true"
    ):
        Launch(TrainConfig(**values))
    toy_dataset(tmp_path / "rated", is_rated=True)
    Launch(TrainConfig(**values | {"data_path": str(tmp_path / "rated")}))


@pytest.mark.parametrize("supervised", ["all", "last"])
def test_gradients_are_those_of_the_supervised_steps(tmp_path, supervised):
    """Against a plain loop: three ACT steps of every puzzle, each with its loss or the last one alone."""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    arch = TRM | {"halt_max_steps": 3, "loss": {"label_smoothing": 0.1}}
    more = {"supervision_steps": 3, "supervised": supervised, "halting": {"name": "fixed"}}
    trainers = []
    for name in ("taken", "plain"):
        parsed = TrainConfig(**toy_config(tmp_path / "data", tmp_path / name, arch=arch, **more))
        trainers.append(TrainingLoop(parsed, run_folder(parsed), World(), Hooks()))
        trainers[-1].state.model.inner.puzzle_emb.weights.normal_(generator=torch.Generator().manual_seed(1))
    taken, plain = trainers
    gradients = {}

    def note():
        gradients.update({n: p.grad.clone() for n, p in taken.state.model.named_parameters()})

    taken.state.optimizer.step = note
    before = taken.state.model.inner.puzzle_emb.weights.clone()
    outcome = taken.stepper.take(1)

    model, carry, total = plain.state.model, plain.state.carry, torch.zeros(len(METRICS))
    for supervision_step in (1, 2, 3):
        is_supervised = supervised == "all" or supervision_step == 3
        batch, control = plain.stepper.batch(supervision_step), plain.stepper.control(1, supervision_step)
        with torch.set_grad_enabled(is_supervised):
            step = model(carry, batch, control)
            loss, metrics, _ = act_loss(step, "stablemax_cross_entropy", 0.1)
        carry, total = step.carry, total + metrics
        if is_supervised:
            (loss / (8 if supervised == "last" else 24)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    rows, emb_gradients = model.inner.puzzle_emb.take_gradients()
    assert len(rows) == (8 if supervised == "last" else 24)
    moved = before.clone()
    sparse_sign_sgd(
        moved, rows, emb_gradients, lr=1e-2 * taken.plan.lr_share(1), weight_decay=0.1, backend="auto"
    )
    torch.testing.assert_close(taken.state.model.inner.puzzle_emb.weights, moved)
    torch.testing.assert_close(outcome.metrics, total)  # of all ACT steps
    assert outcome.num_slots == 24 and outcome.metrics[METRICS.index("count")] == 8
    for trainer in trainers:
        trainer._close()


@pytest.mark.parametrize("halting", ["act", "q_learning"])
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path, halting):
    """The same gradients but for the order of summation, the same metrics, never more slots at once; and no more
    reductions over workers than without, see test_workers."""
    toy_dataset(tmp_path / "data", vocab_size=3, num_identifiers=5)
    trainers = {}
    for size in (None, 3):  # of eight slots
        values = toy_config(tmp_path / "data", tmp_path / str(size), halting={"name": halting})
        parsed = TrainConfig(**values | {"micro_batch_size": size, "supervision_steps": 2})
        trainers[size] = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    sizes = []
    trainers[3].state.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[1].inputs)))
    for step in range(1, 7):
        whole, parts = (trainers[size].stepper.take(step) for size in (None, 3))
        torch.testing.assert_close(parts.metrics, whole.metrics, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert sizes == [3, 3, 2] * 12
    whole, parts = (trainers[size].state for size in (None, 3))
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        # Moments and not weights alone: AdamATan2 does not feel a wrong scale of gradients.
        for key in ("exp_avg", "exp_avg_sq"):
            moment, other = whole.optimizer.state[a][key], parts.optimizer.state[b][key]
            bound = 1e-4 * float(moment.abs().max())
            torch.testing.assert_close(other, moment, rtol=1e-3, atol=bound, msg=f"{name} {key}")
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(whole.carry.batch, parts.carry.batch, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.carry.steps, parts.carry.steps)
    if halting == "q_learning":
        assert torch.equal(whole.learner.memory.written, parts.learner.memory.written)
        assert torch.equal(whole.learner.memory.exact, parts.learner.memory.exact)
    for trainer in trainers.values():
        trainer._close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("halting", ["act", "q_learning"])
def test_no_step_waits_for_the_gpu(tmp_path, halting):
    """Not for the loss, nor for what is counted: torch says so of whatever would. (On the CPU: test_cuda_graph.)"""
    toy_dataset(tmp_path / "data", num_identifiers=5)
    values = toy_config(
        tmp_path / "data", tmp_path / "runs", device="cuda", halting={"name": halting}, ema=True
    )
    parsed = TrainConfig(**values, micro_batch_size=3)
    trainer = TrainingLoop(parsed, run_folder(parsed), World(), Hooks())
    for step in range(1, 4):  # compiles kernels and allocates what stays
        trainer._step(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4, 8):
            trainer._step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer._close()


def test_the_rows_of_the_puzzle_embedding_that_moved_are_known(tmp_path):
    """What is compared and scanned at checkpoints is these rows, not the whole table."""
    toy_dataset(tmp_path / "data", num_identifiers=50)
    config = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", max_steps=3, eval_interval=None))
    trainer = TrainingLoop(config, run_folder(config), World(), Hooks())
    state, table = trainer.state, trainer.state.model.inner.puzzle_emb.weights
    before = table.clone()
    trainer._step(1)
    moved = (table != before).any(1)
    assert 0 < moved.sum() <= 8
    assert torch.equal(state.touched, moved)
    (rows,) = (
        tensor
        for tensor in state.take_touched()
        if tensor.shape[1:] == table.shape[1:] and len(tensor) == moved.sum()
    )
    assert torch.equal(rows, table[moved])
    assert not state.touched.any()
    trainer._close()
