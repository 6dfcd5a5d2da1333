"""Train and tune recursive reasoning models (HRM, TRM) on Ray, from a laptop CPU to GPU workers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrm_ray.api import Solution, Solver, TrainResult, load, train, tune

__version__ = "0.1.0"
__all__ = ["Solution", "Solver", "TrainResult", "__version__", "load", "train", "tune"]


def __getattr__(name: str) -> Any:
    """What `api` offers, imported when first asked for, so that `hrm-ray --help` need not wait for torch."""
    if name in __all__:
        from hrm_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'hrm_ray' has no attribute '{name}'")
