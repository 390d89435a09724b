"""The aligned encoder is a native CLIPModel folder."""

import json
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.utils import logging

from vla.data.decoding import resize
from vla.models.clip import (
    IMAGE_MEAN,
    in_multiples,
    most_tokens,
    note_of_cut,
    patch_tokens,
    pixel_values,
    text_features,
    tokenize,
    vision_features,
)
from vla.models.clip import TEXTS as TEXTS_AT_ONCE
from vla.models.clip_build import build_clip, sdpa_or_matmul
from vla.models.clip_files import load_clip, resize_positions, resized_grid, save_clip, untrained, with_vision_of
from vla.types import UserError

TEXTS = ("push the red star to the left", "pick up the blue cross")
SIZES = {
    "image_size": 48,
    "patch_size": 12,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 2,
    "embed_dim": 16,
    "vocab_size": 600,
}


@pytest.fixture
def frames():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = build_clip(TEXTS, **SIZES)
    save_clip(tmp_path / "clip", model, tokenizer)
    return tmp_path / "clip", model.eval(), tokenizer


def test_plain_transformers_reproduces_the_features_exactly_and_without_a_warning(saved, frames, capfd):
    folder, model, tokenizer = saved
    logging.set_verbosity_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "newly initialized" not in capfd.readouterr().err
    ids, mask = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        pixels = pixel_values(frames)
        assert torch.equal(patch_tokens(loaded.eval(), pixels), patch_tokens(model, pixels))
        assert torch.equal(text_features(loaded, ids, mask)[1], text_features(model, ids, mask)[1])


def test_each_tower_loads_alone(saved, frames):
    folder, model, tokenizer = saved
    vision, text = CLIPVisionModel.from_pretrained(folder).eval(), CLIPTextModel.from_pretrained(folder).eval()
    ids, mask = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        pixels = pixel_values(frames)
        assert torch.equal(vision(pixels).pooler_output, vision_features(model, pixels)[1])
        assert torch.equal(text(ids, attention_mask=mask).pooler_output, text_features(model, ids, mask)[1])


def test_the_saved_processor_prepares_pictures_and_texts_as_training_does(saved, frames):
    folder, _, tokenizer = saved
    processed = AutoProcessor.from_pretrained(folder)(
        text=list(TEXTS), images=[f.numpy() for f in frames[:2]], padding=True, return_tensors="pt"
    )
    torch.testing.assert_close(processed["pixel_values"], pixel_values(frames[:2]), atol=1e-5, rtol=1e-5)
    assert torch.equal(processed["input_ids"], tokenize(tokenizer, TEXTS)[0])


