"""Losses over all pairs of a large batch in memory that grows with its rows, not with its pairs.

A part of the rows is compared with all columns at a time. Its gradients are taken at once, so that no part's pairs are
kept: the row-chunked log-sum-exp of arXiv:2410.17243 in plain autograd. Several processes may share the parts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 20  # pairs that are compared at a time


class Share(NamedTuple):
    """Which parts are taken here: every `count`-th, from number `rank` on. What all ranks get adds up to the whole."""

    rank: int = 0
    count: int = 1


WHOLE = Share()


@dataclass(frozen=True)
class Term:
    """One loss term with what makes its value readable, all () in nats."""

    loss: Tensor
    chance: Tensor
    floor: Tensor

    def __add__(self, other: "Term") -> "Term":
        return Term(self.loss + other.loss, self.chance + other.chance, self.floor + other.floor)

    def __rmul__(self, factor: float | Tensor) -> "Term":
        return Term(factor * self.loss, factor * self.chance, factor * self.floor)


type Part = Callable[..., Term]  # (slice of the rows, *tensors) -> their share of the term


def in_parts(
    part: Part, rows: int, columns: int, *tensors: Tensor, pairs: int | None = None, share: Share = WHOLE
) -> Term:
    """Sum of `part(span, *tensors)` over spans of the rows; its loss is differentiable, once, by the tensors.

    Args:
        part: the share of a span of the rows; must read what needs a gradient from `tensors`.
        rows, columns: how many there are.
        tensors: embeddings and scales.
        pairs: rows times columns of a part at most, but one row at least. Default: `PAIRS_AT_ONCE`.
        share: the spans to sum over; they are cut so that the largest share is as small as spans of one size allow.
    """
    size = max(1, (pairs or PAIRS_AT_ONCE) // max(1, columns))
    if share.count > 1:
        turns = -(-rows // (share.count * size))  # spans of each process
        size = max(1, -(-rows // (share.count * max(1, turns))))
    return Term(*_InParts.apply(part, tuple(spans(rows, size))[share.rank :: share.count], *tensors))


def spans(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Part, parts: tuple[slice, ...], *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[2:]
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        kind = torch.promote_types(leaves[0].dtype, torch.float32)
        sums = Term(*(leaves[0].new_zeros((), dtype=kind) for _ in range(3)))
        for span in parts:
            with torch.set_grad_enabled(any(wanted)):
                term = part(span, *leaves)
                if term.loss.requires_grad:
                    term.loss.backward()
            sums += Term(term.loss.detach(), term.chance.detach(), term.floor.detach())
        gradients = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves if leaf.requires_grad
        ]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums.chance, sums.floor)
        return sums.loss, sums.chance, sums.floor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, *_: Tensor):
        saved = iter(ctx.saved_tensors)
        return None, None, *[gradient * next(saved) if want else None for want in ctx.needs_input_grad[2:]]
