"""A whole small sweep down to closed-loop success, and what is refused before anything runs."""

import csv
import errno
import fcntl
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla.comparison import sweep as sweeping
from vla.comparison.data import clone_cached, drop_caches, env_name, token_cache
from vla.comparison.estimates import MEASURED
from vla.comparison.page import comparison_page
from vla.comparison.points import at_point, folder_name, label, points
from vla.comparison.sweep import refuse_unused_fields, sweep
from vla.config import ResultsConfig, SweepConfig
from vla.config_io import load_config, split_flags
from vla.types import UserError


@pytest.fixture(scope="module")
def config(data_root, tmp_path_factory) -> SweepConfig:
    loaded = load_config(SweepConfig, ["--config_path", "configs/sweep/debug.yaml", f"--align.data.root={data_root}"])
    return replace(loaded, output=str(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def finished(config):
    swept = {"align.loss.temperature": ("0.05", "0.2"), "policy.steps": ("1", "2")}
    return sweep(config, swept)


def test_every_combination_is_carried_down_to_success(finished):
    rows = json.loads((finished / "sweep.json").read_text())["rows"]
    assert [tuple(row["point"].values()) for row in rows] == [("0.05", "1"), ("0.05", "2"), ("0.2", "1"), ("0.2", "2")]
    assert all(row["interval"][0] <= row["success"] <= row["interval"][1] and row["n"] == 6 for row in rows)
    assert "target_probe_r2" in rows[0]["measures"]
    with (finished / "sweep.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4


def test_points_that_differ_in_stage_two_share_their_alignment(finished):
    assert len(list((finished / "align").glob("*/0/clip"))) == 2
    assert len(list((finished / "policy").glob("*/0/policy"))) == 4


def test_the_value_reaches_the_run(finished):
    temperatures = {
        (p.parent.parent.name, p.read_text().count("temperature: 0.05")) for p in finished.glob("align/*/0/config.yaml")
    }
    assert temperatures == {("align.loss.temperature=0.05", 1), ("align.loss.temperature=0.2", 0)}


def test_the_report_has_a_figure_for_each_field(finished):
    page = (finished / "report.html").read_text()
    assert "Success against align.loss.temperature" in page
    assert "Success against policy.steps" in page


def test_token_caches_are_gone(finished):
    assert not list((finished / "cache").iterdir())


def test_caches_are_locked_as_a_network_file_system_wants_it(config, tmp_path, monkeypatch):
    """There a shared lock needs a file that can be read, an exclusive one a file that can be written."""
    lock = fcntl.flock

    def strict(file, kind):
        if not (file.readable() if kind & fcntl.LOCK_SH else file.writable()):
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", strict)
    cache = tmp_path / "cache"
    with token_cache(config, (config.align.data.root,), cache):
        drop_caches([cache])
        assert cache.is_dir()
    drop_caches([cache])
    assert not cache.exists()


def test_a_cache_that_is_deleted_before_it_is_locked_begins_anew(config, tmp_path, monkeypatch):
    lock, cache, left = fcntl.flock, tmp_path / "cache", ["another process"]

    def deleted_first(file, kind):
        if kind == fcntl.LOCK_SH and left:
            left.clear()
            drop_caches([cache])
            assert not cache.exists()
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", deleted_first)
    with token_cache(config, (config.align.data.root,), cache):
        drop_caches([cache])
        assert cache.is_dir()


def test_a_cache_stays_while_another_policy_reads_it_or_will(config, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    readers = [tmp_path / name / "policy" for name in "ab"]

    def train(policy):
        drop_caches([cache])
        assert cache.is_dir()  # another process leaves what this one uses
        Path(policy.output, "policy").mkdir(parents=True)
        Path(policy.output, "policy", "model.safetensors").touch()

    monkeypatch.setattr("vla.comparison.data.train_policy", train)
    policy = replace(config.policy, output=str(tmp_path / "a"), data=replace(config.align.data, cache=str(cache)))
    clone_cached(config, policy, readers)
    assert cache.is_dir()
    clone_cached(config, replace(policy, output=str(tmp_path / "b")), readers)
    assert not cache.exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(config, tmp_path, capsys):
    swept = {"align.steps": ("10", "1000")}
    assert sweep(replace(config, output=str(tmp_path / "run"), dry_run=True), swept) is None
    out = capsys.readouterr().out
    assert re.search(r"^sweep: 7 jobs, 7 left, about .* in one process", out)
    times = dict(re.findall(r"align-align.steps=(\d+)-0 +(.+)", out))
    assert times["10"] != times["1000"]
    assert not (tmp_path / "run").exists()


def test_a_finished_sweep_runs_nothing_again(finished, config):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("eval/*/0/eval.json")}
    sweep(config, {"align.loss.temperature": ("0.05", "0.2"), "policy.steps": ("1", "2")})
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_records_that_the_page_links_make_the_same_result(finished, config, tmp_path, capsys):
    (tmp_path / "outputs" / "sweep").mkdir(parents=True)
    (tmp_path / "outputs" / "sweep" / "mine").symlink_to(finished)
    page = comparison_page(ResultsConfig(runs=str(tmp_path / "outputs"), docs=str(tmp_path / "docs" / "results")))
    moved = tmp_path / "moved"
    with zipfile.ZipFile(page.parent / "results" / "sweep" / "mine.zip") as records:
        records.extractall(moved)
    (moved / "sweep.json").unlink()
    sweep(replace(config, output=str(moved)), {"align.loss.temperature": ("0.05", "0.2"), "policy.steps": ("1", "2")})
    assert "0 left" in capsys.readouterr().out
    there, here = (json.loads((folder / "sweep.json").read_text())["rows"] for folder in (finished, moved))
    assert here == there


def test_shares_of_one_alignment_are_carried_down_to_success(config, encoder, tmp_path):
    align = replace(config.align, tower=replace(config.align.tower, pretrained=str(encoder)))
    config = replace(config, align=align, output=str(tmp_path / "run"))
    sweep(config, {"align.wise_ft": ("0",)})
    folder = sweep(config, {"align.wise_ft": ("0", "0.5")})
    result = json.loads((folder / "sweep.json").read_text())
    assert [row["point"]["align.wise_ft"] for row in result["rows"]] == ["0", "0.5"]
    assert len(list((folder / "align").iterdir())) == 1
    (aligned,) = folder.glob("align/*/0")
    start, between = (
        json.loads((folder / "policy" / f"align.wise_ft={share}" / "0" / "policy" / "concord.json").read_text())
        for share in ("0", "0.5")
    )
    assert (start["encoder"], between["encoder"]) == tuple(
        str(aligned / "wise_ft" / share / "clip") for share in ("0", "0.5")
    )
    first, last, half = (
        load_file(path / "model.safetensors")
        for path in (encoder, aligned / "clip", aligned / "wise_ft" / "0.5" / "clip")
    )
    way = json.loads((aligned / "alignment.json").read_text())["way"]
    assert result["rows"][0]["measures"]["zero_shot"] == pytest.approx(way[0]["new/zero_shot"])
    for name, value in half.items():
        if name != "logit_scale":
            torch.testing.assert_close(value, (first[name] + last[name]) / 2)


def test_what_a_pretrained_start_forgot_stands_beside_success(config, encoder, finished, tmp_path):
    tower = replace(config.align.tower, pretrained=str(encoder))
    align = replace(config.align, tower=tower, forgetting=config.align.data.root)
    folder = sweep(replace(config, align=align, output=str(tmp_path / "run")), {"policy.steps": ("1",)})
    (row,) = json.loads((folder / "sweep.json").read_text())["rows"]
    (aligned,) = folder.glob("align/*/0/alignment.json")
    assert row["measures"]["old/zero_shot"] == json.loads(aligned.read_text())["way"][-1]["old/zero_shot"]
    assert "old/zero shot" in (folder / "report.html").read_text()
    assert "old/zero_shot" not in (finished / "sweep.csv").read_text()


def test_a_finished_sweep_makes_its_report_again_without_the_encoder_that_it_began_from(config, encoder, tmp_path):
    start = Path(shutil.copytree(encoder.parent, tmp_path / "start")) / "clip"
    align = replace(config.align, tower=replace(config.align.tower, pretrained=str(start)))
    config = replace(config, align=align, output=str(tmp_path / "run"))
    report = sweep(config, {"policy.steps": ("1",)}) / "report.html"
    report.unlink()
    shutil.rmtree(start)
    MEASURED.clear()  # another process has not timed its tower
    sweep(config, {"policy.steps": ("1",)})
    assert report.is_file()


def test_demonstrations_say_which_environment_is_timed(config, data_root, tmp_path):
    changed = replace(config, collect=replace(config.collect, env=replace(config.collect.env, name="metaworld")))
    assert env_name(changed) == "tabletop"
    nowhere = replace(changed.align, data=replace(changed.align.data, root=str(tmp_path)))
    assert env_name(replace(changed, align=nowhere)) == "metaworld"


def test_ablations_are_compared_with_the_whole_on_the_same_episodes(config, tmp_path):
    changed = ("align.loss.word_patch=0 align.loss.state=0", "policy.aligned_pooler=false")
    folder = sweep(replace(config, output=str(tmp_path / "run"), ablations=changed), {})
    result = json.loads((folder / "sweep.json").read_text())
    whole, *others = result["points"]
    assert whole["point"] == {}
    assert "difference" not in whole["groups"]["plain"]
    for row, text in zip(others, changed, strict=True):
        assert row["point"] == dict(part.split("=") for part in text.split())
        success, before = (r["groups"]["plain"]["success"]["value"] for r in (row, whole))
        assert row["groups"]["plain"]["difference"]["value"] == pytest.approx(success - before)
    assert len(list((folder / "align").glob("*/0/clip"))) == 2
    page = (folder / "report.html").read_text()
    assert "What each part gives" in page
    assert "align.loss.word_patch=0,align.loss.state=0" in page
    shutil.copytree(folder, tmp_path / "runs" / "sweep" / "mine")
    page = comparison_page(ResultsConfig(runs=str(tmp_path / "runs"), docs=str(tmp_path / "docs" / "results")))
    assert "| align.loss.word_patch=0,align.loss.state=0 |" in page.read_text()


@pytest.mark.parametrize(
    "ablations",
    [("align.steps",), ("align.steps=1", "align.steps=1"), ("=2",), ("",), ("policy.steps=1 policy.steps=2",)],
)
def test_what_is_no_change_is_refused(config, ablations):
    with pytest.raises(UserError, match=r"^config error: ablations"):
        sweep(replace(config, output=config.output + "x", ablations=ablations), {})


def test_flags_are_split_into_fields_and_the_rest():
    swept, rest = split_flags(["--sweep.align.steps=1,2", "--output=x", "--sweep.policy.tune=[true,false]"])
    assert swept == {"align.steps": ("1", "2"), "policy.tune": ("true", "false")}
    assert rest == ["--output=x"]
    assert [label(point) for point in points(swept)][:2] == [
        "align.steps=1,policy.tune=true",
        "align.steps=1,policy.tune=false",
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sweep.align.loss.temprature=1,2", "did you mean temperature"),
        ("--sweep.align.steps=1,two", "must be an int"),
        ("--sweep.align.steps=0", "at least 1"),
        ("--sweep.eval.episodes=1,2", "fields of align and policy"),
        ("--sweep.align.steps=", "different values"),
        ("--sweep.align.steps=1,1", "different values"),
        ("--sweep.align.seed=1,2", "the sweep sets it itself"),
        ("--sweep.align.data.root=a,b", "the sweep sets it itself"),
        ("--sweep.policy.data.color_jitter=0,0.4", "stage two gets align.data"),
        ("--sweep.policy.head.n_action_steps=4,20", r"n_action_steps must be at most head\.horizon, got 20 and 16"),
    ],
)
def test_what_cannot_be_swept_is_refused(config, flag, message):
    with pytest.raises(UserError, match=message):
        [at_point(config, point) for point in points(split_flags([flag])[0])]


def test_a_flag_that_the_sweep_would_pass_over_is_refused(config):
    with pytest.raises(
        UserError, match=r"policy\.encoder: is set for every run; the alignment of each point decides here"
    ):
        sweep(replace(config, policy=replace(config.policy, encoder="mine")), {"align.steps": ("1", "2")})


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("policy.encoder_lr_scale", ("0.1", "1"), r"policy\.encoder_lr_scale changes nothing without tune=true"),
        ("policy.loss.temperature", ("0.1", "1"), r"policy\.loss\.temperature changes nothing without auxiliary"),
        ("align.loss.action_beta", ("0.1", "1"), r"align\.loss\.action_beta changes nothing without a term of actions"),
        ("policy.head.width", ("64", "128"), r"policy\.head\.width = align\.loss\.pooler_width"),
    ],
)
def test_values_that_would_change_nothing_or_fit_nothing_are_refused_before_anything_runs(
    config, tmp_path, field, values, message
):
    align = replace(config.align, loss=replace(config.align.loss, context_action=0.0))
    policy = replace(config.policy, aligned_pooler=True, tune=False)
    with pytest.raises(UserError, match=message):
        sweep(replace(config, align=align, policy=policy, output=str(tmp_path / "run")), {field: values})
    assert not (tmp_path / "run").exists()


