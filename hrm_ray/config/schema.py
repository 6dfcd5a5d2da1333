"""Every key of a training configuration, with its meaning and unit; names follow the published HRM and TRM.

Here are types, defaults, ranges and the checks across keys, all of which fail before Ray starts. What the choices of a
group (`arch`, `experiment`, ...) say otherwise is YAML in the Hydra tree beside this file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hrm_ray.config.arch import DEFAULT_ARCH, Arch, StateConfig, arch_class
from hrm_ray.config.halting import HALTINGS, Halting
from hrm_ray.config.optimizer import OPTIMIZERS, Optimizer
from hrm_ray.config.validate import MANY, NonNegativeFloat, PositiveFloat, PositiveInt, Seconds, Settings


class ScalingConfig(Settings):
    """Where the loop runs: `mode=ray` in Ray Train workers, `mode=local` in this process without Ray."""

    mode: Literal["ray", "local"] = "ray"
    """Where the loop runs; scaling=MODE chooses it."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Ray workers; [MIN,MAX]: as many of them as there is room for."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Whether each worker has a GPU; auto: when the cluster has one for each."""
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    """CPUs of a worker; auto: the node's CPUs shared evenly, or 1 beside a GPU."""

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

    max_failures: int = Field(default=3, ge=0, le=MANY)
    """Lost workers or nodes in one command before giving up."""


BiasCorrection = Literal["outside", "inside"]
Share = Annotated[float, Field(gt=0, le=1)]


