"""The jobs of a comparison: what each needs, what it makes, and several processes working through them.

A job is done when what it makes exists, and is run only if a missing result depends on it. A process takes the first job whose needs are met and that no other process
holds; so the same command, started several times or by `accelerate launch`, shares the work, and started again it goes
on. What a job prints goes into its log.txt, what its result depends on into its settings.json.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla.files import write_json
from vla.locks import FolderHeldError, lock_folder
from vla.types import UserError

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLL = 2.0  # s between looks for a job while other processes hold the rest


@dataclass(frozen=True)
class Job:
    """`run` makes `makes`, which appears whole or not at all, after all `beside` it; every job named in `needs` comes first."""

    name: str
    makes: Path
    run: Callable[[], object]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0  # estimate
    beside: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        """Whether all that it makes is there."""
        return all(path.exists() for path in (self.makes, *self.beside))


def leave_the_launcher() -> None:
    """Make this process one of its own, on a GPU of its own: `accelerate launch` only starts several of us, every job is a run of one process."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    for name in LAUNCHER:
        os.environ.pop(name, None)


def needed(jobs: Sequence[Job]) -> list[Job]:
    """The jobs left to run: results (what no other job needs) that are missing, and what is missing on the way to them."""
    by_name = {job.name: job for job in jobs}
    inner = {name for job in jobs for name in job.needs}
    wanted, stack = set(), [job for job in jobs if job.name not in inner]
    while stack:
        job = stack.pop()
        if job.name not in wanted and not job.done:
            wanted.add(job.name)
            stack += [by_name[name] for name in job.needs]
    return [job for job in jobs if job.name in wanted]


def in_short(jobs: Sequence[Job]) -> str:
    """How many there are and are left, and how long these take."""
    left = needed(jobs)
    seconds = sum(job.seconds for job in left)
    return f"{len(jobs)} jobs, {len(left)} left, about {duration(seconds)} in one process"


def print_left(jobs: Sequence[Job]) -> None:
    """What a dry run says of every job that is left."""
    for job in needed(jobs):
        print(f"  {job.name:40} {duration(job.seconds):>12}")


def run_jobs(jobs: Sequence[Job], folder: Path, say: Callable[[str], None], settings: dict[str, Any]) -> dict[str, str]:
    """Work through the jobs together with other processes until no result is missing; `folder` takes locks and logs.

    A job that ends with a user's error, as one that diverges does, is passed over with those that need it.

    Args:
        settings: what the results depend on, kept beside each job's log.
    Returns:
        what failed, by name, with its error.
    """
    failed: dict[str, str] = {}
    while left := reachable(needed(jobs), failed):
        missing = {job.name for job in left}
        ready = [job for job in left if not missing & set(job.needs)]
        for job in ready:
            try:
                if take(job, jobs, folder, say, settings):
                    break
            except UserError as error:
                failed[job.name] = str(error).replace("add --resume=true", "run the same command again")
                say(f"  {job.name} failed: {failed[job.name]}")
                break
        else:
            time.sleep(POLL)
        done = {job.name for job in jobs if job.done}  # another process may have made it by now
        failed = {name: error for name, error in failed.items() if name not in done}
    return failed


def reachable(jobs: Sequence[Job], failed: Collection[str]) -> list[Job]:
    """The jobs that neither failed nor need, over any number of others, one that did."""
    lost, before = set(failed), -1
    while len(lost) > before:
        before = len(lost)
        lost |= {job.name for job in jobs if lost & set(job.needs)}
    return [job for job in jobs if job.name not in lost]


def refuse_failed(failed: dict[str, str], folder: Path) -> None:
    """Say what failed once everything else is done.

    Raises:
        UserError: something did.
    """
    if failed:
        name, error = next(iter(failed.items()))
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise UserError(
            f"{folder}: {name}{others} failed, everything that does not need it is done: {error} "
            f"(log: {folder / 'jobs' / name / 'log.txt'})"
        )


def take(job: Job, jobs: Sequence[Job], folder: Path, say: Callable[[str], None], settings: dict[str, Any]) -> bool:
    """Run the job unless another process holds it or has just finished it."""
    try:
        lock = lock_folder(folder / job.name)
    except FolderHeldError:
        return False
    with lock:
        if job.done:
            return False
        left = needed(jobs)
        seconds = sum(other.seconds for other in left)
        say(f"[{len(jobs) - len(left) + 1} of {len(jobs)}] {job.name}; about {duration(seconds)} of work left")
        started = time.monotonic()
        write_json(folder / job.name / "settings.json", settings)
        with (folder / job.name / "log.txt").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            job.run()
        if not job.done:
            raise RuntimeError(f"{job.name} did not make {job.makes}")
        say(f"  {job.name}: {duration(time.monotonic() - started)}")
    return True


def duration(seconds: float) -> str:
    """`2 h 05 min`, `7 min` or `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
