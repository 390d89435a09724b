"""Goals: what can be asked of a scene, and when it is achieved."""

from dataclasses import dataclass

import numpy as np

from envs.tabletop.physics import World
from envs.tabletop.scene import DIRECTIONS, TABLE_HALF, ZONE_HALF, Scene

TASKS = ("reach", "push", "pick", "place", "next_to", "separate")

REACH_TOLERANCE = 0.02  # m
REACH_STEPS = 3  # timesteps the open gripper has to stay over the object
HOLD_STEPS = 5  # timesteps an object has to be held
PUSH_DISTANCE = 0.06  # m
PUSH_COSINE = np.cos(np.deg2rad(35))
PUSH_ROOM = 0.10  # m of free way that a push goal needs
NEXT_TO = 0.085  # m between centres
APART = 0.15  # m between centres
TOGETHER = 0.072  # m between the centres of a pair that can be separated
OVERLAP = 0.003  # m, deeper is on top of another object rather than beside it


@dataclass(frozen=True)
class TaskGoal:
    """A goal on one scene. `target` and `other` index objects, `zone` zones; what a task does not use is None."""

    task: str
    target: int
    other: int | None = None
    zone: int | None = None
    direction: str | None = None

    def goal_id(self, scene: Scene) -> str:
        """Canonical, wording-free id, e.g. `place/red/star/on/blue`."""
        thing = scene.objects[self.target]
        parts = [self.task, thing.color, thing.shape]
        if self.direction is not None:
            parts.append(self.direction)
        if self.zone is not None:
            parts += ["on", scene.zones[self.zone].color]
        if self.other is not None:
            parts += ["and", scene.objects[self.other].color, scene.objects[self.other].shape]
        return "/".join(parts)


def valid_goals(scene: Scene) -> tuple[TaskGoal, ...]:
    """Every goal that does not hold already and has the room it needs, in a fixed order."""
    count = len(scene.objects)
    at = np.array([(t.x, t.y) for t in scene.objects + scene.distractors])
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    objects = range(count)
    goals = [TaskGoal("reach", i) for i in objects]
    goals += [TaskGoal("push", i, direction=d) for i in objects for d in DIRECTIONS if _free_way(at, i, d)]
    goals += [TaskGoal("pick", i) for i in objects]
    goals += [
        TaskGoal("place", i, zone=z)
        for i in objects
        for z, zone in enumerate(scene.zones)
        if not _in_zone(at[i], (zone.x, zone.y)) and not _occupied(at, i, (zone.x, zone.y))
    ]
    for i in objects:
        for j in objects:
            if i != j and distance[i, j] > 0.11:
                goals.append(TaskGoal("next_to", i, other=j))
            elif i != j and distance[i, j] < TOGETHER:
                goals.append(TaskGoal("separate", i, other=j))
    return tuple(goals)


def _free_way(at: np.ndarray, index: int, direction: str) -> bool:
    """Room behind the object for the gripper, and a free way before it."""
    d = np.array(DIRECTIONS[direction])
    start, end = at[index] - 0.055 * d, at[index] + PUSH_ROOM * d
    if np.abs(start).max() > TABLE_HALF - 0.015 or np.abs(end).max() > TABLE_HALF - 0.035:
        return False
    offsets = np.delete(at, index, axis=0) - at[index]
    along, across = offsets @ d, np.abs(offsets @ np.array([-d[1], d[0]]))
    return not np.any((along > -0.085) & (along < PUSH_ROOM + 0.05) & (across < 0.06))


def _in_zone(position: np.ndarray, zone: tuple[float, float]) -> bool:
    x, y = position.tolist()
    return max(abs(x - zone[0]), abs(y - zone[1])) < ZONE_HALF - 0.01


def _occupied(at: np.ndarray, index: int, zone: tuple[float, float]) -> bool:
    others = np.delete(at, index, axis=0)
    return bool(np.any(np.linalg.norm(others - np.array(zone), axis=1) < 0.065))


class Progress:
    """What the goals need to remember of an episode: start positions, how long something lasted, what was held."""

    def __init__(self, scene: Scene, world: World) -> None:
        self.scene = scene
        self.start = self.now = world.positions(len(scene.objects))  # (n, 2) m
        self.over = np.zeros(len(self.start), int)  # timesteps the open gripper has been over each object
        self.held = np.zeros(len(self.start), int)  # timesteps each object has been held without a break
        self.ever_held = np.zeros(len(self.start), bool)

    def update(self, world: World) -> None:
        """Take note of a timestep."""
        now = self.now = world.positions(len(self.start))
        near = np.linalg.norm(now - world.gripper_position, axis=1) < REACH_TOLERANCE
        self.over = np.where(near & (not world.closed), self.over + 1, 0)
        holding = np.arange(len(now)) == (-1 if world.held is None else world.held)
        self.held = np.where(holding, self.held + 1, 0)
        self.ever_held |= holding

    def achieved(self, world: World, goals: tuple[TaskGoal, ...]) -> list[bool]:
        """Which goals hold at the timestep last taken note of."""
        return [self._holds(goal, self.now, world) for goal in goals]

    def _holds(self, goal: TaskGoal, now: np.ndarray, world: World) -> bool:
        i = goal.target
        if goal.task == "reach":
            return bool(self.over[i] >= REACH_STEPS)
        if goal.task == "pick":
            return bool(self.held[i] >= HOLD_STEPS)
        if world.held == i:
            return False
        if goal.task == "push":
            moved = now[i] - self.start[i]
            along = float(moved @ np.array(DIRECTIONS[goal.direction]))
            far = along >= PUSH_DISTANCE and along >= PUSH_COSINE * np.linalg.norm(moved)
            return bool(far and not self.ever_held[i])
        if goal.task == "place":
            zone = self.scene.zones[goal.zone]
            return _in_zone(now[i], (zone.x, zone.y))
        gap = float(np.linalg.norm(now[i] - now[goal.other]))
        if goal.task == "next_to":
            moved = bool(np.linalg.norm(now[i] - self.start[i]) > 0.02)
            return gap <= NEXT_TO and moved and world.held != goal.other and world.overlap(i) <= OVERLAP
        return gap >= APART and world.held != goal.other
