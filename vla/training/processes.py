"""Stage one on many processes: who embeds what of the global batch, and the exchanges that make it exact.

Every process knows the ids of the whole batch and embeds its share of the images and texts. Embeddings are gathered, the
loss over all of them is taken everywhere, each share carries on its own gradients, and the parameters' gradients are
added up. No gradient travels through a collective, so none is scaled by the number of processes.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1

    def shares(self, total: int) -> list[slice]:
        """Consecutive spans of `total` things, one a process, as even as possible."""
        bounds = [total * process // self.count for process in range(self.count + 1)]
        return [slice(first, last) for first, last in pairwise(bounds)]

    def gather(self, own: Tensor, lengths: list[int]) -> Tensor:
        """(n, ...) of every process, `lengths` of them, -> one behind the other; no gradient."""
        if self.count == 1:
            return own
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def add(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their sums over the processes, in one exchange for each type of number."""
        if self.count == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            members = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in members])
            distributed.all_reduce(flat)
            for tensor, total in zip(members, flat.split([t.numel() for t in members]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def add_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum the gradients; a parameter without one anywhere stays without."""
        if self.count == 1:
            return
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
        self.add([there])
        used = [p for p, anywhere in zip(parameters, there.tolist(), strict=True) if anywhere]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add([parameter.grad for parameter in used])


ALONE = Processes()
