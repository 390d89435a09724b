"""LeRobot's own commands run the policy and its environments."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env

import vla.integrations.lerobot_env  # noqa: F401 - registers the environments

SCRIPTS = Path(sys.executable).parent


def test_every_task_is_a_vector_environment_of_its_own():
    config = EnvConfig.get_choice_class("concord_tabletop")(task="push,place", image_size=48)
    suites = make_env(config, n_envs=2)
    assert list(suites) == ["tabletop"]
    environments = suites["tabletop"]
    assert len(environments) == 2
    observation, _ = environments[0].reset(seed=[1, 2])
    assert observation["pixels"].shape == (2, 48, 48, 3)
    assert environments[0].call("task") == ("push", "push")
    assert all(isinstance(text, str) and text for text in environments[0].call("task_description"))


@pytest.mark.parametrize(("name", "task"), [("tabletop", "push"), ("metaworld", "reach-v3")])
def test_an_environment_gives_and_takes_what_it_declares(name, task):
    config = EnvConfig.get_choice_class(f"concord_{name}")(task=task, image_size=48)
    ((environment,),) = (suite.values() for suite in make_env(config, n_envs=1).values())
    observation, _ = environment.reset(seed=[1])
    for key in ("pixels", "agent_pos"):
        assert observation[key].shape == (1, *config.features[key].shape)
    assert environment.action_space.shape == (1, *config.features["action"].shape)
    assert environment.metadata["render_fps"] == config.fps
    environment.close()


def test_scenes_of_a_split_are_asked_for_by_its_name_and_level():
    config = EnvConfig.get_choice_class("concord_tabletop")(task="push", image_size=48, split="light", level=3)
    (environment,) = make_env(config, n_envs=1)["tabletop"].values()
    assert (environment.envs[0].unwrapped.split, environment.envs[0].unwrapped.level) == ("light", 3)


def test_processes_of_a_task_start_when_it_is_run():
    config = EnvConfig.get_choice_class("concord_tabletop")(task="push,place", image_size=48)
    first, second = make_env(config, n_envs=2, use_async_envs=True)["tabletop"].values()
    assert (first.num_envs, len(multiprocessing.active_children())) == (2, 0)
    observation, _ = first.reset(seed=[1, 2])
    assert observation["pixels"].shape == (2, 48, 48, 3)
    assert first.call("task") == ("push", "push")
    assert len(multiprocessing.active_children()) == 2
    first.close()
    second.close()
    assert not multiprocessing.active_children()


def test_an_unknown_task_lists_the_tasks():
    config = EnvConfig.get_choice_class("concord_tabletop")(task="juggle")
    with pytest.raises(ValueError, match="'juggle' is not a task of tabletop; known: reach"):
        make_env(config, n_envs=1)


def test_lerobot_eval_runs_the_policy_folder_on_the_tabletop(policy_folder, tmp_path):
    command = [
        str(SCRIPTS / "lerobot-eval"),
        f"--policy.path={policy_folder}",
        "--policy.device=cpu",
        "--env.type=concord_tabletop",
        "--env.task=reach",
        "--env.image_size=48",
        "--eval.n_episodes=2",
        "--eval.batch_size=2",
        f"--output_dir={tmp_path}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2


@pytest.mark.slow
def test_lerobot_train_trains_the_policy_type(data_root, encoder, tmp_path):
    command = [
        str(SCRIPTS / "lerobot-train"),
        "--policy.type=concord",
        f"--policy.encoder={encoder}",
        "--policy.image_size=48",
        "--policy.n_action_steps=4",
        "--policy.device=cpu",
        "--dataset.repo_id=local/debug",
        f"--dataset.root={data_root}",
        f"--output_dir={tmp_path / 'run'}",
        "--batch_size=4",
        "--steps=2",
        "--num_workers=0",
        "--save_freq=2",
        "--wandb.enable=false",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    saved = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert (saved / "model.safetensors").is_file()
    from vla.policies.loading import load_chunk_policy

    assert load_chunk_policy(saved).n_action_steps == 4
