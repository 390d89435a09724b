"""From rows to triplets: what one step of stage one sees, as a pure function of (seed, step)."""

import hashlib
import time
from dataclasses import replace

import numpy as np

from vla.data.augmentation import Augmentation, Augmenter
from vla.data.episodes import Episodes
from vla.data.minimal_pairs import MinimalPairs
from vla.data.normalization import Normalizers, normalize_quantile
from vla.data.sampler import MixedSampler
from vla.data.triplets import gather_chunks, stays
from vla.types import Indexed, TripletBatch

PICTURES = 1024  # read at a time


class Pictures:
    """The f distinct pictures of a batch, read and augmented when they are asked for; indexed like an array's first axis."""

    def __init__(
        self, episodes: Episodes, store: np.ndarray, rows: np.ndarray, augmentation: Augmentation | None = None
    ) -> None:
        self.episodes, self.store, self.rows, self.augmentation = episodes, store, rows, augmentation
        self.seconds = 0.0  # spent reading those that were not loaded ahead of time
        self._loaded: tuple[slice, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8."""
        if isinstance(index, slice) and self._loaded is not None and self._loaded[0] == index:
            return self._loaded[1]
        begun = time.perf_counter()
        frames = self._read(index)
        self.seconds += time.perf_counter() - begun
        return frames

    def _read(self, index: slice | np.ndarray) -> np.ndarray:
        frames = self.episodes.gather_frames(self.store, self.rows[index])
        return self.augmentation.apply(frames, np.arange(len(self))[index]) if self.augmentation else frames

    def load(self, index: slice) -> None:
        """Keep some of them in memory, ahead of time."""
        self._loaded = (index, self._read(index))


class TripletSource:
    """Triplets of chosen rows, from the frame store and the in-memory arrays."""

    def __init__(self, episodes: Episodes, frames: np.ndarray, stats: Normalizers, horizon: int) -> None:
        self.episodes, self.frames, self.stats, self.horizon = episodes, frames, stats, horizon
        self.picture_of_row = shared_pictures(episodes, frames)
        self.by_scene = np.argsort(episodes.scene_id, kind="stable")  # episodes

    def gather(self, rows: np.ndarray, text_of_episode: np.ndarray | None = None) -> TripletBatch:
        """(b,) rows -> triplets, not augmented; `text_of_episode` (e,) relabels episodes for the shuffled controls."""
        episodes = self.episodes
        position = episodes.episode_of_row[rows]  # (b,)
        labels = position if text_of_episode is None else text_of_episode[position]
        action_chunk, action_is_pad = gather_chunks(episodes, rows, self.horizon)
        pictures, frame_of_row = np.unique(self.picture_of_row[rows], return_inverse=True)
        return TripletBatch(
            frames=Pictures(episodes, self.frames, pictures),
            frame_of_row=frame_of_row,
            state=normalize_quantile(episodes.state[rows], self.stats.state),
            action_chunk=normalize_quantile(action_chunk, self.stats.action),
            action_is_pad=action_is_pad,
            still=stays(episodes, rows, self.horizon, self.stats),
            text_id=episodes.text_id[labels],
            goal_id=episodes.goal_id[labels],
            scene_id=episodes.scene_id[position],
            episode_id=position.astype(np.int64),
            timestep=episodes.timestep[rows].astype(np.int64),
            progress=progress(episodes, rows),
            pair_id=np.full(len(rows), -1, np.int64),
            asked_in=self.asked_in(np.unique(episodes.scene_id[position]), text_of_episode),
        )

    def asked_in(self, scenes: np.ndarray, text_of_episode: np.ndarray | None = None) -> np.ndarray:
        """(s,) distinct scenes, -1 if unknown -> (n, 2) int64 scenes and the goals that any episode asks in them, each pair once."""
        scene_id, goal_id = self.episodes.scene_id, self.episodes.goal_id
        ordered, scenes = scene_id[self.by_scene], scenes[scenes >= 0]
        first, stop = (np.searchsorted(ordered, scenes, side) for side in ("left", "right"))
        spans = [self.by_scene[a:b] for a, b in zip(first, stop, strict=True)]
        members = np.concatenate([*spans, np.empty(0, np.int64)])
        labels = members if text_of_episode is None else text_of_episode[members]
        pairs = np.stack([scene_id[members], goal_id[labels]], axis=1).astype(np.int64)
        return np.unique(pairs[pairs[:, 1] >= 0], axis=0)


def shared_pictures(episodes: Episodes, frames: Indexed) -> np.ndarray:
    """(r,) for each row the first row with the same picture, as far as episodes of one scene start from the same."""
    picture_of_row = np.arange(len(episodes.frame_row))
    _, scene, members = np.unique(episodes.scene_id, return_inverse=True, return_counts=True)
    together = np.flatnonzero((episodes.scene_id >= 0) & (members[scene] > 1))  # episodes that may share theirs
    first_with: dict[tuple[int, bytes], int] = {}
    for part in np.array_split(together, -(-len(together) // PICTURES) or 1):
        rows = episodes.start[part]
        for row, number, picture in zip(rows, scene[part], episodes.gather_frames(frames, rows), strict=True):
            picture_of_row[row] = first_with.setdefault((int(number), hashlib.sha256(picture).digest()), int(row))
    return picture_of_row


def progress(episodes: Episodes, rows: np.ndarray) -> np.ndarray:
    """(b,) float32 in (0, 1]: share of the row's episode that has passed, this timestep included."""
    position = episodes.episode_of_row[rows]
    length = episodes.start[position + 1] - episodes.start[position]
    return ((rows - episodes.start[position] + 1) / length).astype(np.float32)


def training_batch(
    source: TripletSource,
    sampler: MixedSampler,
    step: int,
    *,
    augmenter: Augmenter,
    text_of_episode: np.ndarray | None = None,
    shuffle_actions: bool = False,
    pairs: MinimalPairs | None = None,
) -> TripletBatch:
    """Batch `step`: sampled, relabelled if it is a control, augmented; its pictures are not read yet."""
    batch = source.gather(sampler.rows(step), text_of_episode)
    rng = np.random.default_rng([sampler.seed, step, 1])
    batch.frames.augmentation = augmenter.draw(rng, len(batch.frames))
    if pairs is not None:
        batch = replace(batch, pair_id=pairs.draw(batch.text_id, batch.goal_id, batch.scene_id, rng))
    if not shuffle_actions:
        return batch
    order = rng.permutation(len(batch.frame_of_row))
    return replace(batch, **{name: getattr(batch, name)[order] for name in ("action_chunk", "action_is_pad", "still")})
