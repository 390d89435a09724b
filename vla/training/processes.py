"""Stage one on many processes, of one machine or several: who embeds what, and the exchanges that make it exact.

Every process knows the ids of the whole batch and embeds its share of the images and texts. Embeddings are gathered, each
process compares its share of them with all, the embeddings' gradients are added up, each process carries on those of its own
embeddings, and the parameters' gradients are added up. No gradient travels through a collective, so none is scaled by the number of processes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import Tensor, distributed

from vla.data.episodes import Episodes
from vla.training.checkpoint import latest_checkpoint, step_of
from vla.types import UserError

# What bad input, a full disk or a lost file raise: not faults of the program, and often on one machine alone.
STOPS = (UserError, OSError, SafetensorError)


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

    def numbers(self, own: int, device: torch.device) -> list[int]:
        """One integer of every process."""
        return self.gather(torch.tensor([own], device=device), [1] * self.count).tolist()

    @torch.no_grad()
    def share(self, module: torch.nn.Module) -> None:
        """Give every process the first one's parameters and buffers: other hardware may have computed others."""
        if self.count == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            sent = tensor.contiguous()
            distributed.broadcast(sent, 0)
            tensor.copy_(sent)

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


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of this process. Others wait with patience: one that decodes a large data set is not lost."""
    AcceleratorState._reset_state()  # it is one for the whole process and keeps its first precision; processes stay connected
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])


def check_same_progress(processes: Processes, folder: Path, finished: bool, device: torch.device) -> None:
    """Refuse to begin or resume where machines see different run folders, or some were not told to resume.

    Raises:
        UserError: names the steps, or the checkpoint that is not the same everywhere.
    """
    last = latest_checkpoint(folder)
    every = processes.numbers(-1 if finished else step_of(last) if last else 0, device)
    if rank := other_than_first(every):
        first, other = ("the end" if n < 0 else f"step {n}" for n in (every[0], every[rank]))
        raise refusal(
            f"{folder}: process 0 is at {first}, process {rank} at {other}; all must see the same run: let them share the "
            "folder, or copy it from the machine that is ahead to the others"
        )
    state = last / "state.json" if last and not finished else None
    if rank := other_than_first(
        processes.numbers(number_of(state.read_text()) if state and state.is_file() else 0, device)
    ):
        raise refusal(
            f"{last}: process {rank} has this checkpoint of another run than process 0; copy the folder anew from the machine whose run "
            "is to go on"
        )


def check_same_data(processes: Processes, episodes: Episodes, chosen: str, device: torch.device) -> None:
    """Refuse to compute one batch from different data.

    Args:
        chosen: a digest of the training episodes, which the tasks in meta/concord.json may decide.
    Raises:
        UserError: the data sets of two processes have different fingerprints, or other instructions, goals or training episodes.
    """
    told = episodes.fingerprint + episodes.labels() + chosen
    if rank := other_than_first(processes.numbers(number_of(told), device)):
        raise refusal(f"{episodes.root}: process {rank} has other data than process 0; copy it anew, whole")


def check_same_settings(processes: Processes, settings: str, device: torch.device) -> None:
    """Refuse to compute one batch with different settings, given as text.

    Raises:
        UserError: they differ between two processes.
    """
    if rank := other_than_first(processes.numbers(number_of(settings), device)):
        raise refusal(
            f"process {rank} has other settings than process 0; start all with the same configuration (paths, threads, chunk and "
            "how often something is written may differ), and with a --precision if one machine has bfloat16 and another has not"
        )


def check_same_encoders(processes: Processes, words_digest: str, model: torch.nn.Module, device: torch.device) -> None:
    """Refuse to compute one batch with towers of different sizes, or that read the texts, whose tokens have the digest `words_digest`, differently.

    Raises:
        UserError: they differ between two processes.
    """
    sizes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    if rank := other_than_first(processes.numbers(number_of(f"{words_digest}{sizes}"), device)):
        raise refusal(
            f"process {rank} has an encoder of other words or sizes than process 0; copy what tower.pretrained, tower.vocabulary or "
            "tower.lexicon names to all machines anew, whole, and give all the same versions (uv.lock)"
        )


def number_of(text: str) -> int:
    """A digest of a text that fits an int64."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def other_than_first(numbers: list[int]) -> int:
    """The first process whose number is not that of process 0; 0 if there is none."""
    return next((rank for rank, number in enumerate(numbers) if number != numbers[0]), 0)


def in_turn[T](accelerator: Accelerator, action: Callable[[], T], *, mine_first: bool) -> T:
    """What every process gets from an action that the first one, or the first one of each machine (`mine_first`), does before the others.

    Raises:
        UserError, OSError, SafetensorError: the action raised one here, or in another process; all stop alike.
    """
    if not mine_first:
        accelerator.wait_for_everyone()
    result, error = attempt(action)
    if mine_first:
        accelerator.wait_for_everyone()
    return agreed(accelerator, result, error)


def together[T](accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What every process gets from an action of its own.

    Raises:
        UserError, OSError, SafetensorError: the action raised one here, or in another process; all stop alike.
    """
    return agreed(accelerator, *attempt(action))


def in_step[T](accelerator: Accelerator, items: Iterator[T]) -> Iterator[T]:
    """What every process's own iterator gives, as many things everywhere.

    Raises:
        UserError, OSError, SafetensorError: an iterator raised one here, or in another process; all stop alike.
    """
    while (item := together(accelerator, lambda: next(items, None))) is not None:
        yield item


def attempt[T](action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an action gives, or the error that it raises."""
    try:
        return action(), None
    except STOPS as error:
        return None, error


def agreed[T](accelerator: Accelerator, result: T, error: Exception | None) -> T:
    """The result, if no process has an error."""
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    failed = processes.numbers(int(error is not None), accelerator.device)
    if any(failed):
        leave_group()
        raise error or UserError(f"process {failed.index(1)} has stopped; its message says why")
    return result


def refusal(text: str) -> UserError:
    """The error that all processes stop with; they part first, as one that is left alone would crash."""
    leave_group()
    return UserError(text)


def leave_group() -> None:
    """Leave the other processes, if there are any, which all do alike; one that still belongs to them when the interpreter ends may abort."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


ALONE = Processes()
