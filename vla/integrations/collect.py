"""Collection: what the scripted expert does into a LeRobotDataset v3 root, over several processes, resumable.

Workers write shards of whole episodes; a shard is a pure function of the configuration and its number, so a killed
collection repeats only unfinished shards, and any number of workers gives the same data.
"""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from envs import env_class, make_env, make_expert
from envs.metaworld.gl import RenderingError
from vla.config import CollectConfig
from vla.config_io import changed, filled, to_dict
from vla.data.episodes import read_episodes, task_of_episode
from vla.files import fsync, write_json, write_whole
from vla.integrations.behaviours import PATIENCE, Behaviour, demonstration, mistakes, play, stopped
from vla.integrations.dataset_writer import episode_stats, episode_table, write_dataset
from vla.locks import lock_folder
from vla.types import (
    ACTION_KEY,
    GOAL_KEY,
    IMAGE_KEY,
    SCENE_KEY,
    SEED_KEY,
    STATE_KEY,
    SUCCESS_KEY,
    TARGET_KEY,
    UserError,
)
from vla.versions import write_versions

SHARD_EPISODES = 100


@dataclass(frozen=True)
class Recording:
    """One recorded episode; arrays are (t, ...)."""

    frames: np.ndarray
    state: np.ndarray
    action: np.ndarray
    target: np.ndarray  # (t, 0) where the environment does not tell
    goal_id: str
    instruction: str
    task: str
    scene_id: int
    seed: int
    success: bool


def collect(config: CollectConfig) -> Path:
    """Collect what the configuration describes and return the data set's root.

    Raises:
        UserError: unknown environment or task, a kind it has not, nothing to render with, or the output holds a data set of another
            configuration.
    """
    root = Path(config.output)
    tasks = checked_tasks(config)
    wanted = to_dict(config) | {"workers": None, "output": None}
    if (root / "meta" / "concord.json").is_file():
        if found := changes(collected_with(root), wanted):
            raise UserError(f"{root}: holds a data set with {found}; choose another --output")
        shutil.rmtree(parts_folder(root), ignore_errors=True)  # there if the machine went down at the very end
        print(f"{root}: already complete")
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root}: exists and is not a data set of this program; move it, or choose an --output elsewhere"
        )

    shards = plan_shards(config, tasks)
    parts = parts_folder(root)
    lock = lock_folder(parts)
    check_same_plan(parts, wanted)
    made_with = write_versions(parts / "versions.json")
    todo = [number for number in range(len(shards)) if not shard_path(parts, number).with_suffix(".json").is_file()]
    total = sum(len(shard) for shard in shards)
    print(f"collect: {total} episodes of {config.env.name} with {config.workers} processes into {root}")
    work = partial(write_shard, config, parts)
    bar = tqdm(total=total, initial=total - sum(len(shards[n]) for n in todo), desc="collect", unit="episode")
    try:
        with bar:
            if config.workers == 1:
                for number in todo:
                    bar.update(work(number, shards[number]))
            else:
                with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
                    for done in pool.map(work, todo, [shards[number] for number in todo]):
                        bar.update(done)
    except RenderingError as error:
        raise UserError(f"{config.env.name}: {error}") from error
    merge(config, tasks, parts, len(shards), root, wanted, made_with)
    shutil.rmtree(parts)
    lock.close()
    print(summary(root))
    return root


def collected_with(root: Path) -> dict:
    """The configuration that a data set was collected with.

    Raises:
        UserError: its record is damaged.
    """
    path = root / "meta" / "concord.json"
    try:
        return json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete {root} to collect anew, or choose another --output"
        ) from error


def checked_tasks(config: CollectConfig) -> tuple[str, ...]:
    """The tasks to collect; UserError names those that do not exist, or a kind that the environment has not."""
    try:
        known = env_class(config.env.name).TASKS
    except ValueError as error:
        raise UserError(f"config error: env.name: {error}") from error
    unknown = [task for task in config.env.tasks if task not in known]
    if unknown:
        raise UserError(f"config error: env.tasks: {unknown[0]!r} is not a task of {config.env.name}; known: {known}")
    if config.kind != "demonstrations" and not env_class(config.env.name).SEVERAL_GOALS:
        raise UserError(f"config error: kind: scenes of {config.env.name} have one goal, {config.kind} needs several")
    return config.env.tasks or known


