"""Stage two on a real small data set: what it refuses, the token cache, rollouts during training."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from vla.data.episodes import read_episodes
from vla.data.frames import open_frames
from vla.training.policy import train_policy
from vla.types import UserError


def test_more_executed_than_predicted_is_refused_before_anything_is_written(policy_config, tmp_path):
    config = replace(policy_config, head=replace(policy_config.head, n_action_steps=99), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"head\.n_action_steps must be at most head\.horizon, got 99 and 16"):
        train_policy(config)
    assert not (tmp_path / "run").exists()


def test_success_is_measured_during_training_if_asked_for(policy_config, tmp_path):
    config = replace(policy_config, rollouts_every=2, rollouts=2, steps=2, output=str(tmp_path / "run"))
    train_policy(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line for line in lines if "rollouts/success" in line]
    assert measured["rollouts/low"] <= measured["rollouts/success"] <= measured["rollouts/high"]


def test_two_runs_on_one_encoder_share_its_token_cache(policy_config, tmp_path):
    data = replace(policy_config.data, cache=str(tmp_path / "cache"))
    open_frames(read_episodes(data.root), data.image_size, data.cache, workers=1)
    configs = [replace(policy_config, data=data, seed=s, steps=1, output=str(tmp_path / str(s))) for s in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(train_policy, configs))
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    assert len(list((tmp_path / "cache").glob("tokens_*.npy"))) == 1


def test_an_untrained_encoder_is_a_baseline(policy_config, tmp_path):
    config = replace(policy_config, encoder="random", steps=1, output=str(tmp_path / "run"))
    config.tower.width, config.tower.heads, config.tower.layers = 32, 2, 1
    assert (train_policy(config) / "model.safetensors").is_file()
