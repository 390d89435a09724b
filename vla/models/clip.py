"""The vision and language encoders: a native transformers `CLIPModel`, its tokenizer and its image statistics.

A vision transformer that knows no language (DINOv2, ViT) is paired with a text tower as a `VisionTextDualEncoderModel`,
which has the same parts; what is said of a CLIP model here holds for it, too. The only place that builds or loads transformers models. Everything downstream reads one fixed tap: the
*layer-normed last-layer patch tokens* (`patch_tokens`) and the final-layer-normed word tokens (`word_tokens`).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vla.losses.contrastive import unit
from vla.models.lexicon import MAX_TEXT_TOKENS, general_tokenizer, give_meanings, train_tokenizer
from vla.types import UserError, first_line

# ImageNet statistics: the ones LeRobot's policies normalise with by default.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
IMAGES, TEXTS = 8, 16  # a batch's images and texts are embedded in multiples of them
WORDS = 4  # the tokens that a batch's texts are cut to are a multiple of it
Encoder = CLIPModel | VisionTextDualEncoderModel
FAMILIES = (
    "CLIP (OpenAI's, OpenCLIP's in transformers' format), or a VisionTextDualEncoder of DINOv2 or ViT and a text tower"
)


def check_sizes(image_size: int, patch_size: int, width: int, heads: int, text_width: int, text_heads: int) -> None:
    """Refuse sizes of fresh towers that do not divide.

    Raises:
        UserError: names the field.
    """
    if image_size % patch_size:
        raise UserError(f"config error: tower.patch_size {patch_size} does not divide data.image_size {image_size}")
    for name, size, parts in (("heads", width, heads), ("text_heads", text_width, text_heads)):
        if size % parts:
            raise UserError(f"config error: tower.{name} {parts} does not divide its width {size}")


def build_clip(
    texts: Sequence[str],
    *,
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    text_width: int,
    text_layers: int,
    text_heads: int,
    embed_dim: int,
    vocab_size: int,
    vocabulary: str | None = None,
    lexicon: str | None = None,
    resumed: bool = False,
) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A small CLIP with random weights (the caller seeds torch) and a tokenizer trained on `texts`.

    `vocabulary` is a general one instead, see `general_tokenizer`. With a `lexicon`, a sentence encoder, word embeddings are
    its meanings of words, for good: training leaves them alone, so that words unseen in training stay among their like. A `resumed` run
    has them in its checkpoint, so that they are not computed again.
    """
    check_sizes(image_size, patch_size, width, heads, text_width, text_heads)
    if lexicon and not vocabulary:
        raise UserError(
            "config error: tower.lexicon needs the words of a general vocabulary; name one with --tower.vocabulary"
        )
    tokenizer = general_tokenizer(vocabulary) if vocabulary else train_tokenizer(texts, vocab_size)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "max_position_embeddings": MAX_TEXT_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "gelu",  # CLIP's quick_gelu takes three passes over memory instead of one
        },
        projection_dim=embed_dim,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embedding.weight
        positions[1:] = sine_positions(image_size // patch_size, width)
        # CLIP starts these so small that untrained layers drown which word a token is.
        model.text_model.embeddings.token_embedding.weight *= 20
        for layer in model.vision_model.encoder.layers:
            start_like_trained_attention(layer.self_attn)
    if lexicon:
        if not resumed:
            give_meanings(model.text_model.embeddings.token_embedding, tokenizer, lexicon)
        model.config.text_config.fixed_words = True
        fix_words(model)
    return quick_attention(model), tokenizer


def fix_words(model: Encoder) -> None:
    """Exclude word embeddings from training if they are a lexicon's meanings."""
    if getattr(model.config.text_config, "fixed_words", False):
        text_transformer(model).embeddings.token_embedding.requires_grad_(False)


def text_transformer(model: Encoder) -> nn.Module:
    """CLIP's text tower, which is wrapped where it is one of two models."""
    return model.text_model if isinstance(model, CLIPModel) else model.text_model.text_model


def quick_attention[E: Encoder](model: E) -> E:
    """The model with an attention that is quick in bfloat16 on a CPU, too."""
    if not torch.cuda.is_available():
        AttentionInterface.register("sdpa_or_matmul", sdpa_or_matmul)
        AttentionMaskInterface.register("sdpa_or_matmul", sdpa_mask)
        model.set_attn_implementation("sdpa_or_matmul")
    return model


def sdpa_or_matmul(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface, (b, h, n, d) -> (b, n, h, d): its fused kernel, save in reduced precision.

    There, on a CPU and for some 60 tokens, plain products are five times as fast, forward and backward.
    """
    if query.dtype == torch.float32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    with torch.autocast(query.device.type, enabled=False):  # which would do the softmax in float32
        scores = (query * scaling) @ key.transpose(-1, -2)
        if attention_mask is None and kwargs.get("is_causal"):
            attention_mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        weights = nn.functional.dropout(scores.softmax(-1), kwargs.get("dropout", 0.0))
        return (weights @ value).transpose(1, 2).contiguous(), weights


def sine_positions(side: int, width: int) -> Tensor:
    """(side * side, width) sines and cosines of rows and columns, about as strong as untrained patch embeddings.

    CLIP starts its position embeddings at a twentieth of that, which is slow to learn *where* from (arXiv:2205.01580).
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]  # (n, w / 4) each
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)
    return nn.functional.pad(0.5 * waves, (0, width - waves.shape[1]))