def test_the_saved_processor_resizes_as_training_does(saved):
    folder, *_ = saved
    camera = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    processor = AutoProcessor.from_pretrained(folder).image_processor
    side = processor.size["height"]
    expected = pixel_values(torch.from_numpy(resize(camera, side))[None])
    for image in (Image.fromarray(camera), camera):
        processed = processor(images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(processed, expected, atol=1.5 / 255 / 0.224, rtol=0)  # 8-bit rounding
    floats = torch.from_numpy(camera).permute(2, 0, 1) / 255  # as LeRobot gives them
    processed = processor(images=[floats], do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, expected, atol=1.5 / 255 / 0.224, rtol=0)


def test_the_image_processor_is_where_older_transformers_look_for_it(saved, frames):
    folder, *_ = saved
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == list(IMAGE_MEAN)
    assert settings["size"] == {"height": frames.shape[1], "width": frames.shape[2]}


@pytest.mark.parametrize("count", [1, 3, TEXTS_AT_ONCE, TEXTS_AT_ONCE + 1])
def test_texts_of_a_batch_have_the_features_and_gradients_they_have_alone(saved, count):
    _, model, tokenizer = saved
    texts = tuple(f"{TEXTS[i % len(TEXTS)]} {'again ' * (i // len(TEXTS))}" for i in range(count))
    ids, mask = tokenize(tokenizer, texts)
    sizes = []
    model.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    alone_features = partial(text_features, model)

    def gradient(features):
        words, pooled = features(ids, mask)
        weight = next(model.text_model.parameters())
        (found,) = torch.autograd.grad((words * mask[..., None]).square().sum() + pooled.sum(), weight)
        return words.detach(), pooled.detach(), found

    for alone, together in zip(
        gradient(alone_features), gradient(partial(in_multiples, TEXTS_AT_ONCE, alone_features)), strict=True
    ):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert sizes == [count, -(-count // TEXTS_AT_ONCE) * TEXTS_AT_ONCE]


def test_the_saved_tokenizer_is_the_trained_one(saved):
    folder, _, tokenizer = saved
    text = "grasp the ünknown thing"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_text_is_pooled_at_its_own_end_whatever_the_padding(saved):
    _, model, tokenizer = saved
    alone, padded = tokenize(tokenizer, TEXTS[:1]), tokenize(tokenizer, (TEXTS[0], TEXTS[0] + " and then stop"))
    with torch.no_grad():
        a, b = text_features(model, *alone)[1][0], text_features(model, *padded)[1][0]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_pooled_output_gives_the_last_patch_tokens_no_gradient_and_the_tap_does(saved, frames):
    _, model, _ = saved
    output = model.vision_model(pixel_values=pixel_values(frames))
    output.last_hidden_state.retain_grad()
    output.pooler_output.sum().backward()
    assert output.last_hidden_state.grad[:, 1:].abs().max() == 0
    weight = model.vision_model.encoder.layers[-1].mlp.fc2.weight
    model.zero_grad()
    (patch_tokens(model, pixel_values(frames)) ** 3).sum().backward()
    assert weight.grad.abs().max() > 0


def test_a_folder_with_missing_weights_is_refused(saved):
    folder, _, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys in the weights \(visual_projection\.weight\)"):
        load_clip(folder)


def test_a_folder_without_its_tokenizer_is_refused(saved):
    folder, _, _ = saved
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer in it \(tokenizer\.json\)"):
        load_clip(folder)


def published(folder, frames):
    """The patch tokens that transformers' own processor and model give pictures of the model's size."""
    model = CLIPModel.from_pretrained(folder).eval().vision_model
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=[f.numpy() for f in frames], return_tensors="pt")
    return model.post_layernorm(model(pixels["pixel_values"]).last_hidden_state[:, 1:])


@torch.no_grad()
def test_a_model_of_other_image_statistics_sees_what_its_own_processor_shows_it(openai_clip, frames):
    pictures = frames[:, :32, :32]
    ours = patch_tokens(load_clip(openai_clip)[0].eval(), pixel_values(pictures))
    torch.testing.assert_close(ours, published(openai_clip, pictures), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_saved_model_of_other_image_statistics_sees_the_same_by_its_own_processor(openai_clip, frames, tmp_path):
    pictures = frames[:, :32, :32]
    save_clip(tmp_path / "clip", *load_clip(openai_clip))
    torch.testing.assert_close(
        published(tmp_path / "clip", pictures), published(openai_clip, pictures), atol=1e-5, rtol=1e-5
    )
    again = patch_tokens(load_clip(tmp_path / "clip")[0].eval(), pixel_values(pictures))
    torch.testing.assert_close(again, published(openai_clip, pictures), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_folder_without_an_image_processor_says_which_statistics_are_taken_for_its_own(openai_clip, tmp_path, capsys):
    shutil.copytree(openai_clip, tmp_path / "clip")
    load_clip(tmp_path / "clip")
    assert "no image processor" not in capsys.readouterr().out
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    load_clip(tmp_path / "clip")
    assert "no image processor is at hand; pictures are normalised by ImageNet's statistics" in capsys.readouterr().out


def test_image_statistics_are_absorbed_at_another_image_size_too(openai_clip, frames):
    model = resize_positions(CLIPModel.from_pretrained(openai_clip), 48).eval()
    processor = CLIPImageProcessor.from_pretrained(openai_clip)
    pixels = processor(images=[f.numpy() for f in frames], do_resize=False, do_center_crop=False, return_tensors="pt")
    ours = resize_positions(load_clip(openai_clip)[0], 48).eval()
    expected = patch_tokens(model, pixels["pixel_values"])
    torch.testing.assert_close(patch_tokens(ours, pixel_values(frames)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(180, 240), (31, 40)], ids=["shrunk", "enlarged"])
def test_pictures_are_stored_as_the_encoder_resizes_those_of_another_size(saved, shape):
    pictures = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    model, seen = saved[1], []
    model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    stored = np.stack([resize(picture, 48) for picture in pictures])
    for frames in (pictures, stored):
        vision_features(model, pixel_values(torch.from_numpy(frames)))
    level = 1 / (255 * 0.224)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1.01 * level)


def test_a_folder_without_an_image_processor_is_one_of_imagenet_statistics(saved):
    folder, model, _ = saved
    (folder / "processor_config.json").unlink()
    weight = load_clip(folder)[0].vision_model.embeddings.patch_embedding.weight
    assert torch.equal(weight, model.vision_model.embeddings.patch_embedding.weight)


def test_a_model_of_another_family_is_refused_with_those_that_work(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": 32}, vision_config=sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a siglip model; encoders are CLIP .* DINOv2 or ViT"):
        load_clip(tmp_path)


def test_a_missing_folder_names_the_command_that_makes_one():
    with pytest.raises(UserError, match=r"no such encoder folder; run `python scripts/train_align\.py`"):
        load_clip("outputs/nowhere/clip")


@pytest.fixture
def dinov2(tmp_path):
    """A small vision transformer in DINOv2's format, for pictures of 70 px in patches of 14."""
    torch.manual_seed(1)
    sizes = {"image_size": 70, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2", model


def test_weights_that_would_have_to_be_unpickled_are_refused(saved, dinov2):
    (clip_folder, clip, _), (vision_folder, _) = saved, dinov2
    for folder, load in ((clip_folder, load_clip), (vision_folder, lambda folder: with_vision_of(folder, clip, 70))):
        weights = folder / "model.safetensors"
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
        with pytest.raises(UserError, match=r"cannot load .*model\.safetensors"):
            load(folder)


def test_a_vision_model_of_others_is_read_as_it_is_and_gets_the_text_tower(saved, dinov2, tmp_path):
    _, clip, tokenizer = saved
    folder, vision = dinov2
    save_clip(tmp_path / "pair" / "clip", with_vision_of(folder, clip, 70), tokenizer)
    loaded, _ = load_clip(tmp_path / "pair" / "clip")
    pixels = torch.randn(2, 3, 70, 70)
    ids, mask = tokenize(tokenizer, TEXTS)
    with torch.no_grad():
        assert torch.allclose(patch_tokens(loaded.eval(), pixels), vision(pixels).last_hidden_state[:, 1:], atol=1e-6)
        assert torch.allclose(text_features(loaded, ids, mask)[1], text_features(clip, ids, mask)[1], atol=1e-6)


@torch.no_grad()
def test_a_vision_model_of_other_image_statistics_sees_what_its_own_processor_shows_it(saved, dinov2):
    _, clip, _ = saved
    folder, vision = dinov2
    processor = CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False, do_center_crop=False)
    processor.save_pretrained(folder)
    frames = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 70, 70, 3), dtype=np.uint8))
    expected = vision(processor(images=[f.numpy() for f in frames], return_tensors="pt")["pixel_values"])
    ours = patch_tokens(with_vision_of(folder, clip, 70).eval(), pixel_values(frames))
    torch.testing.assert_close(ours, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=1e-5)


