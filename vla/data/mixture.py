"""Several data sets as one: their rows one after another, texts and goals by name, pictures from each one's store."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from vla.config import DataConfig
from vla.data.episodes import Episodes, as_read, limit_per_task, read_episodes, split_episodes
from vla.data.frames import open_pictures
from vla.files import read_json
from vla.types import UserError


@dataclass(frozen=True)
class Mixture:
    """What a stage trains on. Positions are those of the episodes; held out are only some of the first data set."""

    episodes: Episodes
    frames: "np.ndarray | Stores"
    train: list[np.ndarray]  # positions, one array a data set
    validation: np.ndarray  # positions; in stage one all with an instruction
    weights: list[float]  # of the data sets in a batch


class Stores:
    """Frame stores one after another, indexed by row like one array."""

    def __init__(self, stores: Sequence[np.ndarray]) -> None:
        self.stores = stores
        self.first = np.cumsum([0, *(len(store) for store in stores)])
        self.shape = (len(self), *stores[0].shape[1:])

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8 of (n,) rows."""
        which = np.searchsorted(self.first, rows, side="right") - 1
        pictures = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for number in np.unique(which):
            chosen = which == number
            pictures[chosen] = self.stores[number][rows[chosen] - self.first[number]]
        return pictures


def open_mixture(data: DataConfig, more: Sequence[str], seed: int, told: bool = True, partial: bool = False) -> Mixture:
    """The data set of `data` and further ones, each ROOT or ROOT=WEIGHT; `data.root` has weight 1.

    The further ones may lack actions, states or, in episodes whose task is empty, instructions. They are trained on whole.

    Args:
        told: only episodes with an instruction are held out for validation.
        partial: the first one may lack what further ones may.

    Raises:
        UserError: a weight that is no positive number, `data.root` again, data sets that do not fit together, or unusable ones.
    """
    named = [root_and_weight(text) for text in more]
    again = [root for root, _ in named if Path(root).resolve() == Path(data.root).resolve()]
    if again:
        raise UserError(
            f"config error: more: {again[0]} is data.root itself, so what it holds out would be trained on; leave it out"
        )
    own = read_episodes(data.root, data.camera, partial=partial)
    parts = [own, *(read_episodes(root, camera_in(root, data.camera), partial=True) for root, _ in named)]
    train, validation = split_episodes(own, data.holdout, seed)
    train = limit_per_task(own, train, data.episodes_per_task, seed)
    validation = validation[own.goal_id[validation] >= 0] if told else validation
    if not len(validation):
        raise UserError(f"{data.root}: no held-out episode has an instruction; raise --data.holdout")
    ends = np.cumsum([len(part.goal_id) for part in parts])
    stores = [open_pictures(own, data)]
    stores += [open_pictures(part, data) for part in parts[1:]]
    return Mixture(
        episodes=joined(parts) if more else own,
        frames=Stores(stores) if more else stores[0],
        train=[train, *(np.arange(*span) for span in pairwise(ends))],
        validation=validation,
        weights=[1.0, *(weight for _, weight in named)],
    )


def camera_in(root: str, camera: str | None) -> str | None:
    """The camera, if a data set has one of that name; else its only one."""
    try:
        features = read_json(Path(root) / "meta" / "info.json").get("features", {})
    except UserError:  # the reader says which
        return None
    return camera if camera in features else None


def root_and_weight(text: str) -> tuple[str, float]:
    """ROOT or ROOT=WEIGHT."""
    root, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not root or not 0 < value < float("inf"):
        raise UserError(f"config error: more: {text!r} is not ROOT or ROOT=WEIGHT with a positive weight")
    return root, value


