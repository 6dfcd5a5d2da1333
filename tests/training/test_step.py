"""What one optimizer step hands to whom."""

import torch

from hrm_ray.config.schema import TrainConfig
from hrm_ray.models.act import IGNORE
from hrm_ray.training.loop import Hooks, Trainer
from hrm_ray.training.trainer import run_folder
from hrm_ray.training.world import World
from tests.toy import toy_config, toy_dataset


def test_what_is_remembered_is_what_happened(tmp_path):
    """The memory of Q-learning against what the model said and the carry became, step by step."""
    toy_dataset(tmp_path / "data", vocab_size=3, num_identifiers=5)  # easy, so that some answers are right
    halting = {"name": "q_learning", "dqn_warmup_ratio": 0.0, "replay_max_age": 32}
    parsed = TrainConfig(**toy_config(tmp_path / "data", tmp_path / "runs", halting=halting, lr=3e-3))
    trainer = Trainer(parsed, run_folder(parsed), World(), Hooks())
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
        trainer = Trainer(parsed, run_folder(parsed), World(), Hooks())
        batches = []
        trainer.state.model.register_forward_pre_hook(lambda module, args: batches.append(args[1:]))
        for step in range(1, num_steps + 1):
            trainer._step(step)
        return batches

    several, single = seen(3, 2), seen(1, 6)
    assert len(several) == len(single) == 6
    for (batch, control), (other, other_control) in zip(several, single, strict=True):
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(control.min_halt_steps, other_control.min_halt_steps)
