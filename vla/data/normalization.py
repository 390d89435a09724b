"""Statistics of actions and states, and normalisation with floors on the ranges."""

from dataclasses import asdict, dataclass

import numpy as np

from vla.types import ACTION_KEY, RANGE_FLOOR, STATE_KEY

RECURS = (5, 2e-4)  # rows at an extreme, and their share, from which on it is a command and not a glitch or a tail


@dataclass(frozen=True)
class NormStats:
    """Per-dimension statistics, (n,) float32 each, named as in LeRobot's stats."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray


@dataclass(frozen=True)
class Normalizers:
    """Statistics of the training episodes' actions and states."""

    action: NormStats
    state: NormStats

    def by_key(self) -> dict[str, dict[str, np.ndarray]]:
        """The same in LeRobot's form: (n,) float32 by feature and by name."""
        return {STATE_KEY: asdict(self.state), ACTION_KEY: asdict(self.action)}


def compute_norm_stats(values: np.ndarray) -> NormStats:
    """Statistics of (r, n) values with q99 - q01 and std floored symmetrically.

    A quantile that cuts off a rare but legal value, such as a gripper command, would make it unreachable: where q01 and
    q99 leave more than 20 % of the full range outside, an extreme that recurs, or one of a
    dimension that hardly varies otherwise, takes the place of its quantile. Tails and glitches do not.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    smallest, largest = values.min(axis=0), values.max(axis=0)
    cut = (high - low) < 0.8 * (largest - smallest)
    often, still = max(RECURS[0], RECURS[1] * len(values)), high - low < RANGE_FLOOR
    at_smallest = (values <= smallest + 0.01 * (low - smallest)).sum(axis=0)  # in a hundredth of what is cut off
    at_largest = (values >= largest - 0.01 * (largest - high)).sum(axis=0)
    low = np.where(cut & (still | (at_smallest >= often)), smallest, low)
    high = np.where(cut & (still | (at_largest >= often)), largest, high)
    centre, half = (low + high) / 2, np.maximum(high - low, RANGE_FLOOR) / 2
    arrays = {
        "mean": values.mean(axis=0),
        "std": np.maximum(values.std(axis=0), RANGE_FLOOR),
        "min": smallest,
        "max": largest,
        "q01": centre - half,
        "q99": centre + half,
    }
    return NormStats(**{key: array.astype(np.float32) for key, array in arrays.items()})


def normalize_quantile(x: np.ndarray, stats: NormStats) -> np.ndarray:
    """(..., n) data units -> [q01, q99] mapped to [-1, 1], float32, not clipped."""
    return (2 * (x - stats.q01) / (stats.q99 - stats.q01) - 1).astype(np.float32)
