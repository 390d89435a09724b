"""A pretrained start: low-rank updates, interpolation with the start, and what is measured on the way."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Config, ViTConfig

from tests.conftest import ROOT, debug, small_alignment_model, without
from vla.config import AlignConfig, CollectConfig
from vla.config_io import save_yaml
from vla.data.episodes import read_episodes, split_episodes
from vla.integrations.collect import collect
from vla.models.clip import patch_tokens, vision_features
from vla.models.clip_build import build_clip
from vla.models.clip_files import load_clip, save_clip, with_vision_of
from vla.models.finetuning import add_lora, interpolated, merged
from vla.training.align import train_align
from vla.training.align_export import export_share
from vla.training.align_setup import old_data
from vla.training.optim import make_optimizers
from vla.training.pretrained import along_the_way, rate_groups, take_up
from vla.training.ranges import header_of
from vla.types import ACTION_KEY, STATE_KEY, UserError

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


def test_a_run_whose_start_has_changed_is_not_resumed(align_config, encoder, tmp_path):
    start = shutil.copytree(encoder, tmp_path / "clip")
    config = replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run"))
    config = replace(config, tower=replace(align_config.tower, pretrained=str(start)))
    train_align(config)
    (tmp_path / "run" / "report.html").unlink()  # what says that a run has finished
    weights = load_file(start / "model.safetensors")
    weights["visual_projection.weight"] += 1
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"step_000001: began from another encoder than tower\.pretrained holds now"):
        train_align(replace(config, resume=True))


def test_encoders_on_the_way_are_exported(encoder, continued):
    between = load_file(continued.parent / "wise_ft" / "0.25" / "clip" / "model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, continued))
    for name, weight in between.items():
        torch.testing.assert_close(weight, before[name].lerp(after[name], 0.25))


def test_what_the_start_brought_beside_its_encoder_goes_the_same_part_of_the_way(encoder, continued):
    between, after = (
        load_file(folder / "alignment.safetensors") for folder in (continued.parent / "wise_ft/0.25", continued.parent)
    )
    before = load_file(encoder.parent / "alignment.safetensors")
    assert between.keys() == after.keys()
    assert not torch.equal(before["pooler.queries"], after["pooler.queries"])
    for name, value in between.items():  # scales stay: they belong to the loss that they were trained with
        torch.testing.assert_close(value, after[name] if "logit" in name else before[name].lerp(after[name], 0.25))


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


def standing_still(config: AlignConfig, start: Path, output: Path, **changes) -> AlignConfig:
    """One step from a start that moves nothing."""
    optimizer = replace(config.optimizer, lr=0.0, pretrained_lr=0.0)
    tower = replace(config.tower, pretrained=str(start))
    return replace(config, tower=tower, optimizer=optimizer, steps=1, output=str(output), **changes)


def test_a_start_that_stage_one_wrote_brings_what_lies_beside_its_encoder(align_config, encoder, tmp_path, capsys):
    run = train_align(standing_still(align_config, encoder, tmp_path / "run", seed=5)).parent
    before, after = (load_file(folder / "alignment.safetensors") for folder in (encoder.parent, run))
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    out = capsys.readouterr().out
    assert "not taken up" not in out
    assert "other ranges" not in out


def test_a_start_that_knows_other_ranges_of_actions_says_so(align_config, encoder, tmp_path, capsys):
    shutil.copytree(encoder.parent, tmp_path / "start")
    path = tmp_path / "start" / "alignment.safetensors"
    (low, high), header = json.loads(header_of(path)["action"]), header_of(path)
    header["action"] = json.dumps([[2 * value for value in low], [2 * value for value in high]])
    save_file(load_file(path), path, metadata=header)
    train_align(standing_still(align_config, tmp_path / "start" / "clip", tmp_path / "run"))
    assert f"{path}: was trained where action had other ranges than in this data" in capsys.readouterr().out


def test_what_does_not_fit_is_named_and_the_rest_taken_up(align_config, encoder, tmp_path, capsys):
    run = train_align(standing_still(align_config, encoder, tmp_path / "run", horizon=align_config.horizon + 4)).parent
    assert (
        "alignment.safetensors: not taken up, as it does not fit this run: action_encoder\n" in capsys.readouterr().out
    )
    before, after = (load_file(folder / "alignment.safetensors") for folder in (encoder.parent, run))
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name.startswith("pooler."))


def test_a_fixed_temperature_stays_as_configured(align_config, encoder, tmp_path):
    loss = replace(align_config.loss, temperature=0.5, learn_temperature=False)
    run = train_align(standing_still(align_config, encoder, tmp_path / "run", loss=loss)).parent
    assert float(load_file(run / "alignment.safetensors")["logit_scales.state"].exp()) == pytest.approx(2)


def test_a_start_with_nothing_beside_it_brings_the_scale_of_its_own_loss_alone(openai_clip):
    model, _ = small_alignment_model(("a text",), layers=1)
    model.clip = load_clip(openai_clip)[0]
    take_up(model, str(openai_clip), (), print)
    scales = {name: float(model.scale(name).detach()) for name in model.logit_scales}
    assert scales.pop("vision_language") == pytest.approx(100)
    assert all(scale == pytest.approx(1 / 0.07) for scale in scales.values())


def test_a_temperature_that_is_asked_for_is_kept(openai_clip):
    model, _ = small_alignment_model(("a text",), layers=1)
    model.clip = load_clip(openai_clip)[0]
    take_up(model, str(openai_clip), ("vision_language",), print)
    assert float(model.scale("vision_language").detach()) == pytest.approx(1 / 0.07)


def test_scales_of_an_alignment_that_are_configured_or_fixed_are_not_taken_up(tmp_path):
    model, _ = small_alignment_model(("a",), 1, temperatures={"state": (0.05, True), "word_patch": (0.1, False)})
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("logit_scales.")}
    (tmp_path / "clip").mkdir()
    scales = {name: torch.full_like(value, 4.0) for name, value in before.items()}
    save_file(model.beside_clip() | scales, tmp_path / "alignment.safetensors")
    take_up(model, str(tmp_path / "clip"), ["state"], print)
    changed = {name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)}
    assert changed == {"logit_scales.context_action", "logit_scales.vision_language"}


def test_terms_that_only_the_alignment_had_are_left_out_and_named(tmp_path):
    before, _ = small_alignment_model(("a",), 1, transitions=True, sigmoid=True)
    (tmp_path / "clip").mkdir()
    save_file(before.beside_clip(), tmp_path / "alignment.safetensors")
    model, _ = small_alignment_model(("a",), 1)
    told = []
    take_up(model, str(tmp_path / "clip"), (), told.append)
    assert torch.equal(
        model.beside_clip()["action_projection.layers.1.weight"],
        before.beside_clip()["action_projection.layers.1.weight"],
    )
    names = "logit_scales.transition_action, logit_scales.transition_language, logit_scales.vision_language, transition_projection"
    assert told == [f"{tmp_path}/alignment.safetensors: not taken up, as it does not fit this run: {names}"]


def test_a_sigmoid_loss_does_not_start_from_a_softmaxs_scale(openai_clip):
    model, _ = small_alignment_model(("a text",), layers=1, sigmoid=True)
    model.clip = load_clip(openai_clip)[0]
    take_up(model, str(openai_clip), (), print)
    assert float(model.scale("vision_language").detach()) == pytest.approx(1 / 0.07)


def test_low_rank_updates_have_a_tenth_of_the_rate_and_pretrained_projections_their_own(align_config):
    model, _ = small_alignment_model(("a text",), layers=1)
    add_lora(model.clip, 2)
    tower = replace(align_config.tower, pretrained="somewhere", lora_rank=2)
    groups = make_optimizers(rate_groups(model, replace(align_config, tower=tower)), 0.0, "no").param_groups
    name_of = {id(p): name for name, p in model.named_parameters()}
    rates = {name_of[id(p)]: g["peak_lr"] for g in groups for p in g["params"]}
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(set(rates.values())) == 3
    for name, rate in rates.items():
        projection, update = name.endswith("_projection.weight"), ".lora_" in name
        optimizer = align_config.optimizer
        assert rate == (optimizer.pretrained_lr if projection else optimizer.lr / 10 if update else optimizer.lr)


def test_a_rate_by_layer_is_refused_where_layers_keep_their_weights(align_config, encoder, tmp_path):
    tower = replace(align_config.tower, pretrained=str(encoder), lora_rank=2)
    optimizer = replace(align_config.optimizer, layer_decay=0.5)
    with pytest.raises(UserError, match=r"config error: optimizer\.layer_decay: tower\.lora_rank leaves"):
        train_align(replace(align_config, tower=tower, optimizer=optimizer, output=str(tmp_path / "run")))


def start_of(encoder: Path, folder: Path, config: AlignConfig) -> Path:
    """The encoder as a run of another configuration would have written it."""
    shutil.copytree(encoder, folder / "clip")
    shutil.copy(encoder.parent / "alignment.safetensors", folder)
    save_yaml(config, folder / "config.yaml")
    return folder / "clip"


def forgetting(config: AlignConfig, start: Path, root: Path) -> AlignConfig:
    return replace(config, tower=replace(config.tower, pretrained=str(start)), forgetting=str(root))


def of_other_data(config: AlignConfig) -> AlignConfig:
    return replace(config, data=replace(config.data, root="elsewhere"))


@pytest.mark.parametrize("where", ["run", "run/wise_ft/0.5"])
def test_old_episodes_are_those_that_the_start_held_out(align_config, encoder, data_root, tmp_path, where):
    before = replace(align_config, seed=11, data=replace(align_config.data, holdout=0.5))
    start = start_of(encoder, tmp_path / where, before)
    save_yaml(before, tmp_path / "run" / "config.yaml")
    old = old_data(forgetting(of_other_data(align_config), start, data_root))["old"].positions
    episodes = read_episodes(data_root)
    assert old.tolist() == split_episodes(episodes, 0.5, 11)[1].tolist()
    assert old.tolist() != split_episodes(episodes, align_config.data.holdout, align_config.seed)[1].tolist()


def test_old_episodes_are_split_as_the_new_ones_where_the_start_has_no_run(align_config, openai_clip, data_root):
    old = old_data(forgetting(align_config, openai_clip, data_root))
    expected = split_episodes(read_episodes(data_root), align_config.data.holdout, align_config.seed)[1]
    assert old.keys() == {"old"}
    assert old["old"].positions.tolist() == expected.tolist()


def test_old_data_that_the_start_trained_on_whole_is_refused(align_config, encoder, data_root, tmp_path):
    before = replace(align_config, more=(f"{data_root}=0.5",))
    start = start_of(encoder, tmp_path / "run", before)
    with pytest.raises(UserError, match=r"config error: forgetting: .* was trained on all of"):
        old_data(forgetting(align_config, start, data_root))


def test_old_data_that_this_run_trains_on_whole_is_refused(align_config, openai_clip, data_root):
    rehearsing = replace(align_config, more=(f"{data_root}=0.5",))
    with pytest.raises(UserError, match=r"config error: forgetting: `more` trains on all of"):
        old_data(forgetting(rehearsing, openai_clip, data_root))


def test_old_data_that_this_run_splits_otherwise_is_refused(align_config, encoder, data_root, tmp_path):
    start = start_of(encoder, tmp_path / "run", replace(align_config, seed=11))
    with pytest.raises(UserError, match=r"trains on what the start held out of .*--seed=11"):
        old_data(forgetting(align_config, start, data_root))


def test_old_data_may_be_pictures_and_texts_alone(align_config, encoder, data_root, tmp_path):
    captions = without(data_root, tmp_path / "captions", ACTION_KEY, STATE_KEY)
    start = start_of(encoder, tmp_path / "start", align_config)
    config = replace(forgetting(align_config, start, captions), steps=1, output=str(tmp_path / "run"))
    train_align(config)
    way = json.loads((tmp_path / "run" / "alignment.json").read_text())["way"]
    assert all(0 <= share["old/text_to_image_r1"] <= 1 for share in way)


def test_old_data_may_call_its_camera_otherwise(align_config, openai_clip, data_root):
    config = replace(align_config, data=replace(align_config.data, camera="observation.images.front"))
    source = old_data(forgetting(config, openai_clip, data_root))["old"].source
    assert source.episodes.camera == "observation.image"


def test_goals_that_the_start_never_trained_on_are_measured_apart(align_config, encoder, data_root, tmp_path):
    before = replace(align_config, data=replace(align_config.data, holdout=0.8))
    start = start_of(encoder, tmp_path / "run", before)
    old = old_data(forgetting(of_other_data(align_config), start, data_root))
    goals = read_episodes(data_root).goal_id
    train, _ = split_episodes(read_episodes(data_root), 0.8, before.seed)
    assert len(old["old_goals"].positions)
    assert not np.isin(goals[old["old_goals"].positions], goals[train]).any()


def test_a_clip_as_openai_published_theirs_is_aligned_at_another_image_size(align_config, openai_clip, tmp_path):
    tower = replace(align_config.tower, pretrained=str(openai_clip))
    folder = train_align(replace(align_config, tower=tower, steps=2, output=str(tmp_path / "run")))
    clip, _ = load_clip(folder)
    assert clip.config.vision_config.image_size == align_config.data.image_size
    assert clip.config.text_config.eos_token_id == 2  # texts are still pooled as they were
    before = load_clip(openai_clip)[0]
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert 0 < (clip.state_dict()[name] - before.state_dict()[name]).abs().max() < 1e-3


def test_a_share_of_the_way_from_a_start_that_has_changed_is_refused(align_config, encoder, tmp_path):
    start = Path(shutil.copytree(encoder.parent, tmp_path / "start")) / "clip"
    tower = replace(align_config.tower, pretrained=str(start))
    config = replace(align_config, tower=tower, steps=1, output=str(tmp_path / "run"))
    train_align(config)
    export_share(config, 0.5)
    shared = tmp_path / "run" / "wise_ft" / "0.5"
    assert (shared / "clip" / "model.safetensors").is_file()
    assert header_of(shared / "alignment.safetensors") == header_of(tmp_path / "run" / "alignment.safetensors")
    half, before, after = (
        load_file(folder / "alignment.safetensors") for folder in (shared, start.parent, tmp_path / "run")
    )
    torch.testing.assert_close(half["pooler.queries"], before["pooler.queries"].lerp(after["pooler.queries"], 0.5))
    weights = load_file(start / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"start/clip: has changed since .*run began from it"):
        export_share(config, 0.25)


def test_a_hub_id_is_read_from_the_hubs_cache_without_a_network(openai_clip, tmp_path):
    model = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(openai_clip, model / "snapshots" / "0123abcd")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    code = "from vla.models.clip_files import load_clip; print(load_clip('somebody/{}')[0].config.projection_dim)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def load(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code.format(name)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert load("tiny").stdout.strip() == "16"
    assert "it was looked up on the hub, which HF_HUB_OFFLINE=1 forbids" in load("absent").stderr


@pytest.mark.parametrize("kind", [Dinov2Config, ViTConfig])
def test_a_vision_transformer_with_a_text_tower_is_aligned(align_config, encoder, tmp_path, kind):
    sizes = {"image_size": 48, "patch_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(kind(**sizes)).save_pretrained(tmp_path / "vision")
    clip, tokenizer = load_clip(encoder)
    save_clip(tmp_path / "pair", with_vision_of(tmp_path / "vision", clip, 48), tokenizer)
    tower = replace(align_config.tower, pretrained=str(tmp_path / "pair"))
    optimizer = replace(align_config.optimizer, layer_decay=0.5)
    config = replace(align_config, tower=tower, optimizer=optimizer, wise_ft=(0.5,), output=str(tmp_path / "run"))
    load_clip(train_align(replace(config, steps=2)))  # complete, or it is refused


@pytest.mark.parametrize("kind", [Dinov2Config, ViTConfig])
def test_pictures_are_aligned_by_what_transformers_takes_for_their_embedding(encoder, tmp_path, kind):
    sizes = {"image_size": 48, "patch_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(kind(**sizes)).save_pretrained(tmp_path / "vision")
    model = with_vision_of(tmp_path / "vision", load_clip(encoder)[0], 48).eval()
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        embeds = model.visual_projection(vision_features(model, pixels)[1])
        torch.testing.assert_close(embeds, model.get_image_features(pixel_values=pixels).pooler_output)


def test_each_share_is_measured_with_its_own_weights(clip):
    class Mean:
        def measures(self, encoder, tokenizer):
            return {"mean": encoder.visual_projection.weight.mean().item()}

    start = {name: torch.zeros_like(value) for name, value in clip.state_dict().items()}
    way = along_the_way(start, clip, None, (0.0, 0.5, 1.0), {"new": Mean()})
    whole = clip.visual_projection.weight.mean().item()
    assert [point["new/mean"] for point in way] == pytest.approx([0, whole / 2, whole])
