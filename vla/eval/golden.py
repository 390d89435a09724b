"""Golden observations of a policy folder: what it did where it was trained, repeated where it is used.

A policy that answers otherwise was loaded or is normalised otherwise; a first picture that is drawn otherwise means that the simulator is another one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from envs import make_env
from vla.data.decoding import resize
from vla.data.episodes import Episodes, spread
from vla.data.normalization import NormStats
from vla.types import ChunkPolicy, Indexed, UserError, first_line

GOLDEN = "golden.safetensors"
ARRAYS = ("images", "state", "action", "action_range")
OBSERVATIONS = 4
ACTION_LIMIT = 0.05  # of q99 - q01; bfloat16 and float32 differed by 0.8 % in 32 observations
PICTURE_LIMIT = 2.0  # grey levels of 255, mean over a picture


@dataclass(frozen=True)
class Scene:
    """Of a golden observation: -1 and "" where not known."""

    seed: int
    goal: str
    instruction: str


@dataclass(frozen=True)
class GoldenCheck:
    """How far this machine is from where the policy was trained.

    `action_difference`: the largest, as a share of its dimension's range in training. `picture_difference`: mean over the picture that differs most, in grey levels;
    None where pictures were not compared, `why_not` says why. `reworded`: an instruction of training and how it reads now, if they differ.
    """

    action_difference: float
    picture_difference: float | None = None
    reworded: tuple[str, str] | None = None
    why_not: str = ""

    @property
    def problem(self) -> str:
        """One line for the user; empty if all is well."""
        if not self.action_difference <= ACTION_LIMIT:
            return (
                f"the policy acts otherwise than where it was trained, by {100 * self.action_difference:.0f} % of the actions' range; "
                "install the versions that its concord.json names, or copy the folder anew"
            )
        if self.picture_difference is not None and self.picture_difference > PICTURE_LIMIT:
            return (
                f"the environment's pictures are not those of training, by {self.picture_difference:.1f} of 255 grey levels; "
                "install the versions that meta/concord.json of the data names, or collect and train anew"
            )
        if self.reworded:
            before, now = self.reworded
            return (
                f"the environment words its instructions otherwise than in training, {now!r} for {before!r}; "
                "install the versions that meta/concord.json of the data names, or collect and train anew"
            )
        return ""

    def __str__(self) -> str:
        pictures = "" if self.picture_difference is None else f", pictures within {self.picture_difference:.2g} of 255"
        return f"repeats its actions within {100 * self.action_difference:.2g} % of their range{pictures}"

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self) | {"problem": self.problem}


def write_golden(
    folder: Path, policy: ChunkPolicy, episodes: Episodes, frames: Indexed, positions: np.ndarray, action: NormStats
) -> None:
    """Add to a policy folder the first observations of some episodes with what the policy does there.

    Args:
        folder: of the policy.
        policy: it, as loaded from there.
        episodes: with their pictures in `frames`.
        positions: (n,) of the episodes to choose from, all collected in the environment that `episodes.collected` names, if it names one.
        action: statistics that the actions are normalised by.
    """
    chosen = spread(positions, OBSERVATIONS)
    rows = episodes.start[chosen]
    images, state = episodes.gather_frames(frames, rows), episodes.state[rows]
    instructions = [episodes.texts[t] for t in episodes.text_id[chosen]]
    collected = episodes.collected
    known = "env" in collected and bool((episodes.seed[chosen] >= 0).all())
    goals = [episodes.goals[goal] if goal >= 0 else "" for goal in episodes.goal_id[chosen]]
    scenes = map(Scene, episodes.seed[chosen].tolist(), goals, instructions)
    about = {
        "env": collected["env"] if known else None,
        "env_tasks": collected.get("tasks", []),
        "drawn_at": drawn_at(episodes, images.shape[1]),
        "scenes": [astuple(scene) for scene in scenes],
    }
    arrays = (images, state, policy.act(images, state, instructions), action.q99 - action.q01)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in zip(ARRAYS, arrays, strict=True)},
        folder / GOLDEN,
        metadata={"golden": json.dumps(about)},
    )


def drawn_at(episodes: Episodes, size: int) -> int:
    """The side, px, at which the environment drew the pictures when they were collected; `size` where that is not known.

    A policy that reads another size is to be shown pictures of this one, which it resizes as training did.
    """
    return episodes.collected.get("config", {}).get("env", {}).get("image_size", size)


def check_golden(folder: Path, policy: ChunkPolicy, env: str | None) -> GoldenCheck | None:
    """Repeat the golden observations of a policy folder; None if it has none, as those of other programs.

    Pictures and instructions are compared if they are of the environment `env`.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / GOLDEN
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["golden"])
            images, state, action, action_range = (file.get_tensor(name) for name in ARRAYS)
        scenes = [Scene(*scene) for scene in about["scenes"]]
        acted = policy.act(images, state, [scene.instruction for scene in scenes])
        steps = min(acted.shape[1], action.shape[1])  # n_action_steps may have been changed since
        difference = float(np.max(np.abs(acted[:, :steps] - action[:, :steps]) / action_range))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); copy the folder anew") from error
    if env is None or env != about["env"]:
        return GoldenCheck(difference)
    try:
        return GoldenCheck(difference, *compare_scenes(about, scenes, images))
    except Exception as error:  # noqa: BLE001 - a simulator that is absent or cannot draw raises what it likes
        return GoldenCheck(difference, why_not=f"pictures not compared: {first_line(error)}")


def compare_scenes(
    about: dict[str, Any], scenes: Sequence[Scene], images: np.ndarray
) -> tuple[float, tuple[str, str] | None]:
    """The largest mean difference, in grey levels, of (n, H, W, 3) pictures from what the environment draws now, and an instruction that reads otherwise."""
    env = make_env(about["env"], tasks=tuple(about["env_tasks"]), image_size=about["drawn_at"])
    differences, reworded = [], None
    for image, scene in zip(images, scenes, strict=True):
        observation, info = env.reset(seed=scene.seed, options={"goal": scene.goal} if scene.goal else {})
        drawn = resize(observation["pixels"], images.shape[1])
        differences.append(np.abs(drawn.astype(np.float32) - image).mean())
        if scene.goal and info["instruction"] != scene.instruction:
            reworded = reworded or (scene.instruction, info["instruction"])
    env.close()
    return float(max(differences)), reworded
