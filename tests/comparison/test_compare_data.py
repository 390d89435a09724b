"""What encoders and policies of a comparison learn from: tasks kept apart, play, demonstrations collected again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import debug
from vla.comparison.compare import compare
from vla.comparison.data import aligned_beside, make_data
from vla.comparison.jobs import needed
from vla.comparison.plan import plan_jobs
from vla.config import (
    CollectConfig,
    CompareConfig,
)
from vla.data.episodes import read_episodes, task_of_episode
from vla.integrations.collect import collect
from vla.types import UserError


def test_transfer_keeps_tasks_from_the_encoders_and_gives_them_to_policies(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), seeds=(0,), demonstrations=(1,))
    config = replace(config, arms=("aligned-frozen", "random-frozen"), transfer=("place",))
    config.align.data.root = str(tmp_path / "data")
    compare(config)
    broad, cloned = (read_episodes(root) for root in (tmp_path / "data", tmp_path / "data_transfer"))
    assert set(task_of_episode(cloned)) == {"place"}
    assert "place" not in task_of_episode(broad)
    assert json.loads((tmp_path / "run" / "align" / "none" / "0" / "alignment.json").read_text())["data"][
        "root"
    ] == str(broad.root)
    policy = tmp_path / "run" / "policy" / "aligned-frozen" / "1" / "0" / "policy"
    record = json.loads((policy / "concord.json").read_text())
    assert (record["data"]["root"], record["more"]) == (str(cloned.root), [f"{broad.root}=1.0"])
    for path in (tmp_path / "run" / "eval").glob("*/eval.json"):
        assert {episode["task"] for episode in json.loads(path.read_text())["episodes"]} == {"place"}
    other = replace(config, output=str(tmp_path / "other"), transfer=("reach",))
    with pytest.raises(UserError, match=r"has episodes of .*, which transfer keeps apart"):
        compare(other)


@pytest.fixture(scope="module")
def with_play(tmp_path_factory) -> CompareConfig:
    """The configuration of a finished comparison whose alignments saw play, too."""
    folder = tmp_path_factory.mktemp("with_play")
    config = debug(CompareConfig, "compare", output=str(folder / "run"), seeds=(0,), demonstrations=(1,))
    config = replace(config, arms=("aligned-frozen", "shuffle-all"), transfer=("place",), play_scenes=3)
    config.align.data.root = str(folder / "data")
    compare(config)
    return config


def test_play_is_collected_of_the_tasks_of_the_encoders_in_scenes_of_its_own(with_play):
    play, broad = (read_episodes(with_play.align.data.root + end) for end in ("_play", ""))
    assert (
        set(play.collected["tasks"])
        == set(broad.collected["tasks"])
        == {"reach", "push", "pick", "next_to", "separate"}
    )
    assert (len(play.goal_id), play.texts) == (3, ("",))
    assert not set(play.seed) & set(broad.seed)


def test_every_alignment_names_the_play(with_play):
    for arm in ("none", "all"):
        record = yaml.safe_load((Path(with_play.output) / "align" / arm / "0" / "config.yaml").read_text())
        assert record["more"] == [f"{with_play.align.data.root}_play=0.5"]


def test_policies_clone_no_play(with_play):
    policy = Path(with_play.output) / "policy" / "aligned-frozen" / "1" / "0" / "policy"
    assert json.loads((policy / "concord.json").read_text())["more"] == [f"{with_play.align.data.root}=1.0"]


def test_the_result_says_what_play_there_was(with_play):
    play = json.loads((Path(with_play.output) / "comparison.json").read_text())["data"]["play"]
    assert (play["episodes"], play["collected with"]["kind"]) == (3, "play")


def test_play_of_tasks_that_transfer_keeps_apart_is_refused(with_play, tmp_path):
    root = tmp_path / "data"
    play = replace(with_play.collect, output=f"{root}_play", kind="play", scenes=2)
    collect(play)
    config = replace(with_play, output=str(tmp_path / "run"))
    config.align = replace(config.align, data=replace(config.align.data, root=str(root)))
    with pytest.raises(UserError, match="has play of place, which transfer keeps apart"):
        compare(config)


def test_play_of_another_number_of_scenes_is_refused(with_play, tmp_path):
    with pytest.raises(UserError, match="has play of 3 scenes, not play_scenes=2"):
        compare(replace(with_play, output=str(tmp_path / "run"), play_scenes=2))


def test_an_untrained_encoder_knows_the_words_of_all_data_sets(data_root, tmp_path):
    """Else it could not take the text tower of the aligned one."""
    other = replace(debug(CollectConfig, "collect"), output=str(tmp_path / "other"), scenes=4, seed=1000)
    collect(replace(other, env=replace(other.env, tasks=("separate",))))
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), seeds=(0,), demonstrations=(1,))
    config = replace(config, arms=("random-frozen",))
    config.align = replace(
        config.align, data=replace(config.align.data, root=str(data_root)), more=(str(tmp_path / "other"),)
    )
    assert compare(config).is_file()


def test_play_where_none_can_be_collected_is_refused_before_anything_is(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), play_scenes=2)
    config.align.data.root = str(tmp_path / "data")
    config.collect.env.name = "metaworld"
    with pytest.raises(UserError, match="scenes of metaworld have one goal"):
        compare(config)
    assert not list(tmp_path.iterdir())


def test_without_play_alignments_see_what_they_are_given(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path))
    assert aligned_beside(config) == config.align.more == ()


def of_new_data(folder: Path) -> CompareConfig:
    """A comparison whose demonstrations were collected and then lost, as where its records alone are unpacked."""
    config = debug(CompareConfig, "compare", output=str(folder / "run"))
    config.align.data.root = str(folder / "data")
    make_data(config)
    shutil.rmtree(folder / "data")
    return config


def test_demonstrations_that_are_not_here_are_collected_again_for_further_results(tmp_path):
    config = of_new_data(tmp_path)
    before = (tmp_path / "run" / "data.json").read_text()
    assert "data" in [job.name for job in needed(plan_jobs(config))]
    make_data(config)
    assert (tmp_path / "run" / "data.json").read_text() == before
    assert "data" not in [job.name for job in needed(plan_jobs(config))]


def test_demonstrations_collected_again_that_came_out_differently_are_refused(tmp_path):
    config = of_new_data(tmp_path)
    path = tmp_path / "run" / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0123456789abcdef"}))
    with pytest.raises(UserError, match=r"data: has changed since .* \(fingerprints 0123456789abcdef and "):
        make_data(config)
    assert json.loads(path.read_text())["fingerprint"] == "0123456789abcdef"
