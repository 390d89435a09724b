"""One episode: what to run, while it runs, and what happened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from vla.eval.video import beside_attention, write_video


@dataclass(frozen=True)
class EpisodeSpec:
    """What to run. `goal` and `instruction` replace the seed's own if given; `kind` labels the measurement.

    `end_on_success` ends it at the first success.
    """

    env: str
    task: str
    seed: int
    tasks: tuple[str, ...] = ()
    split: str = "train"
    level: int = 1
    goal: str | None = None
    instruction: str | None = None
    image_size: int = 96
    kind: str = "success"
    end_on_success: bool = False


@dataclass(frozen=True)
class EpisodeRecord:
    """What happened. `achieved` holds every goal of the scene that held at some timestep after the first.

    `success_final` is None for an episode that ended at its first success.
    """

    kind: str
    env: str
    task: str
    goal: str
    instruction: str
    split: str
    level: int
    seed: int
    success: bool
    success_final: bool | None
    steps: int  # to the first success, or all
    achieved: tuple[str, ...]
    video: str | None = None


@dataclass(eq=False)
class RunningEpisode:
    """An episode in its environment, which draws a picture only when the policy looks."""

    spec: EpisodeSpec
    env: gym.Env
    observation: dict[str, np.ndarray]
    told: dict[str, Any]  # of the reset: task, goal, instruction, and what holds already
    film: list[np.ndarray] | None
    achieved: set[str] = field(default_factory=set)
    looked_at: np.ndarray | None = None  # (side, side), where the policy looked last
    timesteps: int = 0
    first_success: int | None = None  # timesteps to it
    succeeds: bool = False  # now
    running: bool = True

    def look(self) -> None:
        """Draw what there is to see now."""
        if self.timesteps:  # a reset has drawn it
            self.observation = self.env.observe()

    def step(self, action: np.ndarray) -> None:
        """Act for one timestep, (a,) in the environment's units, clipped to what it takes."""
        space = self.env.action_space
        action = np.clip(action, space.low, space.high).astype(np.float32)
        self.observation, _, _, truncated, info = self.env.step(action)
        self.timesteps += 1
        self.succeeds = info["is_success"]
        self.achieved |= set(info["achieved"])
        if self.succeeds and self.first_success is None:
            self.first_success = self.timesteps
        if self.film is not None:
            self.film.append(beside_attention(self.env.render(), self.looked_at))
        self.running = not (truncated or (self.succeeds and self.spec.end_on_success))

    def save_film(self, path: Path) -> None:
        """Write what was filmed, with the instruction as its caption."""
        write_video(path, self.film, self.env.metadata["render_fps"], self.told["instruction"])

    def record(self, video: str | None) -> EpisodeRecord:
        """What happened; `video` is the name of its film."""
        succeeded = self.first_success is not None
        return EpisodeRecord(
            kind=self.spec.kind,
            env=self.spec.env,
            task=self.told["task"],
            goal=self.told["goal_id"],
            instruction=self.told["instruction"],
            split=self.spec.split,
            level=self.spec.level,
            seed=self.spec.seed,
            success=succeeded,
            success_final=None if self.spec.end_on_success and succeeded else bool(self.succeeds),
            steps=self.first_success if succeeded else self.timesteps,
            achieved=tuple(sorted(self.achieved - set(self.told["achieved"]))),
            video=video,
        )


def begin(env: gym.Env, spec: EpisodeSpec, *, filmed: bool) -> RunningEpisode:
    """Reset an environment to what is specified."""
    options = {"task": spec.task, "goal": spec.goal, "instruction": spec.instruction}
    env.render_observations = False
    observation, told = env.reset(
        seed=spec.seed, options={key: value for key, value in options.items() if value is not None}
    )
    return RunningEpisode(spec, env, observation, told, film=[] if filmed else None)
