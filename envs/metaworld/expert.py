"""Meta-World's own scripted experts."""

import warnings

import numpy as np

from envs.metaworld.env import MetaWorldEnv
from envs.metaworld.gl import ensure_gl, rendering


class ScriptedExpert:
    """Reads the full state of a `MetaWorldEnv`."""

    def __init__(self, env: MetaWorldEnv) -> None:
        with rendering():
            ensure_gl()  # before Meta-World imports MuJoCo
            from metaworld.policies import ENV_POLICY_MAP

        self.env = env
        self.policy = ENV_POLICY_MAP[env.task]()

    def act(self) -> np.ndarray:
        """(4,) float32 action, clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that its action exceeds [-1, 1], which is clipped here
            action = self.policy.get_action(self.env.state)
        return np.clip(action, -1, 1).astype(np.float32)
