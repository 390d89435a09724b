"""What stage two trains: text-conditioned pooling of patch tokens, proprio, a residual MLP and an action head."""

import torch
from torch import Tensor, nn

from vla.models.action_heads import make_head
from vla.models.pooler import TextConditionedPooler


class PolicyNetwork(nn.Module):
    """(patch tokens, word tokens, proprio) -> action chunk, all normalised."""

    def __init__(
        self,
        *,
        token_width: int,
        text_width: int,
        n_patches: int,
        state_dim: int,
        action_dim: int,
        kind: str,
        horizon: int,
        queries: int,
        width: int,
        hidden: int,
        layers: int,
        state_dropout: float,
        flow_steps: int,
        hide: str = "none",
    ) -> None:
        super().__init__()
        self.hide = hide  # a control's blind spot: "language" or "vision"
        self.pooler = TextConditionedPooler(token_width, text_width, n_patches=n_patches, width=width, queries=queries)
        self.state_encoder = nn.Sequential(nn.Linear(state_dim, 128), nn.GELU(), nn.Linear(128, 128))
        self.no_state = nn.Parameter(torch.zeros(128))
        self.state_dropout = state_dropout
        self.enter = nn.Linear(queries * width + 128, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = make_head(kind, hidden, horizon, action_dim, flow_steps)

    def features(self, tokens: Tensor, words: Tensor, words_mask: Tensor, similarity: Tensor, state: Tensor) -> Tensor:
        """(b, n, w), (b, l, w), (b, l), (b, l, n), (b, s) -> (b, hidden)."""
        pooled = self.pooler(*self.seen(tokens, words, words_mask, similarity)).flatten(1)
        proprio = self.state_encoder(state)
        if self.training and self.state_dropout:
            hide = torch.rand(len(state), 1, device=state.device) < self.state_dropout
            proprio = torch.where(hide, self.no_state.to(proprio.dtype), proprio)
        x = self.enter(torch.cat([pooled, proprio], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)

    def seen(
        self, tokens: Tensor, words: Tensor, words_mask: Tensor, similarity: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the pooler gets of these: all, but for a control's blind spot."""
        if self.hide == "language":
            words, words_mask = torch.zeros_like(words[:, :1]), torch.ones_like(words_mask[:, :1])
            similarity = torch.zeros_like(similarity[:, :1])
        elif self.hide == "vision":
            tokens, similarity = torch.zeros_like(tokens), torch.zeros_like(similarity)
        return tokens, words, words_mask, similarity
