"""This project's environments for LeRobot's commands: `--env.type=concord_tabletop` and `--env.type=concord_metaworld`.

`--env.task` takes task names separated by commas; empty means all. Every task is an entry of its own in LeRobot's tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from envs import env_class, make_env
from vla.types import ACTION_KEY, IMAGE_KEY, STATE_KEY

FEATURES_MAP = {"action": ACTION_KEY, "agent_pos": STATE_KEY, "pixels": IMAGE_KEY}


@EnvConfig.register_subclass("concord_tabletop")
@dataclass
class ConcordTabletopEnv(EnvConfig):
    """The tabletop; `split` and `level` as in docs/environments.md."""

    task: str | None = ""
    fps: int = 10
    image_size: int = 96
    split: str = "train"
    level: int = 1
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=lambda: dict(FEATURES_MAP))

    def __post_init__(self) -> None:
        self.features = features(self.image_size, state_dim=4, action_dim=3)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "split": self.split, "level": self.level}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """{"tabletop": {number of the task: vector environment}}."""
        return vector_envs("tabletop", self.task, n_envs, use_async_envs, self.gym_kwargs)


@EnvConfig.register_subclass("concord_metaworld")
@dataclass
class ConcordMetaWorldEnv(EnvConfig):
    """Meta-World with fast rendering, as this project's data sets are collected; not LeRobot's `metaworld`."""

    task: str | None = ""
    fps: int = 80
    image_size: int = 96
    episode_length: int = 250
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=lambda: dict(FEATURES_MAP))

    def __post_init__(self) -> None:
        self.features = features(self.image_size, state_dim=4, action_dim=4)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "max_episode_steps": self.episode_length}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """{"metaworld": {number of the task: vector environment}}."""
        return vector_envs("metaworld", self.task, n_envs, use_async_envs, self.gym_kwargs)


def features(image_size: int, *, state_dim: int, action_dim: int) -> dict[str, PolicyFeature]:
    """What the environment gives and takes."""
    return {
        "action": PolicyFeature(FeatureType.ACTION, (action_dim,)),
        "agent_pos": PolicyFeature(FeatureType.STATE, (state_dim,)),
        "pixels": PolicyFeature(FeatureType.VISUAL, (image_size, image_size, 3)),
    }


class Unbuilt:
    """A vector environment in processes of its own, which start when it is used: LeRobot makes those of all tasks before it runs the first."""

    def __init__(self, makers: list[Callable[[], gym.Env]]) -> None:
        self.makers, self.num_envs = makers, len(makers)

    @cached_property
    def built(self) -> gym.vector.AsyncVectorEnv:
        return gym.vector.AsyncVectorEnv(self.makers, autoreset_mode=AutoresetMode.SAME_STEP, context="forkserver")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.built, name)

    def close(self) -> None:
        if "built" in vars(self):
            self.built.close()


def vector_envs(
    name: str, task: str | None, n_envs: int, use_async_envs: bool, kwargs: dict[str, Any]
) -> dict[str, dict[int, gym.vector.VectorEnv]]:
    """One vector environment for each task.

    Raises:
        ValueError: a task the environment does not have.
    """
    known = env_class(name).TASKS
    tasks = [part.strip() for part in (task or "").split(",") if part.strip()] or list(known)
    unknown = [one for one in tasks if one not in known]
    if unknown:
        raise ValueError(f"env.task: {unknown[0]!r} is not a task of {name}; known: {', '.join(known)}")

    def vector(one: str) -> "gym.vector.VectorEnv | Unbuilt":
        makers = [partial(make_env, name, tasks=(one,), **kwargs)] * n_envs
        if use_async_envs and n_envs > 1:
            return Unbuilt(makers)
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)

    return {name: {number: vector(one) for number, one in enumerate(tasks)}}
