"""Action chunks from the in-memory actions, and whether anything moves meanwhile."""

import numpy as np

from vla.data.episodes import Episodes
from vla.data.normalization import NormStats, normalize_quantile

STILL = 0.01  # of a state, normalised units


def stays(episodes: Episodes, rows: np.ndarray, horizon: int, stats: NormStats) -> np.ndarray:
    """(b,) bool: whether the normalised state stays within `STILL` of the row's for `horizon` timesteps, or what its episode has of them.

    Not of rows that are the last of their episode, nor where the state is unknown.
    """
    last = episodes.start[episodes.episode_of_row[rows] + 1] - 1  # (b,)
    later = np.minimum(rows[:, None] + np.arange(1, horizon + 1), last[:, None])  # (b, h)
    states = normalize_quantile(episodes.state[later], stats)  # (b, h, s)
    near = np.abs(states - normalize_quantile(episodes.state[rows], stats)[:, None]) <= STILL  # never of NaN
    return near.all((1, 2)) & (rows < last) & (states.shape[-1] > 0)


def gather_chunks(episodes: Episodes, rows: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks a[t : t + h] of (b,) rows, within their episodes.

    Returns:
        action_chunk (b, h, a) in data-set units, the last action repeated past the end, 0 where none was recorded;
        action_is_pad (b, h) bool, both cases.
    """
    steps = rows[:, None] + np.arange(horizon)  # (b, h)
    last = episodes.start[episodes.episode_of_row[rows] + 1] - 1  # (b,)
    chunk = episodes.action[np.minimum(steps, last[:, None])]
    unknown = np.isnan(chunk).any(-1)
    return np.where(unknown[..., None], np.float32(0), chunk), (steps > last[:, None]) | unknown