def test_a_grid_may_hold_points_where_one_of_its_fields_changes_nothing(config):
    swept = {"policy.head.kind": ("l1", "flow"), "policy.head.flow_steps": ("4", "8")}
    refuse_unused_fields([(point, at_point(config, point)) for point in points(swept)])
    alone = points(swept | {"policy.head.kind": ("l1",)})
    with pytest.raises(UserError, match=r"flow_steps changes nothing without head\.kind=flow"):
        refuse_unused_fields([(point, at_point(config, point)) for point in alone])


def test_names_of_folders_are_short_and_tell_every_point_from_the_others():
    first, second = ({"align.tower.pretrained": path} for path in ("runs/a_b", "runs_a/b"))
    assert label(first) == "align.tower.pretrained=runs/a_b"
    assert folder_name({"align.steps": "1"}) == "align.steps=1"
    assert folder_name(first) != folder_name(second)
    assert "/" not in folder_name(first)
    assert len(folder_name({f"align.data.field{i}": "/a/long/path" * 9 for i in range(4)})) < 200


def test_a_point_that_fails_leaves_the_others_and_their_report(config, tmp_path, monkeypatch):
    train = sweeping.train_align

    def diverges(align):
        if align.loss.temperature == 0.05:
            raise UserError("loss is not finite at step 1")
        return train(align)

    monkeypatch.setattr(sweeping, "train_align", diverges)
    config = replace(config, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"align-align\.loss\.temperature=0\.05-0 failed, .* not finite at step 1"):
        sweep(config, {"align.loss.temperature": ("0.05", "0.2")})
    result = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [row["point"]["align.loss.temperature"] for row in result["rows"]] == ["0.2"]
    assert "align.loss.temperature=0.05: failed" in (tmp_path / "run" / "report.html").read_text()


