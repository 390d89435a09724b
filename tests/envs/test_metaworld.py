"""Meta-World behind the interface of the tabletop, simulated and drawn for real, without a display."""

import os
import subprocess
import sys

import numpy as np
import pytest

import envs
from envs import make_env, make_expert
from tests.conftest import ROOT
from vla.config import CollectConfig, EnvConfig
from vla.integrations.collect import checked_tasks
from vla.types import UserError

BUTTON, DRAWER = "button-press-topdown-v3", "drawer-open-v3"


@pytest.fixture(scope="module")
def env():
    env = make_env("metaworld", tasks=(BUTTON, DRAWER), image_size=96)
    yield env
    env.close()


@pytest.mark.parametrize("task", [BUTTON, DRAWER])
def test_the_expert_succeeds(env, task):
    expert = make_expert("metaworld", env)
    _, info = env.reset(seed=3, options={"task": task})
    done = False
    while not done:
        _, _, terminated, truncated, info = env.step(expert.act())
        done = terminated or truncated
    assert info["is_success"]


def test_a_seed_fixes_pictures_states_and_task(env):
    first, _ = env.reset(seed=11)
    task = env.task
    env.reset(seed=12)
    env.step(np.ones(4, np.float32))
    again, _ = env.reset(seed=11)
    assert env.task == task
    np.testing.assert_array_equal(first["pixels"], again["pixels"])
    np.testing.assert_array_equal(first["agent_pos"], again["agent_pos"])


def test_the_picture_shows_the_arm_move(env):
    before, _ = env.reset(seed=1, options={"task": DRAWER})
    for _ in range(20):
        after, *_ = env.step(np.array([1, 0, 0, 0], np.float32))
    assert before["pixels"].std() > 10
    assert np.abs(before["pixels"].astype(int) - after["pixels"]).max() > 50


def test_no_frame_is_drawn_while_nobody_looks(env):
    env.reset(seed=1, options={"task": DRAWER})
    env.render_observations = False
    try:
        shown = env.observe(fresh=False)["pixels"]
        for _ in range(20):
            unseen, *_ = env.step(np.array([1, 0, 0, 0], np.float32))
        assert unseen["pixels"] is shown
        assert (env.observe()["pixels"] != shown).any()
    finally:
        env.render_observations = True


def test_an_instruction_replaces_the_tasks_own(env):
    env.reset(seed=1, options={"task": DRAWER, "instruction": "pull"})
    assert env.task_description == "pull"


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="'fly-v3' is not one of"):
        make_env("metaworld", tasks=("fly-v3",))


def test_an_environment_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setattr(envs, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"env\.name: env 'metaworld' is not installed; pip install .*\[metaworld\]"):
        checked_tasks(CollectConfig(env=EnvConfig(name="metaworld")))


def test_the_simulation_of_the_task_before_is_released(env, monkeypatch):
    import mujoco

    env.reset(seed=1, options={"task": DRAWER})
    closed, close = [], mujoco.Renderer.close
    monkeypatch.setattr(mujoco.Renderer, "close", lambda renderer: closed.append(renderer) or close(renderer))
    before, _ = env.reset(seed=1, options={"task": DRAWER})
    assert not closed
    env.reset(seed=1, options={"task": BUTTON})
    assert len(closed) == 1
    again, _ = env.reset(seed=1, options={"task": DRAWER})
    np.testing.assert_array_equal(before["pixels"], again["pixels"])
    np.testing.assert_array_equal(before["agent_pos"], again["agent_pos"])


def test_an_episode_may_be_longer_than_meta_worlds_own():
    env = make_env("metaworld", tasks=(DRAWER,), end_on_success=False, max_episode_steps=510, render_mode=None)
    env.render_observations = False
    env.reset(seed=1)
    ended = [env.step(np.zeros(4, np.float32))[3] for _ in range(510)]
    env.close()
    assert ended == [False] * 509 + [True]


def test_nothing_to_render_with_is_one_line(tmp_path):
    flags = ["--config_path=configs/collect/metaworld_debug.yaml", f"--output={tmp_path}/data"]
    done = subprocess.run(
        [sys.executable, "scripts/collect.py", *flags],
        cwd=ROOT,
        env=os.environ | {"MUJOCO_GL": "nothing"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "metaworld: cannot render with MUJOCO_GL nothing" in done.stderr
    assert "Traceback" not in done.stderr
