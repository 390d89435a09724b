"""The stage-one model: shared pictures, scales, what the exported CLIP holds."""

import math

import pytest
import torch

from tests.conftest import small_alignment_model
from vla.models.alignment import MAX_LOGIT_SCALE, unit
from vla.models.clip import tokenize, vision_features

TEXTS = ("push the red star left", "reach the blue circle", "pick up the green cross")


@pytest.fixture
def model():
    model, tokenizer = small_alignment_model(TEXTS, layers=1)
    return model.eval(), tokenize(tokenizer, TEXTS)


def test_a_shared_picture_embeds_like_its_copies(model):
    model, (ids, mask) = model
    pixels = torch.randn(2, 3, 24, 24)
    frame_of_row = torch.tensor([0, 1, 0])
    rows = (torch.tensor([0, 1, 2]), torch.randn(3, 4, 3), torch.zeros(3, 4, dtype=torch.bool), None)
    texts = model.texts(ids, mask)
    shared = model.rows(texts, mask, pixels, frame_of_row, *rows)
    copied = model.rows(texts, mask, pixels[frame_of_row], torch.arange(3), *rows)
    torch.testing.assert_close(shared.context, copied.context)
    torch.testing.assert_close(shared.vision[frame_of_row], copied.vision)


def test_texts_of_a_batch_are_embedded_in_multiples(model):
    model, (ids, mask) = model
    sizes = []
    model.clip.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert len(model.texts(ids, mask).words) == 3
    assert sizes == [16]


def test_images_of_a_batch_are_embedded_in_multiples(model):
    model, (ids, mask) = model
    sizes = []
    model.clip.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    pixels, rows = torch.rand(9, 3, 48, 48), torch.arange(3)
    embeds = model.rows(model.texts(ids, mask), mask, pixels, rows, rows, None, None, None, acted=False)
    assert (len(embeds.vision), sizes) == (9, [16])
    alone = torch.cat([vision_features(model.clip, pixel[None])[1] for pixel in pixels])
    torch.testing.assert_close(embeds.vision, unit(model.clip.visual_projection(alone)))


def test_scales_start_at_the_temperature_and_stop_at_a_hundred(model):
    model, _ = model
    assert model.scale("word_patch").item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scales["word_patch"].fill_(9.0)
    model.clamp_scales()
    assert model.logit_scales["word_patch"].item() == pytest.approx(MAX_LOGIT_SCALE)
    assert model.scale("word_patch").item() == pytest.approx(100.0)


def test_the_exported_clip_holds_the_trained_scale(model):
    model, _ = model
    with torch.no_grad():
        model.logit_scales["vision_language"].fill_(math.log(33.0))
    assert model.exported_clip().logit_scale.exp().item() == pytest.approx(33.0)


def test_the_words_get_a_share_of_the_context_gradient(model):
    model, (ids, mask) = model
    table = model.clip.text_model.embeddings.token_embedding.weight
    rows = (torch.tensor([0, 1, 2]), torch.randn(3, 4, 3), torch.zeros(3, 4, dtype=torch.bool), None)
    pixels = torch.randn(3, 3, 24, 24)

    def gradient(share: float) -> torch.Tensor:
        texts = model.texts(ids, mask)
        embeds = model.rows(texts, mask, pixels, torch.arange(3), *rows, text_gradient=share)
        return torch.autograd.grad(embeds.context[:, 0].sum(), table)[0]

    torch.testing.assert_close(gradient(0.1), 0.1 * gradient(1.0))


def test_padding_of_the_texts_changes_no_context(model):
    model, (ids, mask) = model
    index, pad = torch.arange(3), torch.nn.functional.pad
    rest = (torch.randn(3, 3, 24, 24), index, index, torch.randn(3, 4, 3), torch.zeros(3, 4, dtype=torch.bool), None)
    short, long = (
        model.rows(model.texts(tokens, kept), kept, *rest).context
        for tokens, kept in ((ids, mask), (pad(ids, (0, 4)), pad(mask, (0, 4))))
    )
    torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-4)
