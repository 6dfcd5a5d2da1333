"""What a run looks at in an evaluation: its splits and, if wanted, the norms of its weights and its gradients."""

from collections.abc import Callable
from functools import cached_property

import torch

from hrm_ray.batch import make_batch
from hrm_ray.config.schema import TrainConfig
from hrm_ray.data.shards import Dataset
from hrm_ray.evaluation.evaluate import evaluate
from hrm_ray.evaluation.norms import norms
from hrm_ray.evaluation.outer_product import eigenvalues, sample
from hrm_ray.models.act import ACT, Batch
from hrm_ray.training.plan import Plan, evaluated_at_once
from hrm_ray.world import World

OF_TRAINING = {"accuracy", "exact_accuracy", "loss"}  # what is told of the training split


class Evaluations:
    """One worker's part of the evaluations of a run.

    Args:
        config, plan, dataset: the run.
        world: this worker's place.
        device: where the model is.
    """

    def __init__(self, config: TrainConfig, plan: Plan, dataset: Dataset, world: World, device: torch.device):
        self.config, self.plan, self.dataset = config, plan, dataset
        self.world, self.device = world, device

    def of(
        self, model: ACT, step: int, *, on_batch: Callable[[int], object], interrupt: Callable[[], bool]
    ) -> dict[str, float]:
        """What is known of `model` after `step`, by the names of metrics. Collective.

        Args:
            on_batch, interrupt: as of `evaluate`.

        Raises:
            Interrupted: `interrupt` has said so.
        """
        config = self.config
        seq_len = self.dataset.manifest.seq_len
        named: dict[str, float] = {}
        for prefix, split in {
            "eval": "test",
            **({"eval_train": "train"} if config.eval_train else {}),
        }.items():
            metrics, _ = evaluate(
                model,
                self.dataset,
                split=split,
                batch_size=evaluated_at_once(config, config.global_batch_size, self.world.size, seq_len),
                num_examples=config.num_eval_examples,
                world=self.world,
                on_batch=on_batch,
                interrupt=interrupt,
            )
            told = [name for name in metrics if split == "test" or name in OF_TRAINING]
            named |= {f"{prefix}/{name}": metrics[name] for name in told}
        if config.log_norms:
            named |= {f"norm/{part}": value for part, value in norms(model).items()}
        if self.plan.takes_eigenvalues(step):
            found = eigenvalues(model, self._sample, config.gop_eigenvalues, on_gradient=lambda: on_batch(0))
            named |= {f"gop/{name}": value for name, value in found.items()}
        return named

    @cached_property
    def _sample(self) -> Batch:
        """The training puzzles of which gradients are looked at."""
        examples = self.dataset.split("train")
        ids = sample(examples.num_examples, self.config.gop_examples, self.config.seed)
        return make_batch(examples, ids, self.dataset.manifest.ignore_label_id).to(self.device)
