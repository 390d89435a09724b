"""Gymnasium environments with instructions, several valid goals a scene, and scripted experts.

Both environments share one interface, described in `docs/environments.md`.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator


@dataclass(frozen=True)
class Environment:
    """Where an environment and its expert are, as "module:class", and the packages that it needs beside this project's own."""

    gym_id: str
    env: str
    expert: str
    packages: tuple[str, ...] = ()


ENVIRONMENTS = {
    "tabletop": Environment(
        "concord/Tabletop-v0", "envs.tabletop.env:TabletopEnv", "envs.tabletop.expert:ScriptedExpert"
    ),
    "metaworld": Environment(
        "concord/MetaWorld-v0",
        "envs.metaworld.env:MetaWorldEnv",
        "envs.metaworld.expert:ScriptedExpert",
        ("metaworld", "mujoco"),
    ),
}

for _environment in ENVIRONMENTS.values():
    if _environment.gym_id not in gym.registry:
        gym.register(_environment.gym_id, entry_point=_environment.env, disable_env_checker=True, order_enforce=False)


class Expert(Protocol):
    """A scripted expert reads the true state of its environment, so it corrects whatever happened to its last action."""

    def act(self) -> np.ndarray:
        """(a,) float32 action in [-1, 1]."""
        ...


def environment_named(name: str) -> Environment:
    """What `ENVIRONMENTS` says of a name.

    Raises:
        ValueError: no such environment, where the names are listed, or one whose packages are not installed.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"env {name!r} is not one of {', '.join(sorted(ENVIRONMENTS))}")
    if not all(find_spec(package) for package in ENVIRONMENTS[name].packages):
        raise ValueError(f"env {name!r} is not installed; pip install 'lerobot_policy_concord[{name}]'")
    return ENVIRONMENTS[name]


def env_class(name: str) -> type[gym.Env]:
    """The class of an environment; raises as `environment_named` does."""
    return load_env_creator(environment_named(name).env)


def make_env(name: str, **kwargs: Any) -> gym.Env:
    """An environment by name, unwrapped."""
    return env_class(name)(**kwargs)


def make_expert(name: str, env: gym.Env) -> Expert:
    """The scripted expert of an environment."""
    return load_env_creator(environment_named(name).expert)(env)
