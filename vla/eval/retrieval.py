"""Measures of embeddings: retrieval with several right answers beside its chance level, how they fill the space."""

import numpy as np
from scipy.spatial.distance import pdist
from scipy.stats import entropy, hypergeom


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
    """`recall_at_k` of a random order: how often k keys drawn without putting back hold a positive."""
    right, n = positives.sum(1)[positives.any(1)], positives.shape[1]  # (q,)
    return float(hypergeom.sf(0, n, right, min(k, n)).mean())


def rank_me(embeds: np.ndarray) -> float:
    """Effective rank of (b, d) embeddings: exp of the entropy of the singular values (arXiv:2210.02885).

    They are not centred: of embeddings that are all one point but for noise, the noise alone has full rank.
    """
    return float(np.exp(entropy(np.linalg.svd(embeds, compute_uv=False))))


def alignment(embeds: np.ndarray, partners: np.ndarray) -> float:
    """Mean squared distance of (b, d) unit vectors to what belongs to them, row by row: 0 if they are equal (arXiv:2005.10242)."""
    return float(((embeds - partners) ** 2).sum(1).mean())


def uniformity(embeds: np.ndarray) -> float:
    """Log of the mean Gaussian potential exp(-2 |x - y|^2) between at least two (b, d) unit vectors: 0 if all are equal (arXiv:2005.10242)."""
    return float(np.log(np.exp(-2 * pdist(embeds, "sqeuclidean")).mean()))
