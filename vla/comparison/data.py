"""The data sets of a comparison: what encoders are trained on, what policies clone, and play beside them."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from vla.config import CompareConfig, EnvConfig, PolicyTrainConfig, SweepConfig
from vla.config_io import inside
from vla.data.episodes import Episodes, fingerprint, read_episodes, task_of_episode
from vla.data.frames import open_pictures
from vla.data.mixture import camera_in, root_and_weight
from vla.eval.evaluate import check_sizes
from vla.files import read_json, write_json
from vla.integrations.collect import checked_tasks, collect
from vla.locks import LOCK_NAME
from vla.policies.concord.modeling_concord import WEIGHTS
from vla.training.policy import train_policy
from vla.types import UserError


def make_data(config: CompareConfig) -> None:
    """Collect the demonstrations, unless the data sets are there, and decode their pictures once.

    Raises:
        UserError: of a comparison that was begun with them, other demonstrations came out.
    """
    known = checked_tasks(config.collect)
    roots = {cloned_root(config): config.transfer or known}
    roots[config.align.data.root] = tuple(task for task in known if task not in config.transfer)
    record = {}
    for root, tasks in roots.items():
        if not (Path(root) / "meta" / "info.json").is_file():
            scenes = config.collect.scenes if root == config.align.data.root else max(4, config.collect.scenes // 10)
            collect(replace(config.collect, output=root, env=env_of(config, tasks), scenes=scenes))
        episodes = read_episodes(root, config.align.data.camera)
        there = set(task_of_episode(episodes))
        if config.transfer and not there <= set(tasks):
            raise UserError(
                f"{root}: has episodes of {sorted(there - set(tasks))[0]}, which transfer keeps apart; choose another root"
            )
        check_evaluable(config, episodes)
        cache = config.align.data.cache if root == config.align.data.root else None
        open_pictures(episodes, replace(config.align.data, cache=cache))
        record[root] = {"fingerprint": episodes.fingerprint, **counts(episodes)}
        record[root] |= {"collected with": episodes.collected.get("config")}
    own = record.pop(config.align.data.root)
    own |= {"root": config.align.data.root} | ({"cloned": record} if record else {})
    if config.play_scenes:
        own |= {"play": make_play(config, roots[config.align.data.root])}
    open_beside(config)
    check_data_there(Path(config.output))
    write_json(Path(config.output) / "data.json", own)


def check_data_there(folder: Path) -> None:
    """Refuse demonstrations that are not those that the folder was begun with; absent ones are of another machine.

    Raises:
        UserError: names the data set and both fingerprints.
    """
    path = folder / "data.json"
    made = read_json(path)
    fingerprints = {made["root"]: made["fingerprint"]} if made else {}
    fingerprints |= {root: record["fingerprint"] for root, record in made.get("cloned", {}).items()}
    fingerprints |= {record["root"]: record["fingerprint"] for record in [made.get("play")] if record}
    for root, before in fingerprints.items():
        if (Path(root) / "meta" / "info.json").is_file() and (now := fingerprint(Path(root))) != before:
            raise UserError(
                f"{root}: has changed since {path} was written (fingerprints {before} and {now}); restore it, or choose another --output"
            )


def make_play(config: CompareConfig, tasks: tuple[str, ...]) -> dict:
    """Collect play of some tasks, unless it is there, in scenes that no demonstration shows; returns what is recorded of it.

    Raises:
        UserError: the play that is there is of other tasks or of another number of scenes.
    """
    root, collected = play_root(config), config.collect
    shown = record_of(config.align.data.root).get("config", {"seed": collected.seed, "scenes": collected.scenes})
    if not (Path(root) / "meta" / "info.json").is_file():
        scenes = {"scenes": config.play_scenes, "seed": shown["seed"] + shown["scenes"]}
        collect(replace(collected, output=root, kind="play", env=env_of(config, tasks), **scenes))
    episodes = read_episodes(root, partial=True)
    other = sorted(set(episodes.collected.get("tasks", ())) - set(tasks))
    if other:
        raise UserError(f"{root}: has play of {other[0]}, which transfer keeps apart; choose another root")
    made_with = episodes.collected.get("config")
    if made_with and made_with["scenes"] != config.play_scenes:
        raise UserError(
            f"{root}: has play of {made_with['scenes']} scenes, not play_scenes={config.play_scenes}; choose another root"
        )
    open_pictures(episodes, config.align.data)
    return {"root": root, "fingerprint": episodes.fingerprint, **counts(episodes), "collected with": made_with}


@contextmanager
def token_cache(config: CompareConfig | SweepConfig, roots: Iterable[str], cache: Path) -> Iterator[None]:
    """A cache folder of an encoder's own that shares the decoded pictures of some data sets, and stays while the block runs."""
    with held(cache):
        for root in roots:
            link_frames(config, root, cache)
        yield


