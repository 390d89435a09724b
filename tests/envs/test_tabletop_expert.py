import numpy as np
import pytest

from envs import make_env, make_expert

TASKS = make_env("tabletop").TASKS


def succeeds(env, seed, task, noise=0.0):
    env.reset(seed=seed, options={"task": task})
    expert = make_expert("tabletop", env)
    rng = np.random.default_rng(seed)
    for _ in range(env._max_episode_steps):
        action = expert.act()
        action[:2] += noise * rng.standard_normal(2)
        *_, terminated, _, _ = env.step(np.clip(action, -1, 1))
        if terminated:
            return True
    return False


def without_pictures(**arguments):
    env = make_env("tabletop", **arguments)
    env.render_observations = False
    return env


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds_in_every_task(task, noise):
    env = without_pictures(tasks=(task,))
    assert all(succeeds(env, seed, task, noise) for seed in range(12))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds_in_98_percent_of_200_seeds(task, noise):
    env = without_pictures(tasks=(task,))
    assert np.mean([succeeds(env, seed, task, noise) for seed in range(200)]) >= 0.98


@pytest.mark.parametrize(
    ("split", "level"), [("position", 3), ("distractors", 3), ("combination", 1), ("combination", 2)]
)
def test_expert_succeeds_outside_the_training_split(split, level):
    env = without_pictures(split=split, level=level)
    assert np.mean([succeeds(env, seed, None) for seed in range(40)]) >= 0.95


@pytest.mark.parametrize("task", TASKS)
def test_success_lasts_until_the_horizon(task):
    env = without_pictures(tasks=(task,), end_on_success=False)
    for seed in range(5):
        env.reset(seed=seed)
        expert = make_expert("tabletop", env)
        for _ in range(env._max_episode_steps):
            *_, truncated, info = env.step(expert.act())
        assert truncated
        assert info["is_success"]


def test_expert_follows_the_goal_that_is_asked_for_and_not_another():
    env = without_pictures()
    env.reset(seed=9)
    for goal in env.goals():
        env.reset(seed=9, options={"goal": goal.goal_id})
        expert = make_expert("tabletop", env)
        for _ in range(env._max_episode_steps):
            *_, terminated, _, info = env.step(expert.act())
            if terminated:
                break
        assert goal.goal_id in info["achieved"]


def test_expert_needs_no_memory():
    env = without_pictures()
    env.reset(seed=5, options={"task": "place"})
    lasting = make_expert("tabletop", env)
    for _ in range(25):
        action = lasting.act()
        np.testing.assert_array_equal(action, make_expert("tabletop", env).act())
        env.step(action)
