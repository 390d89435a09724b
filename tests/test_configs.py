"""Every shipped configuration loads, and the stages of one name fit together."""

from pathlib import Path

import pytest

from vla.config import AlignConfig, CollectConfig, CompareConfig, EvalConfig, PolicyTrainConfig, SweepConfig
from vla.config_io import load_config

ROOT = Path(__file__).resolve().parent.parent / "configs"
CLASSES = {"collect": CollectConfig, "align": AlignConfig, "policy": PolicyTrainConfig, "eval": EvalConfig}
FILES = sorted(ROOT.glob("*/*.yaml"))
NAMES = sorted({path.stem for path in FILES if path.parent.name in CLASSES})


def load(stage: str, name: str):
    return load_config(
        (CLASSES | {"compare": CompareConfig, "sweep": SweepConfig})[stage],
        ["--config_path", str(ROOT / stage / f"{name}.yaml")],
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_loads(path):
    load(path.parent.name, path.stem)


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_reads_what_the_one_before_writes(name):
    collect, align, policy, evaluation = (load(stage, name) for stage in CLASSES)
    assert align.data.root == collect.output
    assert policy.data.root == collect.output
    assert policy.encoder == f"{align.output}/clip"
    assert evaluation.policy == f"{policy.output}/policy"
    assert evaluation.env in (None, collect.env.name)  # by default the environment the policy was trained on


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_seeds_are_none_of_the_demonstrations(name):
    collect, evaluation = load("collect", name), load("eval", name)
    assert evaluation.seed >= collect.seed + collect.scenes


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_says_where_it_writes(name):
    for stage, configuration in zip(("data", "align", "policy", "eval"), CLASSES, strict=True):
        assert load(configuration, name).output == f"outputs/{stage}/{name}"
