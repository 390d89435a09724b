"""Collection: the same data for any number of processes, resumable, failures kept and marked."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vla.integrations.collect as module
from envs import make_env, make_expert
from tests.conftest import debug
from vla.config import CollectConfig, EnvConfig
from vla.config_io import load_config, save_yaml
from vla.data.episodes import data_files, read_episodes
from vla.integrations.behaviours import mistakes
from vla.integrations.behaviours import play as play_of
from vla.integrations.collect import answer, collect, recorded, spread_goals
from vla.types import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def config(tmp_path):
    loaded = load_config(CollectConfig, ["--config_path", f"{ROOT}/configs/collect/debug.yaml"])
    return replace(loaded, output=str(tmp_path / "data"))


def same(a: Path, b: Path) -> bool:
    return all(pq.read_table(x).equals(pq.read_table(y)) for x, y in zip(data_files(a), data_files(b), strict=True))


def test_two_processes_write_the_data_of_one(config, data_root, monkeypatch):
    monkeypatch.setattr(module, "SHARD_EPISODES", 8)
    assert same(collect(replace(config, workers=2)), data_root)


def test_a_killed_collection_goes_on_with_what_is_not_finished_and_ends_equal(config, data_root, tmp_path, monkeypatch):
    save_yaml(config, tmp_path / "collect.yaml")
    program = (
        "import sys, vla.integrations.collect as m, vla.cli as c; m.SHARD_EPISODES = 4;"
        f"sys.exit(c.run('collect', ['--config_path', {str(tmp_path / 'collect.yaml')!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    parts = Path(config.output + ".parts")
    deadline = time.monotonic() + 60
    while process.poll() is None and len(list(parts.glob("shard_*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(config.output).exists()
    finished = {int(path.stem.removeprefix("shard_")) for path in parts.glob("shard_*.json")}
    written, write_shard = set(), module.write_shard
    monkeypatch.setattr(module, "SHARD_EPISODES", 4)
    monkeypatch.setattr(module, "write_shard", lambda *given: written.add(given[2]) or write_shard(*given))
    assert same(collect(replace(config, workers=1)), data_root)
    assert written == set(range(6)) - finished
    assert not parts.exists()


def test_a_finished_data_set_is_left_alone(config):
    root = collect(config)
    stamp = data_files(root)[0].stat().st_mtime_ns
    collect(config)
    assert data_files(root)[0].stat().st_mtime_ns == stamp


def test_another_configuration_does_not_overwrite(config):
    collect(config)
    with pytest.raises(UserError, match="holds a data set with scenes=6, not 2; choose another --output"):
        collect(replace(config, scenes=2))


def test_an_unrelated_folder_is_not_touched(config):
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a data set of this program"):
        collect(config)


def test_a_data_set_of_an_older_version_is_complete(config, capsys):
    record = collect(config) / "meta" / "concord.json"
    made = json.loads(record.read_text())
    del made["config"]["kind"]
    record.write_text(json.dumps(made))
    collect(config)
    assert "already complete" in capsys.readouterr().out


def test_failures_are_kept_and_marked(config, monkeypatch):
    class Lazy:
        def __init__(self, _):
            pass

        def act(self):
            return np.zeros(3, np.float32)

    monkeypatch.setattr(module, "make_expert", lambda _, env: Lazy(env))
    episodes = read_episodes(collect(replace(config, scenes=2)))
    assert not episodes.success.any()
    assert len(episodes.success) == 8


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> Path:
    """20 scenes of play, of four goals each."""
    output = str(tmp_path_factory.mktemp("play") / "data")
    return collect(debug(CollectConfig, "collect", output=output, kind="play", scenes=20))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Path:
    """80 attempts that fail in 20 scenes."""
    output = str(tmp_path_factory.mktemp("failures") / "data")
    return collect(debug(CollectConfig, "collect", output=output, kind="failures", scenes=20))


@pytest.mark.parametrize("kind", ["play", "failures"])
def test_play_and_failures_have_no_words_no_goals_and_no_success(kind, request):
    root = request.getfixturevalue(kind)
    episodes = read_episodes(root)
    assert episodes.texts == ("",)
    assert (episodes.goal_id == -1).all()
    assert not episodes.success.any()
    assert episodes.target is None


def test_an_episode_of_play_pursues_several_goals_of_different_tasks(monkeypatch):
    env = make_env("tabletop", image_size=32, end_on_success=False)
    pursued = []
    monkeypatch.setattr(env, "pursue", lambda goal: (pursued.append(goal), type(env).pursue(env, goal)))
    recorded(debug(CollectConfig, "collect", kind="play", goals_per_scene=3), env, "", 5, 0)
    assert len({goal.split("/")[0] for goal in pursued}) == 3


def test_play_reaches_one_goal_after_the_other():
    env = make_env("tabletop", image_size=32, end_on_success=False, max_episode_steps=200)
    env.reset(seed=5)
    goals = spread_goals(env.goals(), 5)
    behaviour, reached = play_of(env, make_expert("tabletop", env), goals, 3), set()
    action = next(behaviour)
    while action is not None:
        _, _, _, _, info = env.step(action)
        reached |= set(info["achieved"]) & set(goals[:3])
        action = answer(behaviour, info)
    assert reached == set(goals[:3])


def test_play_has_one_episode_a_scene_and_failures_one_a_goal(play, failures):
    assert len(read_episodes(play).goal_id) == 20
    assert len(read_episodes(failures).goal_id) == 20 * 4


def test_play_lasts_longer_than_a_demonstration(play, data_root):
    assert read_episodes(play).length().mean() > 2 * read_episodes(data_root).length().mean()


def test_half_of_the_failures_are_of_another_object_and_half_stop():
    goals = ["pick/red/star", "pick/blue/star", "reach/red/cross", "pick/red/cross"]
    first = [mistakes(goals, "pick/red/star", np.random.default_rng(seed))[0] for seed in range(200)]
    wrong = [mistake for mistake in first if isinstance(mistake, str)]
    assert set(wrong) == {"pick/blue/star", "pick/red/cross"}
    assert 70 < len(wrong) < 130


@pytest.mark.parametrize("seed", range(8))
def test_what_a_failure_was_asked_is_never_reached(seed):
    env = make_env("tabletop", image_size=32, end_on_success=False)
    config = debug(CollectConfig, "collect", kind="failures", noise=0.0)
    episode = recorded(config, env, "", seed, seed)
    env.reset(seed=seed, options={"goal": episode.goal_id})
    assert not any(env.step(action)[4]["is_success"] for action in episode.action)


def test_play_needs_scenes_of_several_goals(config):
    with pytest.raises(UserError, match="scenes of metaworld have one goal, play needs several"):
        collect(replace(config, kind="play", env=EnvConfig(name="metaworld")))


def test_what_the_end_of_a_collection_left_is_removed(config):
    root = collect(config)
    parts = Path(f"{root}.parts")
    parts.mkdir()
    (parts / "shard_00000.parquet").touch()
    collect(config)
    assert not parts.exists()


def test_a_damaged_record_of_a_collection_is_named(config):
    record = collect(config) / "meta" / "concord.json"
    record.write_text("")
    with pytest.raises(UserError, match=r"concord\.json: damaged .*; delete .* to collect anew"):
        collect(config)
