"""Intervals, tests and power of success rates.

One policy: Wilson. Two policies on the same episodes: McNemar. Arms of several training seeds on the same episodes: the
crossed interval, whose coverage the tests check by simulation.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion; (0, 1) if nothing was observed."""
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    # Exact at the ends, where rounding would leave the estimate outside its interval.
    return 0.0 if successes == 0 else float(low), 1.0 if successes == n else float(high)


def summarise(outcomes: Iterable[bool]) -> dict[str, Any]:
    """{"success_rate", "interval": [lo, hi], "n"} of independent outcomes."""
    outcomes = list(outcomes)
    n, successes = len(outcomes), sum(outcomes)
    return {"success_rate": successes / n if n else None, "interval": list(wilson(successes, n)), "n": n}


def paired_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact McNemar test of two policies on the same episodes, two-sided.

    Raises:
        ValueError: the sequences differ in length.
    """
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    neither = len(first) - both - only_first - only_second
    return float(mcnemar([[both, only_first], [only_second, neither]], exact=True).pvalue)


@dataclass(frozen=True)
class Estimate:
    """A mean over training seeds and episodes, with its interval and the p-value of "it is zero"."""

    value: float
    low: float
    high: float
    p_value: float
    seeds: int
    episodes: int


def crossed_interval(outcomes: np.ndarray, strata: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of outcomes whose training seeds and episodes are both samples, the tasks fixed.

    Two-way random effects, seeds crossed with the episodes within each task: the variance of the mean is
    (MS_seed + MS_episode - MS_residual) / N, its degrees of freedom Satterthwaite's (Satterthwaite 1946; Snedecor and
    Cochran, "Statistical Methods", two-way mixed models), at most twice those of the seeds. It is never taken smaller than what the
    episodes or the seeds alone give. With one training seed the interval is over episodes alone, and says nothing of other seeds.

    Args:
        outcomes: (s, e) success of every training seed on every episode, or the difference of two arms.
        strata: (e,) the task of each episode.
        confidence: of the interval.
    Raises:
        ValueError: fewer than two episodes in a task, or shapes that do not match.
    """
    outcomes = np.asarray(outcomes, float)
    seeds, episodes = outcomes.shape
    if strata.shape != (episodes,):
        raise ValueError(f"strata must be ({episodes},), got {strata.shape}")
    tasks, task = np.unique(strata, return_inverse=True)
    if np.bincount(task).min() < 2:
        raise ValueError("every task needs at least two episodes")
    of_task = np.stack([outcomes[:, task == t].mean(axis=1) for t in range(len(tasks))], axis=1)  # (s, t)
    of_episode = outcomes.mean(axis=0)  # (e,)
    value = float(outcomes.mean())
    episode_freedom = episodes - len(tasks)
    ms_episode = seeds * float(((of_episode - of_task.mean(axis=0)[task]) ** 2).sum()) / episode_freedom
    if seeds == 1:
        mean_squares, freedoms = [ms_episode], [episode_freedom]
        variance = ms_episode / episodes
    else:
        ms_seed = episodes * float(((outcomes.mean(axis=1) - value) ** 2).sum()) / (seeds - 1)
        residual = outcomes - of_task[:, task] - of_episode[None] + of_task.mean(axis=0)[task][None]
        ms_residual = float((residual**2).sum()) / ((seeds - 1) * episode_freedom)
        mean_squares = [ms_seed, ms_episode, -ms_residual]
        freedoms = [seeds - 1, episode_freedom, (seeds - 1) * episode_freedom]
        variance = max(sum(mean_squares), ms_seed, ms_episode) / outcomes.size
    total = variance * outcomes.size
    squares = sum(m**2 / f for m, f in zip(mean_squares, freedoms, strict=True))
    freedom = max(total**2 / squares, min(freedoms)) if squares > 0 else episode_freedom
    if seeds > 1:
        # Where seeds agree by chance, the variance falls and Satterthwaite's freedom rises together: small p-values would be
        # several times too small.
        freedom = min(freedom, 2 * (seeds - 1))
    quantile = float(stats.t.ppf(0.5 + confidence / 2, freedom))
    # Where all outcomes agree, the rule of three (Hanley and Lippman-Hand 1983); seeds on the same episode count once.
    deviation = max(variance**0.5, 3 / episodes / quantile)
    half, p_value = quantile * deviation, float(2 * stats.t.sf(abs(value) / deviation, freedom))
    return Estimate(value, value - half, value + half, p_value, seeds, episodes)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979)."""
    return multipletests(list(p_values), method="holm")[1].tolist() if len(p_values) else []


def power(first: float, second: float, *, seeds: int, episodes: int, alpha: float = 0.05, trials: int = 400) -> float:
    """How often the crossed interval tells two arms apart, by simulation: independent episodes, training seeds that agree.

    Args:
        first, second: the arms' success rates.
        seeds: training seeds of each arm.
        episodes: of each seed, the same for all.
        alpha: level of the test, two-sided.
    """
    rng = np.random.default_rng(0)
    shape = (trials, seeds, episodes)
    differences = (rng.random(shape) < first).astype(float) - (rng.random(shape) < second)
    return float(np.mean([crossed_interval(d, np.zeros(episodes)).p_value < alpha for d in differences]))


def visible_difference(
    seeds: int, episodes: int, *, around: float = 0.7, alpha: float = 0.05, wanted: float = 0.8
) -> float:
    """The smallest difference below the rate `around`, to a point, that is told apart with the wanted power; 1 if none is."""
    low, high = 0, round(100 * around)
    if power(around, 0.0, seeds=seeds, episodes=episodes, alpha=alpha) < wanted:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(around, around - middle / 100, seeds=seeds, episodes=episodes, alpha=alpha) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high / 100


def episodes_needed(difference: float, seeds: int, *, around: float = 0.7, wanted: float = 0.8) -> int:
    """Episodes of each seed, to about a fifth, at which a difference below the rate `around` is told apart with the wanted power."""
    episodes = 20
    while power(around, around - difference, seeds=seeds, episodes=episodes) < wanted:
        episodes = round(1.2 * episodes)
    return episodes
