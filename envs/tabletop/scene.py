"""Scenes: which objects and zones lie where. Metres, the table's centre is the origin, x to the right, y up."""

from dataclasses import dataclass, replace

import numpy as np

TABLE_HALF = 0.25  # m, half of the table's side
OBJECT_RADIUS = 0.03  # m, of the circle around every object
ZONE_HALF = 0.06  # m, half of a zone's side
PLACE_RANGE = 0.175  # m, training scenes keep object centres within this of the centre, on each axis
GRIPPER_START = 0.2  # m, training episodes start with the gripper within this of the centre, on each axis
CLEARANCE = 0.075  # m, least distance of two object centres, adjacent pairs aside
ADJACENT = 0.064  # m, distance of the centres of an adjacent pair

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, 1.0), "down": (0.0, -1.0)}


@dataclass(frozen=True)
class Thing:
    """An object (`shape` of `SHAPES`, or "hexagon" for a distractor) or a zone (`shape` "zone")."""

    color: str
    shape: str
    x: float  # m
    y: float  # m
    angle: float = 0.0  # rad


@dataclass(frozen=True)
class Scene:
    """The initial state: objects, then distractors without a part in any goal, zones, gripper position (m)."""

    objects: tuple[Thing, ...]
    zones: tuple[Thing, ...]
    gripper: tuple[float, float]
    distractors: tuple[Thing, ...] = ()


def sample_scene(rng: np.random.Generator, must_have: tuple[tuple[str, str], ...] = ()) -> Scene:
    """A random scene with minimal pairs: some object shares another's colour, some its shape.

    Args:
        rng: the only source of randomness.
        must_have: (color, shape) pairs of which the first object is one, if any are given.
    """
    kinds = _sample_kinds(rng, must_have)
    while True:
        zones = _sample_zones(rng)
        places = _sample_places(rng, len(kinds), zones)
        if places is not None:
            break
    order = rng.permutation(len(kinds))
    objects = tuple(
        Thing(*kinds[k], float(x), float(y), float(rng.uniform(-0.5, 0.5)))
        for k, (x, y) in zip(order, places, strict=True)
    )
    gripper = rng.uniform(-GRIPPER_START, GRIPPER_START, size=2)
    return Scene(objects, zones, (float(gripper[0]), float(gripper[1])))


def add_distractors(scene: Scene, rng: np.random.Generator, count: int) -> Scene:
    """The same scene with up to `count` pink and brown hexagons where there is room, none in the middle of a zone."""
    taken = [(t.x, t.y) for t in scene.objects]
    added = []
    for _ in range(200):
        if len(added) == count:
            break
        x, y = rng.uniform(-0.21, 0.21, size=2)
        blocks_zone = any(np.hypot(x - z.x, y - z.y) < CLEARANCE for z in scene.zones)
        if not blocks_zone and all(np.hypot(x - a, y - b) > CLEARANCE for a, b in taken):
            added.append(Thing("pink" if len(added) % 2 else "brown", "hexagon", float(x), float(y)))
            taken.append((x, y))
    return replace(scene, distractors=tuple(added))


def move_out(scene: Scene, rng: np.random.Generator, beyond: float) -> Scene:
    """The same layout moved towards its nearest edge, until an object and the gripper are outside the training range.

    Args:
        scene: is left as it is.
        rng: draws where the gripper starts along that edge.
        beyond: how far the outermost object and the gripper are outside their training ranges, m.
    """
    at = np.array([(t.x, t.y) for t in scene.objects])
    reach = {name: float((at @ np.array(d)).max()) for name, d in DIRECTIONS.items()}
    direction = np.array(DIRECTIONS[max(reach, key=lambda name: reach[name])])
    shift = (PLACE_RANGE + beyond - max(reach.values())) * direction
    limit = TABLE_HALF - OBJECT_RADIUS - 0.005

    def moved(thing: Thing) -> Thing:
        x, y = np.clip([thing.x + shift[0], thing.y + shift[1]], -limit, limit)
        return replace(thing, x=float(x), y=float(y))

    along = rng.uniform(-GRIPPER_START, GRIPPER_START) * np.abs(direction[::-1])
    gripper = (GRIPPER_START + beyond) * direction + along
    return replace(
        scene,
        objects=tuple(moved(t) for t in scene.objects),
        zones=tuple(moved(t) for t in scene.zones),
        gripper=(float(gripper[0]), float(gripper[1])),
    )


def _sample_kinds(rng: np.random.Generator, must_have: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """4-6 distinct (color, shape) pairs; the second shares the first's colour, the third its shape."""
    if must_have:
        first = must_have[rng.integers(len(must_have))]
    else:
        first = (COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))])
    other_shapes = [s for s in SHAPES if s != first[1]]
    other_colors = [c for c in COLORS if c != first[0]]
    kinds = [
        first,
        (first[0], other_shapes[rng.integers(len(other_shapes))]),
        (other_colors[rng.integers(len(other_colors))], first[1]),
    ]
    rest = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in kinds]
    extra = rng.permutation(len(rest))[: rng.integers(1, 4)]
    return kinds + [rest[i] for i in extra]


def _sample_zones(rng: np.random.Generator) -> tuple[Thing, ...]:
    count = int(rng.integers(1, 3))
    colors = rng.permutation(len(COLORS))[:count]
    zones: list[Thing] = []
    while len(zones) < count:
        x, y = rng.uniform(-PLACE_RANGE, PLACE_RANGE, size=2)
        if all(max(abs(x - z.x), abs(y - z.y)) > 2.2 * ZONE_HALF for z in zones):
            zones.append(Thing(COLORS[colors[len(zones)]], "zone", float(x), float(y)))
    return tuple(zones)


def _sample_places(rng: np.random.Generator, count: int, zones: tuple[Thing, ...]) -> np.ndarray | None:
    """(count, 2) object centres outside the zones; the first two are adjacent."""
    places: list[np.ndarray] = []
    for _ in range(400):
        if len(places) == count:
            return np.array(places)
        if len(places) == 1:
            angle = rng.uniform(-np.pi, np.pi)
            place = places[0] + ADJACENT * np.array([np.cos(angle), np.sin(angle)])
            clear = 0.0
        else:
            place, clear = rng.uniform(-PLACE_RANGE, PLACE_RANGE, size=2), CLEARANCE
        inside = np.abs(place).max() <= PLACE_RANGE
        in_zone = any(max(abs(place[0] - z.x), abs(place[1] - z.y)) < ZONE_HALF + 0.02 for z in zones)
        if inside and not in_zone and all(np.hypot(*(place - p)) > clear for p in places):
            places.append(place)
    return None
