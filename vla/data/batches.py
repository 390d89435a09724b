"""From rows to triplets: what one step of stage one sees, as a pure function of (seed, step)."""

from dataclasses import dataclass

import numpy as np

from vla.data.augmentation import augment
from vla.data.episodes import Episodes
from vla.data.normalization import NormStats, normalize_quantile
from vla.data.sampler import GoalSampler
from vla.data.triplets import gather_chunks
from vla.types import TripletBatch


@dataclass(frozen=True)
class Normalizers:
    """Statistics of the training episodes' actions and states."""

    action: NormStats
    state: NormStats


class TripletSource:
    """Triplets of chosen rows, from the frame store and the in-memory arrays."""

    def __init__(self, episodes: Episodes, frames: np.ndarray, stats: Normalizers, horizon: int) -> None:
        self.episodes, self.frames, self.stats, self.horizon = episodes, frames, stats, horizon
        self.picture_of_row = shared_pictures(episodes, frames)

    def gather(self, rows: np.ndarray, text_of_episode: np.ndarray | None = None) -> TripletBatch:
        """(b,) rows -> triplets, not augmented; `text_of_episode` (e,) relabels episodes for the shuffled controls."""
        episodes = self.episodes
        position = episodes.episode_of_row[rows]  # (b,)
        labels = position if text_of_episode is None else text_of_episode[position]
        action_chunk, action_is_pad = gather_chunks(episodes, rows, self.horizon)
        pictures, frame_of_row = np.unique(self.picture_of_row[rows], return_inverse=True)
        return TripletBatch(
            frames=episodes.gather_frames(self.frames, pictures),
            frame_of_row=frame_of_row,
            state=normalize_quantile(episodes.state[rows], self.stats.state),
            action_chunk=normalize_quantile(action_chunk, self.stats.action),
            action_is_pad=action_is_pad,
            text_id=episodes.text_id[labels],
            goal_id=episodes.goal_id[labels],
            scene_id=episodes.scene_id[position],
            episode_id=position.astype(np.int64),
            timestep=episodes.timestep[rows].astype(np.int64),
            progress=progress(episodes, rows),
        )


def shared_pictures(episodes: Episodes, frames: np.ndarray) -> np.ndarray:
    """(r,) for each row the first row with the same picture, as far as episodes of one scene start from the same."""
    picture_of_row = np.arange(len(episodes.frame_row))
    first_of_scene: dict[int, tuple[int, np.ndarray]] = {}
    for row, scene in zip(episodes.start[:-1], episodes.scene_id, strict=True):
        if scene >= 0:
            picture = frames[episodes.frame_row[row]]
            first, seen = first_of_scene.setdefault(int(scene), (int(row), picture))
            if np.array_equal(picture, seen):
                picture_of_row[row] = first
    return picture_of_row


def progress(episodes: Episodes, rows: np.ndarray) -> np.ndarray:
    """(b,) float32 in (0, 1]: share of the row's episode that has passed, this timestep included."""
    position = episodes.episode_of_row[rows]
    length = episodes.start[position + 1] - episodes.start[position]
    return ((rows - episodes.start[position] + 1) / length).astype(np.float32)


def training_batch(
    source: TripletSource,
    sampler: GoalSampler,
    step: int,
    *,
    shift_px: int,
    color_jitter: float,
    text_of_episode: np.ndarray | None,
    shuffle_actions: bool,
) -> TripletBatch:
    """Batch `step`: sampled, relabelled if it is a control, augmented."""
    batch = source.gather(sampler.rows(step), text_of_episode)
    rng = np.random.default_rng([sampler.seed, step, 1])
    changes: dict[str, np.ndarray] = {"frames": augment(batch.frames, rng, shift_px, color_jitter)}
    if shuffle_actions:
        order = rng.permutation(len(batch.frame_of_row))
        changes |= {"action_chunk": batch.action_chunk[order], "action_is_pad": batch.action_is_pad[order]}
    return batch.replace(**changes)
