"""The points of a sweep: which values its fields take, and what their folders are called."""

import hashlib
import itertools
from copy import deepcopy

from vla.comparison.chosen import SET_BY_POINTS, SET_HERE
from vla.config import SweepConfig
from vla.config_io import ConfigError, check, inside, set_field
from vla.training.policy import check_head

SWEPT = ("align", "policy")  # stages whose fields can be swept
NOT_SWEPT = {*SET_HERE, *SET_BY_POINTS, "align.resume", "policy.resume", "align.data.root"}
LONGEST = 150  # of a folder's name, which job names lengthen
SHARE = "align.wise_ft"  # where it varies, every share of one alignment is an encoder

Point = dict[str, str]  # dotted field -> the value's text


def points(swept: dict[str, tuple[str, ...]]) -> list[Point]:
    """Every combination of the swept values."""
    return [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]


def ablation_points(ablations: tuple[str, ...]) -> list[Point]:
    """The configuration as it is, then each change alone.

    Raises:
        ConfigError: a text that is not FIELD=VALUE, or two that are equal.
    """
    changed: list[Point] = [{}]
    for text in ablations:
        parts = [part.partition("=") for part in text.split()]
        if not parts or any(not (name and equals and value) for name, equals, value in parts):
            raise ConfigError(f"ablations: {text!r} is not FIELD=VALUE, as in align.loss.word_patch=0")
        changed.append({name: value for name, _, value in parts})
        if len(changed[-1]) < len(parts) or changed[-1] in changed[:-1]:
            raise ConfigError(f"ablations: {text!r} repeats a field or a change")
    return changed


def at_point(config: SweepConfig, point: Point) -> SweepConfig:
    """The configuration with a point's values.

    Raises:
        ConfigError: an unknown field or a value that does not fit it, or a field that the sweep itself sets.
    """
    config = deepcopy(config)
    for name, text in point.items():
        if name.partition(".")[0] not in SWEPT:
            raise ConfigError(f"{name}: fields of {' and '.join(SWEPT)} can be swept or ablated, as align.steps can")
        if name in NOT_SWEPT or name.startswith("policy.data."):
            raise ConfigError(
                f"{name}: the sweep sets it itself; stage two gets align.data and the encoder of its point"
            )
        set_field(config, name, text, where="sweep", from_text=True)
    check(config)
    with inside("policy."):
        check_head(config.policy)
    return config


def label(point: Point, stages: tuple[str, ...] = SWEPT) -> str:
    """`align.loss.temperature=0.07,policy.steps=1000`, of some stages' fields."""
    return ",".join(f"{n}={v}" for n, v in point.items() if n.partition(".")[0] in stages) or "default"


def folder_name(point: Point, stages: tuple[str, ...] = SWEPT) -> str:
    """The label, if a folder can be named so; else what can be of it, and a digest that tells it from others."""
    text = label(point, stages)
    short = text.replace("/", "_")[:LONGEST]
    return short if short == text else f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def alignment_of(point: Point) -> str:
    """The folder's name of a point's alignment, which points that differ in later stages or in the share taken of it have in common."""
    return folder_name({name: value for name, value in point.items() if name != SHARE}, ("align",))


def share_of(config: SweepConfig, point: Point) -> float | None:
    """The share of the way from a pretrained start that a point takes of its alignment; None if it does not vary.

    Raises:
        ConfigError: several.
    """
    if SHARE not in point:
        return None
    own = at_point(config, point).align.wise_ft
    if len(own) != 1:
        raise ConfigError(f"{SHARE}={point[SHARE]}: a point of a sweep takes one share, as in --sweep.{SHARE}=0.25,0.5")
    return own[0]
