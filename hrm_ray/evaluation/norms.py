"""The l2 norms of the weights of a model, by part."""

import torch

from hrm_ray.models.act import ACT

# By the beginning of a parameter's name; all others are of the blocks. The table of puzzle embeddings is no parameter.
PARTS = {"embed_": "embedding", "lm_head": "output", "q_head": "q_head"}


@torch.no_grad()
def norms(model: ACT) -> dict[str, float]:
    """The norm of each part that `model` has, all its weights in one vector: `embedding` (tokens and positions),
    `blocks`, `output` (the layer that makes logits) and `q_head`."""
    squares: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.inner.named_parameters():
        part = next((part for beginning, part in PARTS.items() if name.startswith(beginning)), "blocks")
        squares.setdefault(part, []).append(parameter.square().sum(dtype=torch.float64))
    total = torch.stack([torch.stack(parts).sum() for parts in squares.values()]).sqrt()
    return dict(zip(squares, total.tolist(), strict=True))
