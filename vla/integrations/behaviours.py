"""What the scripted expert does in an episode: a demonstration, play, or an attempt that fails.

A behaviour is a generator: it gives actions, is sent what the environment's `info` says after each, and ends when the
episode should.
"""

from collections.abc import Generator, Sequence

import gymnasium as gym
import numpy as np

from envs import Expert

type Behaviour = Generator[np.ndarray, dict, None]

SETTLED_TIMESTEPS = 5  # recorded after success, so that the policy sees what "done" looks like
PATIENCE = 60  # timesteps after which play turns to its next goal, reached or not


def demonstration(expert: Expert) -> Behaviour:
    """The goal that is asked, and a while more."""
    settled, success = 0, False
    while settled <= SETTLED_TIMESTEPS:
        info = yield expert.act()
        success = success or info["is_success"]
        settled += success


def play(env: gym.Env, expert: Expert, goals: Sequence[str], count: int) -> Behaviour:
    """The first `count` of the scene's goals that do not hold already when it is their turn, one after the other."""
    achieved: tuple[str, ...] = ()
    for goal in goals:
        if goal in achieved:
            continue
        if count == 0:
            return
        count -= 1
        env.pursue(goal)
        settled = 0
        for _ in range(PATIENCE):
            info = yield expert.act()
            achieved = info["achieved"]
            settled += goal in achieved
            if settled > SETTLED_TIMESTEPS:
                break


def stopped(expert: Expert, timesteps: int) -> Behaviour:
    """The goal that is asked for some timesteps, then rest with the gripper as it is."""
    gripper = np.float32(-1.0)
    for _ in range(timesteps):
        action = expert.act()
        gripper = action[-1]
        yield action
    rest = np.zeros_like(expert.act())
    rest[-1] = gripper
    for _ in range(SETTLED_TIMESTEPS + 1):
        yield rest.copy()


def mistakes(goals: Sequence[str], named: str, rng: np.random.Generator) -> list[str | int]:
    """Ways to fail at `named`, the preferred first: a goal of its task with another object, or the timesteps until a stop.

    The last of the stops is before the first timestep.
    """
    task, *thing = named.split("/")[:3]
    others = [goal for goal in goals if goal.split("/")[0] == task and goal.split("/")[1:3] != thing]
    wrong: list[str | int] = [others[i] for i in rng.permutation(len(others))]
    stop = int(rng.integers(4, 20))
    stops: list[str | int] = [stop, stop // 2, stop // 4, 0]
    return wrong + stops if rng.random() < 0.5 else stops + wrong
