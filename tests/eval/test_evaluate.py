"""An evaluation's folder: what is refused, what goes on, what the numbers count."""

import json
from dataclasses import replace

import imageio.v3 as iio
import pytest

from vla.config import EvalConfig
from vla.eval.evaluate import evaluate
from vla.types import UserError


@pytest.fixture
def config(policy_folder, tmp_path):
    return EvalConfig(
        policy=str(policy_folder),
        output=str(tmp_path / "eval"),
        tasks=("reach",),
        episodes=2,
        splits=("none",),
        grounding_episodes=2,
        batch_size=2,
        workers=1,
        videos=0,
        failures=0,
    )


def test_the_environment_is_the_one_the_policy_was_trained_on(config):
    result = json.loads((evaluate(config) / "eval.json").read_text())
    assert {e["env"] for e in result["episodes"]} == {"tabletop"}
    assert result["n"] == 2
    kinds = [e["kind"] for e in result["episodes"]]
    assert kinds.count("success") == kinds.count("swap") == kinds.count("blank") == 2


def test_a_policy_of_another_robot_is_refused(config):
    with pytest.raises(UserError, match="metaworld has 4 action dimensions, the policy 3"):
        evaluate(replace(config, env="metaworld", tasks=("reach-v3",)))


def test_a_finished_evaluation_is_left_alone(config, capsys):
    before = (evaluate(config) / "eval.json").stat().st_mtime_ns
    output = evaluate(config)
    assert "already complete" in capsys.readouterr().out
    assert (output / "eval.json").stat().st_mtime_ns == before


def test_another_configuration_does_not_replace_an_evaluation(config):
    output = evaluate(config)
    with pytest.raises(UserError, match="another policy or configuration"):
        evaluate(replace(config, episodes=1))
    assert (output / "eval.json").is_file()


def test_the_run_folder_is_told_from_the_policy_in_it(config, policy_folder):
    with pytest.raises(UserError, match=r"did you mean .*policy\?"):
        evaluate(replace(config, policy=str(policy_folder.parent)))


def test_failures_of_every_split_are_filmed_with_where_the_policy_looked(config):
    output = evaluate(replace(config, splits=("light",), split_episodes=2, failures=4))
    page = (output / "failures.html").read_text()
    episodes = json.loads((output / "eval.json").read_text())["episodes"]
    failed = [e for e in episodes if e["kind"] in ("success", "swap") and not e["success"]]
    assert len(failed) > 4  # an all but untrained policy
    assert page.count("<video") == len(list((output / "failures").glob("*.mp4"))) == 4
    for title in ("plain:", "light/1:", "light/2:", "light/3:"):
        assert title in page
    frames = iio.imread(next((output / "failures").glob("*.mp4")), plugin="pyav")
    assert frames.shape[2] == 2 * 256  # the picture, and beside it the same lit


def test_without_asking_no_failure_is_filmed(config):
    assert not (evaluate(config) / "failures.html").exists()
