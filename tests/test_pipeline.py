"""The four commands one after the other, as a user types them, on both environments."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vla.config import PipelineConfig
from vla.locks import FolderHeldError
from vla.pipeline import pipeline
from vla.training.align import train_align
from vla.types import UserError

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, config: str, folder: Path) -> subprocess.CompletedProcess:
    """A script with its debug configuration, in an empty working directory."""
    command = [sys.executable, str(ROOT / "scripts" / script), "--config_path", str(ROOT / "configs" / config)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.parametrize("name", ["debug", pytest.param("metaworld_debug", marks=pytest.mark.slow)])
def test_collect_align_clone_evaluate(name, tmp_path):
    run("collect.py", f"collect/{name}.yaml", tmp_path)
    run("train_align.py", f"align/{name}.yaml", tmp_path)
    run("train_policy.py", f"policy/{name}.yaml", tmp_path)
    run("evaluate.py", f"eval/{name}.yaml", tmp_path)
    outputs = tmp_path / "outputs"
    assert (outputs / "align" / name / "clip" / "model.safetensors").is_file()
    assert (outputs / "policy" / name / "policy" / "config.json").is_file()
    results = json.loads((outputs / "eval" / name / "eval.json").read_text())
    low, high = results["interval"]
    assert 0 <= low <= results["success_rate"] <= high <= 1
    plain = [e for e in results["episodes"] if e["split"] == "train" and e["kind"] == "success"]
    assert results["n"] == len(plain)
    assert results["success_rate"] == sum(e["success"] for e in plain) / len(plain)
    page = (outputs / "eval" / name / "report.html").read_text()
    assert "<video" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_beginning_anew_deletes_no_evaluation_of_another_policy_that_has_begun(tmp_path):
    kept = tmp_path / "outputs" / "eval" / "debug" / "mine" / "begun.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    command = [sys.executable, str(ROOT / "scripts" / "pipeline.py"), "--name=debug", "--fresh=true"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 2
    assert (
        "mine: an evaluation of its own, which fresh would delete; move it out of outputs/eval/debug" in result.stderr
    )
    assert kept.is_file()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("run: was trained on other data; choose another --output"), "data; start anew with --fresh=true"),
        (FolderHeldError("run: wait for it or choose another --output"), "run: wait for it$"),
        (UserError("run: disk full; free some space, then add --resume=true"), "then run the same command again"),
    ],
)
def test_what_a_stage_refuses_is_told_in_what_the_pipeline_has(error, told, tmp_path, monkeypatch):
    def refuses(config):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vla.integrations.collect.collect", refuses)
    with pytest.raises(UserError, match=told):
        pipeline(PipelineConfig(name="debug"))


def test_another_scene_count_of_the_same_name_is_told_to_begin_anew(data_root, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(data_root, tmp_path / "outputs" / "data" / "debug")
    collect = tmp_path / "configs" / "collect" / "debug.yaml"
    collect.write_text(collect.read_text() + "seed: 12345\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"seed=\d+, not 12345; start anew with --fresh=true"):
        pipeline(PipelineConfig(name="debug"))


def test_a_run_in_use_is_told_from_one_of_another_configuration(align_config, tmp_path, monkeypatch):
    def held(*_, **__):
        raise FolderHeldError("run: another process is writing into it")

    monkeypatch.setattr("vla.training.align.RunFolder", held)
    with pytest.raises(FolderHeldError):
        train_align(replace(align_config, output=str(tmp_path / "run")))


def test_beginning_anew_deletes_nothing_of_a_run_in_use(tmp_path, monkeypatch):
    run = tmp_path / "outputs" / "align" / "debug"
    held = "import sys; from pathlib import Path; from vla.locks import lock_folder; "
    held += "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); input()"
    (tmp_path / "outputs" / "data" / "debug").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-c", held, str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderHeldError, match="another process is writing into it"):
            pipeline(PipelineConfig(name="debug", fresh=True))
        other.kill()
    assert run.is_dir()
    assert (tmp_path / "outputs" / "data" / "debug").is_dir()


def test_beginning_anew_deletes_nothing_behind_a_link(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "meta").mkdir(parents=True)
    (tmp_path / "outputs" / "data").mkdir(parents=True)
    (tmp_path / "outputs" / "data" / "debug").symlink_to(elsewhere)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"outputs/data/debug: is a link, which fresh does not follow; empty .*elsewhere, or"
    ):
        pipeline(PipelineConfig(name="debug", fresh=True))
    assert (elsewhere / "meta").is_dir()


def test_who_began_anew_is_not_told_to_begin_anew_again(tmp_path, monkeypatch, capsys):
    def fills_the_disk(config):
        raise UserError("run: disk full; free some space, then add --resume=true")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vla.integrations.collect.collect", fills_the_disk)
    with pytest.raises(UserError, match="then run the same command without --fresh again"):
        pipeline(PipelineConfig(name="debug", fresh=True))
    assert "Interrupted, the same command without --fresh goes on" in capsys.readouterr().out
