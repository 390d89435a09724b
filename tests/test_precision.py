"""Which precision computes where, and that what was begun goes on in it."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import logged
from vla.comparison.begun import check_same, with_precision
from vla.config import AlignConfig, CollectConfig, CompareConfig, EvalConfig, PipelineConfig, PolicyTrainConfig
from vla.pipeline import opening
from vla.precision import chosen_precision, multiplies_bf16
from vla.training.align import train_align
from vla.training.checkpoint import save_checkpoint
from vla.training.optim import make_optimizers
from vla.training.policy import train_policy
from vla.training.run import begun_precision

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """A machine without a GPU whose processor can only what is said."""

    def can(**names: bool | str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)

    return can


@pytest.mark.parametrize(
    "has", [{"amx_bf16": True}, {"bf16": True}, {"avx512_bf16": True, "cpu_name": "AMD EPYC 9755"}]
)
def test_a_processor_with_fast_products_in_bfloat16_uses_them(processor, has):
    processor(avx2=True, **has)
    assert chosen_precision("auto") == "bf16"


@pytest.mark.parametrize(
    "has", [{"avx512_bf16": True, "cpu_name": "Intel Xeon Processor"}, {"avx512_f": True, "cpu_name": "AMD EPYC"}]
)
def test_a_processor_without_fast_ones_computes_in_float32(processor, has):
    processor(avx2=True, amx_bf16=False, **has)
    assert chosen_precision("auto") == "no"
    assert not multiplies_bf16(CPU)


def test_a_named_precision_is_used_anywhere(processor):
    processor(avx2=True)
    assert chosen_precision("bf16") == "bf16"


def test_a_run_with_a_checkpoint_goes_on_in_the_precision_it_began_in(processor, tmp_path):
    (tmp_path / "config.yaml").write_text("precision: bf16\n")
    processor(avx2=True)
    assert begun_precision(tmp_path, "auto", "end") == "no"  # it ended before its first checkpoint
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, {"step": 1})
    assert begun_precision(tmp_path, "auto", "end") == "bf16"
    assert begun_precision(tmp_path, "no", "end") == "no"


def test_a_finished_run_without_checkpoints_keeps_its_precision(processor, tmp_path):
    (tmp_path / "config.yaml").write_text("precision: bf16\n")
    (tmp_path / "report.html").touch()
    processor(avx2=True)
    assert begun_precision(tmp_path, "auto", "report.html") == "bf16"


def test_a_comparison_goes_on_in_the_precision_it_began_in(processor, tmp_path):
    processor(amx_bf16=True)
    begun = with_precision(tmp_path, CompareConfig())
    check_same(tmp_path, begun)
    processor(avx2=True)
    assert with_precision(tmp_path, CompareConfig()) == begun
    assert (begun.align.precision, begun.policy.precision) == ("bf16", "bf16")
    assert with_precision(tmp_path / "new", CompareConfig()).policy.precision == "no"


def test_one_process_trains_in_both_precisions(align_config, policy_config, tmp_path):
    encoder = train_align(replace(align_config, precision="bf16", steps=1, output=str(tmp_path / "align")))
    config = replace(policy_config, encoder=str(encoder), precision="no", steps=1, output=str(tmp_path / "policy"))
    assert json.loads((train_policy(config) / "config.json").read_text())["precision"] == "no"


def test_what_trains_in_bfloat16_computes_in_it(align_config, policy_config, tmp_path):
    def first_loss(stage: str, precision: str) -> float:
        train, config = {"align": (train_align, align_config), "policy": (train_policy, policy_config)}[stage]
        folder = tmp_path / stage / precision
        train(replace(config, precision=precision, steps=1, eval_every=0, output=str(folder)))
        return logged(folder)[0]["loss"]

    for stage in ("align", "policy"):
        rounded, exact = first_loss(stage, "bf16"), first_loss(stage, "no")
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("has_it", [True, False])
def test_the_demo_says_at_once_where_training_will_be_slower(processor, has_it):
    processor(amx_bf16=has_it)
    text = opening(PipelineConfig(name="demo"), CollectConfig(), AlignConfig(), PolicyTrainConfig(), EvalConfig())
    assert ("no fast products" in text) != has_it


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_muon_computes_in_the_precision_of_the_run_whatever_the_machine(precision, dtype):
    linear, _ = make_optimizers([(torch.nn.Linear(2, 2), 1e-3)], 0.0, precision).members
    assert linear.dtype == dtype
