"""Meta-World v3 behind the interface of the tabletop: a thin adapter, one simulated task at a time.

Pictures are drawn without shadows, reflections and multisampling, which is about eight times faster and looks different from
other people's: `metadata["rendering"]` says so. Camera as in LeRobot: corner2, moved, flipped on both axes.
"""

import atexit
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from envs.goal import Goal
from envs.metaworld.gl import ensure_gl, rendering
from envs.metaworld.language import INSTRUCTIONS

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)


class MetaWorldEnv(gym.Env):
    """One of Meta-World's tasks at each reset.

    Observations: `pixels` (H, W, 3) uint8; `agent_pos` (4,) float32, gripper position (m) and opening. Actions in
    [-1, 1]: x, y, z displacement and gripper. 80 actions a second of simulated time.

    Raises:
        ValueError: unknown task, split, level or render mode.
        RenderingError: at the first reset, nothing to render with.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 80, "rendering": "fast"}
    TASKS: ClassVar[tuple[str, ...]] = tuple(INSTRUCTIONS)
    SEVERAL_GOALS: ClassVar[bool] = False

    def __init__(
        self,
        tasks: tuple[str, ...] = (),
        image_size: int = 96,
        split: str = "train",
        level: int = 1,
        render_mode: str | None = "rgb_array",
        end_on_success: bool = True,
        max_episode_steps: int = 250,
    ) -> None:
        unknown = [task for task in tasks if task not in INSTRUCTIONS]
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is not one of Meta-World's 50, such as hammer-v3")
        if (split, level) != ("train", 1):
            raise ValueError(f"split {split!r} level {level}: Meta-World has the split 'train', level 1, only")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not one of {self.metadata['render_modes']}")
        self.tasks = tuple(tasks) or self.TASKS
        self.image_size, self.split, self.level = image_size, split, level
        self.render_mode, self.end_on_success = render_mode, end_on_success
        self._max_episode_steps = max_episode_steps
        self.render_observations = True
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.task = self.goal_id = self.tasks[0]
        self.task_description = INSTRUCTIONS[self.task]
        self.scene_id = -1
        self.state = np.zeros(39)  # Meta-World's full state, which the expert reads
        self._running: tuple[str, Any, Any] | None = None  # a task, its simulation and renderer

    @classmethod
    def splits(cls) -> dict[str, tuple[int, ...]]:
        """Name of each split -> its levels."""
        return {"train": (1,)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start an episode.

        Args:
            seed: fixes the task, if not asked for, and where things are.
            options: `task` or `goal`, one of the tasks; `instruction`, a text that replaces the task's sentence.
        """
        super().reset(seed=seed)
        options = options or {}
        scene_seed = int(seed) if seed is not None else int(self.np_random.integers(1 << 31))
        drawn = self.tasks[int(np.random.default_rng([scene_seed, 1]).integers(len(self.tasks)))]
        self.task = self.goal_id = options.get("goal") or options.get("task") or drawn
        if self.task not in self.tasks:
            raise ValueError(f"goal {self.task!r} is not among this environment's tasks {self.tasks}")
        self.task_description = options.get("instruction", INSTRUCTIONS[self.task])
        self.scene_id = len(self.TASKS) * scene_seed + self.TASKS.index(self.task)
        simulation = self._simulation()
        simulation.seed(scene_seed)
        self.state, _ = simulation.reset()
        self._timestep, self._success = 0, False
        return self.observe(), self._info()

    def step(self, action: np.ndarray):
        """Apply one action."""
        self.state, reward, _, _, info = self._simulation().step(np.clip(action, -1, 1))
        self._timestep += 1
        self._success = bool(info["success"])
        terminated = self.end_on_success and self._success
        truncated = self._timestep >= self._max_episode_steps
        return self.observe(fresh=self.render_observations), float(reward), terminated, truncated, self._info()

    def observe(self, fresh: bool = True) -> dict[str, np.ndarray]:
        """The observation now; without `fresh` its picture is the last one drawn."""
        if fresh:
            self._pixels = self.render()
        return {"pixels": self._pixels, "agent_pos": self.state[:4].astype(np.float32)}

    def render(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        _, simulation, renderer = self._running
        renderer.update_scene(simulation.data, CAMERA)
        return np.ascontiguousarray(renderer.render()[::-1, ::-1])

    def goals(self) -> tuple[Goal, ...]:
        """The task: what a Meta-World scene holds can be used for it only."""
        return (Goal(self.task, self.task, INSTRUCTIONS[self.task]),)

    def close(self) -> None:
        """Release the simulation and its renderer; the next reset makes others."""
        if self._running is not None:
            _, simulation, renderer = self._running
            atexit.unregister(renderer.close)
            renderer.close()
            simulation.close()
        self._running = None

    def _simulation(self) -> Any:
        """The simulated task; made, with a renderer of its own, when first needed, in the process that uses it.

        That of the task before is released: each takes some 100 MB.
        """
        if self._running is not None and self._running[0] == self.task:
            return self._running[1]
        self.close()
        with rendering():
            ensure_gl()
            import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        simulation = ALL_V3_ENVIRONMENTS[self.task]()
        simulation._partially_observable = False
        # Cached while the goal was still hidden; its bounds would clip the goal to zero.
        simulation.__dict__.pop("sawyer_observation_space", None)
        simulation._freeze_rand_vec = False
        simulation.seeded_rand_vec = True
        simulation._set_task_called = True
        simulation.max_path_length = max(simulation.max_path_length, self._max_episode_steps)
        model = simulation.model
        model.cam_pos[model.camera(CAMERA).id] = CAMERA_POSITION
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.mat_reflectance[:] = 0
        with rendering():  # not the simulation's own renderer, which draws into whatever OpenGL context was made last
            renderer = mujoco.Renderer(model, self.image_size, self.image_size)
        atexit.register(renderer.close)  # later, OpenGL is gone and complains
        self._running = self.task, simulation, renderer
        return simulation

    def _info(self) -> dict[str, Any]:
        return {
            "is_success": self._success,
            "goal_id": self.goal_id,
            "task": self.task,
            "instruction": self.task_description,
            "scene_id": self.scene_id,
            "achieved": (self.goal_id,) if self._success else (),
        }
