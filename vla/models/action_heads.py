"""Action heads: from features to a chunk of actions, one interface."""

import torch
from torch import Tensor, nn

from vla.losses.cloning import masked_l1, masked_mse
from vla.models.action_encoder import mlp


class L1Head(nn.Module):
    """Regresses the chunk; the median of what the demonstrations do."""

    def __init__(self, width: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.shape = (horizon, action_dim)
        self.out = nn.Linear(width, horizon * action_dim)

    def loss(self, features: Tensor, action_chunk: Tensor, action_is_pad: Tensor) -> Tensor:
        """() L1 of (b, width) features against (b, h, a) chunks with (b, h) padding."""
        return masked_l1(self.predict(features), action_chunk, action_is_pad)

    def predict(self, features: Tensor) -> Tensor:
        """(b, width) -> (b, h, a), normalised units."""
        return self.out(features).unflatten(-1, self.shape).float()


class FlowHead(nn.Module):
    """Flow matching along straight paths from noise to the chunk (arXiv:2210.02747); for several modes of behaviour.

    Inference starts from the path's mean, zero noise, so that one observation gives one action.
    """

    def __init__(self, width: int, horizon: int, action_dim: int, steps: int) -> None:
        super().__init__()
        self.shape, self.steps = (horizon, action_dim), steps
        size = horizon * action_dim
        self.velocity = mlp(width + size + 16, width, size)
        self.register_buffer("frequencies", 2.0 ** torch.arange(8) * torch.pi, persistent=False)

    def loss(self, features: Tensor, action_chunk: Tensor, action_is_pad: Tensor) -> Tensor:
        """() squared error of the velocity at a random time of each path."""
        noise = torch.randn_like(action_chunk)
        time = torch.rand(len(action_chunk), 1, 1, device=action_chunk.device, dtype=action_chunk.dtype)
        between = (1 - time) * noise + time * action_chunk
        return masked_mse(self._velocity(features, between, time[:, 0]), action_chunk - noise, action_is_pad)

    def predict(self, features: Tensor) -> Tensor:
        """(b, width) -> (b, h, a), normalised units, by Euler steps."""
        chunk = torch.zeros(len(features), *self.shape, device=features.device)
        for step in range(self.steps):
            time = torch.full((len(features), 1), step / self.steps, device=features.device)
            chunk = chunk + self._velocity(features, chunk, time) / self.steps
        return chunk

    def _velocity(self, features: Tensor, chunk: Tensor, time: Tensor) -> Tensor:
        angles = time * self.frequencies  # (b, 8)
        inputs = torch.cat([features, chunk.flatten(1).to(features.dtype), angles.sin(), angles.cos()], dim=-1)
        return self.velocity(inputs).unflatten(-1, self.shape).float()


def make_head(kind: str, width: int, horizon: int, action_dim: int, flow_steps: int) -> L1Head | FlowHead:
    """The head called `kind`."""
    if kind == "l1":
        return L1Head(width, horizon, action_dim)
    if kind == "flow":
        return FlowHead(width, horizon, action_dim, flow_steps)
    raise ValueError(f"head.kind {kind!r} is not one of l1, flow")
