"""A whole small comparison, shared by two processes, with an encoder and a policy of the user's."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from tests.conftest import debug
from vla.comparison.begun import check_same
from vla.comparison.compare import compare, finished_part
from vla.comparison.jobs import needed
from vla.comparison.page import comparison_page, keep_records
from vla.comparison.plan import plan_jobs
from vla.comparison.work import make_encoder
from vla.config import (
    CompareConfig,
    ResultsConfig,
)
from vla.models.clip_files import load_clip, save_clip, with_vision_of
from vla.training.policy import train_policy
from vla.types import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINED = (
    "random-frozen",
    "cloning-pretrained-frozen",
    "aligned-frozen",
    "aligned-last-block",
    "aligned-head-tuned",
    "shuffle-language",
    "shuffle-action",
    "shuffle-all",
    "no-vision",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_root, encoder, policy_folder) -> Path:
    """The folder of a comparison that `accelerate launch` ran with two processes."""
    folder, others = tmp_path_factory.mktemp("compare"), tmp_path_factory.mktemp("dinov2")
    sizes = {"image_size": 70, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(others)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
    ]
    command += [
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        str(ROOT / "scripts" / "compare.py"),
    ]
    command += ["--config_path", "configs/compare/debug.yaml", f"--align.data.root={data_root}"]
    command += [
        f"--output={folder}",
        f"--encoders=[mine={encoder},dinov2={others}]",
        f"--policies=[theirs={policy_folder}]",
    ]
    command += [f"--arms=[{','.join(TRAINED)}]"]
    command += ["--demonstrations=[1]"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"compare: \d+ jobs", done.stdout)) == 2
    return folder


def test_every_arm_encoder_and_policy_is_in_the_result(finished):
    result = json.loads((finished / "comparison.json").read_text())
    arms = {row["arm"] for row in result["success"]}
    assert arms == {*TRAINED, "aligned-frozen@1", "mine", "dinov2", "theirs"}
    assert {row["group"] for row in result["success"]} == {"plain", "perturbed", "swapped instructions"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["success"])
    minutes = {row["arm"]: row["minutes"] for row in result["success"]}
    assert minutes["aligned-head-tuned"] > minutes["aligned-frozen"]  # whose minutes it contains


def test_differences_are_of_the_same_seeds_and_corrected(finished):
    rows = json.loads((finished / "comparison.json").read_text())["contrasts"]
    pairs = {(row["first"], row["second"]) for row in rows}
    assert {("aligned-frozen", "shuffle-all"), ("aligned-frozen", "dinov2")} <= pairs
    assert ("aligned-tuned", "scratch") not in pairs  # not run
    assert all(row["holm_p"] >= row["p_value"] and row["seeds"] == 2 for row in rows)


def test_table_and_report_are_beside_the_json(finished):
    result = json.loads((finished / "comparison.json").read_text())
    for name in ("success", "levels", "contrasts", "measures", "validity"):
        with (finished / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(result[name])
    page = (finished / "report.html").read_text()
    assert "aligned-frozen - shuffle-all" in page
    assert {(row["arm"], row["seed"]) for row in result["measures"]} >= {("aligned-frozen", 0), ("aligned-frozen", 1)}
    assert "Alignment measures by training seed" in page
    assert 'src="http' not in page


def test_it_becomes_a_page_of_the_documentation_that_needs_no_runs(finished, tmp_path):
    (tmp_path / "outputs" / "compare" / "mine").mkdir(parents=True)
    shutil.copy(finished / "comparison.json", tmp_path / "outputs" / "compare" / "mine" / "comparison.json")
    docs = str(tmp_path / "docs" / "results")
    page = comparison_page(ResultsConfig(runs=str(tmp_path / "outputs"), docs=docs))
    first = page.read_text()
    assert "| aligned-frozen - shuffle-all |" in first
    config = json.loads((finished / "comparison.json").read_text())["config"]
    names = {"no": "float32", "bf16": "bfloat16"}
    assert f"Stage one was computed in {names[config['align']['precision']]}, stage two in" in first
    named = re.findall(r"\((pictures/[^)]*)\)", first)
    assert named
    assert all((page.parent / name).read_text().startswith("<svg") for name in named)
    comparison_page(ResultsConfig(runs=str(tmp_path / "nothing"), docs=docs))
    assert page.read_text() == first
    (Path(docs) / "compare" / "mine.md").write_text("By an older test.\n")
    comparison_page(ResultsConfig(runs=str(tmp_path / "nothing"), docs=docs))
    assert "## mine\n\nBy an older test.\n" in page.read_text()
    result = json.loads((finished / "comparison.json").read_text())
    replaced = tmp_path / "outputs" / "compare" / "mine" / "comparison.json"
    for changes, kept in (({"command": "another"}, True), ({"success": result["success"][1:]}, False)):
        replaced.write_text(json.dumps(result | changes))
        comparison_page(ResultsConfig(runs=str(tmp_path / "outputs"), docs=docs))
        assert ("By an older test." in page.read_text()) == kept


def test_arms_share_the_text_tower_and_differ_in_vision(finished):
    aligned, random = (load_clip(finished / "encoders" / s / "0" / "clip")[0].state_dict() for s in ("none", "random"))
    towers = {name for name in aligned if name != "logit_scale"}
    differ = {name.split(".")[0] for name in towers if not aligned[name].equal(random[name])}
    assert differ == {"vision_model", "visual_projection"}


def test_arms_of_a_dual_encoder_share_its_text_tower_too(data_root, encoder, tmp_path):
    sizes = {"image_size": 48, "patch_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "vision")
    clip, tokenizer = load_clip(encoder)
    pair = with_vision_of(tmp_path / "vision", clip, 48)
    save_clip(tmp_path / "pair" / "clip", pair, tokenizer)
    with torch.no_grad():
        for parameter in pair.parameters():  # what stage one makes of it
            parameter += 0.1
    aligned = tmp_path / "run" / "align" / "none" / "0"
    save_clip(aligned / "clip", pair, tokenizer)
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), encoders=(f"dinov2={tmp_path / 'vision'}",))
    config.align.data.root = str(data_root)
    config.align.tower.pretrained = str(tmp_path / "pair" / "clip")
    wanted = pair.state_dict()
    for name in ("random", "dinov2"):
        make_encoder(config, name, 0)
        made = load_clip(tmp_path / "run" / "encoders" / name / "0" / "clip")[0].state_dict()
        text = [key for key in wanted if key.startswith(("text_model.", "text_projection."))]
        assert all(made[key].equal(wanted[key]) for key in text)
        assert not made["visual_projection.weight"].equal(wanted["visual_projection.weight"])


def test_a_snapshot_of_the_alignment_is_an_encoder_of_its_own(finished):
    early, late = (load_clip(finished / "encoders" / s / "0" / "clip")[0].state_dict() for s in ("none@1", "none"))
    name = "visual_projection.weight"
    assert not early[name].equal(late[name])
    assert early["text_projection.weight"].equal(late["text_projection.weight"])


def test_a_vision_model_alone_reads_with_the_aligned_text_tower(finished):
    pair, aligned = (load_clip(finished / "encoders" / s / "0" / "clip")[0] for s in ("dinov2", "none"))
    assert type(pair.vision_model).__name__ == "Dinov2Model"
    ours, theirs = aligned.text_model.state_dict(), pair.text_model.text_model.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_token_caches_are_gone(finished):
    assert not list((finished / "cache").iterdir())


def test_every_job_was_run_once(finished):
    for log in (finished / "jobs").glob("policy-*/log.txt"):
        assert log.read_text().count("stage two:") == 1


def test_again_it_has_nothing_to_do(finished, data_root, encoder, capsys):
    config = of_one_arm(finished, data_root)
    config.policy.save_every = 77  # which changes no result
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("eval.json")}
    compare(config)
    assert "0 left" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("eval.json")}


def gathered(finished: Path, data_root: Path, moved: Path) -> CompareConfig:
    """The comparison of `moved`, where the small files of `finished` are copied."""
    for path in (path for kind in ("json", "jsonl", "html") for path in finished.rglob(f"*.{kind}")):
        (moved / path.relative_to(finished)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.relative_to(finished))
    return of_one_arm(moved, data_root)


def of_one_arm(folder: Path, data_root: Path) -> CompareConfig:
    """A part of the comparison, in a folder."""
    config = debug(CompareConfig, "compare", output=str(folder), demonstrations=(1,), arms=("aligned-frozen",))
    config.align.data.root = str(data_root)
    return config


def test_the_small_files_alone_make_the_same_result_on_another_machine(finished, data_root, tmp_path, capsys):
    moved = tmp_path / "moved"
    compare(gathered(finished, data_root, moved))
    assert_the_same_result(finished, moved, capsys.readouterr().out)


def test_the_records_that_the_page_links_make_the_same_result(finished, data_root, tmp_path, capsys):
    (tmp_path / "outputs" / "compare").mkdir(parents=True)
    (tmp_path / "outputs" / "compare" / "mine").symlink_to(finished)
    page = comparison_page(ResultsConfig(runs=str(tmp_path / "outputs"), docs=str(tmp_path / "docs" / "results")))
    (link,) = re.findall(r"\[mine\.zip\]\(([^)]*)\)", page.read_text())
    with zipfile.ZipFile(page.parent / link) as records:
        records.extractall(tmp_path / "moved")
    assert not list((tmp_path / "moved").rglob("*.safetensors"))
    compare(of_one_arm(tmp_path / "moved", data_root))
    assert_the_same_result(finished, tmp_path / "moved", capsys.readouterr().out)


def assert_the_same_result(finished: Path, moved: Path, printed: str) -> None:
    """Nothing was run for it."""
    assert "0 left" in printed
    there, here = (json.loads((folder / "comparison.json").read_text()) for folder in (finished, moved))
    assert here["success"]
    assert all(row in there["success"] for row in here["success"])


def test_runs_of_other_demonstrations_are_not_compared(finished, data_root, tmp_path):
    moved = tmp_path / "moved"
    config = gathered(finished, data_root, moved)
    path = moved / "align" / "all" / "0" / "alignment.json"
    record = json.loads(path.read_text())
    record["data"]["fingerprint"] = "another"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"trained on another .*\(fingerprints "):
        compare(config)


def test_the_result_says_what_the_runs_were_trained_with(finished, data_root, tmp_path):
    config = gathered(finished, data_root, tmp_path / "moved")
    path = tmp_path / "moved" / "align" / "none" / "0" / "versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor": "AAA with bfloat16"}))
    compare(config)
    protocol = json.loads((tmp_path / "moved" / "comparison.json").read_text())["protocol"]
    assert protocol["trained on"] == f"AAA with bfloat16, {protocol['processor']}"


def test_a_machine_without_the_gpu_of_the_evaluations_makes_the_report(finished, data_root, tmp_path, capsys):
    config = gathered(finished, data_root, tmp_path / "moved")
    compare(replace(config, eval=replace(config.eval, device="cuda:99")))
    assert_the_same_result(finished, tmp_path / "moved", capsys.readouterr().out)
    more = replace(config, eval=replace(config.eval, device="cuda:99"), arms=("aligned-tuned",), dry_run=True)
    with pytest.raises(UserError, match=r"eval\.device: 'cuda:99' cannot be used"):
        compare(more)


def test_the_result_says_where_there_were_fewer_demonstrations_than_asked(finished, data_root, tmp_path):
    config = gathered(finished, data_root, tmp_path / "moved")
    path = tmp_path / "moved" / "policy" / "aligned-frozen" / "1" / "0" / "policy" / "concord.json"
    record = json.loads(path.read_text())
    assert set(record["episodes"].values()) == {1}
    path.write_text(json.dumps(record | {"episodes": record["episodes"] | {"reach": 0}}))
    looked_at = tmp_path / "moved" / "policy" / "cloning" / "1234" / "rollouts" / "policy" / "concord.json"
    looked_at.parent.mkdir(parents=True)
    looked_at.write_text(path.read_text())
    compare(config)
    protocol = json.loads((tmp_path / "moved" / "comparison.json").read_text())["protocol"]
    assert protocol["demonstrations of each task that there were"] == "0 to 1 instead of 1"


def test_other_settings_are_refused_and_nothing_is_lost(finished, data_root):
    config = debug(CompareConfig, "compare", output=str(finished))
    config.align.data.root = str(data_root)
    config.policy = replace(config.policy, steps=3)
    with pytest.raises(UserError, match=r"was begun with policy\.steps=2, not 3; choose another --output"):
        compare(config)


def test_the_tuned_head_goes_on_from_the_frozen_arms(finished):
    run = finished / "policy" / "aligned-head-tuned" / "1" / "0"
    record = json.loads((run / "policy" / "concord.json").read_text())
    assert record["start"] == str(finished / "policy" / "aligned-frozen" / "1" / "0" / "policy")


def test_a_name_keeps_its_folder(finished, data_root, encoder, tmp_path):
    config = debug(CompareConfig, "compare", output=str(finished), encoders=(f"mine={tmp_path}",))
    config.align.data.root = str(data_root)
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"encoders: 'mine' was {encoder} before"):
        compare(config)


def test_weights_that_changed_under_a_name_are_not_mixed_with_earlier_ones(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "mine")
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), encoders=(f"mine={tmp_path / 'mine'}",))
    check_same(tmp_path / "run", config)
    check_same(tmp_path / "run", config)
    weights = load_file(tmp_path / "mine" / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, tmp_path / "mine" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"encoders: the weights in .*mine have changed since 'mine' was first compared"
    ):
        check_same(tmp_path / "run", config)


def test_a_job_that_fails_leaves_the_other_arms_and_their_report(data_root, tmp_path, monkeypatch):
    config = of_one_arm(tmp_path / "run", data_root)
    config.arms, config.seeds, config.align.snapshots = ("random-frozen", "aligned-frozen"), (0,), ()

    def diverges(policy):
        if "aligned-frozen" in policy.output:
            raise UserError("loss is not finite at step 1")
        return train_policy(policy)

    monkeypatch.setattr("vla.comparison.data.train_policy", diverges)
    with pytest.raises(UserError, match=r"policy-aligned-frozen-1-0 failed, .* not finite at step 1"):
        compare(config)
    result = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert list(result["arms"]) == ["random-frozen"]
    assert result["protocol"]["failed, and left out"] == "policy-aligned-frozen-1-0"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "compare").symlink_to(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "run").symlink_to(tmp_path / "run")
    assert comparison_page(ResultsConfig(runs=str(tmp_path / "runs"), docs=str(tmp_path / "docs"))) is None
    monkeypatch.undo()
    compare(config)
    result = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert list(result["arms"]) == ["random-frozen", "aligned-frozen"]


def test_an_encoder_is_not_reported_without_the_arm_whose_demonstrations_it_has(encoder, tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path), demonstrations=(1, 0), seeds=(0,))
    config.arms, config.encoders = ("random-frozen:1", "aligned-frozen:1"), (f"mine={encoder}",)
    for name in ("random-frozen", "mine"):
        (tmp_path / "eval" / f"{name}-1-0").mkdir(parents=True)
        (tmp_path / "eval" / f"{name}-1-0" / "report.html").touch()
    part = finished_part(config)
    assert (part.arms, part.encoders) == (("random-frozen:1",), ())


def test_a_report_that_lacks_an_arm_does_not_take_the_place_of_a_whole_one(finished, data_root, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    before = (tmp_path / "run" / "comparison.json").read_text()
    config = of_one_arm(tmp_path / "run", data_root)
    config.arms = ("aligned-frozen", "no-language")

    def diverges(policy):
        raise UserError("loss is not finite at step 1")

    monkeypatch.setattr("vla.comparison.data.train_policy", diverges)
    with pytest.raises(UserError, match=r"policy-no-language-1-0 .*failed"):
        compare(config)
    assert (tmp_path / "run" / "comparison.json").read_text() == before


def test_the_records_of_an_unfinished_evaluation_are_left_out(finished, tmp_path):
    shutil.copytree(finished / "eval", tmp_path / "run" / "eval")
    (tmp_path / "run" / "eval" / "theirs-given-0" / "report.html").unlink()
    keep_records(tmp_path / "run", tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as packed:
        names = packed.namelist()
    assert "eval/theirs-given-0/begun.json" not in names
    assert "eval/aligned-frozen-1-0/begun.json" in names


def test_a_policy_without_weights_is_trained_again_for_what_needs_it(finished, data_root, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    config = of_one_arm(tmp_path / "run", data_root)
    (tmp_path / "run" / "policy" / "aligned-frozen" / "1" / "0" / "policy" / "model.safetensors").unlink()
    assert not needed(plan_jobs(config))
    shutil.rmtree(tmp_path / "run" / "eval" / "aligned-frozen-1-0")
    assert [job.name for job in needed(plan_jobs(config))] == ["policy-aligned-frozen-1-0", "eval-aligned-frozen-1-0"]


def test_a_folder_of_an_older_version_goes_on(finished, data_root, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / "begun.json"
    begun = json.loads(path.read_text())
    del begun["align"]["data"]["word_dropout"], begun["policies"]
    del begun["transfer_weight"]  # whose folder cloned without the others, which is no matter without transfer
    path.write_text(json.dumps(begun))
    config = debug(CompareConfig, "compare", output=str(tmp_path / "run"), demonstrations=(1,), arms=("random-frozen",))
    config.align.data.root = str(data_root)
    compare(config)
    assert "0 left" in capsys.readouterr().out


def test_a_transfer_that_cloned_without_the_others_is_not_mixed_with_one_that_does(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path), transfer=("place",))
    check_same(tmp_path, config)
    begun = json.loads((tmp_path / "begun.json").read_text())
    del begun["transfer_weight"]  # of a version without the field
    (tmp_path / "begun.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match=r"was begun with transfer_weight=0\.0, not 1\.0"):
        check_same(tmp_path, config)
    check_same(tmp_path, replace(config, transfer_weight=0.0))


def test_a_policy_of_the_users_is_evaluated_on_the_episodes_of_the_arms(finished):
    def episodes(name: str) -> set[tuple]:
        found = json.loads((finished / "eval" / name / "eval.json").read_text())["episodes"]
        return {(e["kind"], e["split"], e["level"], e["task"], e["seed"]) for e in found if e["kind"] == "success"}

    assert episodes("theirs-given-0") == episodes("aligned-frozen-1-0")


def test_results_of_other_settings_that_were_gathered_are_refused(finished, data_root, tmp_path):
    config = gathered(finished, data_root, tmp_path / "moved")
    path = tmp_path / "moved" / "jobs" / "eval-aligned-frozen-1-0" / "settings.json"
    settings = json.loads(path.read_text())
    settings["policy"]["precision"] = "bf16" if settings["policy"]["precision"] == "no" else "no"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"jobs/eval-aligned-frozen-1-0: was run with policy\.precision="):
        compare(config)


def test_demonstrations_that_changed_since_are_refused_before_anything_runs(finished, data_root, tmp_path):
    config = gathered(finished, data_root, tmp_path / "moved")
    path = tmp_path / "moved" / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0123456789abcdef"}))
    with pytest.raises(UserError, match=r"/debug: has changed since .* \(fingerprints 0123456789abcdef and "):
        compare(config)
