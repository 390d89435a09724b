"""Contact physics of the table: pymunk bodies with table-top friction, and a gripper that lowers, pushes and grasps.

The open gripper is raised and passes over objects. Closing lowers it: over an object's centre it grasps the object,
which then travels with it, lifted; elsewhere it becomes a solid disc that pushes what it touches. Opening raises it and
puts down what it held.
"""

from dataclasses import replace

import numpy as np
import pymunk

from envs.tabletop.scene import OBJECT_RADIUS, TABLE_HALF, Scene, Thing

CONTROL_DT = 0.1  # s, 10 actions a second
SUBSTEPS = 4
MAX_SPEED = 0.3  # m/s
GRIPPER_RADIUS = 0.018  # m
GRASP_TOLERANCE = 0.02  # m, from the gripper's centre to the object's
GRIPPER_RANGE = TABLE_HALF - 0.01  # m
# m, a held object's centre stays within this, so that even a star is put down clear of the walls
CARRY_RANGE = TABLE_HALF - 1.2 * OBJECT_RADIUS - 0.003
_FRICTION_DAMPING = 1e-7  # share of the speed left after a second: objects stop at once, as on felt
# m of overlap that contacts leave alone. pymunk's default, 0.1, is meant for pixels and is wider than three objects here.
_SLOP = 2e-4

_OBJECTS, _GRIPPER, _RAISED = 0b01, 0b10, 0b100
_ON_TABLE = pymunk.ShapeFilter(categories=_OBJECTS, mask=_OBJECTS | _GRIPPER)
_LOWERED = pymunk.ShapeFilter(categories=_GRIPPER, mask=_OBJECTS)
_UNTOUCHABLE = pymunk.ShapeFilter(categories=_RAISED, mask=0)


def outline(shape: str) -> np.ndarray:
    """(n, 2) vertices of a shape in metres around its centre; a circle has 24."""
    r = OBJECT_RADIUS
    if shape == "circle":
        return _ring(24, 0.92 * r)
    if shape == "square":
        s = 0.8 * r
        return np.array([(-s, -s), (s, -s), (s, s), (-s, s)])
    if shape == "triangle":
        return _ring(3, 1.15 * r, np.pi / 2)
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _ring(5, 1.2 * r, np.pi / 2), _ring(5, 0.5 * r, np.pi / 2 + np.pi / 5)
        return points
    if shape == "cross":
        a, b = 0.33 * r, 1.02 * r
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    if shape == "hexagon":
        return _ring(6, 0.9 * r)
    raise ValueError(f"shape {shape!r} has no outline")


def _ring(count: int, radius: float, start: float = 0.0) -> np.ndarray:
    angles = start + 2 * np.pi * np.arange(count) / count
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


