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
import yaml
from transformers import Dinov2Config, Dinov2Model

from tests.conftest import debug
from vla.comparison.begun import check_same
from vla.comparison.compare import compare
from vla.comparison.data import aligned_beside, make_data
from vla.comparison.jobs import needed
from vla.comparison.page import comparison_page
from vla.comparison.plan import plan_jobs
from vla.comparison.work import make_encoder
from vla.config import (
    AlignConfig,
    CollectConfig,
    CompareConfig,
    DataConfig,
    EvalConfig,
    HeadConfig,
    LossConfig,
    PolicyTrainConfig,
    ResultsConfig,
)
from vla.data.episodes import read_episodes, task_of_episode
from vla.integrations.collect import collect
from vla.models.clip import load_clip, save_clip, with_vision_of
from vla.types import UserError

ROOT = Path(__file__).resolve().parent.parent.parent


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
    command += ["--mixed_precision=no", "--dynamo_backend=no", str(ROOT / "scripts" / "compare.py")]
    command += ["--config_path", "configs/compare/debug.yaml", f"--align.data.root={data_root}"]
    command += [
        f"--output={folder}",
        f"--encoders=[mine={encoder},dinov2={others}]",
        f"--policies=[theirs={policy_folder}]",
    ]
    command += [
        "--arms=[random-frozen,cloning-pretrained-frozen,aligned-frozen,aligned-head-tuned,shuffle-all,no-vision]"
    ]
    command += ["--demonstrations=[1]"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"compare: \d+ jobs", done.stdout)) == 2
    return folder


def test_every_arm_encoder_and_policy_is_in_the_result(finished):
    result = json.loads((finished / "comparison.json").read_text())
    arms = {row["arm"] for row in result["success"]}
    trained = {"random-frozen", "cloning-pretrained-frozen", "aligned-frozen", "aligned-head-tuned", "shuffle-all"}
    trained.add("no-vision")
    assert arms == trained | {"aligned-frozen@1", "mine", "dinov2", "theirs"}
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
    for name in ("success", "levels", "contrasts", "validity"):
        with (finished / f"{name}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(result[name])
    page = (finished / "report.html").read_text()
    assert "aligned-frozen - shuffle-all" in page
    assert 'src="http' not in page


def test_it_becomes_a_page_of_the_documentation_that_needs_no_runs(finished, tmp_path):
    (tmp_path / "outputs" / "compare" / "mine").mkdir(parents=True)
    shutil.copy(finished / "comparison.json", tmp_path / "outputs" / "compare" / "mine" / "comparison.json")
    docs = str(tmp_path / "docs" / "results")
    page = comparison_page(ResultsConfig(runs=str(tmp_path / "outputs"), docs=docs))
    first = page.read_text()
    assert "| aligned-frozen - shuffle-all |" in first
    named = re.findall(r"\((pictures/[^)]*)\)", first)
    assert named
    assert all((page.parent / name).read_text().startswith("<svg") for name in named)
    comparison_page(ResultsConfig(runs=str(tmp_path / "nothing"), docs=docs))
    assert page.read_text() == first


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
    assert set(play.extra["tasks"]) == set(broad.extra["tasks"]) == {"reach", "push", "pick", "next_to", "separate"}
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


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("transfer", ("fly",), "transfer: 'fly' is not a task"),
        ("transfer", ("reach", "push", "pick", "place", "next_to", "separate"), "no task is left for the encoders"),
        ("arms", ("aligned",), "'aligned' is not an arm; known: scratch"),
        ("arms", ("aligned-head-tuned",), "aligned-head-tuned goes on from aligned-frozen; name that, too"),
        ("encoders", ("nowhere=/nowhere",), "is not NAME=FOLDER of an existing folder"),
        ("seeds", (0, 0), "repeats a value"),
        ("seeds", (), "seeds: .*give at least one number"),
        ("seeds", (-1,), "seeds: .*none below 0"),
        ("demonstrations", (), "demonstrations: .*give at least one number"),
        ("align", AlignConfig(steps=10, snapshots=(11,)), r"align\.snapshots: 11 is not a step of 1 to 10"),
        ("eval", EvalConfig(split_episodes=1), r"eval\.split_episodes: 1 episode has no interval"),
        (
            "policy",
            PolicyTrainConfig(data=DataConfig(shift_px=2)),
            r"policy\.data\.shift_px: stage two gets align\.data",
        ),
        ("encoders", ("random=.",), "'random' is taken"),
        ("encoders", ("scratch=.",), "'scratch' is taken"),
        ("encoders", ("none@5=.",), "'none@5' names a folder; take letters"),
        ("policies", ("../mine=.",), "names a folder; take letters"),
        ("align", AlignConfig(seed=7), r"align\.seed: is set for every run; seeds decides here"),
        ("align", AlignConfig(shuffle="all"), r"align\.shuffle: is set for every run; arms decides here"),
        ("policy", PolicyTrainConfig(encoder="mine"), r"policy\.encoder: is set for every run; encoders decides here"),
        ("eval", EvalConfig(policy="mine"), r"eval\.policy: is set for every run; policies decides here"),
        ("eval", EvalConfig(workers=4), r"eval\.workers: is set for every run; the number of processes decides here"),
        ("collect", CollectConfig(output="mine"), r"collect\.output: .*align\.data\.root decides here"),
        ("collect", CollectConfig(kind="play"), r"collect\.kind: play cannot be cloned"),
        (
            "policy",
            PolicyTrainConfig(head=HeadConfig(n_action_steps=20)),
            r"n_action_steps must be at most head\.horizon",
        ),
        ("encoders", ("empty=tests",), "encoders: tests: "),
        (
            "align",
            AlignConfig(loss=LossConfig(word_patch=0, minimal_pairs=True)),
            r"loss\.minimal_pairs changes the term loss\.word_patch",
        ),
        ("align", AlignConfig(wise_ft=(0.5,)), "wise_ft needs a pretrained start"),
        (
            "policy",
            PolicyTrainConfig(aligned_pooler=True, head=HeadConfig(width=64)),
            r"policy\.head\.width = align\.loss\.pooler_width, got .* 64 and",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(field, value, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compare(replace(debug(CompareConfig, "compare", output=str(tmp_path)), **{field: value}))


def test_tasks_beside_those_of_transfer_are_refused(tmp_path):
    config = debug(
        CompareConfig, "compare", output=str(tmp_path), transfer=("reach",), eval=EvalConfig(tasks=("push",))
    )
    with pytest.raises(UserError, match=r"eval\.tasks: policies are evaluated on the tasks of `transfer`"):
        compare(config)


def test_a_dry_run_says_cost_and_power_and_writes_nothing(tmp_path, capsys):
    compare(debug(CompareConfig, "compare", output=str(tmp_path / "run"), dry_run=True))
    out = capsys.readouterr().out
    assert "jobs" in out
    assert "80 % power" in out
    assert "strictest of" in out
    assert not (tmp_path / "run").exists()


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
