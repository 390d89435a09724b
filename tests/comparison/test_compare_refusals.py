"""What a comparison refuses before anything runs, and what a dry run says."""

from dataclasses import replace

import pytest

from tests.conftest import debug
from vla.comparison.arms import Arm
from vla.comparison.chosen import numbers_of
from vla.comparison.compare import compare, power
from vla.comparison.plan import plan_jobs
from vla.config import (
    AlignConfig,
    CollectConfig,
    CompareConfig,
    DataConfig,
    EvalConfig,
    HeadConfig,
    LossConfig,
    PolicyTrainConfig,
    TowerConfig,
)
from vla.types import UserError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("transfer", ("fly",), "transfer: 'fly' is not a task"),
        ("transfer", ("reach", "push", "pick", "place", "next_to", "separate"), "no task is left for the encoders"),
        ("arms", ("aligned",), "'aligned' is not an arm; known: scratch"),
        ("arms", ("aligned-head-tuned",), "aligned-head-tuned goes on from aligned-frozen; name that, too"),
        ("arms", ("scratch:3",), r"'scratch:3': 3 is not among demonstrations=\[1, 0\]"),
        ("arms", ("scratch:",), "'scratch:': nothing is not among demonstrations"),
        ("arms", ("scratch:1", "scratch:0"), "arms: scratch is named twice; give it one number"),
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
            r"policy\.head\.n_action_steps must be at most head\.horizon",
        ),
        ("encoders", ("empty=tests",), "encoders: tests: "),
        (
            "align",
            AlignConfig(loss=LossConfig(word_patch=0, minimal_pairs=True)),
            r"loss\.minimal_pairs changes the term loss\.word_patch",
        ),
        ("align", AlignConfig(wise_ft=(0.5,)), r"align\.wise_ft needs .* with --align\.tower\.pretrained=FOLDER"),
        ("policy", PolicyTrainConfig(tower=TowerConfig(width=64)), r"policy\.tower: .*set align\.tower"),
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


def test_a_snapshot_is_compared_at_the_middle_number_of_demonstrations_in_any_order(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path), demonstrations=(0, 5, 25))
    assert numbers_of(config, Arm("none", "a snapshot", snapshot=1)) == (25,)


def test_an_arm_with_a_number_is_trained_on_that_alone(tmp_path):
    arms = ("aligned-frozen:5", "aligned-head-tuned:5", "scratch:0", "random-frozen")
    config = debug(CompareConfig, "compare", output=str(tmp_path), arms=arms, demonstrations=(5, 0), seeds=(0,))
    config.align.snapshots = ()
    trained = {job.name for job in plan_jobs(config) if job.name.startswith("policy-")}
    wanted = ("aligned-frozen-5", "aligned-head-tuned-5", "scratch-0", "random-frozen-5", "random-frozen-0")
    assert trained == {f"policy-{name}-0" for name in wanted}


def test_snapshots_are_trained_on_the_number_of_the_alignment_that_they_are_of(tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path), arms=("aligned-frozen:1",), demonstrations=(1, 0))
    config.align.snapshots = (1,)
    assert "policy-aligned-frozen@1-1-0" in {job.name for job in plan_jobs(config)}
    assert "policy-aligned-frozen@1-0-0" not in {job.name for job in plan_jobs(config)}


def test_power_counts_the_differences_that_are_corrected_together(tmp_path):
    arms = ("aligned-frozen:1", "shuffle-all:1", "random-frozen:1", "scratch:0", "aligned-head-tuned:1")
    config = debug(CompareConfig, "compare", output=str(tmp_path), arms=arms, demonstrations=(1, 0))
    assert "strictest of 3 corrected ones" in power(config)


def test_an_arm_that_goes_on_from_another_with_other_demonstrations_is_refused(tmp_path):
    arms = ("aligned-frozen:0", "aligned-head-tuned:5")
    config = debug(CompareConfig, "compare", output=str(tmp_path), arms=arms, demonstrations=(5, 0))
    with pytest.raises(UserError, match="goes on from aligned-frozen; name that, too, with as many demonstrations"):
        compare(config)


def test_demonstrations_of_another_robot_are_refused_before_anything_is_trained(data_root, tmp_path):
    config = debug(CompareConfig, "compare", output=str(tmp_path), arms=("random-frozen",))
    config.align.data.root = str(data_root)
    config.eval = EvalConfig(env="metaworld", splits=("none",), grounding_episodes=0)
    with pytest.raises(UserError, match=r"eval\.env: metaworld has 4 action dimensions, the data in .* 3"):
        compare(config)
    assert not (tmp_path / "align").exists()


def test_a_dry_run_says_cost_and_power_and_writes_nothing(tmp_path, capsys):
    compare(debug(CompareConfig, "compare", output=str(tmp_path / "run"), dry_run=True))
    out = capsys.readouterr().out
    assert "jobs" in out
    assert "80 % power" in out
    assert "strictest of" in out
    assert not (tmp_path / "run").exists()
