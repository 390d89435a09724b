import pytest
import torch

from vla.precision import begun_precision, chosen_precision, multiplies_bf16

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
