"""Compiles the modules of a recursion with torch.compile: what is between the matrix products becomes a few passes.

A module is compiled as a whole and used many times in an ACT step, so there is little to compile: one program with
gradients and one without. Results differ from those of the eager modules by rounding only.
"""

import torch

from hrm_ray.models.act import ACT, Batch, Carry
from hrm_ray.models.halting import Control
from hrm_ray.models.layers import ReasoningModule

# Programs for the same code that torch keeps in a process: modules x with and without gradients x sizes of batches.
MAX_PROGRAMS = 64


def compile_recursion(model: ACT, carry: Carry, batch: Batch, control: Control) -> None:
    """Compile every `ReasoningModule` of `model`, by one ACT step in training mode, forwards and backwards.

    Nothing else changes: no gradient, no weight. Other sizes of batches are compiled when they come.

    Args:
        carry, batch, control: of a step, in the sizes that will come.

    Raises:
        Exception: whatever torch or the compiler say; the model is as before then.
    """
    torch._dynamo.config.recompile_limit = MAX_PROGRAMS
    torch._dynamo.config.optimize_ddp = False  # it would cut the modules where buckets of gradients end
    modules = [module for module in model.modules() if isinstance(module, ReasoningModule)]
    for module in modules:
        module.compile(dynamic=False)
    try:
        prediction = model(carry, batch, control).prediction
        outputs = prediction.logits.sum() + prediction.q_halt.sum() + prediction.q_continue.sum()
        torch.autograd.grad(outputs, list(model.parameters()), allow_unused=True)
    except Exception:
        for module in modules:
            module._compiled_call_impl = None
        raise
    finally:
        if model.inner.config.puzzle_emb_ndim:
            model.inner.puzzle_emb.take_gradients()