def start_like_trained_attention(attention: nn.Module) -> None:
    """Start a self-attention in place where trained ones end up (arXiv:2305.09828).

    Queries and keys of one token resemble each other, so that it looks at its surroundings and its like; what it writes
    opposes what it reads, as in trained vision transformers. This takes little data to learn from.
    """
    width, heads = attention.embed_dim, attention.num_heads
    size = width // heads

    def noise() -> Tensor:
        return torch.randn(width, width) * width**-0.5

    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        u, s, vt = torch.linalg.svd(0.7 * noise() + 0.7 * torch.eye(width))
        root = s[:size].sqrt()[:, None]
        attention.q_proj.weight[rows] = root * u[:, :size].T
        attention.k_proj.weight[rows] = root * vt[:size]
    u, s, vt = torch.linalg.svd(0.4 * noise() - 0.4 * torch.eye(width))
    attention.v_proj.weight.copy_(s.sqrt()[:, None] * u.T)
    attention.out_proj.weight.copy_((s.sqrt()[:, None] * vt).T)


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


def untrained_like(folder: str | Path) -> Encoder:
    """An encoder of the configuration in a folder, with weights still to be loaded."""
    kind, config = encoder_class(folder)
    return quick_attention(kind(config))


def untrained[E: Encoder](clip: E) -> E:
    """An encoder of the same sizes with random weights (the caller seeds torch)."""
    return quick_attention(type(clip)(clip.config))


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


def with_text_of[E: Encoder](model: E, other: Encoder) -> E:
    """Replace the text tower and its projection in place by those of `other`, which must have the same sizes."""
    text_transformer(model).load_state_dict(text_transformer(other).state_dict(), strict=True)
    model.text_projection.load_state_dict(other.text_projection.state_dict(), strict=True)
    if getattr(other.config.text_config, "fixed_words", False):
        model.config.text_config.fixed_words = True
        fix_words(model)
    return model


def load_clip_at(
    source: str | Path, image_size: int, flag: str | None = None
) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """`load_clip` adapted to an image size; with `flag` it says so, and which flag keeps the encoder's own size."""
    clip, tokenizer = load_clip(source)
    own = clip.config.vision_config.image_size
    if flag and own != image_size:
        print(f"{source}: trained on pictures of {own} px, adapted to {image_size}; {flag}={own} keeps them")
    return resize_positions(clip, image_size), tokenizer


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
