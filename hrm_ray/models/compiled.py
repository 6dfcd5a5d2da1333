"""Compiles the modules of a recursion with torch.compile: what is between the matrix products becomes a few passes.

A module is compiled as a whole and used many times in an ACT step, so there is little to compile: a program without
gradients and one with, two for TRM. Results differ from those of the eager modules by rounding only, and are the same
whenever the same step is compiled on the same kind of machine.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hrm_ray.errors import first_line
from hrm_ray.models.act import ACT
from hrm_ray.models.layers import ReasoningModule

# Programs for the same code that torch keeps in a process: modules x with and without gradients x sizes of batches.
MAX_PROGRAMS = 64
# For `torch.compiler.set_stance` while a compiled model is used: other sizes of batches, as they come in evaluations,
# run eagerly, so that nothing is compiled, and nothing fails, in the middle of a run.
STANCE = "eager_on_recompile"


def compile_recursion(
    model: ACT, loss_of: Callable[[int], Tensor], sizes: Sequence[int], *, without_gradient: bool = False
) -> None:
    """Compile every `ReasoningModule` of `model`, by ACT steps in training mode, forwards and backwards.

    No gradient and no weight changes. Sets torch's `recompile_limit` and `optimize_ddp` for this process.

    Args:
        loss_of: takes a step with so many slots, and returns its loss.
        sizes: numbers of slots for which to compile.
        without_gradient: also compile for ACT steps that run wholly without one.

    Raises:
        Exception: whatever torch or the compiler say (see `reason`); the model is as before then.
    """
    if torch._dynamo.config.disable:
        raise RuntimeError("TORCHDYNAMO_DISABLE is set")
    torch._dynamo.config.recompile_limit = MAX_PROGRAMS
    torch._dynamo.config.optimize_ddp = False  # it would cut the modules where buckets of gradients end
    for module in _modules(model):
        module.compile(dynamic=False)
    try:
        # Kernels chosen by their speed on the day would sum in another order when a run is continued.
        with torch._inductor.config.patch(deterministic=True), torch.compiler.set_stance("default"):
            for size in sizes:
                if without_gradient:
                    with torch.no_grad():
                        loss_of(size)
                torch.autograd.grad(loss_of(size), list(model.parameters()), allow_unused=True)
    except Exception:
        uncompile(model)
        raise
    finally:
        if model.inner.config.puzzle_emb_ndim:
            model.inner.puzzle_emb.forget()


def uncompile(model: ACT) -> None:
    """Let every module run eagerly again."""
    for module in _modules(model):
        module._compiled_call_impl = None


def reason(error: Exception) -> str:
    """Why compiling failed, in one line: what the compiler said first, if it said something."""
    _, _, said = str(error).partition("Output:\n")
    return f"{first_line(error)}: {said.strip().splitlines()[0]}" if said.strip() else first_line(error)


def _modules(model: ACT) -> list[ReasoningModule]:
    return [module for module in model.modules() if isinstance(module, ReasoningModule)]
