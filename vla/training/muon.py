"""Muon on many small matrices at once."""

from collections.abc import Callable, Iterable
from itertools import batched
from typing import Any

import torch
from torch import Tensor, nn

AT_ONCE = 1 << 20  # numbers orthogonalised at once, which bounds the memory that large towers need


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw", which takes one matrix after the other.

    Matrices of one shape are orthogonalised together, wide and tall ones alike (arXiv:2502.16982), which is quicker.
    `dtype` is that of the products, for torch's bfloat16, which is slow where it is only emulated. State and options are torch's.
    """

    def __init__(
        self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], dtype: torch.dtype, **options: Any
    ) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all matrices that have a gradient; `closure`, if there is one, computes these and the loss."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for (_, longer), parameters in alike.items():
                for some in batched(parameters, max(1, AT_ONCE // parameters[0].numel())):
                    directions = [self.direction(p, group["momentum"], group["nesterov"]) for p in some]
                    wide = torch.stack([d if d.shape[1] == longer else d.T for d in directions])
                    wide = wide.to(self.dtype)
                    updates = orthogonalised(wide, group["ns_coefficients"], group["ns_steps"], group["eps"])
                    for p, update in zip(some, updates, strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                        p.add_(update if p.shape[1] == longer else update.T, alpha=-group["lr"] * 0.2 * longer**0.5)
        return loss

    def direction(self, p: nn.Parameter, momentum: float, nesterov: bool) -> Tensor:
        """The averaged gradient of a matrix, before it is orthogonalised."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        average = self.state[p]["momentum_buffer"]
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum) if nesterov else average


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(k, m, n), m <= n: matrices with the same singular vectors and singular values near 1, by Newton and Schulz's iteration."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
