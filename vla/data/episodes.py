"""Reader of LeRobotDataset v3 roots: actions, states and ids in memory, pictures left on disk. No hub, no video here."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data.validation import OPTIONAL, validate
from vla.files import read_json
from vla.types import (
    ACTION_KEY,
    GOAL_KEY,
    IMAGE_KEY,
    IMAGES_PREFIX,
    SCENE_KEY,
    SEED_KEY,
    STATE_KEY,
    SUCCESS_KEY,
    TARGET_KEY,
    UserError,
)


@dataclass(frozen=True)
class Episodes:
    """Everything of a data set but its pictures. r rows, e episodes; rows of an episode are contiguous, in time order."""

    root: Path
    camera: str
    fps: int
    state: np.ndarray  # (r, s) float32; NaN, or s = 0, where none was recorded
    action: np.ndarray  # (r, a) float32; NaN, or a = 0, where none was recorded
    timestep: np.ndarray  # (r,) int32
    episode_of_row: np.ndarray  # (r,) int32, position in the e-arrays
    frame_row: np.ndarray  # (r,) int64, row of the frame store
    start: np.ndarray  # (e + 1,) int64, rows of episode i are start[i]:start[i + 1]
    episode_index: np.ndarray  # (e,) LeRobot's
    text_id: np.ndarray  # (e,) int64, indexes `texts`
    goal_id: np.ndarray  # (e,) int64, indexes `goals`; -1 where there is no instruction
    scene_id: np.ndarray  # (e,) int64, -1 where unknown
    seed: np.ndarray  # (e,) int64, -1 where unknown
    success: np.ndarray  # (e,) bool
    texts: tuple[str, ...]
    goals: tuple[str, ...]
    fingerprint: str  # of the data set's files
    target: np.ndarray | None = None  # (r, 2) float32, m: where the instructed object is, if recorded
    collected: dict = field(default_factory=dict)  # meta/concord.json: how it was collected; empty without one

    def gather_frames(self, store: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(b, H, W, 3) uint8 pictures of (b,) rows from the frame store."""
        return store[self.frame_row[rows]]

    def length(self) -> np.ndarray:
        """(e,) timesteps of each episode."""
        return np.diff(self.start)

    def labels(self) -> str:
        """A digest of the instructions, and of which goals and instructions episodes have; none of the files that `fingerprint` is of says them."""
        digest = hashlib.sha256(json.dumps(self.texts).encode())
        for values in (self.text_id, self.goal_id):
            digest.update(values.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


def read_episodes(root: Path | str, camera: str | None = None, *, partial: bool = False) -> Episodes:
    """Open a data set; goals and texts come from the task strings where the id columns are missing.

    Args:
        root: folder of a LeRobotDataset v3.
        camera: image key; may be left out if there is only one.
        partial: actions and states may be missing.
    Raises:
        UserError: not a sound data set (the first problem is named), or no such camera.
    """
    root = Path(root)
    problems = validate(root, partial=partial)
    if problems:
        more = f" (and {len(problems) - 1} more; `python scripts/doctor.py --data={root}` lists them)"
        raise UserError(problems[0] + (more if len(problems) > 1 else ""))
    info = json.loads((root / "meta" / "info.json").read_text())
    camera = choose_camera(root, info["features"], camera)
    optional = [key for key in OPTIONAL if key in info["features"]]
    numeric = [key for key in (STATE_KEY, ACTION_KEY) if key in info["features"]]
    columns = [*numeric, "episode_index", "frame_index", "task_index", *optional]
    table = pa.concat_tables(pq.read_table(p, columns=columns) for p in data_files(root))
    collected = read_json(root / "meta" / "concord.json")

    episode, frame = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
    order = np.lexsort((frame, episode))
    episode_index, first, counts = np.unique(episode[order], return_index=True, return_counts=True)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def vectors(key: str) -> np.ndarray:
        return matrix(table[key])[order] if key in info["features"] else np.zeros((len(order), 0), np.float32)

    def of_episode(key: str, default: int) -> np.ndarray:
        if key not in optional:
            return np.full(len(episode_index), default, np.int64)
        return table[key].to_numpy()[order][first].astype(np.int64)

    tasks = pq.read_table(root / "meta" / "tasks.parquet").to_pylist()
    text_of_task = {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in tasks}
    episode_texts = [str(text_of_task[t] or "") for t in table["task_index"].to_numpy()[order][first]]
    texts, text_id = np.unique(episode_texts, return_inverse=True)
    if GOAL_KEY in optional:
        goal_id, goals = named_goals(root, of_episode(GOAL_KEY, 0), collected.get("goals"))
    else:
        goal_id, goals = goals_of_texts(texts.tolist(), text_id)
    goal_id = np.where([bool(text.strip()) for text in episode_texts], goal_id, -1)
    return Episodes(
        root=root,
        camera=camera,
        fps=int(info["fps"]),
        state=vectors(STATE_KEY),
        action=vectors(ACTION_KEY),
        timestep=frame[order].astype(np.int32),
        episode_of_row=np.repeat(np.arange(len(episode_index), dtype=np.int32), counts),
        frame_row=order.astype(np.int64),
        start=start,
        episode_index=episode_index,
        text_id=text_id.astype(np.int64),
        goal_id=goal_id,
        scene_id=of_episode(SCENE_KEY, -1),
        seed=of_episode(SEED_KEY, -1),
        success=of_episode(SUCCESS_KEY, 1).astype(bool),
        texts=tuple(texts.tolist()),
        goals=goals,
        fingerprint=fingerprint(root),
        target=vectors(TARGET_KEY) if TARGET_KEY in optional else None,
        collected=collected,
    )


def named_goals(root: Path, goal_id: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(e,) goals as indices of their names; ids that have no names become these, however large they are. Below 0 is none.

    Raises:
        UserError: an id beyond the names.
    """
    if names is not None:
        if (largest := int(goal_id.max())) >= len(names):
            raise UserError(f"{root}: goal_id {largest} is beyond the {len(names)} goals of meta/concord.json")
        return np.maximum(goal_id, -1), tuple(names)
    values, dense = np.unique(goal_id[goal_id >= 0], return_inverse=True)
    found = np.full_like(goal_id, -1)
    found[goal_id >= 0] = dense
    return found, tuple(str(value) for value in values)


def as_read(text: str) -> str:
    """A text as CLIP's tokenizer reads it, to which capitals, repeated spaces and composed accents are all the same."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def goals_of_texts(texts: Sequence[str], text_id: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(e,) goals, one for all texts that read the same, named by the first of them."""
    named: dict[str, str] = {}
    for text in texts:
        named.setdefault(as_read(text), text)
    number = {read: goal for goal, read in enumerate(named)}
    return np.array([number[as_read(text)] for text in texts], np.int64)[text_id], tuple(named.values())


def select(episodes: Episodes, positions: np.ndarray) -> Episodes:
    """Only the episodes at (n,) positions, in that order; rows still point at their pictures."""
    positions = np.asarray(positions)
    rows = rows_of(episodes, positions)
    counts = episodes.length()[positions]
    return replace(
        episodes,
        state=episodes.state[rows],
        action=episodes.action[rows],
        timestep=episodes.timestep[rows],
        episode_of_row=np.repeat(np.arange(len(positions), dtype=np.int32), counts),
        frame_row=episodes.frame_row[rows],
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{
            name: getattr(episodes, name)[positions]
            for name in ("episode_index", "text_id", "goal_id", "scene_id", "seed", "success")
        },
        target=None if episodes.target is None else episodes.target[rows],
    )


def rows_of(episodes: Episodes, positions: np.ndarray) -> np.ndarray:
    """All rows of the episodes at (n,) positions, in order."""
    if len(positions) == 0:
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(episodes.start[p], episodes.start[p + 1]) for p in positions])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of (n,) rows or positions, evenly, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def split_episodes(episodes: Episodes, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation episodes; episodes of one scene stay together.

    At least one group is held out, and at least one stays for training.
    """
    unknown = episodes.scene_id < 0
    group = np.where(unknown, -1 - np.arange(len(unknown)), episodes.scene_id)
    groups = np.random.default_rng([seed, 3]).permutation(np.unique(group))
    if len(groups) < 2:
        raise UserError(f"{episodes.root}: one scene or episode only; nothing can be held out for validation")
    count = min(max(1, round(holdout * len(groups))), len(groups) - 1)
    held_out = np.isin(group, groups[:count])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def task_of_episode(episodes: Episodes) -> np.ndarray:
    """(e,) name of each episode's task: what meta/concord.json says, else its goal."""
    names = episodes.collected.get("task_of_goal", {})
    return np.array([*(names.get(goal, goal) for goal in episodes.goals), ""])[episodes.goal_id]  # the last of none


def limit_per_task(episodes: Episodes, positions: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """At most `count` of the chosen episodes for each task, drawn by seed, in their order; fewer are a part of more."""
    if count is None:
        return positions
    shuffled = np.random.default_rng(seed).permutation(positions)
    task = task_of_episode(episodes)[shuffled]
    order = np.argsort(task, kind="stable")
    rank = np.arange(len(task)) - np.searchsorted(task[order], task[order])
    return np.sort(shuffled[order][rank < count])


def choose_camera(root: Path, features: dict, camera: str | None) -> str:
    """The camera's image key."""
    cameras = [
        key
        for key, feature in features.items()
        if feature["dtype"] in ("image", "video") and (key == IMAGE_KEY or key.startswith(IMAGES_PREFIX))
    ]
    listed = ", ".join(cameras)
    if not cameras:
        raise UserError(f"{root}: has no image feature, {IMAGE_KEY} or {IMAGES_PREFIX}NAME")
    if camera is None:
        if len(cameras) != 1:
            raise UserError(
                f"{root}: name one of its cameras, {listed}, with --data.camera=KEY (doctor: --camera=KEY); a data set of --more needs "
                "one camera alone, or one named like data.root's"
            )
        return cameras[0]
    if camera not in cameras:
        raise UserError(f"{root}: data.camera {camera!r} is not one of its cameras ({listed})")
    return camera


def data_files(root: Path) -> list[Path]:
    """The data set's parquet files, in row order."""
    return sorted(root.glob("data/*/*.parquet"))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(r, n) float32 of a column of vectors or scalars."""
    flat = column.combine_chunks()
    values = flat.flatten() if pa.types.is_nested(flat.type) else flat
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def fingerprint(root: Path) -> str:
    """A digest of the data set's metadata and of every data file's name, size and last 64 kB, videos and their tables included."""
    digest = hashlib.sha256()
    videos = sorted(root.glob("videos/**/*.mp4"))
    tables = sorted(root.glob("meta/episodes/*/*.parquet")) if videos else []
    for path in [root / "meta" / "info.json", root / "meta" / "stats.json", *data_files(root), *tables, *videos]:
        digest.update(path.name.encode() + str(path.stat().st_size).encode())
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            digest.update(file.read())
    return digest.hexdigest()[:16]
