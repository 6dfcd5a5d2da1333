"""Twelve steps of the real training loop equal the published implementation's, to the last parameter."""

import numpy as np
import pytest
import torch

from hrm_ray.config.schema import TrainConfig
from hrm_ray.models.losses import METRICS
from hrm_ray.training.loop import Hooks, Trainer
from hrm_ray.training.storage import Storage
from hrm_ray.training.world import World
from tests.golden_cases import CASES, FOLDER, NUM_IDENTIFIERS, arch_of, batch_of, config_of, load_weights
from tests.toy import toy_dataset


class GoldenTrainer(Trainer):
    """The loop, fed the published batches; keeps each step's sums and halting decisions."""

    def use(self, case: str) -> None:
        self.golden = np.load(FOLDER / case / "train.npz")
        load_weights(case, self.state.model.inner)
        self.seen = []
        add = self._meter.add

        def remember(metrics, loss, step, num_slots, data_wait_s):
            self.seen.append((loss.item(), metrics.clone(), self.state.carry.halted.clone(), self._lr(step)))
            add(metrics, loss, step, num_slots, data_wait_s)

        self._meter.add = remember

    def _batch(self, step):
        return batch_of(self.golden, step - 1), torch.zeros(8, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES)
def test_twelve_training_steps(case, tmp_path):
    published = config_of(case)
    # 96 examples in batches of 8: 12 steps in all.
    toy_dataset(tmp_path / "data", num_train=96, num_identifiers=NUM_IDENTIFIERS)
    keys = "global_batch_size lr lr_min_ratio lr_warmup_steps weight_decay beta1 beta2 puzzle_emb_lr"
    config = TrainConfig(
        data_path=str(tmp_path / "data"),
        arch=arch_of(case),
        epochs=1,
        eval_interval=None,
        puzzle_emb_weight_decay=published["puzzle_emb_weight_decay"],
        device="cpu",
        forward_dtype="float32",
        attention="sdpa",
        tensorboard=False,
        **{key: published[key] for key in keys.split()},
    )
    trainer = GoldenTrainer(config, Storage(tmp_path / "run"), World(), Hooks())
    trainer.use(case)
    trainer.train()
    golden = trainer.golden
    assert len(trainer.seen) == 12
    for i, (loss, metrics, halted, lr) in enumerate(trainer.seen):
        np.testing.assert_allclose(lr, golden["lr"][i], rtol=1e-6)
        np.testing.assert_allclose(loss, golden["loss"][i], rtol=1e-4)
        np.testing.assert_array_equal(halted, golden["halted"][i])
        for name, value in zip(METRICS, metrics, strict=True):
            np.testing.assert_allclose(value, golden[f"metric_{name}"][i], rtol=1e-4, atol=1e-4, err_msg=name)
    final = trainer.state.model.inner.state_dict()
    names = [name for name in golden if name.startswith("final/")]
    assert len(names) == len(final)
    for name in names:
        ours = final[name.removeprefix("final/model.inner.")]
        np.testing.assert_allclose(ours, golden[name], atol=1e-4, rtol=1e-4, err_msg=name)
