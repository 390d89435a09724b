"""The tabletop as a gymnasium environment."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.goal import Goal
from envs.tabletop.language import instruction
from envs.tabletop.physics import CONTROL_DT, GRIPPER_RANGE, MAX_SPEED, World, settled
from envs.tabletop.render import Camera
from envs.tabletop.scene import Scene, sample_scene
from envs.tabletop.splits import (
    HELD_OUT_PAIRS,
    SPLITS,
    check_split,
    combination_level,
    perturb_scene,
    perturb_view,
    stream,
)
from envs.tabletop.tasks import TASKS, Progress, TaskGoal, valid_goals


class TabletopEnv(gym.Env):
    """A gripper over a table with objects and zones; told in words which of many possible goals to achieve.

    Observations: `pixels` (H, W, 3) uint8 from above; `agent_pos` (4,) float32: x and y of the gripper (m), 1 if closed,
    1 if holding. Actions in [-1, 1]: x and y velocity (times 0.3 m/s), gripper (> 0 closes). 10 actions a second.

    Raises:
        ValueError: unknown task, split, level, render mode or goal.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_DT)}
    TASKS: ClassVar[tuple[str, ...]] = TASKS
    SEVERAL_GOALS: ClassVar[bool] = True  # in a scene
    MIN_GOALS: ClassVar[int] = 4

    def __init__(
        self,
        tasks: tuple[str, ...] = (),
        image_size: int = 96,
        split: str = "train",
        level: int = 1,
        render_mode: str | None = "rgb_array",
        end_on_success: bool = True,
        max_episode_steps: int = 100,
    ) -> None:
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks {unknown} are not among {', '.join(TASKS)}")
        check_split(split, level)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not one of {self.metadata['render_modes']}")
        self.tasks = tuple(tasks) or TASKS
        self.image_size, self.split, self.level = image_size, split, level
        self.render_mode, self.end_on_success = render_mode, end_on_success
        self._max_episode_steps = max_episode_steps
        self.render_observations = True
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": gym.spaces.Box(
                    np.array([-GRIPPER_RANGE - 1e-3] * 2 + [0, 0], np.float32),
                    np.array([GRIPPER_RANGE + 1e-3] * 2 + [1, 1], np.float32),
                ),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.task_description = self.task = self.goal_id = ""
        self.scene_id = -1

    @classmethod
    def splits(cls) -> dict[str, tuple[int, ...]]:
        """Name of each split -> its levels."""
        return dict(SPLITS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode.

        Args:
            seed: fixes scene, default goal and wording.
            options: `goal`, a goal id valid in the scene; `task`, a task the default goal is then of, if the scene has
                one; `instruction`, a text that replaces the goal's wording.
        """
        super().reset(seed=seed)
        options = options or {}
        scene_seed = int(seed) if seed is not None else int(self.np_random.integers(1 << 31))
        self.scene_id = scene_seed
        self.scene, self._goals, before = self._sample(scene_seed)
        self.world = World(self.scene)
        self.progress = Progress(self.scene, self.world)
        view = perturb_view(self.split, self.level, stream(scene_seed, "view"))
        self._camera = Camera(self.image_size, self.scene, view)
        self._view = view
        self._display: Camera | None = None
        self.goal = self._choose_goal(scene_seed, before, options.get("goal"), options.get("task"))
        self.goal_id, self.task = self.goal.goal_id(self.scene), self.goal.task
        self.task_description = options.get("instruction", self._wording(self.goal))
        self._timestep = 0
        self._pixels = self._camera.picture(self.world)
        return self.observe(fresh=False), self._info()

    def step(self, action: np.ndarray):
        """Apply one action for 0.1 s."""
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self.world.step(MAX_SPEED * action[:2], close=bool(action[2] > 0))
        self.progress.update(self.world)
        self._timestep += 1
        info = self._info()
        terminated = self.end_on_success and info["is_success"]
        truncated = self._timestep >= self._max_episode_steps
        return self.observe(fresh=self.render_observations), float(info["is_success"]), terminated, truncated, info

    def observe(self, fresh: bool = True) -> dict[str, np.ndarray]:
        """The observation now; without `fresh` its picture is the last one drawn."""
        if fresh:
            self._pixels = self._camera.picture(self.world)
        x, y = np.clip(self.world.gripper_position, -GRIPPER_RANGE, GRIPPER_RANGE)
        state = np.array([x, y, self.world.closed, self.world.held is not None], np.float32)
        return {"pixels": self._pixels, "agent_pos": state}

    def pursue(self, goal_id: str) -> None:
        """Ask for another goal of the scene from now on, with things as they are.

        Raises:
            ValueError: no goal of the scene.
        """
        self.goal = self._goal_named(goal_id)
        self.goal_id, self.task, self.task_description = goal_id, self.goal.task, self._wording(self.goal)

    def render(self) -> np.ndarray:
        """(384, 384, 3) uint8, for people."""
        if self._display is None:
            self._display = Camera(384, self.scene, self._view)
        return self._display.picture(self.world)

    def goals(self) -> tuple[Goal, ...]:
        """All valid goals of the current scene, each with one training wording."""
        return tuple(Goal(g.goal_id(self.scene), g.task, self._wording(g)) for g in self._goals)

    @property
    def target_position(self) -> np.ndarray:
        """(2,) m: where the instructed object is now."""
        return self.world.position(self.goal.target)

    def _sample(self, scene_seed: int) -> tuple[Scene, tuple[TaskGoal, ...], tuple[TaskGoal, ...]]:
        """The first scene of the seed's stream with enough goals: scene, its goals, its goals before the perturbation."""
        rng = stream(scene_seed, "scene")
        must_have = HELD_OUT_PAIRS if (self.split, self.level) == ("combination", 2) else ()
        while True:
            unperturbed = settled(sample_scene(rng, must_have))
            before = self._goals_of(unperturbed)
            if len(before) < self._enough:
                continue
            scene = perturb_scene(unperturbed, self.split, self.level, stream(scene_seed, "perturbation"))
            if scene is unperturbed:
                return scene, before, before
            scene = settled(scene)
            goals = self._goals_of(scene)
            if goals:
                return scene, goals, before

    @property
    def _enough(self) -> int:
        """Least number of goals a scene needs: a held-out combination is rare, and only one pair can be separated."""
        if self.split == "combination":
            return 1
        return 2 if set(self.tasks) == {"separate"} else self.MIN_GOALS

    def _goals_of(self, scene: Scene) -> tuple[TaskGoal, ...]:
        level = self.level if self.split == "combination" else 0
        return tuple(g for g in valid_goals(scene) if g.task in self.tasks and combination_level(g, scene) == level)

    def _choose_goal(
        self, scene_seed: int, before: tuple[TaskGoal, ...], goal_id: str | None, task: str | None
    ) -> TaskGoal:
        """The goal asked for; otherwise the one the seed has without perturbation, unless the perturbation rules it out."""
        if goal_id is not None:
            return self._goal_named(goal_id)
        rng = stream(scene_seed, "goal")
        drawn = _draw_goal(before, task, rng)
        return drawn if drawn in self._goals else _draw_goal(self._goals, task, rng)

    def _goal_named(self, goal_id: str) -> TaskGoal:
        for goal in self._goals:
            if goal.goal_id(self.scene) == goal_id:
                return goal
        raise ValueError(f"goal {goal_id!r} is not valid in scene {self.scene_id} of split {self.split!r}")

    def _wording(self, goal: TaskGoal) -> str:
        rng = stream(self.scene_id, "wording/" + goal.goal_id(self.scene))
        return instruction(goal, self.scene, self.split, self.level, rng)

    def _info(self) -> dict[str, Any]:
        achieved = self.progress.achieved(self.world, self._goals)
        holds = dict(zip(self._goals, achieved, strict=True))
        return {
            "is_success": bool(holds[self.goal]),
            "goal_id": self.goal_id,
            "task": self.task,
            "instruction": self.task_description,
            "scene_id": self.scene_id,
            "achieved": tuple(g.goal_id(self.scene) for g, a in holds.items() if a),
        }


def _draw_goal(goals: tuple[TaskGoal, ...], task: str | None, rng: np.random.Generator) -> TaskGoal:
    """A task, then one of its goals; of `task` if there are any."""
    tasks = sorted({goal.task for goal in goals})
    # Drawn in any case, so that asking for a task the scene has anyway changes nothing.
    drawn = tasks[int(rng.integers(len(tasks)))]
    candidates = [goal for goal in goals if goal.task == (task if task in tasks else drawn)]
    return candidates[int(rng.integers(len(candidates)))]
