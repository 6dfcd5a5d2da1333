"""Keys that change nothing beside the values of others."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from hrm_ray.config.schema import TrainConfig


class Idle(NamedTuple):
    """When some keys change nothing.

    Attributes:
        keys: which.
        is_so: of a configuration.
        with_what: that configuration, in words that stand behind "has no effect".
    """

    keys: tuple[str, ...]
    is_so: Callable[[TrainConfig], bool]
    with_what: str


IDLE = (
    Idle(("eval_interval",), lambda c: c.eval_spacing is not None, "with eval_spacing; leave it out"),
    Idle(("ema_rate",), lambda c: not c.ema, "without ema=true"),
    Idle(("weight_decay_anneal_ratio",), lambda c: c.weight_decay_end is None, "without weight_decay_end"),
    Idle(("max_rollbacks",), lambda c: c.on_nonfinite == "stop", "without on_nonfinite=rollback"),
    Idle(("gop_examples", "gop_interval"), lambda c: not c.gop_eigenvalues, "without gop_eigenvalues"),
    Idle(
        ("supervised",),
        lambda c: c.supervised == "last" and c.supervision_steps == 1,
        "with supervision_steps=1, where every step is the last one",
    ),
    Idle(
        ("puzzle_emb_lr", "puzzle_emb_weight_decay"),
        lambda c: not getattr(c.arch, "puzzle_emb_ndim", 0),
        "without puzzle embeddings; set arch.puzzle_emb_ndim, or leave it out",
    ),
    Idle(
        ("arch.halt_exploration_prob", "arch.no_ACT_continue"),
        lambda c: c.halting.name != "act",
        "without halting=act",
    ),
    Idle(
        ("arch.pos_encodings",),
        lambda c: getattr(c.arch, "mlp_t", False) and getattr(c.arch, "pos_encodings", None) == "rope",
        "as rope with arch.mlp_t=true, which has no attention; use learned, grid or none",
    ),
)


def without_effect(config: TrainConfig, given: Iterable[str]) -> dict[str, str]:
    """Of the keys that were given, those that change nothing in `config`, and with what they do not."""
    keys = set(given)
    return {key: idle.with_what for idle in IDLE for key in idle.keys if key in keys and idle.is_so(config)}
