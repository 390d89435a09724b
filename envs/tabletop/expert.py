"""The scripted expert of the tabletop: one reactive rule a task, nothing remembered.

Every action follows from what the picture shows (and the goal), so that behaviour cloning from single frames can match it.
"""

import numpy as np

from envs.tabletop.env import TabletopEnv
from envs.tabletop.physics import CONTROL_DT, GRIPPER_RADIUS, MAX_SPEED
from envs.tabletop.scene import DIRECTIONS, OBJECT_RADIUS, TABLE_HALF
from envs.tabletop.tasks import APART, NEXT_TO, ZONE_HALF

GAIN = 0.6  # share of the remaining way that one action covers
OPEN, CLOSE = -1.0, 1.0
ALIGNED = 0.008  # m
ARRIVED = 0.012  # m, from where an object is put down
BESIDE_ARRIVED = 0.006  # m, the same for "next to", which has less room than any other task
BESIDE = 0.07  # m between centres where "next to" is put down, in the middle of what touches neither nor counts as far
WELL_APART = 0.2  # m between centres where "separate" is put down, clear of the least distance that counts


class ScriptedExpert:
    """Reads the true state of a `TabletopEnv`."""

    def __init__(self, env: TabletopEnv) -> None:
        self.env = env

    def act(self) -> np.ndarray:
        """(3,) float32 action in [-1, 1]."""
        goal, world = self.env.goal, self.env.world
        if goal.task == "push":
            return self._push(goal.target, np.array(DIRECTIONS[goal.direction]))
        if goal.task == "reach":
            return self._move(world.position(goal.target), OPEN)
        if goal.task == "pick":
            return self._grasp(goal.target)
        target = self._destination()
        if target is None:
            return self._move(world.gripper_position, OPEN)
        if world.held != goal.target:
            return self._grasp(goal.target)
        offset = world.position(goal.target) - world.gripper_position
        near_enough = BESIDE_ARRIVED if goal.task == "next_to" else ARRIVED
        arrived = np.linalg.norm(world.position(goal.target) - target) < near_enough
        return self._move(target - offset, OPEN if arrived else CLOSE)

    def _destination(self) -> np.ndarray | None:
        """Where the held object has to go, (2,) m; None once it lies there."""
        goal, world, scene = self.env.goal, self.env.world, self.env.scene
        here = world.position(goal.target)
        down = world.held != goal.target
        if goal.task == "place":
            zone = np.array([scene.zones[goal.zone].x, scene.zones[goal.zone].y])
            return None if down and np.abs(here - zone).max() < ZONE_HALF - 0.015 else zone
        other = world.position(goal.other)
        gap = float(np.linalg.norm(here - other))
        if goal.task == "next_to":
            return None if down and gap <= NEXT_TO - BESIDE_ARRIVED else self._free_spot(other, BESIDE, here)
        return None if down and gap >= APART + 0.003 else self._free_spot(other, WELL_APART, here)

    def _free_spot(self, centre: np.ndarray, distance: float, near: np.ndarray) -> np.ndarray:
        """The spot at `distance` (m) from `centre` that is free, on the table and nearest to `near`."""
        goal, world = self.env.goal, self.env.world
        angles = np.linspace(-np.pi, np.pi, 48, endpoint=False)
        spots = centre + distance * np.stack([np.cos(angles), np.sin(angles)], axis=1)  # (48, 2)
        others = np.array([world.position(i) for i in range(len(world.bodies)) if i not in (goal.target, goal.other)])
        clearance = np.linalg.norm(spots[:, None] - others[None], axis=-1).min(axis=1)
        outside = np.maximum(np.abs(spots).max(axis=1) - (TABLE_HALF - 0.035), 0)
        crowded = np.maximum(0.068 - clearance, 0)
        cost = np.linalg.norm(spots - near, axis=1) + 20 * outside + 20 * crowded
        return spots[int(cost.argmin())]

    def _grasp(self, target: int) -> np.ndarray:
        """Go over the object, close there, stay."""
        world = self.env.world
        if world.held == target:
            return self._move(world.gripper_position, CLOSE)
        there = world.position(target)
        close = not world.closed and np.linalg.norm(there - world.gripper_position) < ALIGNED
        return self._move(there, CLOSE if close else OPEN)

    def _push(self, target: int, direction: np.ndarray) -> np.ndarray:
        """Go behind the object with the gripper raised, lower it, push through the object's centre up to the edge.

        How far the object has come is not in the picture, so the push goes on until the picture shows its end.
        """
        world = self.env.world
        there = world.position(target)
        if there @ direction > TABLE_HALF - 1.5 * OBJECT_RADIUS:
            return self._move(world.gripper_position, OPEN)
        offset = world.gripper_position - there
        along, across = float(offset @ direction), offset - (offset @ direction) * direction
        behind = OBJECT_RADIUS + GRIPPER_RADIUS + 0.01
        if world.closed and world.held is None and along < -0.02 and np.linalg.norm(across) < 0.02:
            velocity = 0.6 * direction - 0.5 * across / (CONTROL_DT * MAX_SPEED)
            return self._action(velocity, CLOSE)
        start = there - behind * direction
        aligned = np.linalg.norm(start - world.gripper_position) < ALIGNED
        return self._move(start, CLOSE if aligned and not world.closed else OPEN)

    def _move(self, point: np.ndarray, gripper: float) -> np.ndarray:
        velocity = GAIN * (point - self.env.world.gripper_position) / (CONTROL_DT * MAX_SPEED)
        speed = np.linalg.norm(velocity)
        return self._action(velocity / max(1.0, speed), gripper)

    def _action(self, velocity: np.ndarray, gripper: float) -> np.ndarray:
        return np.array([*np.clip(velocity, -1, 1), gripper], np.float32)
