"""Closed-loop rollouts: many environments stepped together, a frame rendered only when the policy looks.

Episodes run to their horizon, so that success at the final timestep is known besides success at any, unless the
specification ends them at the first success. Results
depend on the specification alone, not on batch size or number of processes (up to float rounding inside the policy).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from envs import make_env
from vla.eval.episode import EpisodeRecord, EpisodeSpec, begin
from vla.types import ChunkPolicy, UserError
from vla.workers import worker_context

MakePolicy = Callable[[], ChunkPolicy]


def check_drawing(field: str, spec: EpisodeSpec) -> None:
    """Refuse rollouts, which the configuration's `field` asks for, if they could not begin.

    Raises:
        UserError: the environment is not installed, or has nothing to render with.
    """
    try:
        env = make_env(spec.env, tasks=spec.tasks, image_size=spec.image_size)
        env.reset(seed=spec.seed)
        env.close()
    except ValueError as error:
        raise UserError(f"config error: {field}: {error}; or leave it out") from error


@contextmanager
def rollout_workers(make_policy: MakePolicy, count: int) -> Iterator[Executor | None]:
    """Processes for `run_rollouts`, one thread each, that load the policy while this one goes on; none if `count` is 1.

    `make_policy` must be picklable.
    """
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(
        count, mp_context=worker_context(), initializer=_start_worker, initargs=(make_policy,)
    ) as pool:
        for _ in range(count):  # a process is started when there is work for it
            pool.submit(_loaded)
        yield pool


def run_rollouts(
    policy: ChunkPolicy | None,
    specs: Sequence[EpisodeSpec],
    *,
    batch_size: int = 32,
    workers: Executor | None = None,
    video_folder: Path | None = None,
    journal: Path | None = None,
) -> list[EpisodeRecord]:
    """Run every spec and return the records in their order.

    Args:
        policy: what acts, if there are no workers, which have theirs.
        specs: the episodes.
        batch_size: environments stepped together in one process.
        workers: from `rollout_workers`, of the same policy; None runs in this process.
        video_folder: where every episode is filmed, as `NNNNN.mp4`; none if it is not given.
        journal: file of finished records; an interrupted call with the same specs goes on from it.
    """
    started = time.perf_counter() - (seconds_so_far(journal) if journal else 0.0)
    done = read_journal(journal, specs) if journal else {}
    groups = grouped([i for i in range(len(specs)) if i not in done], specs, batch_size)
    bar = tqdm(total=len(specs), initial=len(done), desc="rollouts", unit="episode", mininterval=1.0)
    arguments = [([(i, specs[i]) for i in group], video_folder) for group in groups]
    with bar:
        if workers is not None:
            _take(workers.map(_run_in_worker, arguments), done, journal, bar, started)
        else:
            try:
                _take(map(partial(_run_group, policy), arguments), done, journal, bar, started)
            finally:  # simulators take some 100 MB each; workers end with theirs
                close_environments()
    return [done[i] for i in range(len(specs))]


def grouped(indices: list[int], specs: Sequence[EpisodeSpec], batch_size: int) -> list[list[int]]:
    """Batches of episodes that share the construction of their environments."""
    by_environment: dict[tuple, list[int]] = {}
    for index in indices:
        by_environment.setdefault(_construction(specs[index]), []).append(index)
    return [
        members[i : i + batch_size] for members in by_environment.values() for i in range(0, len(members), batch_size)
    ]


def read_journal(path: Path, specs: Sequence[EpisodeSpec]) -> dict[int, EpisodeRecord]:
    """Finished records by index; those of other specs, and a torn last line, are left out."""
    done: dict[int, EpisodeRecord] = {}
    for entry in entries(path):
        index = entry["index"]
        if index < len(specs) and entry["spec"] == json.loads(json.dumps(asdict(specs[index]))):
            record = entry["record"]
            done[index] = EpisodeRecord(**record | {"achieved": tuple(record["achieved"])})
    return done


def seconds_so_far(journal: Path) -> float:
    """What the rollouts took that a journal holds; 0 for one that does not say."""
    told = [entry.get("seconds", 0.0) for entry in entries(journal)]
    return max(told, default=0.0)


def entries(journal: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal but for a torn last one."""
    for line in journal.read_text().splitlines() if journal.is_file() else ():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


