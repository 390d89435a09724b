"""Encoders in folders and on hubs: loaded, adapted to an image size or to other pictures' statistics, put together from parts, written."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ImageProcessingMixin,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.image_utils import PILImageResampling

from vla.models.clip import IMAGE_MEAN, IMAGE_STD, Encoder, text_transformer
from vla.models.clip_build import fix_words, quick_attention
from vla.types import UserError, first_line

FAMILIES = (
    "CLIP (OpenAI's, OpenCLIP's in transformers' format), or a VisionTextDualEncoder of DINOv2 or ViT and a text tower"
)


def load_clip(source: str | Path) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """A CLIP model and its tokenizer from a local folder, or from the hub if `source` is not a folder.

    The model takes pictures as `pixel_values` makes them, whatever the statistics of its own image processor.

    Raises:
        UserError: not a CLIPModel folder, absent or surplus weights, unreadable files.
    """
    folder = Path(source)
    local = folder.is_dir()
    hub_id = len(folder.parts) <= 2 and folder.name != "clip" and not str(source).startswith((".", "~", "/"))
    if not local and not hub_id:
        raise UserError(f"{source}: no such encoder folder; run `python scripts/train_align.py` to make one")
    if (folder / "clip" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{source}: not an encoder folder; did you mean {folder / 'clip'}?")
    try:
        kind, config = encoder_class(source)
        model, report = kind.from_pretrained(
            source, config=config, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
        tokenizer = load_tokenizer(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        forbidden = ", which HF_HUB_OFFLINE=1 forbids" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        hint = "" if local else f" (no such folder, so it was looked up on the hub{forbidden})"
        raise UserError(f"{source}: cannot load a CLIP model{hint}: {first_line(error)}") from error
    buffers = {
        name for name, _ in model.named_buffers()
    }  # position ids, which CLIP's published weights have among them
    report["unexpected_keys"] = set(report["unexpected_keys"]) - buffers
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            some = ", ".join(sorted(str(key) for key in report[kind])[:3])
            raise UserError(f"{source}: {kind.replace('_', ' ')} in the weights ({some}); not a complete CLIPModel")
    if not isinstance(model, CLIPModel):
        refuse_other_vision(source, model.vision_model)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    fix_words(model)
    absorb_statistics(model, *image_statistics(source))
    return quick_attention(model), tokenizer


def load_clip_at(
    source: str | Path, image_size: int, flag: str | None = None
) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """`load_clip` adapted to an image size; with `flag` it says so, and which flag keeps the encoder's own size."""
    clip, tokenizer = load_clip(source)
    own = clip.config.vision_config.image_size
    if flag and own != image_size:
        print(f"{source}: trained on pictures of {own} px, adapted to {image_size}; {flag}={own} keeps them")
    return resize_positions(clip, image_size), tokenizer