def test_pictures_that_a_vision_models_patches_do_not_divide_are_scaled_up(saved, dinov2):
    pair = with_vision_of(dinov2[0], saved[1], 48)
    assert pair.config.vision_config.image_size == 56
    assert patch_tokens(pair, torch.zeros(1, 3, 48, 48)).shape == (1, 16, 24)
    assert resize_positions(pair, 48) is pair


def test_what_is_no_vision_transformer_is_refused(saved):
    with pytest.raises(UserError, match="a CLIPModel is not a vision transformer like DINOv2 or ViT"):
        with_vision_of(saved[0], saved[1], 48)


def test_another_image_size_keeps_what_a_patch_is(saved):
    _, model, _ = saved
    resized = resize_positions(model, 96)
    tokens = patch_tokens(resized, torch.zeros(1, 3, 96, 96))
    assert tokens.shape == (1, 64, 32)


@pytest.mark.parametrize("texts", [("go left", "push the red star to the left"), ("go left", "go right")])
def test_attention_in_bfloat16_computes_what_the_fused_kernel_does(texts):
    torch.manual_seed(0)
    clip, tokenizer = build_clip(TEXTS, **SIZES)
    ids, mask = tokenize(tokenizer, texts)
    exact = text_features(clip, ids, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quick = text_features(clip, ids, mask)[0]
    torch.testing.assert_close(quick.float()[mask.bool()], exact[mask.bool()], atol=0.06, rtol=0)


def test_an_untrained_twin_has_the_sizes_and_other_weights(saved):
    _, model, _ = saved
    torch.manual_seed(5)
    twin = untrained(model)
    assert type(twin) is type(model)
    ours, theirs = model.state_dict(), twin.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not ours[name].equal(theirs[name])


def test_texts_that_are_cut_are_counted(encoder):
    _, tokenizer = load_clip(encoder)
    most = most_tokens(tokenizer)
    assert f"1 of 2 instructions have more than {most} tokens" in note_of_cut(tokenizer, ["push it", "push it " * 80])
    assert note_of_cut(tokenizer, ["push it"]) == ""


def test_texts_are_cut_to_what_the_tower_reads(encoder):
    clip, tokenizer = load_clip(encoder)
    assert tokenizer.model_max_length == clip.config.text_config.max_position_embeddings
    tokenizer.model_max_length = 5
    assert tokenize(tokenizer, ["push the red star to the left and then up"])[0].shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_drops_weights_in_any_precision(dtype):
    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 4).to(dtype)
    plain, dropped = (
        sdpa_or_matmul(torch.nn.Module(), query, query, query, None, 0.5, dropout=p)[0] for p in (0.0, 0.5)
    )
    assert not torch.allclose(plain, dropped)


def test_resized_positions_keep_rows_and_columns():
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None]
    resized = resized_grid(torch.cat([torch.full((1, 1), 9.0), ramp]), 4, 8)
    grid = resized[1:, 0].view(8, 8)
    assert resized[0] == 9
    assert grid[0, 0] < grid[7, 0]
    torch.testing.assert_close(grid, grid[:, :1].expand(-1, 8))
