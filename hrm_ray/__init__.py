"""Train and evaluate recursive reasoning models (HRM) on Ray, from a laptop CPU to GPU workers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrm_ray.api import Solution, Solver, load

__version__ = "0.1.0"
__all__ = ["Solution", "Solver", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and its types, imported when first asked for, so that `hrm-ray --help` need not wait for torch."""
    if name in ("Solution", "Solver", "load"):
        from hrm_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'hrm_ray' has no attribute '{name}'")
