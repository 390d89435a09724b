"""A policy folder notices that it is loaded, or used, otherwise than where it was trained."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from envs.tabletop.env import TabletopEnv
from vla.config import DoctorConfig
from vla.doctor import doctor
from vla.eval.evaluate import evaluate
from vla.eval.golden import GOLDEN, GoldenCheck, check_golden
from vla.policies.loading import load_chunk_policy
from vla.training.policy import train_policy
from vla.types import UserError


@pytest.fixture
def copy(policy_folder, tmp_path):
    """A copy of the policy that a test may change."""
    return shutil.copytree(policy_folder, tmp_path / "policy")


def cannot_draw(*_: object, **__: object) -> None:
    """What a simulator does without a display."""
    raise RuntimeError("no OpenGL")


def checked(folder) -> GoldenCheck:
    return check_golden(folder, load_chunk_policy(folder), "tabletop")


def test_where_it_was_trained_nothing_differs(policy_folder):
    check = checked(policy_folder)
    assert check.action_difference < 1e-3
    assert check.picture_difference == 0
    assert not check.problem


def test_other_statistics_of_actions_are_noticed(copy):
    (path,) = copy.glob("policy_postprocessor_step_*unnormalizer*.safetensors")
    tensors = load_file(path)
    save_file({name: 3 * value for name, value in tensors.items()}, path)
    assert "the policy acts otherwise than where it was trained" in checked(copy).problem


@pytest.mark.parametrize("steps", [4, 12])
def test_looking_more_or_less_often_than_in_training_is_no_other_answer(copy, steps):
    config = json.loads((copy / "config.json").read_text())
    assert config["n_action_steps"] == 8
    (copy / "config.json").write_text(json.dumps(config | {"n_action_steps": steps}))
    check = checked(copy)
    assert check.action_difference < 1e-3
    assert not check.problem


def test_an_answer_that_is_no_number_is_noticed():
    assert "acts otherwise" in GoldenCheck(float("nan"), 0.0).problem


def test_another_simulator_is_noticed(policy_folder, darker):
    check = checked(policy_folder)
    assert check.action_difference <= 1e-3
    assert "the environment's pictures are not those of training" in check.problem


def test_another_wording_is_noticed(policy_folder, monkeypatch):
    monkeypatch.setattr(TabletopEnv, "_wording", lambda env, goal: "please")
    assert "words its instructions otherwise than in training, 'please' for " in checked(policy_folder).problem


def test_pictures_of_another_size_than_collected_are_resized_as_in_training(policy_config, tmp_path):
    data = replace(policy_config.data, image_size=36)
    folder = train_policy(replace(policy_config, data=data, aligned_pooler=False, steps=1, output=str(tmp_path)))
    assert checked(folder).picture_difference == 0


def test_a_simulator_that_cannot_draw_is_no_fault_of_the_policy(policy_folder, monkeypatch, capsys):
    monkeypatch.setattr("vla.eval.golden.make_env", cannot_draw)
    check = checked(policy_folder)
    assert not check.problem
    assert check.why_not == "pictures not compared: no OpenGL"
    doctor(DoctorConfig(policy=str(policy_folder)))
    assert "note  policy" in capsys.readouterr().out


def test_pictures_of_another_environment_are_not_compared(policy_folder):
    assert check_golden(policy_folder, load_chunk_policy(policy_folder), "metaworld").picture_difference is None


def test_a_policy_of_another_program_has_none(copy):
    (copy / GOLDEN).unlink()
    assert checked(copy) is None


def test_a_truncated_file_is_named(copy):
    (copy / GOLDEN).write_bytes((copy / GOLDEN).read_bytes()[:100])
    with pytest.raises(UserError, match=r"golden\.safetensors: damaged .*copy the folder anew"):
        checked(copy)


def test_a_damaged_record_is_named_by_the_doctor_and_an_evaluation(copy, eval_config, capsys):
    (copy / "concord.json").write_text('{"env": "tab')
    with pytest.raises(UserError, match=r"concord\.json: damaged"):
        evaluate(replace(eval_config, policy=str(copy)))
    with pytest.raises(UserError, match="doctor: policy need attention"):
        doctor(DoctorConfig(policy=str(copy)))
    assert "concord.json: damaged" in capsys.readouterr().out


def test_an_evaluation_says_so(eval_config, policy_folder, darker, capsys):
    output = evaluate(eval_config)
    problem = json.loads((output / "eval.json").read_text())["golden"]["problem"]
    assert "pictures are not those of training" in problem
    assert "pictures are not those of training" in (output / "report.html").read_text()
    assert f"warning: {policy_folder}: {problem}" in capsys.readouterr().out


def test_the_doctor_says_so(policy_folder, darker, capsys):
    with pytest.raises(UserError, match="doctor: policy need attention"):
        doctor(DoctorConfig(policy=str(policy_folder)))
    assert "pictures are not those of training" in capsys.readouterr().out


def test_the_doctor_repeats_the_golden_observations(policy_folder, capsys):
    doctor(DoctorConfig(policy=str(policy_folder)))
    assert "ConcordPolicy loads, repeats its actions within 0 % of their range, pictures within 0 of 255" in (
        capsys.readouterr().out
    )