def plan_shards(config: CollectConfig, tasks: tuple[str, ...]) -> list[list[tuple[str, int, int]]]:
    """Shards of (task, seed, number of the goal within its scene), whole scenes together.

    Where a scene has one goal (Meta-World), every task gets `scenes` episodes; in play, every scene has one.
    """
    several = env_class(config.env.name).SEVERAL_GOALS
    goals = config.goals_per_scene if several and config.kind != "play" else 1
    task_lists = [""] if several else list(tasks)
    jobs = [
        [(task, config.seed + scene, goal) for goal in range(goals)]
        for task in task_lists
        for scene in range(config.scenes)
    ]
    per_shard = max(1, SHARD_EPISODES // goals)
    return [
        [job for scene in jobs[first : first + per_shard] for job in scene] for first in range(0, len(jobs), per_shard)
    ]


def check_same_plan(parts: Path, wanted: dict) -> None:
    """Refuse to mix shards of two configurations."""
    plan = parts / "config.json"
    text = json.dumps(wanted, indent=2, sort_keys=True)
    if plan.is_file() and (found := changes(json.loads(plan.read_text()), wanted)):
        raise UserError(f"{parts}: was begun with {found}; delete it or choose another --output")
    write_whole(plan, text)


def changes(made_with: dict, wanted: dict) -> str:
    """`scenes=3, not 4` for all that differs; what an older version did not know had its default."""
    return "; ".join(changed(filled(made_with, to_dict(CollectConfig())), wanted).values())


def write_shard(config: CollectConfig, parts: Path, number: int, jobs: list[tuple[str, int, int]]) -> int:
    """Simulate the jobs and write their episodes as one file; the marker comes last. Returns the episodes."""
    cv2.setNumThreads(1)
    env = environment_of(config)
    features = features_of(config, env)
    tables, records = [], []
    for task, seed, goal_number in jobs:
        episode = recorded(config, env, task, seed, goal_number)
        length = len(episode.action)
        columns = {
            IMAGE_KEY: episode.frames,
            STATE_KEY: episode.state,
            ACTION_KEY: episode.action,
            GOAL_KEY: np.zeros(length, np.int64),  # numbered when all goals are known
            SCENE_KEY: np.full(length, episode.scene_id, np.int64),
            SEED_KEY: np.full(length, episode.seed, np.int64),
            SUCCESS_KEY: np.full(length, episode.success, np.int64),
        }
        if TARGET_KEY in features:
            columns[TARGET_KEY] = episode.target
        tables.append(episode_table(columns, features))
        records.append(
            {
                "goal": episode.goal_id,
                "task": episode.task,
                "instruction": episode.instruction,
                "length": length,
                "stats": episode_stats(columns, features),
            }
        )
    env.close()
    path = shard_path(parts, number)
    pq.write_table(pa.concat_tables(tables), path)
    fsync(path)
    told = {"fps": env.metadata["render_fps"], "features": features, "episodes": records}
    write_whole(path.with_suffix(".json"), json.dumps(told))
    return len(jobs)


def environment_of(config: CollectConfig) -> gym.Env:
    """What the expert acts in."""
    longer = {"max_episode_steps": PATIENCE * config.goals_per_scene} if config.kind == "play" else {}
    return make_env(
        config.env.name, tasks=config.env.tasks, image_size=config.env.image_size, end_on_success=False, **longer
    )


def parts_folder(root: Path) -> Path:
    """Where the shards of an unfinished collection are."""
    return root.with_name(root.name + ".parts")


def shard_path(parts: Path, number: int) -> Path:
    """The file of a shard."""
    return parts / f"shard_{number:05d}.parquet"


def features_of(config: CollectConfig, env) -> dict[str, dict]:
    """LeRobot feature declarations."""
    side = config.env.image_size
    told = config.kind == "demonstrations"  # who is told nothing has no instructed object

    def vector(size: int, names: list[str] | None = None) -> dict:
        return {"dtype": "float32", "shape": (size,), "names": names}

    number = {"dtype": "int64", "shape": (1,), "names": None}
    return {
        IMAGE_KEY: {
            "dtype": "image",
            "shape": (side, side, 3),
            "names": ["height", "width", "channels"],
        },
        STATE_KEY: vector(env.observation_space["agent_pos"].shape[0]),
        ACTION_KEY: vector(env.action_space.shape[0]),
        **({TARGET_KEY: vector(2, ["x", "y"])} if told and hasattr(type(env), "target_position") else {}),
        GOAL_KEY: number,
        SCENE_KEY: number,
        SEED_KEY: number,
        SUCCESS_KEY: number,
    }


def recorded(config: CollectConfig, env, task: str, seed: int, goal_number: int) -> Recording:
    """One episode of the `goal_number`-th goal drawn for the scene; labels are the expert's, noise or not."""
    options = {"task": task} if task else {}
    begun = env.reset(seed=seed, options=options)
    goals = spread_goals(env.goals(), seed)
    if goal_number or len(goals) > 1:
        options["goal"] = goals[goal_number % len(goals)]
        begun = env.reset(seed=seed, options=options)
    expert = make_expert(config.env.name, env)
    rng = np.random.default_rng([seed, goal_number, 5])
    noise = config.noise if rng.random() < config.noisy_share else 0.0
    if config.kind == "demonstrations":
        return record(env, begun, seed, demonstration(expert), noise, rng)
    if config.kind == "play":
        episode = record(env, begun, seed, play(env, expert, goals, config.goals_per_scene), noise, rng)
        return replace(episode, goal_id="", task="play", instruction="", success=False)
    for mistake in mistakes(goals, begun[1]["goal_id"], np.random.default_rng([seed, goal_number, 7])):
        wrong = isinstance(mistake, str)
        behaviour = play(env, expert, [mistake], 1) if wrong else stopped(expert, mistake)
        episode = record(env, env.reset(seed=seed, options=options), seed, behaviour, noise, rng)
        if not episode.success:
            return replace(episode, instruction="")
    raise RuntimeError(f"scene {seed}: nothing keeps {begun[1]['goal_id']} from being reached")


def record(env, begun, seed: int, behaviour: Behaviour, noise: float, rng: np.random.Generator) -> Recording:
    """Record a behaviour until it or the environment ends the episode, as an attempt at what was asked at the beginning.

    Args:
        begun: what `env.reset` returned.
        noise: std of the noise on the executed action.
    """
    observation, asked = begun
    rows: dict[str, list[np.ndarray]] = {"frames": [], "state": [], "action": [], "target": []}
    success, action = False, next(behaviour)
    while action is not None:
        rows["frames"].append(observation["pixels"])
        rows["state"].append(observation["agent_pos"])
        rows["action"].append(action)
        rows["target"].append(np.asarray(getattr(env, "target_position", ()), np.float32))
        executed = action.copy()
        executed[:-1] += noise * rng.standard_normal(len(action) - 1).astype(np.float32)
        observation, _, _, truncated, info = env.step(np.clip(executed, -1, 1))
        success = success or asked["goal_id"] in info["achieved"]
        action = None if truncated else answer(behaviour, info)
    return Recording(
        **{key: np.stack(values) for key, values in rows.items()},
        **{key: asked[key] for key in ("goal_id", "instruction", "task", "scene_id")},
        seed=seed,
        success=success,
    )


def answer(behaviour: Behaviour, info: dict) -> np.ndarray | None:
    """(a,) the next action, or None at the end."""
    try:
        return behaviour.send(info)
    except StopIteration:
        return None


def spread_goals(goals, seed: int) -> list[str]:
    """Goal ids in a drawn order that alternates between tasks, so that the first few differ in what they need."""
    rng = np.random.default_rng([seed, 6])
    by_task: dict[str, list[str]] = {}
    for index in rng.permutation(len(goals)):
        by_task.setdefault(goals[index].task, []).append(goals[index].goal_id)
    queues = [by_task[task] for task in rng.permutation(sorted(by_task))]
    return [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]


def merge(
    config: CollectConfig, tasks: tuple[str, ...], parts: Path, count: int, root: Path, wanted: dict, made_with: dict
) -> None:
    """Join the shards, number the goals, and move the finished data set, `made_with` these versions, into place."""
    shards = [shard_path(parts, number) for number in range(count)]
    markers = [json.loads(shard.with_suffix(".json").read_text()) for shard in shards]
    episodes = [episode for marker in markers for episode in marker["episodes"]]
    goals = sorted({episode["goal"] for episode in episodes})
    number_of_goal = {goal: number for number, goal in enumerate(goals)}
    for episode in episodes:
        episode["columns"] = {GOAL_KEY: number_of_goal[episode["goal"]]}
    features = {k: v | {"shape": tuple(v["shape"])} for k, v in markers[0]["features"].items()}
    joined = parts / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    write_dataset(joined, markers[0]["fps"], features, shards, episodes)
    record = {
        "env": config.env.name,
        "tasks": list(tasks),
        "task_of_goal": {episode["goal"]: episode["task"] for episode in episodes},
        "goals": goals,
        "config": wanted,
        "versions": made_with,
    }
    write_json(joined / "meta" / "concord.json", record)
    for path in joined.rglob("*"):
        fsync(path)
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.exists():
        root.rmdir()
    joined.rename(root)


def summary(root: Path) -> str:
    """What was written, success by task, and the next command."""
    episodes = read_episodes(root)
    task, told = task_of_episode(episodes), episodes.goal_id >= 0
    goals = len(np.unique(episodes.goal_id[told]))
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) / 1e6
    lines = [f"{root}: {len(task)} episodes, {len(episodes.state)} frames, {goals} goals, {size:.0f} MB"]
    for name in sorted(set(task)):
        chosen = task == name
        succeeded = f"{100 * episodes.success[chosen].mean():5.1f} % successful, " if name else ""
        lines.append(
            f"  {name or 'without instruction':24} {chosen.sum():5d} episodes, {succeeded}"
            f"{episodes.length()[chosen].mean():5.1f} timesteps"
        )
    lines.append(f"next: python scripts/train_align.py --{'data.root' if told.any() else 'more'}={root}")
    return "\n".join(lines)
