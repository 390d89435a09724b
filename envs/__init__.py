"""Gymnasium environments with instructions, several valid goals a scene, and scripted experts.

Both environments share one interface, described in `docs/environments.md`.
"""

from importlib.util import find_spec
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

ENVIRONMENTS = {"tabletop": "concord/Tabletop-v0", "metaworld": "concord/MetaWorld-v0"}
_ENTRY_POINTS = {
    "concord/Tabletop-v0": "envs.tabletop.env:TabletopEnv",
    "concord/MetaWorld-v0": "envs.metaworld.env:MetaWorldEnv",
}

for _id, _entry_point in _ENTRY_POINTS.items():
    if _id not in gym.registry:
        gym.register(_id, entry_point=_entry_point, disable_env_checker=True, order_enforce=False)


class Expert(Protocol):
    """A scripted expert reads the true state of its environment, so it corrects whatever happened to its last action."""

    def act(self) -> np.ndarray:
        """(a,) float32 action in [-1, 1]."""
        ...


def env_class(name: str) -> type[gym.Env]:
    """The class behind a name of `ENVIRONMENTS`.

    Raises:
        ValueError: no such environment, where the names are listed, or one whose packages are not installed.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"env {name!r} is not one of {', '.join(sorted(ENVIRONMENTS))}")
    if name == "metaworld" and not all(find_spec(package) for package in ("metaworld", "mujoco")):
        raise ValueError("env 'metaworld' is not installed; pip install 'lerobot_policy_concord[metaworld]'")
    return gym.envs.registration.load_env_creator(_ENTRY_POINTS[ENVIRONMENTS[name]])


def make_env(name: str, **kwargs: Any) -> gym.Env:
    """An environment by name, unwrapped."""
    return env_class(name)(**kwargs)


def make_expert(name: str, env: gym.Env) -> Expert:
    """The scripted expert of an environment."""
    if name == "tabletop":
        from envs.tabletop.expert import ScriptedExpert
    elif name == "metaworld":
        from envs.metaworld.expert import ScriptedExpert
    else:
        raise ValueError(f"env {name!r} is not one of {', '.join(sorted(ENVIRONMENTS))}")
    return ScriptedExpert(env)
