"""Pretraining by cloning and scratch on all demonstrations are one run where they take as many steps."""

from dataclasses import replace

import pytest

from tests.conftest import debug
from vla.comparison.arms import ARMS
from vla.comparison.plan import plan_jobs
from vla.comparison.work import clone_everything, cloning_run, make_policy
from vla.config import CompareConfig


@pytest.fixture
def config(tmp_path) -> CompareConfig:
    arms = ("scratch", "cloning-pretrained-frozen", "aligned-frozen")
    return debug(
        CompareConfig, "compare", output=str(tmp_path), arms=arms, seeds=(0,), scratch_steps=2, cloning_steps=2
    )


def names(config: CompareConfig) -> set[str]:
    """Of the jobs that train policies."""
    return {job.name for job in plan_jobs(config) if job.name.startswith(("policy-scratch", "cloning"))}


def test_it_is_trained_once(config):
    assert names(config) == {"cloning-0", "policy-scratch-1-0"}
    evaluation = next(job for job in plan_jobs(config) if job.name == "eval-scratch-0-0")
    assert evaluation.needs == ("cloning-0",)


def test_scratch_alone_is_a_job_of_its_own(config):
    assert names(replace(config, arms=("scratch",))) == {"policy-scratch-1-0", "policy-scratch-0-0"}


def test_a_folder_in_which_an_older_version_trained_both_goes_on(config, tmp_path):
    (tmp_path / "policy" / "cloning" / "0").mkdir(parents=True)
    assert names(config) == {"cloning-0", "policy-scratch-1-0", "policy-scratch-0-0"}


@pytest.mark.parametrize("change", [{"cloning_steps": 3}, {"transfer": ("reach",)}])
def test_with_other_steps_or_data_both_are_trained(config, change):
    assert names(replace(config, **change)) == {"cloning-0", "policy-scratch-1-0", "policy-scratch-0-0"}


def test_both_would_train_the_same(config, monkeypatch):
    config.policy.pooler_lr_scale = 0.0
    trained = []
    monkeypatch.setattr("vla.comparison.work.clone_cached", lambda config, policy, readers: trained.append(policy))
    make_policy(config, "scratch", ARMS["scratch"], 0, 0)
    clone_everything(config, 0)
    first, second = (replace(policy, data=replace(policy.data, cache=None)) for policy in trained)
    assert first == second
    assert first.output == str(cloning_run(config, 0))
