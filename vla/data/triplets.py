"""Action chunks from the in-memory actions."""

import numpy as np

from vla.data.episodes import Episodes


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
