"""The data contract: keys, axes and the shapes that travel between the parts.

Axes: b batch, t time, h horizon, a action, s state, d embedding, n tokens, c/H/W image, e episodes, r rows
(a row is one stored timestep). Images are uint8 HWC until `vla.models.clip.pixel_values`. SI units unless the
name says otherwise. Actions are in environment units until normalised by `vla.data.normalization`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

# LeRobot's keys, verbatim.
STATE_KEY = "observation.state"
IMAGE_KEY = "observation.image"
IMAGES_PREFIX = "observation.images."
ACTION_KEY = "action"
TASK_KEY = "task"

# Columns that collection adds to a LeRobotDataset, one int64 a row, constant within an episode.
GOAL_KEY = "goal_id"
SCENE_KEY = "scene_id"
SEED_KEY = "seed"
SUCCESS_KEY = "success"
# Optional, (2,) float32 metres a row: where the instructed object is. Only probes and minimal pairs read it.
TARGET_KEY = "target_position"


# Of q99 - q01 and of the standard deviation of actions and states, in their units: a dimension that hardly varies does not blow up.
RANGE_FLOOR = 1e-2


class UserError(Exception):
    """A mistake the user can mend. The message is one line and holds the next command; exit status 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


class Indexed(Protocol):
    """What is indexed like an array's first axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class TripletBatch:
    """Vision-language-action triplets, rows aligned; goals of one scene share the picture they start from.

    frames: (f, H, W, 3) uint8, distinct, read when indexed. frame_of_row: (b,) int64, which of them a row shows.
    state: (b, s) float32, normalised, NaN where unknown. action_chunk: (b, h, a) float32, normalised.
    action_is_pad: (b, h) bool, True means ignore. still: (b,) bool, state and action stay where they are throughout the chunk. The ids are (b,) int64; `text_id` indexes `texts` of the episodes;
    `goal_id` is -1 for a row without an instruction.
    progress: (b,) float32 in (0, 1], share of the episode that has passed.
    pair_id: (b,) a text that differs in one word and names what the row's scene lacks, -1 if there is none; see `MinimalPairs`.
    asked_in: (n, 2) int64, scenes of the batch and the goals that the whole data set asks in them, in pairs.
    """

    frames: Indexed
    frame_of_row: np.ndarray
    state: np.ndarray
    action_chunk: np.ndarray
    action_is_pad: np.ndarray
    still: np.ndarray
    text_id: np.ndarray
    goal_id: np.ndarray
    scene_id: np.ndarray
    episode_id: np.ndarray
    timestep: np.ndarray
    progress: np.ndarray
    pair_id: np.ndarray
    asked_in: np.ndarray


class ChunkPolicy(Protocol):
    """What a rollout needs of a policy."""

    def act(self, images: np.ndarray, state: np.ndarray, instructions: list[str]) -> np.ndarray:
        """(b, H, W, 3) uint8, (b, s) float32 environment units, b texts -> (b, n_action_steps, a) environment units: what is done until the next look."""
        ...