_policy: ChunkPolicy | UserError | None = None
_environments: dict[tuple, list[gym.Env]] = {}


def _start_worker(make_policy: MakePolicy) -> None:
    global _policy
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        _policy = make_policy()
    except UserError as error:  # told by whoever asks for the policy, not by a traceback from here
        _policy = error


def _loaded() -> bool:
    return _policy is not None


def _run_in_worker(arguments):
    if isinstance(_policy, UserError):
        raise _policy
    return _run_group(_policy, arguments)


def _take(results, done: dict[int, EpisodeRecord], journal: Path | None, bar: tqdm, started: float) -> None:
    for group in results:
        seconds = round(time.perf_counter() - started, 1)
        for index, spec, record in group:
            done[index] = record
            if journal is not None:
                entry = {"index": index, "spec": asdict(spec), "record": asdict(record), "seconds": seconds}
                with journal.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        bar.update(len(group))


def _construction(spec: EpisodeSpec) -> tuple:
    return spec.env, spec.tasks, spec.split, spec.level, spec.image_size


def close_environments(but: tuple | None = None) -> None:
    """Close the environments that this process keeps, but for those of one construction."""
    for key in [key for key in _environments if key != but]:
        for env in _environments.pop(key):
            env.close()


def _environments_for(specs: Sequence[EpisodeSpec]) -> list[gym.Env]:
    """An environment for each of a batch's episodes, which are of one construction; those of other constructions are closed.

    They are kept between batches, and each goes on with its task where it can: Meta-World builds every other one anew.
    """
    first, key = specs[0], _construction(specs[0])
    close_environments(but=key)
    pool = _environments.setdefault(key, [])
    while len(pool) < len(specs):
        pool.append(
            make_env(
                first.env,
                tasks=first.tasks,
                split=first.split,
                level=first.level,
                image_size=first.image_size,
                end_on_success=False,
            )
        )
    free = list(pool)
    chosen: list[gym.Env | None] = []
    for spec in specs:
        place = next((i for i, env in enumerate(free) if env.task == spec.task), None)
        chosen.append(None if place is None else free.pop(place))
    return [free.pop(0) if env is None else env for env in chosen]


def _run_group(policy: ChunkPolicy, arguments) -> list[tuple[int, EpisodeSpec, EpisodeRecord]]:
    """Step one batch of environments in lockstep until all episodes have ended; `policy` acts in those that have not."""
    members, video_folder = arguments
    envs = _environments_for([spec for _, spec in members])
    episodes = [begin(env, spec, filmed=video_folder is not None) for env, (_, spec) in zip(envs, members, strict=True)]
    attends = video_folder is not None and hasattr(policy, "attention")
    while active := [episode for episode in episodes if episode.running]:
        for episode in active:
            episode.look()
        seen = (
            np.stack([episode.observation["pixels"] for episode in active]),
            np.stack([episode.observation["agent_pos"] for episode in active]),
            [episode.told["instruction"] for episode in active],
        )
        chunks = policy.act(*seen)
        if attends and (attention := policy.attention(*seen)) is not None:
            for episode, looked_at in zip(active, attention, strict=True):
                episode.looked_at = looked_at
        for actions in chunks.swapaxes(0, 1):
            for episode, action in zip(active, actions, strict=True):
                if episode.running:
                    episode.step(action)
    names = [None if video_folder is None else f"{index:05d}.mp4" for index, _ in members]
    if video_folder is not None:
        video_folder.mkdir(parents=True, exist_ok=True)
        for episode, name in zip(episodes, names, strict=True):
            episode.save_film(video_folder / name)
    return [
        (index, spec, episode.record(name))
        for (index, spec), episode, name in zip(members, episodes, names, strict=True)
    ]
