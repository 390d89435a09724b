"""Measures of embeddings: retrieval with several right answers beside its chance level, how they fill the space."""

import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import gammaln


def recall_at_k(similarity: np.ndarray, positives: np.ndarray, k: int) -> float:
    """Share of the queries with at least one positive among the k most similar keys.

    Args:
        similarity: (q, n). positives: (q, n) bool; rows without a positive are left out.
    """
    has = positives.any(1)
    k = min(k, similarity.shape[1])
    top = np.argpartition(-similarity[has], k - 1, axis=1)[:, :k]
    return float(np.take_along_axis(positives[has], top, axis=1).any(1).mean())


def recall_at_k_chance(positives: np.ndarray, k: int) -> float:
    """`recall_at_k` of a random order: the mean of 1 - C(n - p, k) / C(n, k)."""
    p = positives.sum(1)[positives.any(1)].astype(float)  # (q,)
    n = positives.shape[1]
    k = min(k, n)
    possible = n - p >= k
    left = np.where(possible, n - p, n)
    log_miss = gammaln(left + 1) - gammaln(left - k + 1) - gammaln(n + 1) + gammaln(n - k + 1)
    return float(np.mean(np.where(possible, 1 - np.exp(log_miss), 1.0)))


def rank_me(embeds: np.ndarray) -> float:
    """Effective rank of (b, d) embeddings: exp of the entropy of the singular values (arXiv:2210.02885).

    They are not centred: of embeddings that are all one point but for noise, the noise alone has full rank.
    """
    singular = np.linalg.svd(embeds, compute_uv=False)
    p = singular / max(singular.sum(), 1e-12)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def alignment(embeds: np.ndarray, partners: np.ndarray) -> float:
    """Mean squared distance of (b, d) unit vectors to what belongs to them, row by row: 0 if they are equal (arXiv:2005.10242)."""
    return float(((embeds - partners) ** 2).sum(1).mean())


def uniformity(embeds: np.ndarray) -> float:
    """Log of the mean Gaussian potential exp(-2 |x - y|^2) between at least two (b, d) unit vectors: 0 if all are equal (arXiv:2005.10242)."""
    return float(np.log(np.exp(-2 * pdist(embeds, "sqeuclidean")).mean()))