def test_the_highest_success_is_over_training_seeds(config, tmp_path):
    config = replace(config, output=str(tmp_path / "run"), seeds=(0, 1))
    folder = sweep(config, {"policy.steps": ("1", "2")})
    result = json.loads((folder / "sweep.json").read_text())
    assert [point["groups"]["plain"]["success"]["seeds"] for point in result["points"]] == [2, 2]
    for point in result["points"]:
        of_seeds = [row["success"] for row in result["rows"] if row["point"] == point["point"]]
        assert point["groups"]["plain"]["success"]["value"] == pytest.approx(sum(of_seeds) / 2)
    page = (folder / "report.html").read_text()
    assert "(2 training seeds), is at policy.steps=" in page
    assert "Success over training seeds" in page


def test_another_configuration_in_the_same_folder_is_refused(finished, config):
    other = replace(config, eval=replace(config.eval, episodes=12))
    with pytest.raises(UserError, match=r"was begun with eval\.episodes=6, not 12"):
        sweep(other, {"align.loss.temperature": ("0.05",)})


def test_shares_of_the_way_need_a_pretrained_start(config):
    with pytest.raises(UserError, match="wise_ft needs a pretrained start"):
        sweep(config, {"align.wise_ft": ("0", "0.5")})


def test_a_temperature_that_the_start_overrules_is_not_swept(config, encoder):
    config = replace(config, align=replace(config.align, tower=replace(config.align.tower, pretrained=str(encoder))))
    with pytest.raises(UserError, match=r"a start that has no scales of its own beside it \(loss\.temperatures"):
        sweep(config, {"align.loss.temperature": ("0.05", "0.1")})


def test_a_sweep_of_nothing_is_refused(config):
    with pytest.raises(UserError, match=r"add --sweep\.FIELD"):
        sweep(config, {})


def test_a_training_seed_counts_once(config, tmp_path):
    with pytest.raises(UserError, match=r"seeds: \[0, 0\] repeats a value"):
        sweep(replace(config, seeds=(0, 0), output=str(tmp_path / "run")), {"policy.steps": ("1", "2")})
