"""Text-conditioned pooling of patch tokens: the reading glass that stage one and the policy share."""

import torch
from einops import rearrange
from torch import Tensor, nn

from vla.losses.contrastive import at_least_float32

POSITION_WIDTH = 32
NAMED_GAIN = 8.0  # at the start; cosines are small


class TextConditionedPooler(nn.Module):
    """A few learned queries read the words, then look at the patches, twice: a second look can depend on the first.

    A query looks where the patches resemble the words it reads, in the joint space that stage one aligns, and where its
    own learned attention sends it. The key and value projections are folded into the queries' side, so that the many
    patch tokens are never projected, and position codes are separate, so that *where* survives pooling: every look
    returns the expected coordinates of what it attends to, a spatial softmax.
    """

    def __init__(
        self, token_width: int, text_width: int, *, n_patches: int, width: int, queries: int, layers: int = 2
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"pooler width {width} is not a multiple of its 4 heads")
        side = round(n_patches**0.5)
        if side * side != n_patches:
            raise ValueError(f"n_patches {n_patches} is not a square number")
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(n_patches, POSITION_WIDTH) * 0.02)
        line = (torch.arange(side) + 0.5) / side * 2 - 1
        rows, columns = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("coordinates", torch.stack([columns, rows], -1).flatten(0, 1), persistent=False)
        self.layers = nn.ModuleList(PoolerLayer(token_width, text_width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, words: Tensor, words_mask: Tensor, similarity: Tensor, *, need_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool.

        Args:
            tokens: (b, n, token_width) layer-normed patch tokens.
            words: (b, l, text_width) word tokens.
            words_mask: (b, l) True or 1 for words, False or 0 for padding.
            similarity: (b, l, n) cosine of words and patches in the joint space.
            need_weights: also return the last look's attention.
        Returns:
            (b, q, width); with `need_weights` also (b, q, n), averaged over heads.
        """
        codes = torch.cat([self.coordinates, self.position], dim=-1)  # (n, p)
        mask = words_mask.bool()[:, None, None, :]  # (b, 1, 1, l)
        x = self.queries.expand(len(tokens), -1, -1)  # (b, q, width)
        for layer in self.layers:
            x, attention = layer(x, tokens, codes, words, mask, similarity)
        if need_weights:
            return self.norm(x), attention.mean(2)
        return self.norm(x)


class PoolerLayer(nn.Module):
    """Read the words, look at the patches, think."""

    def __init__(self, token_width: int, text_width: int, width: int) -> None:
        super().__init__()
        self.read_norm, self.read = nn.LayerNorm(width), ReadWords(width, text_width)
        self.look_norm, self.look = nn.LayerNorm(width), LookAtPatches(width, token_width)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, x: Tensor, tokens: Tensor, codes: Tensor, words: Tensor, words_mask: Tensor, similarity: Tensor
    ) -> tuple[Tensor, Tensor]:
        read, reading = self.read(self.read_norm(x), words, words_mask)
        x = x + read
        named = torch.einsum("bhql,bln->bqhn", reading, similarity.to(reading.dtype))  # likeness to the words read
        seen, attention = self.look(self.look_norm(x), tokens, codes, named)
        x = x + seen
        return x + self.think(x), attention


class ReadWords(nn.Module):
    """Multi-head attention from queries (b, q, w) to words (b, l, t)."""

    def __init__(self, width: int, text_width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (b, q, w) and the attention (b, heads, q, l)."""

        def split(y: Tensor) -> Tensor:
            return rearrange(y, "b n (h d) -> b h n d", h=self.heads)

        key, value = self.key_value(words).chunk(2, dim=-1)
        scores = split(self.query(x)) @ split(key).transpose(-1, -2) * (x.shape[-1] // self.heads) ** -0.5
        reading = at_least_float32(scores).masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
        return self.out(rearrange(reading @ split(value), "b h q d -> b q (h d)")), reading


class LookAtPatches(nn.Module):
    """Multi-head attention from queries (b, q, w) to raw patch tokens (b, n, t) with position codes (n, p)."""

    def __init__(self, width: int, token_width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.token_width = heads, token_width
        code_width = 2 + POSITION_WIDTH
        self.what = nn.Linear(width, heads * token_width)
        self.where = nn.Linear(width, heads * code_width)
        self.gain = nn.Parameter(torch.full((heads, 1), NAMED_GAIN))
        self.out = nn.Linear(heads * (token_width + code_width), width)

    def forward(self, x: Tensor, tokens: Tensor, codes: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (b, q, w) and the attention (b, q, heads, n); `named` (b, q, heads, n) is likeness to the words read."""

        def of_heads(y: Tensor) -> Tensor:
            return rearrange(y, "b q (h t) -> b (q h) t", h=self.heads)

        what, where = of_heads(self.what(x)) * self.token_width**-0.5, of_heads(self.where(x))
        scores = what @ tokens.transpose(1, 2) + where @ codes.T.to(where.dtype)  # (b, q * heads, n)
        scores = scores + rearrange(self.gain * named, "b q h n -> b (q h) n")
        attention = at_least_float32(scores).softmax(-1).to(tokens.dtype)
        seen = torch.cat([attention @ tokens, attention @ codes.to(attention.dtype)], dim=-1)  # (b, q * heads, t + p)
        seen, attention = (rearrange(y, "b (q h) n -> b q h n", h=self.heads) for y in (seen, attention))
        return self.out(seen.flatten(2)), attention
