"""Instructions: many wordings for each task, and the ones that are kept from training.

`train` wordings are all that training sees. `paraphrase` wordings are new ones made of words that training has seen:
level 1 says the verb anew, level 2 the object. `synonym` level 1 has unseen verbs, level 2 unseen nouns and colours.
"""

import numpy as np

from envs.tabletop.scene import Scene, Thing
from envs.tabletop.tasks import TaskGoal

TRAIN = {
    "reach": (
        "reach {a}",
        "go to {a}",
        "move to {a}",
        "hover over {a}",
        "touch {a}",
        "move the gripper to {a}",
        "bring the gripper over {a}",
        "go over to {a}",
    ),
    "push": (
        "push {a} {d}",
        "push {a} to the {D}",
        "slide {a} {d}",
        "slide {a} to the {D}",
        "shove {a} {d}",
        "nudge {a} to the {D}",
        "give {a} a push to the {D}",
        "push {a} toward the {D} side",
    ),
    "pick": (
        "pick up {a}",
        "grasp {a}",
        "grab {a}",
        "take {a}",
        "lift {a}",
        "pick {a} up",
        "hold {a}",
        "close the gripper on {a}",
    ),
    "place": (
        "place {a} on the {z} zone",
        "put {a} on the {z} zone",
        "move {a} to the {z} zone",
        "put {a} in the {z} area",
        "bring {a} to the {z} area",
        "carry {a} to the {z} zone",
        "pick up {a} and place it on the {z} zone",
        "set {a} down on the {z} area",
    ),
    "next_to": (
        "put {a} next to {b}",
        "place {a} next to {b}",
        "put {a} beside {b}",
        "move {a} next to {b}",
        "bring {a} to {b}",
        "set {a} down beside {b}",
        "carry {a} over to {b}",
        "pick up {a} and put it beside {b}",
    ),
    "separate": (
        "separate {a} from {b}",
        "move {a} away from {b}",
        "take {a} away from {b}",
        "pull {a} away from {b}",
        "bring {a} away from {b}",
        "carry {a} away from {b}",
        "pick up {a} and move it away from {b}",
        "separate {a} and {b}",
    ),
}
PARAPHRASE = {
    "reach": ("move over to {a}", "bring the gripper to {a}", "go and touch {a}"),
    "push": ("give {a} a shove to the {D}", "nudge {a} {d}", "shove {a} toward the {D} side"),
    "pick": ("hold {a} up", "grab {a} and lift it", "take {a} up"),
    "place": ("set {a} down on the {z} zone", "carry {a} over to the {z} area", "grab {a} and put it on the {z} zone"),
    "next_to": ("carry {a} next to {b}", "set {a} down next to {b}", "grab {a} and place it beside {b}"),
    "separate": ("pull {a} from {b}", "grab {a} and take it away from {b}", "lift {a} away from {b}"),
}
SYNONYM_VERBS = {
    "reach": ("approach {a}", "travel to {a}", "head for {a}"),
    "push": ("thrust {a} {d}", "propel {a} to the {D}", "drive {a} {d}"),
    "pick": ("seize {a}", "clutch {a}", "collect {a}"),
    "place": ("deposit {a} on the {z} zone", "transport {a} to the {z} zone", "drop {a} on the {z} zone"),
    "next_to": ("position {a} next to {b}", "transport {a} to {b}", "deposit {a} beside {b}"),
    "separate": ("detach {a} from {b}", "split {a} from {b}", "isolate {a} from {b}"),
}
SYNONYM_SHAPES = {
    "circle": ("disc", "disk"),
    "square": ("block", "box"),
    "triangle": ("wedge",),
    "star": ("asterisk",),
    "cross": ("plus sign",),
}
SYNONYM_COLORS = {
    "red": ("crimson", "scarlet"),
    "green": ("emerald",),
    "blue": ("azure", "navy"),
    "yellow": ("golden",),
    "purple": ("violet",),
    "orange": ("tangerine",),
}
NOUN_PHRASES = ("the {c} {s}", "the {s} that is {c}", "the {c} object shaped like a {s}")
PARAPHRASE_NOUN_PHRASES = (
    "the {s} shaped object that is {c}",
    "the object that is a {c} {s}",
    "the object shaped like a {c} {s}",
)
DIRECTION_WORDS = {"left": "left", "right": "right", "up": "up", "down": "down"}
SIDES = {"left": "left", "right": "right", "up": "top", "down": "bottom"}


def instruction(goal: TaskGoal, scene: Scene, split: str, level: int, rng: np.random.Generator) -> str:
    """A wording of a goal, drawn from those of the split; splits that do not concern language use training's."""
    templates = {("paraphrase", 1): PARAPHRASE, ("synonym", 1): SYNONYM_VERBS}.get((split, level), TRAIN)
    template = _draw(templates[goal.task], rng)
    phrases = PARAPHRASE_NOUN_PHRASES if (split, level) == ("paraphrase", 2) else NOUN_PHRASES
    new_words = (split, level) == ("synonym", 2)
    return template.format(
        a=_noun_phrase(scene.objects[goal.target], phrases, new_words, rng),
        b=_noun_phrase(scene.objects[goal.other], phrases, new_words, rng) if goal.other is not None else "",
        d=DIRECTION_WORDS.get(goal.direction or "", ""),
        D=SIDES.get(goal.direction or "", ""),
        z=scene.zones[goal.zone].color if goal.zone is not None else "",
    )


def _noun_phrase(thing: Thing, phrases: tuple[str, ...], new_words: bool, rng: np.random.Generator) -> str:
    color, shape = thing.color, thing.shape
    if new_words:
        change = rng.integers(3)  # the colour, the shape, or both
        color = _draw(SYNONYM_COLORS[color], rng) if change != 1 else color
        shape = _draw(SYNONYM_SHAPES[shape], rng) if change != 0 else shape
    return _draw(phrases, rng).format(c=color, s=shape)


def _draw(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
