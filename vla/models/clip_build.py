"""Fresh encoders: sizes, first weights, and an attention that is quick on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vla.models.clip import Encoder, text_transformer
from vla.models.lexicon import MAX_TEXT_TOKENS, general_tokenizer, give_meanings, train_tokenizer
from vla.types import UserError


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
