"""Action chunks from the in-memory actions, and whether anything moves meanwhile."""

import numpy as np

from vla.data.episodes import Episodes
from vla.data.normalization import Normalizers, normalize_quantile

STILL = 0.01  # of a state and an action, normalised units


def stays(episodes: Episodes, rows: np.ndarray, horizon: int, stats: Normalizers) -> np.ndarray:
    """(b,) bool: whether nothing moves for `horizon` timesteps, or what the row's episode has of them.

    State and action both have to stay within `STILL` of the row's, normalised: a state may lack what moves, and a steady command may
    move it. Not of rows that are the last of their episode, nor where states or actions are unknown.
    """
    last = episodes.start[episodes.episode_of_row[rows] + 1] - 1  # (b,)
    later = np.minimum(rows[:, None] + np.arange(1, horizon + 1), last[:, None])  # (b, h)
    still = rows < last
    for values, of_values in ((episodes.state, stats.state), (episodes.action, stats.action)):
        moved = np.abs(
            normalize_quantile(values[later], of_values) - normalize_quantile(values[rows], of_values)[:, None]
        )
        still &= (moved <= STILL).all((1, 2)) & (moved.shape[-1] > 0)  # never of NaN
    return still


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
