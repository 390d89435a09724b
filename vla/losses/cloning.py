"""Behaviour-cloning losses as pure functions."""

from torch import Tensor


def masked_l1(predicted: Tensor, action_chunk: Tensor, action_is_pad: Tensor) -> Tensor:
    """() mean absolute error of (b, h, a) chunks over timesteps that are not padding (b, h), normalised units."""
    return _masked_mean((predicted - action_chunk).abs(), action_is_pad)


def masked_mse(predicted: Tensor, target: Tensor, action_is_pad: Tensor) -> Tensor:
    """() mean squared error of (b, h, a) over timesteps that are not padding (b, h)."""
    return _masked_mean((predicted - target).square(), action_is_pad)


def _masked_mean(errors: Tensor, action_is_pad: Tensor) -> Tensor:
    present = (~action_is_pad).unsqueeze(-1).to(errors.dtype)  # (b, h, 1)
    return (errors * present).sum() / (present.sum() * errors.shape[-1]).clamp_min(1.0)
