"""The jobs of a comparison: what each needs, what it makes, and several processes working through them.

A job is done when the path it makes exists, and is run only if a missing result depends on it. A process takes the first job whose needs are met and that no other process
holds; so the same command, started several times or by `accelerate launch`, shares the work, and started again it goes
on. What a job prints goes into its log.txt.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from vla.locks import lock_folder
from vla.types import UserError

POLL = 2.0  # s between looks for a job while other processes hold the rest


@dataclass(frozen=True)
class Job:
    """`run` makes `makes`, which appears whole or not at all; every job named in `needs` comes first."""

    name: str
    makes: Path
    run: Callable[[], object]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0  # estimate


def needed(jobs: Sequence[Job]) -> list[Job]:
    """The jobs left to run: results (what no other job needs) that are missing, and what is missing on the way to them."""
    by_name = {job.name: job for job in jobs}
    inner = {name for job in jobs for name in job.needs}
    wanted, stack = set(), [job for job in jobs if job.name not in inner]
    while stack:
        job = stack.pop()
        if job.name not in wanted and not job.makes.exists():
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


def run_jobs(jobs: Sequence[Job], folder: Path, say: Callable[[str], None]) -> None:
    """Work through the jobs together with other processes until no result is missing; `folder` takes locks and logs."""
    while left := needed(jobs):
        missing = {job.name for job in left}
        ready = [job for job in left if not missing & set(job.needs)]
        if not any(take(job, jobs, folder, say) for job in ready):
            time.sleep(POLL)


def take(job: Job, jobs: Sequence[Job], folder: Path, say: Callable[[str], None]) -> bool:
    """Run the job unless another process holds it or has just finished it."""
    try:
        lock = lock_folder(folder / job.name)
    except UserError:
        return False
    with lock:
        if job.makes.exists():
            return False
        left = needed(jobs)
        seconds = sum(other.seconds for other in left)
        say(f"[{len(jobs) - len(left) + 1} of {len(jobs)}] {job.name}; about {duration(seconds)} of work left")
        started = time.monotonic()
        with (folder / job.name / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            job.run()
        if not job.makes.exists():
            raise RuntimeError(f"{job.name} did not make {job.makes}")
        say(f"  {job.name}: {duration(time.monotonic() - started)}")
    return True


def duration(seconds: float) -> str:
    """`2 h 05 min`, `7 min` or `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
