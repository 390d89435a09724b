"""Splits: what training never sees. Language, held-out combinations, and perturbations with levels."""

import zlib

import numpy as np

from envs.tabletop.render import View
from envs.tabletop.scene import COLORS, SHAPES, Scene, add_distractors, move_out
from envs.tabletop.tasks import TASKS, TaskGoal

SPLITS: dict[str, tuple[int, ...]] = {
    "train": (1,),
    "paraphrase": (1, 2),
    "synonym": (1, 2),
    "combination": (1, 2),
    "distractors": (1, 2, 3),
    "light": (1, 2, 3),
    "texture": (1, 2, 3),
    "camera": (1, 2, 3),
    "position": (1, 2, 3),
}

# (color, shape) pairs that training never names, whatever the verb; each colour and shape is named in other pairs.
HELD_OUT_PAIRS = (("red", "star"), ("green", "triangle"), ("blue", "circle"), ("yellow", "cross"), ("purple", "square"))


def held_out_triple(task: str, color: str, shape: str) -> bool:
    """One in six (verb, color, shape) triples, although training names the pair with other verbs."""
    return (SHAPES.index(shape) + COLORS.index(color) + TASKS.index(task)) % 6 == 0


def combination_level(goal: TaskGoal, scene: Scene) -> int:
    """0: a training goal; 1: a held-out triple of verb, colour and shape; 2: names a held-out colour-shape pair."""
    target = scene.objects[goal.target]
    named = [target] + ([scene.objects[goal.other]] if goal.other is not None else [])
    if any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in named):
        return 2
    return int(held_out_triple(goal.task, target.color, target.shape))


def perturb_scene(scene: Scene, split: str, level: int, rng: np.random.Generator) -> Scene:
    """The same scene with distractors, or moved out of the training range."""
    if split == "distractors":
        return add_distractors(scene, rng, count=2 * level)
    if split == "position":
        return move_out(scene, rng, beyond=(0.012, 0.024, 0.036)[level - 1])
    return scene


def perturb_view(split: str, level: int, rng: np.random.Generator) -> View:
    """How the camera sees the scene of a split."""
    if split == "light":
        strength = (0.12, 0.24, 0.36)[level - 1]
        gain = 1 + strength * rng.choice([-1.0, 1.0]) + 0.5 * strength * rng.uniform(-1, 1, size=3)
        return View(gain=tuple(gain.tolist()), gradient=float(strength * rng.choice([-1.0, 1.0])))
    if split == "texture":
        texture = str(rng.choice(["stripes", "checker", "speckle"]))
        return View(texture=texture, contrast=(0.06, 0.12, 0.2)[level - 1], texture_seed=int(rng.integers(1 << 30)))
    if split == "camera":
        angle = rng.uniform(-np.pi, np.pi)
        shift = (0.008, 0.016, 0.03)[level - 1]  # m
        rotation = (2.0, 5.0, 9.0)[level - 1] * rng.choice([-1.0, 1.0])
        return View(shift=(float(shift * np.cos(angle)), float(shift * np.sin(angle))), rotation_deg=float(rotation))
    return View()


def check_split(split: str, level: int) -> None:
    """Raise ValueError for a split or level that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if level not in SPLITS[split]:
        raise ValueError(f"split {split!r} has levels {SPLITS[split]}, not {level}")


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Independent randomness for each purpose, so that a perturbation leaves the scene as it was."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])
