"""Encoders of action chunks and proprio states, and the projection heads into the joint space."""

import torch
from torch import Tensor, nn

from vla.losses.contrastive import unit


class ActionEncoder(nn.Module):
    """(b, h, a) normalised chunk and (b, h) padding -> (b, width) features; padded timesteps contribute nothing."""

    def __init__(self, horizon: int, action_dim: int, width: int = 256) -> None:
        super().__init__()
        self.layers = mlp(horizon * (action_dim + 1), width, width)

    def forward(self, action_chunk: Tensor, action_is_pad: Tensor) -> Tensor:
        present = (~action_is_pad).unsqueeze(-1).to(action_chunk.dtype)  # (b, h, 1)
        return self.layers(torch.cat([action_chunk * present, present], dim=-1).flatten(1))


class ProjectionHead(nn.Module):
    """(b, width) features -> (b, d) unit-norm embeddings, normalised in float32 at least."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embed_dim))

    def forward(self, features: Tensor) -> Tensor:
        return unit(self.layers(features))


def mlp(width_in: int, width: int, width_out: int) -> nn.Sequential:
    """Two hidden layers with GELU."""
    return nn.Sequential(
        nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width_out)
    )