def save_clip(folder: Path, model: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a folder that CLIPModel, CLIPVisionModel, CLIPTextModel, AutoModel and AutoProcessor load."""
    model.save_pretrained(folder)
    side = model.config.vision_config.image_size
    image_processor = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        resample=PILImageResampling.BILINEAR,  # as training resizes
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)  # where transformers before version 5 looks for it


def encoder_class(source: str | Path) -> tuple[type[Encoder], CLIPConfig | VisionTextDualEncoderConfig]:
    """The class and configuration of an encoder folder or hub id.

    Raises:
        UserError: a model of another family.
    """
    family = AutoConfig.from_pretrained(source).model_type
    if family == VisionTextDualEncoderConfig.model_type:
        return VisionTextDualEncoderModel, VisionTextDualEncoderConfig.from_pretrained(source)
    if family != CLIPConfig.model_type:
        raise UserError(f"{source}: a {family} model; encoders are {FAMILIES}")
    return CLIPModel, CLIPConfig.from_pretrained(source)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        OSError, ValueError: there is none, or an incomplete one, of which transformers makes one that knows no word.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if len(tokenizer) < 256:
        raise ValueError("no tokenizer in it (tokenizer.json); copy the folder anew, whole")
    return tokenizer


def image_statistics(source: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std that the image processor of a folder or hub id normalises with; ImageNet's if it has none."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        print(f"{source}: no image processor is at hand; pictures are normalised by ImageNet's statistics")
        return IMAGE_MEAN, IMAGE_STD
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return processor.get("image_mean") or IMAGE_MEAN, processor.get("image_std") or IMAGE_STD


@torch.no_grad()
def absorb_statistics(model: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
    """Change the patch embedding in place so that pictures normalised by ImageNet's statistics give what others gave.

    A convolution of (x - mean) / std is one of (x - IMAGE_MEAN) / IMAGE_STD with rescaled weights plus a constant. The constant
    is the same for every patch, as patches neither overlap nor reach beyond the picture; CLIP's convolution has no bias, so
    its position embeddings of the patches take it up.

    Args:
        mean, std: (3,) the statistics of the pictures that the model was trained on, in [0, 1].
    """
    if (tuple(mean), tuple(std)) == (IMAGE_MEAN, IMAGE_STD):
        return
    embeddings = model.vision_model.embeddings
    patches = embeddings.patch_embedding if isinstance(model, CLIPModel) else embeddings.patch_embeddings.projection
    own_mean, own_std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std, IMAGE_MEAN, IMAGE_STD)
    )
    weight = patches.weight.double()  # (w, 3, p, p)
    constant = (weight * (new_mean - own_mean) / own_std).sum((1, 2, 3))  # (w,)
    patches.weight.copy_(weight * new_std / own_std)
    if patches.bias is not None:
        patches.bias += constant
    else:
        embeddings.position_embedding.weight[1:] += constant


def resize_positions[E: Encoder](model: E, image_size: int) -> E:
    """Adapt the vision tower in place to another image size by bicubic interpolation of its position embeddings."""
    vision = model.config.vision_config
    if vision.image_size == image_size:
        return model
    if not isinstance(model, CLIPModel) and image_size < vision.image_size < image_size + vision.patch_size:
        return model  # pictures are scaled up to whole patches
    if image_size % vision.patch_size:
        raise UserError(
            f"config error: data.image_size {image_size} is not a multiple of the encoder's patch size "
            f"{vision.patch_size}; the next one is {vision.patch_size * -(-image_size // vision.patch_size)}"
        )
    embeddings = model.vision_model.embeddings
    old, new = vision.image_size // vision.patch_size, image_size // vision.patch_size
    if isinstance(model, CLIPModel):
        resized = resized_grid(embeddings.position_embedding.weight.data, old, new)
        embeddings.position_embedding = nn.Embedding.from_pretrained(resized, freeze=False)
        embeddings.register_buffer("position_ids", torch.arange(len(resized)).expand((1, -1)), persistent=False)
        embeddings.num_patches, embeddings.num_positions = new * new, new * new + 1
        embeddings.image_size = image_size
    else:
        embeddings.position_embeddings = nn.Parameter(
            resized_grid(embeddings.position_embeddings.data[0], old, new)[None]
        )
        embeddings.patch_embeddings.image_size = (image_size, image_size)
        embeddings.patch_embeddings.num_patches = new * new
    vision.image_size = image_size
    return model


def resized_grid(positions: Tensor, old: int, new: int) -> Tensor:
    """(k + old * old, w) -> (k + new * new, w): a square grid behind k others, interpolated."""
    first, grid = positions[: -old * old], rearrange(positions[-old * old :], "(h w) d -> 1 d h w", h=old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([first, rearrange(grid, "1 d h w -> (h w) d")])


def untrained[E: Encoder](clip: E) -> E:
    """An encoder of the same sizes with random weights (the caller seeds torch)."""
    return quick_attention(type(clip)(clip.config))


def untrained_like(folder: str | Path) -> Encoder:
    """An encoder of the configuration in a folder, with weights still to be loaded."""
    kind, config = encoder_class(folder)
    return quick_attention(kind(config))


def with_text_of[E: Encoder](model: E, other: Encoder) -> E:
    """Replace the text tower and its projection in place by those of `other`, which must have the same sizes."""
    text_transformer(model).load_state_dict(text_transformer(other).state_dict(), strict=True)
    model.text_projection.load_state_dict(other.text_projection.state_dict(), strict=True)
    if getattr(other.config.text_config, "fixed_words", False):
        model.config.text_config.fixed_words = True
        fix_words(model)
    return model


def with_vision_of(source: str | Path, text: Encoder, image_size: int) -> VisionTextDualEncoderModel:
    """The vision transformer of a folder or hub id, for pictures of about `image_size`, with the text tower of `text`.

    It takes pictures as `pixel_values` makes them, whatever its own statistics. Its projection into the joint space is untrained.

    Raises:
        UserError: not a vision transformer with patches, or unreadable files.
    """
    try:
        vision = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: cannot load a vision model: {first_line(error)}") from error
    refuse_other_vision(source, vision)
    config = VisionTextDualEncoderConfig(
        vision_config=vision.config.to_dict(),
        text_config=text.config.text_config.to_dict(),
        projection_dim=text.config.projection_dim,
    )
    model = VisionTextDualEncoderModel(config)
    model.vision_model.load_state_dict(vision.state_dict(), strict=True)
    model.text_model.text_model.load_state_dict(text_transformer(text).state_dict(), strict=True)
    model.text_projection.load_state_dict(text.text_projection.state_dict(), strict=True)
    absorb_statistics(model, *image_statistics(source))
    patch = config.vision_config.patch_size
    return quick_attention(resize_positions(model, patch * -(-image_size // patch)))


def refuse_other_vision(source: str | Path, vision: nn.Module) -> None:
    """Raise a UserError unless the vision model of a folder or hub id is built like DINOv2 or ViT."""
    if not isinstance(getattr(getattr(vision, "embeddings", None), "position_embeddings", None), nn.Parameter):
        raise UserError(f"{source}: a {type(vision).__name__} is not a vision transformer like DINOv2 or ViT")
