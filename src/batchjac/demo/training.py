"""Enough training to have networks worth differentiating."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    batch: int = 64,
    rate: float = 2e-3,
    weight_decay: float = 1e-3,
) -> nn.Module:
    """Fit `model` to ``x [N, ...]`` and ``labels [N]`` by AdamW on the cross entropy, in place.

    The rate falls to zero along half a cosine. Returns the model in evaluation mode.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=draw).split(batch):
            shown = x[index] if augment is None else augment(x[index], draw)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shown), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of ``x [N, ...]`` whose largest score is at ``labels [N]``."""
    right = sum(
        int((model(rows).argmax(1) == truth).sum())
        for rows, truth in zip(x.split(1024), labels.split(1024), strict=True)
    )
    return right / len(x)