def joined(parts: Sequence[Episodes]) -> Episodes:
    """One data set of several; what one of them lacks is NaN.

    Raises:
        UserError: actions or states of another size, or actions at another rate, than the first one's.
    """
    first = parts[0]
    for part in parts[1:]:
        for name in ("action", "state"):
            size, expected = getattr(part, name).shape[1], getattr(first, name).shape[1]
            if size not in (0, expected):
                raise UserError(
                    f"{part.root}: {name} has {size} dimensions, {first.root} has {expected}; leave it out of --more"
                )
        if part.action.shape[1] and part.fps != first.fps:
            raise UserError(
                f"{part.root}: recorded at {part.fps} Hz, {first.root} at {first.fps} Hz; leave it out of --more"
            )
    texts = {text for part in parts for text in part.texts}
    keys, goals = told_goals(parts)
    text_number, goal_number = ({name: i for i, name in enumerate(sorted(names))} for names in (texts, goals))
    rows, episodes, scenes = 0, 0, 0
    columns: dict[str, list[np.ndarray]] = {}
    for part, keys_of_part in zip(parts, keys, strict=True):
        text_of = np.array([text_number[text] for text in part.texts])
        goal_of = np.array([*(goal_number[key] for key in keys_of_part), -1])  # the last of none
        shifted = {
            "state": widened(part.state, first.state.shape[1]),
            "action": widened(part.action, first.action.shape[1]),
            "timestep": part.timestep,
            "episode_of_row": part.episode_of_row + episodes,
            "frame_row": part.frame_row + rows,
            "start": part.start[:-1] + rows,
            "episode_index": part.episode_index,
            "text_id": text_of[part.text_id],
            "goal_id": goal_of[part.goal_id],
            "scene_id": np.where(part.scene_id >= 0, part.scene_id + scenes, -1),
            "seed": part.seed,
            "success": part.success,
        }
        for name, values in shifted.items():
            columns.setdefault(name, []).append(values)
        rows, episodes = rows + len(part.frame_row), episodes + len(part.goal_id)
        scenes += max(0, int(part.scene_id.max()) + 1)
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    arrays["start"] = np.append(arrays["start"], rows)
    return Episodes(
        root=first.root,
        camera=first.camera,
        fps=first.fps,
        **arrays,
        texts=tuple(sorted(texts)),
        goals=tuple(goals[key] for key in sorted(goals)),
        fingerprint=hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:16],
        target=None if first.target is None else np.concatenate([target_of(part) for part in parts]),
        collected=first.collected,
    )


def told_goals(parts: Sequence[Episodes]) -> tuple[list[list[str]], dict[str, str]]:
    """What tells the goals of each of several data sets apart among all, and the goals' names by it, as the first one spells them.

    A goal that its data set names is told by that name. One that is a text or a number is that of a data set with names, or of one
    before it, if they have a text that asks for one goal alone in both; otherwise a text tells itself, and a number means nothing outside
    its own data set.
    """
    keys: dict[int, list[str]] = {}
    names: dict[str, str] = {}
    asked_by: dict[str, set[str]] = {}  # goals by what asks for them, as it is read
    for number in sorted(range(len(parts)), key=lambda number: not names_goals(parts[number])):
        part = parts[number]
        texts: dict[int, set[str]] = {}
        for goal, text in set(zip(part.goal_id.tolist(), part.text_id.tolist(), strict=True)):
            texts.setdefault(goal, set()).add(as_read(part.texts[text]))
        numbered = not names_goals(part) and not set(part.goals) <= set(part.texts)
        own = [f"#{number}:{goal}" if numbered else as_read(goal) for goal in part.goals]
        asks = Counter(text for of_goal in texts.values() for text in of_goal)
        clear = [{text for text in texts.get(goal, ()) if asks[text] == 1} for goal in range(len(own))]
        if not names_goals(part):
            same = [set().union(*(asked_by.get(text, ()) for text in of_goal)) for of_goal in clear]
            own = [next(iter(found)) if len(found) == 1 else key for found, key in zip(same, own, strict=True)]
        for goal, key in enumerate(own):
            names.setdefault(key, key if numbered else part.goals[goal])
            for text in clear[goal]:
                asked_by.setdefault(text, set()).add(key)
        keys[number] = own
    return [keys[number] for number in range(len(parts))], names


def names_goals(episodes: Episodes) -> bool:
    """Whether the data set says what its goals are, beside the texts that ask for them."""
    return "goals" in episodes.collected


def widened(values: np.ndarray, size: int) -> np.ndarray:
    """(r, size), NaN where (r, 0) values lack."""
    return values if values.shape[1] else np.full((len(values), size), np.nan, np.float32)


def target_of(episodes: Episodes) -> np.ndarray:
    """(r, 2) where the instructed object is; NaN where it was not recorded."""
    return np.full((len(episodes.frame_row), 2), np.nan, np.float32) if episodes.target is None else episodes.target
