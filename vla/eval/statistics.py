"""Intervals and summaries of success rates."""

from collections.abc import Iterable, Sequence
from typing import Any

from statsmodels.stats.contingency_tables import mcnemar
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