class World:
    """The simulated table. Positions in metres, angles in radians, velocities in m/s."""

    def __init__(self, scene: Scene) -> None:
        self.space = pymunk.Space()
        self.space.damping = _FRICTION_DAMPING
        self.space.iterations = 12
        self.space.collision_slop = _SLOP
        self._add_walls()
        self.bodies = [self._add_object(thing) for thing in scene.objects + scene.distractors]
        self.gripper = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        self.gripper.position = scene.gripper
        self._gripper_shape = pymunk.Circle(self.gripper, GRIPPER_RADIUS)
        self._gripper_shape.filter = _UNTOUCHABLE
        self._gripper_shape.friction = 0.6
        self.space.add(self.gripper, self._gripper_shape)
        self.closed = False
        self.held: int | None = None
        self._offset = pymunk.Vec2d(0, 0)

    def step(self, velocity: np.ndarray, close: bool) -> None:
        """Advance one control period with the gripper at (2,) `velocity` m/s, closed or open."""
        if close != self.closed:
            self._close() if close else self._open()
        dt, wanted = CONTROL_DT / SUBSTEPS, velocity.tolist()
        for _ in range(SUBSTEPS):
            x, y = self.gripper.position
            # Stop exactly at the edge of the gripper's range.
            vx = _within(x + wanted[0] * dt, GRIPPER_RANGE) - x
            vy = _within(y + wanted[1] * dt, GRIPPER_RANGE) - y
            self.gripper.velocity = (vx / dt, vy / dt)
            self.space.step(dt)
            if self.held is not None:
                body = self.bodies[self.held]
                x, y = self.gripper.position + self._offset
                body.position = (_within(x, CARRY_RANGE), _within(y, CARRY_RANGE))
                body.velocity, body.angular_velocity = (0, 0), 0

    @property
    def gripper_position(self) -> np.ndarray:
        """(2,) m."""
        return np.array(self.gripper.position)

    def position(self, index: int) -> np.ndarray:
        """(2,) m of an object's centre."""
        return np.array(self.bodies[index].position)

    def positions(self, count: int) -> np.ndarray:
        """(count, 2) m of the centres of the first objects."""
        return np.array([body.position for body in self.bodies[:count]])

    def overlap(self, index: int) -> float:
        """Depth in m by which an object that is not held reaches into another one; 0 if it touches none."""
        depth = 0.0
        for shape in self.bodies[index].shapes:
            shape.cache_bb()
            for hit in self.space.shape_query(shape):
                if hit.shape.body is not self.bodies[index] and hit.shape.body in self.bodies:
                    depth = max([depth] + [-point.distance for point in hit.contact_point_set.points])
        return depth

    def _close(self) -> None:
        self.closed = True
        distances = [(body.position - self.gripper.position).length for body in self.bodies]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= GRASP_TOLERANCE:
            self.held = nearest
            self._offset = self.bodies[nearest].position - self.gripper.position
            self._set_filter(nearest, _UNTOUCHABLE)
        else:
            self._gripper_shape.filter = _LOWERED

    def _open(self) -> None:
        self.closed = False
        self._gripper_shape.filter = _UNTOUCHABLE
        if self.held is not None:
            self._set_filter(self.held, _ON_TABLE)
            self.held = None

    def _set_filter(self, index: int, shape_filter: pymunk.ShapeFilter) -> None:
        for shape in self.bodies[index].shapes:
            shape.filter = shape_filter

    def _add_object(self, thing: Thing) -> pymunk.Body:
        points = [tuple(p) for p in outline(thing.shape)]
        mass = 0.1  # kg
        body = pymunk.Body(mass, mass * OBJECT_RADIUS**2)
        body.position, body.angle = (thing.x, thing.y), thing.angle
        if thing.shape == "circle":
            shapes = [pymunk.Circle(body, 0.92 * OBJECT_RADIUS)]
        elif thing.shape == "cross":
            bars = (points[0], points[1], points[6], points[7]), (points[3], points[4], points[9], points[10])
            shapes = [pymunk.Poly(body, bar) for bar in bars]
        else:  # pymunk takes the convex hull, which for the star is the pentagon around it
            shapes = [pymunk.Poly(body, points)]
        for shape in shapes:
            shape.friction = 0.6
            shape.filter = _ON_TABLE
        self.space.add(body, *shapes)
        return body

    def _add_walls(self) -> None:
        h = TABLE_HALF
        corners = [(-h, -h), (h, -h), (h, h), (-h, h)]
        for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
            wall = pymunk.Segment(self.space.static_body, a, b, 0.002)
            wall.filter = pymunk.ShapeFilter(categories=_OBJECTS, mask=_OBJECTS)
            self.space.add(wall)


def _within(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


def settled(scene: Scene) -> Scene:
    """The scene with overlapping objects moved apart; the very same scene if none overlap."""
    world = World(scene)
    bodies = range(len(world.bodies))
    if max(world.overlap(i) for i in bodies) <= 2 * _SLOP:
        return scene
    for _ in range(20):  # 2 s
        world.step(np.zeros(2), close=False)
    things = tuple(
        replace(thing, x=float(body.position.x), y=float(body.position.y), angle=float(body.angle))
        for thing, body in zip(scene.objects + scene.distractors, world.bodies, strict=True)
    )
    count = len(scene.objects)
    return replace(scene, objects=things[:count], distractors=things[count:])
