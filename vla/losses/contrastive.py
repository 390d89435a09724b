"""Contrastive losses as pure functions. Logits, log-sum-exp and means are float32 whatever the inputs' type."""

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Reduced precision raised to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(features: Tensor) -> Tensor:
    """L2-normalised in float32 at least."""
    return nn.functional.normalize(at_least_float32(features), dim=-1)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    positives: Tensor,
    *,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Multi-positive InfoNCE from queries to keys: -log of the summed probability of the positives.

    Args:
        queries: (q, d) unit norm.
        keys: (k, d) unit norm.
        logit_scale: () already exponentiated, 1 / temperature.
        positives: (q, k) bool; every row has at least one.
        valid: (q, k) bool; False pairs are neither positive nor negative. Default: all valid.
        weights: (q,) of each query in the mean. Default: equal.
    Returns:
        () loss in nats; the mean of log(k / |P_i|) at chance.
    Raises:
        ValueError: shapes disagree, or a row has no positive (the row is named).
    References:
        arXiv:1807.03748 (InfoNCE), arXiv:2004.11362 (L_in and L_out for several positives).
    """
    _check_shapes(queries, keys, positives=positives, valid=valid, weights=weights)
    return info_nce_of(_logits(queries, keys, logit_scale), positives, valid=valid, weights=weights)


def info_nce_of(
    logits: Tensor, positives: Tensor, *, valid: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """`info_nce` of (q, k) scaled similarities that do not come from one vector a side."""
    if valid is not None:
        positives, logits = positives & valid, logits.masked_fill(~valid, -torch.inf)
    has_positive = positives.any(1)
    if not has_positive.all():
        raise ValueError(f"row {int((~has_positive).nonzero()[0])} has no valid positive")
    per_query = logits.logsumexp(1) - logits.masked_fill(~positives, -torch.inf).logsumexp(1)  # (q,)
    return weighted_mean(per_query, weights)


def sigmoid_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Tensor,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Multi-label sigmoid loss: each pair is a yes-or-no question, any number of keys may be right for a query.

    Args:
        queries: (q, d) unit norm.
        keys: (k, d) unit norm.
        logit_scale: () already exponentiated, 1 / temperature.
        logit_bias: () added to every logit; about -log k answers "no" at the start.
        positives: (q, k) bool.
        weights: (q,) of each query in the mean. Default: equal.
    Returns:
        () mean over queries of the sum over keys, in nats.
    Raises:
        ValueError: shapes disagree.
    References:
        arXiv:2303.15343 (SigLIP) with one positive a query; true pairs off its diagonal count as positive here.
    """
    _check_shapes(queries, keys, positives=positives, weights=weights)
    logits = _logits(queries, keys, logit_scale) + logit_bias
    signs = 2 * positives.to(logits.dtype) - 1
    return weighted_mean(-torch.nn.functional.logsigmoid(signs * logits).sum(1), weights)


def sigmoid_chance(positives: Tensor, weights: Tensor | None = None) -> Tensor:
    """() loss of `sigmoid_loss` when every key of a query gets the query's share of positives as its probability."""
    share = positives.float().mean(1)
    per_key = torch.special.entr(share) + torch.special.entr(1 - share)
    return weighted_mean(positives.shape[1] * per_key, weights)


def soft_info_nce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """InfoNCE with soft targets: the cross-entropy of the target distribution over the keys.

    Args:
        queries: (q, d) unit norm.
        keys: (k, d) unit norm.
        logit_scale: () already exponentiated, 1 / temperature.
        targets: (q, k) non-negative, every row sums to 1 and is zero where not valid (see `soft_targets`).
        valid: (q, k) bool; False pairs are left out of the normalisation. Default: all valid.
        weights: (q,) of each query in the mean. Default: equal.
    Returns:
        () loss in nats; the mean log of the number of valid keys at chance, the targets' entropy at best.
    Raises:
        ValueError: shapes disagree.
    References:
        arXiv:2209.12908 and arXiv:2207.08289 use soft contrastive targets in the same form.
    """
    _check_shapes(queries, keys, targets=targets, valid=valid, weights=weights)
    logits = _logits(queries, keys, logit_scale)
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    log_probabilities = logits.log_softmax(1)
    # 0 * -inf is nan: pairs that are not valid have no target mass and are left out of the sum.
    products = at_least_float32(targets) * log_probabilities.masked_fill(targets == 0, 0.0)
    return weighted_mean(-products.sum(1), weights)


def soft_targets(distances: Tensor, beta: float, valid: Tensor | None = None) -> Tensor:
    """Target distribution softmax(-d / beta) over the valid keys of each row; (q, k), `beta` in the unit of `distances`.

    Raises:
        ValueError: `beta` is not positive, or a row has no valid key (the row is named).
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    logits = -at_least_float32(distances) / beta
    if valid is not None:
        if not valid.any(1).all():
            raise ValueError(f"row {int((~valid.any(1)).nonzero()[0])} has no valid key")
        logits = logits.masked_fill(~valid, -torch.inf)
    return logits.softmax(1)


def info_nce_chance(positives: Tensor, valid: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """() loss of `info_nce` when all similarities are equal: the mean of log(k_i / |P_i|) over valid pairs."""
    valid = torch.ones_like(positives) if valid is None else valid
    per_query = valid.sum(1).float().log() - (positives & valid).sum(1).float().log()
    return weighted_mean(per_query, weights)


def entropy(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """() mean entropy of the rows of `targets` (q, k) in nats: the floor of `soft_info_nce`."""
    return weighted_mean(torch.special.entr(at_least_float32(targets)).sum(1), weights)


def collision_rate(goal_ids: Tensor) -> Tensor:
    """() share of the rows of (b,) ids with at least one other row of the same id: the diagonal's false negatives."""
    _, inverse, counts = goal_ids.unique(return_inverse=True, return_counts=True)
    return (counts[inverse] > 1).float().sum() / max(1, len(goal_ids))


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """() mean of (q,) values with (q,) weights; equal weights if none are given."""
    if weights is None:
        return values.mean()
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def _logits(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    with torch.autocast(queries.device.type, enabled=False):
        similarity = at_least_float32(queries) @ at_least_float32(keys).T
        return logit_scale.to(similarity.dtype) * similarity


def _check_shapes(queries: Tensor, keys: Tensor, **pairs: Tensor | None) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (q, d) and (k, d)")
    weights = pairs.pop("weights", None)
    if weights is not None and weights.shape != (len(queries),):
        raise ValueError(f"weights {tuple(weights.shape)} must be ({len(queries)},)")
    expected = (len(queries), len(keys))
    for name, tensor in pairs.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be (q, k) = {expected}")
