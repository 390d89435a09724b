"""Golden observations of a policy folder: what it did where it was trained, repeated where it is used.

A policy that answers otherwise was loaded or is normalised otherwise; a first picture that is drawn otherwise means that the simulator is another one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from envs import make_env
from vla.data.episodes import Episodes, task_of_episode
from vla.data.normalization import NormStats
from vla.types import ChunkPolicy, Indexed, UserError

GOLDEN = "golden.safetensors"
OBSERVATIONS = 4
ACTION_LIMIT = 0.05  # of q99 - q01; bfloat16 and float32 differ by less than a tenth of that
PICTURE_LIMIT = 2.0  # grey levels of 255, mean over a picture


@dataclass(frozen=True)
class GoldenCheck:
    """How far this machine is from where the policy was trained.

    `action_difference`: the largest, as a share of its dimension's range in training. `picture_difference`: mean over the picture that differs most, in grey levels;
    None where no environment is known.
    """

    action_difference: float
    picture_difference: float | None

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
        return ""

    def __str__(self) -> str:
        pictures = "" if self.picture_difference is None else f", pictures within {self.picture_difference:.2g} of 255"
        return f"repeats its actions within {100 * self.action_difference:.2g} % of their range{pictures}"

    def as_dict(self) -> dict[str, float | str | None]:
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
        positions: (n,) of the episodes to choose from, all collected in the environment that `episodes.extra` names, if it names one.
        action: statistics that the actions are normalised by.
    """
    chosen = positions[np.linspace(0, len(positions) - 1, min(OBSERVATIONS, len(positions))).round().astype(int)]
    rows = episodes.start[chosen]
    images, state = episodes.gather_frames(frames, rows), episodes.state[rows]
    instructions = [episodes.texts[t] for t in episodes.text_id[chosen]]
    extra = episodes.extra or {}
    known = "env" in extra and bool((episodes.seed[chosen] >= 0).all())
    about = {
        "instructions": instructions,
        "env": extra["env"] if known else None,
        "env_tasks": extra.get("tasks", []),
        "seeds": episodes.seed[chosen].tolist(),
        "tasks": task_of_episode(episodes)[chosen].tolist(),
    }
    arrays = {
        "images": images,
        "state": state,
        "action": policy.act(images, state, instructions),
        "action_range": action.q99 - action.q01,
    }
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / GOLDEN,
        metadata={"golden": json.dumps(about)},
    )


def check_golden(folder: Path, policy: ChunkPolicy, env: str | None) -> GoldenCheck | None:
    """Repeat the golden observations of a policy folder; None if it has none, as those of other programs.

    Pictures are compared if they are of the environment `env`.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / GOLDEN
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["golden"])
            golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); copy the folder anew") from error
    acted = policy.act(golden["images"], golden["state"], about["instructions"])
    actions = float(np.max(np.abs(acted - golden["action"]) / golden["action_range"]))
    return GoldenCheck(actions, picture_difference(about, golden["images"]) if env and env == about["env"] else None)


def picture_difference(about: dict, images: np.ndarray) -> float:
    """The largest mean difference, in grey levels, of (n, H, W, 3) pictures from those that the environment draws now."""
    env = make_env(about["env"], tasks=tuple(about["env_tasks"]), image_size=images.shape[1])
    differences = []
    for image, seed, task in zip(images, about["seeds"], about["tasks"], strict=True):
        observation, _ = env.reset(seed=seed, options={"task": task})
        differences.append(np.abs(observation["pixels"].astype(np.float32) - image).mean())
    env.close()
    return float(max(differences))
