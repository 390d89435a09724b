"""Collection: the same data for any number of processes, resumable, failures kept and marked."""

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
from vla.config import CollectConfig
from vla.config_io import load_config, save_yaml
from vla.data.episodes import data_files, read_episodes
from vla.integrations.collect import collect
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


def test_a_killed_collection_goes_on_and_ends_equal(config, data_root, tmp_path):
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
    module_size = module.SHARD_EPISODES
    try:
        module.SHARD_EPISODES = 4
        assert same(collect(config), data_root)
    finally:
        module.SHARD_EPISODES = module_size
    assert not parts.exists()


def test_a_finished_data_set_is_left_alone(config):
    root = collect(config)
    stamp = data_files(root)[0].stat().st_mtime_ns
    collect(config)
    assert data_files(root)[0].stat().st_mtime_ns == stamp


def test_another_configuration_does_not_overwrite(config):
    collect(config)
    with pytest.raises(UserError, match="holds a data set with another scenes; choose another --output"):
        collect(replace(config, scenes=2))


def test_an_unrelated_folder_is_not_touched(config):
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a data set of this program"):
        collect(config)


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