class CurriculumConfig(Settings):
    """What becomes harder during a run. Durations are shares of the run's steps."""

    depth: tuple[tuple[Annotated[float, Field(gt=0, lt=1)], PositiveInt, PositiveInt], ...] = ()
    """[[UNTIL, H, L], ...]: train with H and L cycles until this share of the run, then with arch.H_cycles and
    arch.L_cycles; evaluations always take these."""
    filled: tuple[Share, Share] | None = None
    """[SHARE, UNTIL]: this share of the cells that a question leaves open is filled in from its answer at the start,
    on average, less and less then, and none from this share of the run on. Never in evaluations. null: none."""
    rating: tuple[Share, Share] | None = None
    """[SHARE, UNTIL]: only this share of the training puzzles, the easiest, are taken at the start, more and more
    then, and all from this share of the run on. null: all."""

    @model_validator(mode="after")
    def _shares_rise(self) -> "CurriculumConfig":
        shares = [until for until, _, _ in self.depth]
        if shares != sorted(set(shares)):
            raise ValueError(f"curriculum.depth: its shares of the run must rise, {shares} do not")
        return self

    @field_validator("filled", "rating", mode="before")
    @classmethod
    def _is_a_pair(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not (isinstance(value, (list, tuple)) and len(value) == 2):
            raise ValueError(f"curriculum.{info.field_name}: give [SHARE,UNTIL], such as [0.7,0.5], or null")
        return value


class PathsConfig(Settings):
    """Along how many paths a model thinks about a puzzle."""

    train: int = Field(default=1, gt=0, le=2**10)
    """Paths of a puzzle in training, from random starts of their own; it learns along the one with the lowest loss."""


class TrainConfig(Settings):
    """A whole training run. What the published code has too has its defaults."""

    data_path: str
    """Data set, a folder or URI made by hrm-ray data build; also data=DIR."""
    arch: Arch = Field(default_factory=lambda: arch_class(DEFAULT_ARCH).model_validate({}))
    """The model; arch=NAME chooses one."""
    halting: Halting = Field(default_factory=HALTINGS.make)
    """How a puzzle comes to halt in training; halting=NAME chooses a way. Its keys may be given without halting."""
    optimizer: Optimizer = Field(default_factory=OPTIMIZERS.make)
    """What moves the weights, but for puzzle embeddings; optimizer=NAME chooses one."""

    # length
    global_batch_size: int = Field(default=768, gt=0, le=2**24)
    """Puzzles in one optimizer step, over all workers."""
    epochs: PositiveInt = 100_000
    """Visits of every group of puzzles."""
    eval_interval: PositiveInt | None = 10_000
    """Epochs between evaluations; null: only at the end."""
    eval_interval_steps: PositiveInt | None = None
    """Optimizer steps between evaluations, in place of eval_interval."""
    eval_spacing: float | None = Field(default=None, ge=0.001, le=10)
    """Let evaluations become rarer as a run goes on: after step s the next is at s * (1 + eval_spacing), but not before
    s + eval_interval_steps (1 if it is null). Then they alone are no reason for a checkpoint. null: evenly spaced."""
    num_eval_examples: PositiveInt | None = None
    """Evaluate only the first so many examples; null: all."""
    eval_train: bool = False
    """Evaluate the training puzzles too, as eval_train/..."""
    log_norms: bool = False
    """Report the l2 norms of the weights, by part, with each evaluation."""
    gop_eigenvalues: int = Field(default=0, ge=0, le=1000)
    """Report so many of the largest eigenvalues of the outer product of the gradients of some training puzzles."""
    gop_examples: int = Field(default=64, gt=0, le=10**6)
    """Of how many puzzles; their gradients take as many times the memory of the weights."""
    gop_interval: PositiveInt = 10
    """Evaluations from one such report to the next."""
    max_steps: PositiveInt | None = None
    """End after so many optimizer steps; schedules still follow epochs."""
    max_time_s: Seconds | None = None
    """End this command after so many seconds, with a checkpoint; null: no limit."""
    early_stopping: PositiveInt | None = None
    """End after so many evaluations without a better best_metric; null: never."""
    stop_at: PositiveFloat | None = None
    """End when an evaluation's best_metric is at least this; null: never."""
    micro_batch_size: PositiveInt | None = None
    """Puzzles that a worker computes at once; null: all of its share."""
    supervision_steps: int = Field(default=1, gt=0, le=10**6)
    """ACT steps of every puzzle before one update, a batch each."""
    supervised: Literal["all", "last"] = "all"
    """Which of these have a loss: all, or the last one alone; the others then run without gradient."""
    drop_last: bool = True
    """Leave out what does not fill the last batch; false: take it as a smaller one."""

    curriculum: CurriculumConfig = CurriculumConfig()
    """What becomes harder during the run."""

    paths: PathsConfig = PathsConfig()
    """Along how many paths a puzzle is thought about."""

    # optimizers
    lr: PositiveFloat = 1e-4
    """Learning rate of all weights but puzzle embeddings."""
    lr_min_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the learning rates that is left at the end of their cosine."""
    lr_warmup_steps: int = Field(default=2000, ge=0, le=MANY)
    """Optimizer steps over which the learning rates rise from 0."""
    lr_warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of the run, in place of lr_warmup_steps."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of all weights but puzzle embeddings, at the start."""
    weight_decay_end: NonNegativeFloat | None = None
    """The same at the end of its cosine, lower or higher; null: constant."""
    weight_decay_anneal_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the run after which weight_decay_end is reached."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the optimizer's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the optimizer's second moment."""
    puzzle_emb_lr: NonNegativeFloat = 1e-2
    """Learning rate of puzzle embeddings."""
    puzzle_emb_weight_decay: NonNegativeFloat = 0.1
    """Weight decay of puzzle embeddings."""
    bias_correction: BiasCorrection = "outside"
    """Where AdamATan2 corrects its first moment, relative to atan2."""
    ema: bool = False
    """Evaluate an exponential moving average of the weights."""
    ema_rate: float = Field(default=0.999, gt=0, lt=1)
    """Decay of that average at a step."""
    weight_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise that all weights but puzzle embeddings have in each training step."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of every random decision."""

    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto: on a GPU where there is one that works."""
    forward_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and products; auto: bfloat16 where it is fast."""
    attention: Literal["auto", "flash2", "sdpa", "matmul"] = "auto"
    """Kernel of attention; auto: the fastest that is here."""
    optimizer_backend: Literal["auto", "cuda", "fused", "foreach", "reference"] = "auto"
    """Code of AdamATan2; auto: the fastest that is here."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model; auto: where there is a compiler, and on a CPU for long runs only."""
    cuda_graphs: bool = False
    """On a GPU: launch a whole ACT step at once. For one worker."""
    scaling: ScalingConfig = ScalingConfig()
    """Where the loop runs."""
    failure: FailureConfig = FailureConfig()
    """What a run survives."""

    # what is done about faults
    resume: Literal["auto", "weights"] = "auto"
    """What becomes of a run of the same name: auto continues it, weights starts a new one from its weights if its
    checkpoint does not fit."""
    watchdog_s: Seconds | None = 900
    """Seconds without progress after which a worker counts as dead; null: never."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """When the loss is not finite: stop, or go back to the last checkpoint and skip those batches."""
    max_rollbacks: PositiveInt = 10
    """Rollbacks of one run before giving up."""
    max_loss: PositiveFloat = 1e4
    """Mean loss of a batch above which it counts as not finite."""
    checksum_interval: PositiveInt | None = 100
    """Optimizer steps between comparisons of the workers' weights; null: never."""

    # records
    storage: str = "runs"
    """Folder or URI that holds the runs."""
    run_name: str | None = None
    """Name of the run and of its folder; null: the name of the experiment."""
    project_name: str = "hrm_ray"
    """Project in Weights & Biases."""
    log_interval: PositiveInt = 10
    """Optimizer steps between reports of training metrics."""
    checkpoint_interval: PositiveInt | None = None
    """Optimizer steps between checkpoints; null: at every evaluation and at the end, with eval_spacing at the end."""
    checkpoint_interval_s: Seconds | None = 300
    """Seconds after which a checkpoint is written anyway; null: never."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: PositiveInt = 1
    """Checkpoints with the best best_metric that are kept beside them."""
    best_metric: str = "eval/exact_accuracy"
    """What the best checkpoint is best in: a metric of the evaluations that is better when it is higher."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether to report to Weights & Biases."""
    wandb_group: str | None = None
    """Runs that belong together there; a sweep gives its name."""
    tensorboard: bool = True
    """Write files for TensorBoard."""

    @property
    def num_supervised_steps(self) -> int:
        """ACT steps of an update that have a loss."""
        return 1 if self.supervised == "last" else self.supervision_steps

    @model_validator(mode="after")
    def _depth_fits(self) -> "TrainConfig":
        if not self.curriculum.depth:
            return self
        full = self.arch.full_depth
        if full is None:
            raise ValueError(
                f"curriculum.depth: arch={self.arch.name} has no H_cycles and L_cycles; give curriculum.depth=[]"
            )
        for until, *cycles in self.curriculum.depth:
            if any(own > most for own, most in zip(cycles, full, strict=True)):
                raise ValueError(
                    f"curriculum.depth: {cycles[0]} and {cycles[1]} cycles until {until:g} of the run are more than "
                    f"arch.H_cycles={full[0]} and arch.L_cycles={full[1]}, with which it ends"
                )
        return self

    @field_validator("stop_at")
    @classmethod
    def _stops_at_a_share(cls, stop_at: float | None) -> float | None:
        if stop_at is not None and stop_at > 1:
            raise ValueError(
                f"stop_at={stop_at:g}: metrics are shares of 1; {stop_at:g} percent are stop_at={stop_at / 100:g}"
            )
        return stop_at

    @model_validator(mode="after")
    def _has_what_halting_needs(self) -> "TrainConfig":
        if self.halting.needs_q_head and not self.arch.has_q_head:
            raise ValueError(
                f"halting={self.halting.name} teaches a Q head, and arch={self.arch.name} has none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _paths_differ(self) -> "TrainConfig":
        if self.paths.train == 1 or self.arch.state.is_drawn:
            return self
        what = f"paths.train={self.paths.train}: the paths of a puzzle are all alike"
        if not isinstance(self.arch, StateConfig):
            raise ValueError(
                f"{what} with arch={self.arch.name}, which has no random starts; give paths.train=1"
            )
        raise ValueError(f"{what} without random starts; add arch.init_std=1")

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
