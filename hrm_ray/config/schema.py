"""Every key of a training configuration, with its meaning and unit; names follow the published HRM and TRM.

The values live in the Hydra tree beside this file (`train.yaml` and the groups `arch` and `experiment`). Here
are types, ranges and the checks across keys, all of which fail before Ray starts.
"""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hrm_ray.config.arch import DEFAULT_ARCH, Arch, arch_class
from hrm_ray.config.halting import HaltingConfig
from hrm_ray.config.validate import Settings


class ScalingConfig(Settings):
    """Where the loop runs: `mode=ray` in Ray Train workers, `mode=local` in this process without Ray."""

    mode: Literal["ray", "local"] = "ray"
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1  # [MIN,MAX]: as many as there is room for
    use_gpu: bool | Literal["auto"] = "auto"  # auto: when the cluster has one for each worker
    cpus_per_worker: PositiveInt | Literal["auto"] = (
        "auto"  # auto: the node's CPUs shared evenly; 1 beside a GPU
    )

    @model_validator(mode="after")
    def _range_is_one(self) -> "ScalingConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"scaling.num_workers=[{self.min_workers},{self.max_workers}] is [MIN,MAX] with MIN above MAX; "
                f"try [{self.max_workers},{self.min_workers}]"
            )
        return self

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether workers may come and go."""
        return self.min_workers < self.max_workers


class FailureConfig(Settings):
    """What a run survives."""

    max_failures: int = Field(default=3, ge=0)  # lost workers or nodes in one command before giving up


class TrainConfig(Settings):
    """A whole training run."""

    data_path: str  # dataset folder or URI, made by `hrm-ray data build`
    arch: Arch = Field(default_factory=lambda: arch_class(DEFAULT_ARCH).model_validate({}))
    halting: HaltingConfig = HaltingConfig()

    # length
    global_batch_size: PositiveInt = 384  # puzzles in one optimizer step, over all workers
    epochs: PositiveInt = 20000  # visits of every group
    eval_interval: PositiveInt | None = 2000  # epochs between evaluations; null: only at the end
    eval_interval_steps: PositiveInt | None = None  # optimizer steps between them instead, if given
    num_eval_examples: PositiveInt | None = None  # only the first so many test examples; null: all
    max_steps: PositiveInt | None = None  # end early; schedules still follow `epochs`
    max_time_s: PositiveFloat | None = (
        None  # end this command after so long, with a checkpoint; null: no limit
    )
    early_stopping: PositiveInt | None = None  # evaluations without a better `best_metric` before ending
    micro_batch_size: PositiveInt | None = None  # puzzles a worker computes at once; null: all
    supervision_steps: PositiveInt = 1  # ACT steps of every slot before one update, a batch each
    drop_last: bool = True  # false: the last step takes what is left, a partial batch

    # optimizers
    lr: PositiveFloat = 1e-4
    lr_min_ratio: float = Field(default=1.0, ge=0, le=1)  # share of lr at the end of the cosine
    lr_warmup_steps: int = Field(default=2000, ge=0)
    lr_warmup_ratio: float | None = Field(
        default=None, ge=0, le=1
    )  # share of the run; if given, it holds, not the number
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_end: float | None = Field(
        default=None, ge=0
    )  # cosine to this, lower or higher; null: constant
    weight_decay_anneal_ratio: float = Field(default=1.0, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    puzzle_emb_lr: float = Field(default=1e-2, ge=0)
    puzzle_emb_weight_decay: float = Field(default=0.1, ge=0)
    bias_correction: Literal["outside", "inside"] = "outside"  # of the first moment, relative to atan2
    ema: bool = False  # evaluate an exponential moving average of the weights
    ema_rate: float = Field(default=0.999, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    forward_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "fused", "flash3", "flash2", "sdpa", "matmul"] = "auto"
    optimizer_backend: Literal["auto", "cuda", "fused", "foreach", "reference"] = "auto"  # of AdamATan2
    compile: bool | Literal["auto"] = "auto"  # auto: where a compiler is, and on a CPU for long runs only
    cuda_graphs: bool = False  # on a GPU: launch a whole ACT step at once; one worker
    scaling: ScalingConfig = ScalingConfig()
    failure: FailureConfig = FailureConfig()

    # what is done about faults
    resume: Literal["auto", "weights"] = (
        "auto"  # weights: start anew from the weights of a run that does not fit
    )
    watchdog_s: PositiveFloat | None = 900  # seconds without progress after which a worker counts as dead
    on_nonfinite: Literal["stop", "rollback"] = (
        "stop"  # rollback: to the last checkpoint, skipping those batches
    )
    max_rollbacks: PositiveInt = 10  # of one run, before giving up
    max_loss: PositiveFloat = 1e4  # mean loss of a batch above which it counts as not finite
    checksum_interval: PositiveInt | None = (
        100  # steps between comparisons of the workers' weights; null: never
    )

    # records
    storage: str = "runs"  # folder or URI that holds the runs
    run_name: str | None = None  # null: the name of the experiment
    project_name: str = "hrm_ray"  # in Weights & Biases
    log_interval: PositiveInt = 10  # steps between reports of training metrics
    checkpoint_interval: PositiveInt | None = None  # steps; null: at every evaluation and at the end
    checkpoint_interval_s: PositiveFloat | None = (
        300  # seconds after which one is written anyway; null: never
    )
    keep_last: PositiveInt = 2  # newest checkpoints kept
    keep_best: PositiveInt = 1  # and as many with the best `best_metric`
    best_metric: Literal["eval/exact_accuracy", "eval/accuracy", "eval/q_halt_accuracy"] = (
        "eval/exact_accuracy"
    )
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_group: str | None = None  # runs that belong together there; a sweep gives its name
    tensorboard: bool = True

    @model_validator(mode="after")
    def _workers_fit_the_batch(self) -> "TrainConfig":
        if self.global_batch_size < self.scaling.max_workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is too few puzzles for "
                f"{self.scaling.max_workers} workers; use fewer workers or a larger batch"
            )
        if self.cuda_graphs and self.scaling.max_workers > 1:
            raise ValueError("cuda_graphs=true is for one worker; set scaling.num_workers=1, or leave it out")
        if self.scaling.mode == "local" and self.scaling.max_workers > 1:
            raise ValueError("scaling=local runs one worker; use scaling=ray for more")
        return self
