"""Text-conditioned pooling of patch tokens: the reading glass that stage one and the policy share."""

import torch
from torch import Tensor, nn


class TextConditionedPooler(nn.Module):
    """A few learned queries read the words, then look at the patches, twice, so that a second look can depend on the first.

    Patch positions are added to what the queries look at *and* to what they get, so that "where" survives pooling.
    """

    def __init__(
        self, token_width: int, text_width: int, *, n_patches: int, width: int, queries: int, layers: int = 2
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.token_projection = nn.Linear(token_width, width)
        self.text_projection = nn.Linear(text_width, width)
        self.position = nn.Parameter(torch.randn(n_patches, width) * 0.02)
        self.layers = nn.ModuleList(PoolerLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, words: Tensor, words_mask: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool.

        Args:
            tokens: (b, n, token_width) layer-normed patch tokens.
            words: (b, l, text_width) word tokens.
            words_mask: (b, l) True or 1 for words, False or 0 for padding.
            need_weights: also return the last look's attention.
        Returns:
            (b, q, width); with `need_weights` also (b, q, n), averaged over heads.
        """
        patches = self.token_projection(tokens) + self.position  # (b, n, width)
        words = self.text_projection(words)  # (b, l, width)
        mask = words_mask.bool()[:, None, None, :]  # (b, 1, 1, l)
        x = self.queries.expand(len(tokens), -1, -1)  # (b, q, width)
        for layer in self.layers:
            x = layer(x, patches, words, mask)
        if need_weights:
            return self.norm(x), self.layers[-1].look.weights(self.layers[-1].look_norm(x), patches)
        return self.norm(x)


class PoolerLayer(nn.Module):
    """Read the words, look at the patches, think."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read_norm, self.read = nn.LayerNorm(width), CrossAttention(width)
        self.look_norm, self.look = nn.LayerNorm(width), CrossAttention(width)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, patches: Tensor, words: Tensor, words_mask: Tensor) -> Tensor:
        x = x + self.read(self.read_norm(x), words, words_mask)
        x = x + self.look(self.look_norm(x), patches)
        return x + self.think(x)


class CrossAttention(nn.Module):
    """Multi-head attention from queries (b, q, w) to a context (b, n, w)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, w / heads)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        key, value = self.key_value(context).chunk(2, dim=-1)
        pooled = nn.functional.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(key), self._split(value), attn_mask=mask
        )
        return self.out(pooled.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """(b, q, n) attention averaged over heads."""
        key, _ = self.key_value(context).chunk(2, dim=-1)
        query, key = self._split(self.query(x)), self._split(key)
        return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1).mean(1)
