"""A pretrained start: low-rank updates, interpolation with the start, and what is measured on the way."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import debug
from vla.config import CollectConfig
from vla.integrations.collect import collect
from vla.models.clip import build_clip, load_clip, patch_tokens
from vla.models.finetuning import add_lora, interpolated, merged
from vla.training.align import train_align
from vla.types import UserError

SIZES = {"image_size": 24, "patch_size": 12, "width": 16, "layers": 2, "heads": 2, "embed_dim": 8}
TEXT_SIZES = {"text_width": 16, "text_layers": 1, "text_heads": 2, "vocab_size": 600}


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return build_clip(["reach the red cube"], **SIZES, **TEXT_SIZES)[0].eval()


def test_low_rank_updates_change_nothing_at_first_and_are_all_of_the_towers_that_trains(clip):
    pixels = torch.randn(2, 3, 24, 24)
    before = patch_tokens(clip, pixels)
    add_lora(clip, 2)
    torch.testing.assert_close(patch_tokens(clip, pixels), before)
    trainable = {name for name, p in clip.named_parameters() if p.requires_grad}
    rest = {name for name in trainable if "lora_" not in name}
    assert rest == {"visual_projection.weight", "text_projection.weight"}
    assert any(name.startswith("vision_model") for name in trainable)
    assert any(name.startswith("text_model") for name in trainable)


def test_merged_updates_are_weights_of_a_plain_encoder(clip):
    names = set(clip.state_dict())
    add_lora(clip, 2, vision=True)
    for name, parameter in clip.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    pixels = torch.randn(2, 3, 24, 24)
    whole = merged(clip)
    assert set(whole.state_dict()) == names
    torch.testing.assert_close(patch_tokens(whole, pixels), patch_tokens(clip, pixels), rtol=1e-4, atol=1e-5)


def test_interpolation_ends_at_the_start_and_at_the_trained_weights(clip):
    start = {name: torch.randn_like(weight) for name, weight in clip.state_dict().items()}
    for share, expected in ((0.0, start), (1.0, clip.state_dict())):
        for name, weight in interpolated(start, clip, share).state_dict().items():
            torch.testing.assert_close(weight, expected[name])


@pytest.fixture(scope="module")
def continued(align_config, encoder, data_root, tmp_path_factory):
    """A short run from the encoder of another one, with low-rank updates."""
    tower = replace(align_config.tower, pretrained=str(encoder), lora_rank=2)
    output = str(tmp_path_factory.mktemp("continued") / "run")
    optimizer = replace(align_config.optimizer, pretrained_lr=1e-2)  # so that the updates stand out from rounding
    config = replace(
        align_config, tower=tower, optimizer=optimizer, wise_ft=(0.25,), forgetting=str(data_root), chunk=7
    )
    config = replace(config, output=output)
    return train_align(config)


def test_a_run_with_low_rank_updates_exports_a_clip_whose_weights_moved_by_that_rank(encoder, continued):
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, continued))
    assert before.keys() == after.keys()
    load_clip(continued)  # complete, or it is refused
    for tower in ("vision_model", "text_model"):
        name = f"{tower}.encoder.layers.0.self_attn.q_proj.weight"
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-2) == 2
    norm = "vision_model.post_layernorm.weight"
    assert torch.equal(before[norm], after[norm])


def test_encoders_on_the_way_are_exported(encoder, continued):
    between = load_file(continued.parent / "wise_ft" / "0.25" / "clip" / "model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, continued))
    for name, weight in between.items():
        torch.testing.assert_close(weight, before[name].lerp(after[name], 0.25))


def test_the_way_is_measured_on_new_and_old_data_and_shown(continued):
    way = json.loads((continued.parent / "alignment.json").read_text())["way"]
    assert [point["share"] for point in way] == [0, 0.25, 1]
    for point in way:  # here both are the same data
        assert point["old/image_to_text_r1"] == point["new/image_to_text_r1"]
    assert "From the pretrained start" in (continued.parent / "report.html").read_text()


def test_forgetting_is_measured_on_the_data_that_is_named(align_config, encoder, data_root, tmp_path):
    old = collect(debug(CollectConfig, "collect", output=str(tmp_path / "old"), seed=900))
    tower = replace(align_config.tower, pretrained=str(encoder), locked=True, lora_rank=2)
    config = replace(align_config, tower=tower, forgetting=str(old), steps=1, output=str(tmp_path / "run"))
    record = json.loads((train_align(config).parent / "alignment.json").read_text())
    assert any(
        record["way"][0][f"old/{name}"] != record["way"][0][f"new/{name}"] for name in ("text_to_image_r1", "zero_shot")
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, tmp_path / "run" / "clip"))
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])  # locked
    with pytest.raises(UserError, match="not a LeRobotDataset"):  # before any step
        train_align(replace(config, forgetting=str(tmp_path / "nowhere"), output=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wise_ft": (0.5,)}, "wise_ft needs a pretrained start"),
        ({"forgetting": "somewhere"}, "forgetting needs a pretrained start"),
    ],
)
def test_what_needs_a_start_is_refused_without_one(align_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_align(replace(align_config, output=str(tmp_path / "run"), **changes))


def test_a_share_beyond_the_way_is_refused(align_config, encoder, tmp_path):
    tower = replace(align_config.tower, pretrained=str(encoder))
    with pytest.raises(UserError, match=r"wise_ft 1\.5 is not between"):
        train_align(replace(align_config, tower=tower, wise_ft=(1.5,), output=str(tmp_path / "run")))
