"""An evaluation's folder: what is refused, what goes on, what the numbers count."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors

from vla.config import EvalConfig
from vla.config_io import save_yaml
from vla.eval.episode import EpisodeRecord
from vla.eval.evaluate import evaluate
from vla.eval.evaluation_report import curves_of
from vla.eval.grounding import grounding_summary
from vla.training.policy import train_policy
from vla.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, UserError

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_environment_is_the_one_the_policy_was_trained_on(eval_config):
    result = json.loads((evaluate(eval_config) / "eval.json").read_text())
    assert {e["env"] for e in result["episodes"]} == {"tabletop"}
    assert result["n"] == 2
    kinds = [e["kind"] for e in result["episodes"]]
    assert kinds.count("success") == kinds.count("swap") == kinds.count("blank") == 2


def test_for_machines_standard_output_is_the_result_alone(eval_config):
    flags = ["--tasks=[reach]", "--episodes=2", "--splits=[none]", "--grounding_episodes=0", "--workers=1", "--json"]
    flags += [f"--policy={eval_config.policy}", f"--output={eval_config.output}", "--videos=0", "--failures=0"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout)
    assert result["n"] == 2
    assert json.loads(Path(result["file"]).read_text())["success_rate"] == result["success_rate"]
    assert "at the final timestep" in done.stderr


def test_a_finished_evaluation_may_move(eval_config, tmp_path, capsys):
    moved = evaluate(eval_config).rename(tmp_path / "moved")
    assert evaluate(replace(eval_config, output=str(moved))) == moved
    assert "moved: already complete" in capsys.readouterr().out


def test_a_killed_evaluation_goes_on_where_it_stopped(eval_config, tmp_path):
    config = replace(eval_config, episodes=6, batch_size=1, grounding_episodes=0)
    save_yaml(config, tmp_path / "eval.yaml")
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--config_path", str(tmp_path / "eval.yaml")]
    journal = Path(config.output) / "episodes.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not journal.is_file() or journal.read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    kept = journal.read_text().splitlines()[:2]
    whole = json.loads((evaluate(replace(config, output=str(tmp_path / "whole"))) / "eval.json").read_text())
    again = json.loads((evaluate(config) / "eval.json").read_text())
    assert again["episodes"] == whole["episodes"]
    assert journal.read_text().splitlines()[:2] == kept


def test_the_score_is_the_share_of_goals_done_because_told():
    def record(kind, seed, goal, success, achieved):
        return EpisodeRecord(kind, "tabletop", "reach", goal, "", "train", 1, seed, success, success, 9, achieved)

    plain = [record("success", seed, "old", True, ("old", "new") if seed == 0 else ("old",)) for seed in range(10)]
    told = [record("swap", seed, "new", seed < 8, ("new",) if seed < 8 else ("old",)) for seed in range(10)]
    grounding = grounding_summary(told, plain)
    assert grounding["swap"]["follows_new"]["success_rate"] == 0.8
    assert grounding["score"]["value"] == pytest.approx(0.7)  # one of the eight is done untold, too
    low, high = grounding["score"]["interval"]
    assert 0 < low < 0.7 < high <= 1


def test_curves_of_perturbations_start_at_the_plain_episodes():
    rate = {"success_rate": 0.5, "interval": [0.4, 0.6], "n": 9}
    result = rate | {"splits": {"train": rate, "light/1": rate, "light/2": rate, "synonym/1": rate}}
    assert [level for level, _ in curves_of(result)["light"]] == [0, 1, 2]
    assert set(curves_of(result)) == {"light"}


def test_grounding_is_refused_where_episodes_end_at_success(eval_config):
    with pytest.raises(UserError, match="end_on_success: grounding needs episodes that run on"):
        evaluate(replace(eval_config, end_on_success=True))
    output = evaluate(replace(eval_config, end_on_success=True, grounding_episodes=0))
    assert json.loads((output / "eval.json").read_text())["success_final"] is None


@pytest.mark.parametrize(
    ("splits", "message"), [(("train",), "train is evaluated in any case"), (("light", "light"), "repeats a split")]
)
def test_episodes_are_not_counted_twice(eval_config, splits, message):
    with pytest.raises(UserError, match=f"splits: .*{message}"):
        evaluate(replace(eval_config, splits=splits))


def test_a_policy_of_another_robot_is_refused(eval_config):
    with pytest.raises(UserError, match="metaworld has 4 action dimensions, the policy 3"):
        evaluate(replace(eval_config, env="metaworld", tasks=("reach-v3",)))


def test_a_policy_that_names_no_environment_needs_one_named(eval_config, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "copy")
    record = json.loads((folder / "concord.json").read_text())
    del record["env"]
    (folder / "concord.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="copy: names no environment; add --env=tabletop, or another of tabletop, metaworld"
    ):
        evaluate(replace(eval_config, policy=str(folder)))


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(eval_config, device):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        evaluate(replace(eval_config, device=device))


def test_a_finished_evaluation_is_left_alone(eval_config, capsys):
    before = (evaluate(eval_config) / "eval.json").stat().st_mtime_ns
    output = evaluate(eval_config)
    assert "already complete" in capsys.readouterr().out
    assert (output / "eval.json").stat().st_mtime_ns == before


def test_another_configuration_does_not_replace_an_evaluation(eval_config):
    output = evaluate(eval_config)
    with pytest.raises(UserError, match=r"holds an evaluation with episodes=\d+, not 1; delete it"):
        evaluate(replace(eval_config, episodes=1))
    assert (output / "eval.json").is_file()


def test_a_policy_that_looks_more_often_does_not_replace_an_evaluation(eval_config, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "copy")
    evaluate(replace(eval_config, policy=str(folder)))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"n_action_steps": 1}))
    with pytest.raises(UserError, match=r"holds an evaluation with policy\.n_action_steps=\d+, not 1; delete it"):
        evaluate(replace(eval_config, policy=str(folder)))


def test_an_evaluation_of_a_version_without_a_field_is_gone_on_with(eval_config, capsys):
    path = evaluate(eval_config) / "begun.json"
    begun = json.loads(path.read_text())
    del begun["config"]["end_on_success"]
    path.write_text(json.dumps(begun))
    evaluate(eval_config)
    assert "already complete" in capsys.readouterr().out


def test_an_evaluation_that_goes_on_counts_the_time_it_took_before(eval_config):
    output = evaluate(eval_config)
    journal = output / "episodes.jsonl"
    lines = [json.dumps(json.loads(line) | {"seconds": 1000.0}) + "\n" for line in journal.read_text().splitlines()]
    journal.write_text("".join(lines[:-1]))
    (output / "report.html").unlink()
    evaluate(eval_config)
    assert 1000 < json.loads((output / "eval.json").read_text())["wall_time_s"] < 1100


def test_pictures_are_drawn_as_the_demonstrations_were(eval_config, policy_config, tmp_path):
    smaller = replace(policy_config.data, image_size=36)
    policy = train_policy(
        replace(policy_config, data=smaller, aligned_pooler=False, steps=1, output=str(tmp_path / "run"))
    )
    output = evaluate(replace(eval_config, policy=str(policy), episodes=1, grounding_episodes=0))
    (line, *_) = (output / "episodes.jsonl").read_text().splitlines()
    assert json.loads(line)["spec"]["image_size"] == 48


def test_an_evaluation_that_another_version_began_says_so(eval_config):
    output = evaluate(eval_config)
    path = output / "versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    (output / "report.html").unlink()
    evaluate(eval_config)
    (before,) = json.loads((output / "eval.json").read_text())["versions"]["before"]
    assert before["torch"] == "1.0"
    assert "torch 1.0" in (output / "report.html").read_text()


def test_the_run_folder_is_told_from_the_policy_in_it(eval_config, policy_folder):
    with pytest.raises(UserError, match=r"did you mean .*policy\?"):
        evaluate(replace(eval_config, policy=str(policy_folder.parent)))


def test_failures_of_every_split_are_filmed_with_where_the_policy_looked(eval_config):
    output = evaluate(replace(eval_config, splits=("light",), split_episodes=2, failures=4))
    page = (output / "failures.html").read_text()
    episodes = json.loads((output / "eval.json").read_text())["episodes"]
    failed = [e for e in episodes if e["kind"] in ("success", "swap") and not e["success"]]
    assert len(failed) > 4  # an all but untrained policy
    assert page.count("<video") == len(list((output / "failures").glob("*.mp4"))) == 4
    for title in ("plain:", "light/1:", "light/2:", "light/3:"):
        assert title in page
    frames = iio.imread(next((output / "failures").glob("*.mp4")), plugin="pyav")
    assert frames.shape[2] == 2 * 256  # the picture, and beside it the same lit


def test_without_asking_no_failure_is_filmed(eval_config):
    assert not (evaluate(eval_config) / "failures.html").exists()


def test_the_suite_runs_on_a_policy_of_lerobots_own(tmp_path):
    folder = tmp_path / "act"
    config = ACTConfig(
        device="cpu",
        input_features={
            IMAGE_KEY: PolicyFeature(FeatureType.VISUAL, (3, 48, 48)),
            STATE_KEY: PolicyFeature(FeatureType.STATE, (4,)),
        },
        output_features={ACTION_KEY: PolicyFeature(FeatureType.ACTION, (3,))},
        pretrained_backbone_weights=None,
        use_vae=False,
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        chunk_size=8,
        n_action_steps=8,
    )
    ACTPolicy(config).save_pretrained(folder)
    usual = {"pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1"}  # not downloaded: the folder has its own
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | usual))
    shapes = {IMAGE_KEY: (3, 1, 1), STATE_KEY: (4,), ACTION_KEY: (3,)}
    stats = {key: {"mean": torch.zeros(shape), "std": torch.ones(shape)} for key, shape in shapes.items()}
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(folder)
    output = evaluate(
        EvalConfig(
            policy=str(folder),
            output=str(tmp_path / "eval"),
            env="tabletop",
            tasks=("reach", "place"),
            episodes=4,
            splits=("synonym",),
            split_episodes=2,
            grounding_episodes=2,
            workers=1,
            videos=0,
            failures=2,
        )
    )
    result = json.loads((output / "eval.json").read_text())
    assert set(result["splits"]) == {"train", "synonym/1", "synonym/2"}
    assert set(result["grounding"]) == {"swap", "score", "chance", "blank", "wrong"}
    assert (output / "failures.html").is_file()