def held(cache: Path) -> IO[str]:
    """The open lock of a cache folder, made if there is none; until it is closed `drop_caches` leaves the folder."""
    while True:
        cache.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # deleted since
            lock = (cache / LOCK_NAME).open("a+")
            fcntl.flock(lock, fcntl.LOCK_SH)
            if is_at(cache / LOCK_NAME, lock):
                return lock
            lock.close()


def is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one at `path`."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def clone_cached(config: CompareConfig | SweepConfig, policy: PolicyTrainConfig, readers: Iterable[Path]) -> None:
    """Train a policy with a token cache; it goes with the last of the policies at `readers`, which read it, too."""
    cache = Path(policy.data.cache)
    with token_cache(config, (policy.data.root, *roots_beside(policy)), cache):
        train_policy(policy)
    if all((path / WEIGHTS).exists() for path in readers):
        drop_caches([cache])


def roots_beside(policy: PolicyTrainConfig) -> list[str]:
    """The further data sets that a policy clones."""
    return [root_and_weight(text)[0] for text in policy.more]


def open_beside(config: CompareConfig | SweepConfig) -> None:
    """Decode the pictures of the further data sets that policies clone, once; those beside which nothing can be written are decoded for each."""
    data = config.align.data
    for root in (root for root in roots_beside(config.policy) if os.access(root, os.W_OK)):
        open_pictures(read_episodes(root, camera_in(root, data.camera), partial=True), replace(data, cache=None))


def drop_caches(caches: Iterable[Path]) -> None:
    """Delete cache folders, but for those that a process is using, or that cannot be deleted."""
    for cache in caches:
        with suppress(OSError), (cache / LOCK_NAME).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(cache / LOCK_NAME, lock):
                for path in set(cache.iterdir()) - {cache / LOCK_NAME}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                (cache / LOCK_NAME).unlink()  # last, so that nobody begins in what is being deleted
                cache.rmdir()  # unless somebody has begun anew


def link_frames(config: CompareConfig | SweepConfig, root: str, cache: Path) -> None:
    """Let a cache folder share the decoded pictures of a data set."""
    data = config.align.data
    shared = Path(data.cache) if data.cache and root == data.root else Path(root) / ".concord"
    for store in shared.glob("frames_*.npy"):
        if not (cache / store.name).exists():
            try:
                os.link(store, cache / store.name)
            except FileExistsError:  # another process was first
                continue
            except OSError:  # another file system, or a file system without links
                with suppress(FileExistsError):
                    (cache / store.name).symlink_to(store.resolve())


def data_sets(config: CompareConfig) -> tuple[Path, ...]:
    """A file of every data set that `make_data` collects or finds."""
    roots = {config.align.data.root, cloned_root(config), *((play_root(config),) if config.play_scenes else ())}
    return tuple(Path(root) / "meta" / "info.json" for root in sorted(roots))


def cloned_root(config: CompareConfig) -> str:
    """The data set that policies clone: that of the encoders, or one of the tasks that these never see."""
    return config.align.data.root + ("_transfer" if config.transfer else "")


def play_root(config: CompareConfig) -> str:
    """The data set of play."""
    return config.align.data.root + "_play"


def aligned_beside(config: CompareConfig) -> tuple[str, ...]:
    """What alignments see beside the demonstrations: play with the weight of its scenes."""
    weight = config.play_scenes / config.collect.scenes
    return (*config.align.more, *((f"{play_root(config)}={weight:g}",) if config.play_scenes else ()))


def env_of(config: CompareConfig, tasks: tuple[str, ...]) -> EnvConfig:
    """The environment to collect some of the tasks in."""
    env = config.collect.env
    return env if tasks == checked_tasks(config.collect) else replace(env, tasks=tasks)


def counts(episodes) -> dict[str, int]:
    """How large a data set is."""
    return {"episodes": len(episodes.goal_id), "frames": len(episodes.frame_row), "goals": len(episodes.goals)}


def record_of(root: str) -> dict:
    """How a data set was collected; nothing of one that is not there, or not from here."""
    return read_json(Path(root) / "meta" / "concord.json")


def env_name(config: CompareConfig | SweepConfig) -> str:
    """The environment that is evaluated in: the one that is named, else that of the demonstrations."""
    return config.eval.env or record_of(config.align.data.root).get("env", config.collect.env.name)


def evaluated_tasks(config: CompareConfig) -> tuple[str, ...]:
    """The tasks that policies are evaluated on: those that are named, those of the demonstrations, or all of the environment's."""
    made_with = tuple(record_of(config.align.data.root).get("tasks", ()))
    own = checked_tasks(config.collect) if env_name(config) == config.collect.env.name else ()
    return config.eval.tasks or made_with or own


def check_evaluable(config: CompareConfig | SweepConfig, episodes: Episodes) -> None:
    """Refuse demonstrations of another robot than the environment's, before policies are trained that could not be evaluated in it.

    Raises:
        UserError: names both sizes.
    """
    with inside("eval."):
        check_sizes(env_name(config), episodes.state.shape[1], episodes.action.shape[1], f"the data in {episodes.root}")
