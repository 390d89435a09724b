"""Optimiser groups and the learning-rate schedule that both stages share."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def adamw(groups: Iterable[tuple[nn.Module, float]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over (module, learning rate) groups; matrices decay, vectors, scales and embeddings of one row do not.

    A parameter belongs to the first group that lists it. Each group keeps its peak rate as `peak_lr`.
    """
    seen: set[int] = set()
    parameter_groups = []
    for module, lr in groups:
        fresh = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in fresh)
        for decay, members in (
            (weight_decay, [p for p in fresh if p.ndim > 1]),
            (0.0, [p for p in fresh if p.ndim <= 1]),
        ):
            if members:
                parameter_groups.append({"params": members, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(parameter_groups, betas=(0.9, 0.98), eps=1e-6)


def schedule(step: int, total: int, warmup: int, final: float = 0.01) -> float:
    """Factor on the peak learning rate at `step` (from 0): linear warm-up, then cosine to `final`."""
    warmup = min(warmup, max(1, total // 5))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
