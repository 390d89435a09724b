import pytest
import torch

from vla.config import AlignConfig, CollectConfig, EvalConfig, PolicyTrainConfig
from vla.pipeline import opening
from vla.precision import begun_precision, chosen_precision, multiplies_bf16
from vla.training.muon import Float32Muon
from vla.training.optim import make_optimizers

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch):
    """A machine without a GPU whose processor can only what is said."""

    def can(**names: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)

    return can


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_a_processor_with_products_in_bfloat16_uses_them(processor, name):
    processor(avx2=True, **{name: True})
    assert chosen_precision("auto") == "bf16"


def test_a_processor_without_them_computes_in_float32(processor):
    processor(avx2=True, avx512_bf16=False)
    assert chosen_precision("auto") == "no"
    assert not multiplies_bf16(CPU)


def test_a_named_precision_is_used_anywhere(processor):
    processor(avx2=True)
    assert chosen_precision("bf16") == "bf16"


def test_a_run_goes_on_in_the_precision_it_began_in(processor, tmp_path):
    (tmp_path / "config.yaml").write_text("precision: bf16\n")
    processor(avx2=True)
    assert begun_precision(tmp_path, "auto") == "bf16"
    assert begun_precision(tmp_path / "new", "auto") == "no"


@pytest.mark.parametrize("has_it", [True, False])
def test_the_demo_says_at_once_where_training_will_be_slower(processor, has_it):
    processor(amx_bf16=has_it)
    text = opening("demo", CollectConfig(), AlignConfig(), PolicyTrainConfig(), EvalConfig())
    assert ("only emulates" in text) != has_it


@pytest.mark.parametrize(("has_it", "kind"), [(True, torch.optim.Muon), (False, Float32Muon)])
def test_muon_computes_in_what_the_processor_multiplies(processor, has_it, kind):
    processor(amx_bf16=has_it)
    linear, _ = make_optimizers([(torch.nn.Linear(2, 2), 1e-3)], 0.0).members
    assert type(linear) is kind
