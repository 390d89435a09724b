"""What the vision and language encoders give: a native transformers `CLIPModel`, or a vision transformer that knows no language (DINOv2,
ViT) paired with a text tower as a `VisionTextDualEncoderModel`, which has the same parts; what is said of a CLIP model here holds for it, too.

Everything downstream reads one fixed tap: the *layer-normed last-layer patch tokens* (`patch_tokens`) and the final-layer-normed word tokens
(`text_features`). `clip_build.py` makes fresh encoders, `clip_files.py` loads, adapts and writes them.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderModel,
)

from vla.losses.contrastive import unit
from vla.models.lexicon import MAX_TEXT_TOKENS

# ImageNet statistics: the ones LeRobot's policies normalise with by default.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
IMAGES, TEXTS = 8, 16  # a batch's images and texts are embedded in multiples of them
WORDS = 4  # the tokens that a batch's texts are cut to are a multiple of it
Encoder = CLIPModel | VisionTextDualEncoderModel


def text_transformer(model: Encoder) -> nn.Module:
    """CLIP's text tower, which is wrapped where it is one of two models."""
    return model.text_model if isinstance(model, CLIPModel) else model.text_model.text_model


def pixel_values(frames: Tensor) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32, ImageNet-normalised."""
    mean = torch.tensor(IMAGE_MEAN, device=frames.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=frames.device).view(3, 1, 1)
    return rearrange(frames, "b h w c -> b c h w").contiguous().float().sub_(255 * mean).div_(255 * std)


def vision_features(model: Encoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 3, H, W) -> patch tokens (b, n, w), layer-normed, and the pooled feature (b, w) before the projection.

    Pictures of another size than the encoder's are resized.
    """
    vision = model.config.vision_config
    if pixels.shape[-2:] != (vision.image_size, vision.image_size):
        size = (vision.image_size, vision.image_size)
        pixels = nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    output = model.vision_model(pixel_values=pixels)
    if isinstance(model, CLIPModel):
        return model.vision_model.post_layernorm(output.last_hidden_state[:, 1:]), output.pooler_output
    patches = (vision.image_size // vision.patch_size) ** 2  # they come last, behind class and register tokens
    return output.last_hidden_state[:, -patches:], output.pooler_output


def patch_tokens(model: Encoder, pixels: Tensor) -> Tensor:
    """(b, 3, H, W) -> (b, n, w): the layer-normed last-layer patch tokens, row by row from the top left."""
    return vision_features(model, pixels)[0]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts -> input ids (b, n) and attention mask (b, n) int64, padded to the longest, truncated to 77 or what the tower reads."""
    encoded = tokenizer(
        list(texts), padding="longest", truncation=True, max_length=most_tokens(tokenizer), return_tensors="pt"
    )
    return encoded["input_ids"], encoded["attention_mask"]


def most_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Of a text: what the tower reads, at most 77."""
    return min(MAX_TEXT_TOKENS, tokenizer.model_max_length)


def note_of_cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str:
    """A note if `tokenize` cuts texts; empty if it does not."""
    most = most_tokens(tokenizer)
    cut = sum(len(ids) > most for ids in tokenizer(list(texts), verbose=False)["input_ids"])
    return f"{cut} of {len(texts)} instructions have more than {most} tokens; what is beyond is not read" if cut else ""


def text_features(model: Encoder, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(b, n) ids -> word tokens (b, n, w), final-layer-normed, and the pooled feature (b, w) before the projection."""
    output = model.text_model(input_ids=input_ids, attention_mask=attention_mask)
    return output.last_hidden_state, output.pooler_output


def in_multiples(multiple: int, embed: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `embed` makes of the inputs, row by row, computed for a multiple of rows: their number changes from step to step.

    A kernel is compiled for every shape; those of ever new shapes push each other out and leave memory in pieces, which slows every allocation.
    """
    n = len(inputs[0])
    rows = torch.arange(n + -n % multiple, device=inputs[0].device).clamp(max=n - 1)  # the last one again and again
    made = embed(*inputs) if len(rows) == n else embed(*(x.index_select(0, rows) for x in inputs))
    return tuple(x[:n] for x in made)


def patch_embeds(model: Encoder, tokens: Tensor) -> Tensor:
    """(b, n, w) patch tokens -> (b, n, d) in the joint space, unit norm, float32."""
    return unit(model.visual_projection(tokens))


def word_embeds(model: Encoder, words: Tensor) -> Tensor:
    """(u, l, w) word tokens -> (u, l, d) in the joint space, unit norm, float32."""
    return unit(model.text_projection(words))
