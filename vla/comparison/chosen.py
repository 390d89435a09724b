"""Which arms a comparison trains, and what it refuses before anything runs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

from transformers import AutoConfig, CLIPConfig, VisionTextDualEncoderConfig

from vla.comparison.arms import ARMS, Arm, Source
from vla.comparison.data import play_root
from vla.config import CompareConfig, DataConfig, EvalConfig, SweepConfig
from vla.config_io import inside
from vla.integrations.collect import checked_tasks
from vla.training.align_setup import check_alignment
from vla.training.policy import check_head
from vla.training.start import check_pooler
from vla.types import UserError, first_line

NAME = re.compile(r"[A-Za-z0-9._-]+")  # of folders
SET_HERE = {  # fields that every run gets from elsewhere
    "collect.output": "align.data.root",
    "align.output": "output",
    "align.seed": "seeds",
    "policy.output": "output",
    "policy.seed": "seeds",
    "eval.output": "output",
    "eval.workers": "the number of processes",
}
SET_BY_ARMS = dict.fromkeys(
    ("align.shuffle", "policy.start", "policy.tune", "policy.tuned_part", "policy.hide"), "arms"
) | {"policy.encoder": "encoders", "eval.policy": "policies"}
SET_BY_POINTS = {  # of a sweep
    "policy.encoder": "the alignment of each point",
    "policy.start": "the alignment of each point",
    "eval.policy": "the policy of each point",
}


def chosen_arms(config: CompareConfig) -> dict[str, Arm]:
    """The arms that are trained, by name.

    Raises:
        UserError: unknown or repeated names, or several training seeds or numbers of demonstrations that are equal.
    """
    check_numbers(config)
    arms = {}
    for text in config.arms:
        name, colon, number = text.partition(":")
        if name not in ARMS:
            raise UserError(f"config error: arms: {name!r} is not an arm; known: {', '.join(ARMS)}")
        if colon and number not in map(str, config.demonstrations):
            raise UserError(
                f"config error: arms: {text!r}: {number or 'nothing'} is not among demonstrations={list(config.demonstrations)}"
            )
        if name in arms:
            raise UserError(
                f"config error: arms: {name} is named twice; give it one number of demonstrations, or none for all"
            )
        arms[name] = replace(ARMS[name], number=int(number)) if colon else ARMS[name]
    for name, arm in arms.items():
        if arm.after and not (
            arm.after in arms and {*numbers_of(config, arm)} <= {*numbers_of(config, arms[arm.after])}
        ):
            raise UserError(
                f"config error: arms: {name} goes on from {arm.after}; name that, too, with as many demonstrations"
            )
    aligned = arms.get("aligned-frozen")
    number = aligned.number if aligned else None  # what is compared with it gets as many demonstrations
    for name, folder in named(config.encoders, "encoders").items():
        alone = vision_alone(folder)
        what = "the vision model" if alone else "the encoder"
        arms[name] = Arm("vision" if alone else "named", f"{what} {folder}, frozen", name=name, number=number)
    for step in config.align.snapshots if aligned else ():
        says = f"aligned for the first {step} steps, frozen"
        arms[f"aligned-frozen@{step}"] = Arm("none", says, snapshot=step, number=number)
    policies = named(config.policies, "policies")
    for field, values in (
        ("arms", [*config.arms, *[pair.partition("=")[0] for pair in (*config.encoders, *config.policies)]]),
        ("demonstrations", config.demonstrations),
        ("seeds", config.seeds),
    ):
        if len(set(values)) < len(values):
            raise UserError(f"config error: {field}: {list(values)} repeats a value")
    if config.transfer:
        known = checked_tasks(config.collect)
        rest = [task for task in known if task not in config.transfer]
        unknown = [task for task in config.transfer if task not in known]
        if config.eval.tasks:
            raise UserError(
                "config error: eval.tasks: policies are evaluated on the tasks of `transfer`; leave one of the two out"
            )
        if unknown or not rest:
            what = f"{unknown[0]!r} is not a task" if unknown else "no task is left for the encoders"
            raise UserError(f"config error: transfer: {what}; known: {', '.join(known)}")
    if config.play_scenes and not Path(play_root(config)).is_dir():
        checked_tasks(replace(config.collect, kind="play"))
    if not (arms or policies):
        raise UserError("config error: arms: name at least one arm, encoder or policy")
    return arms


def names_of(arms: Sequence[str]) -> list[str]:
    """The arms' names, without the number of demonstrations that NAME:NUMBER has behind them."""
    return [text.partition(":")[0] for text in arms]


def numbers_of(config: CompareConfig, arm: Arm) -> tuple[int, ...]:
    """The numbers of demonstrations an arm is trained on: all, its own one, or the middle one for a snapshot of the alignment."""
    if arm.number is not None:
        return (arm.number,)
    ascending = sorted(config.demonstrations, key=lambda number: number or math.inf)
    return config.demonstrations if not arm.snapshot else (ascending[len(ascending) // 2],)


def steps_of(config: CompareConfig, arm: Arm) -> int:
    """The steps of stage two of an arm."""
    if arm.tuned_part == "nothing":
        return config.policy.steps
    return config.scratch_steps if arm.source == "random" else config.tuned_steps


def named(pairs: tuple[str, ...], field: str) -> dict[str, Path]:
    """NAME=FOLDER texts as a mapping; UserError if one is not of that form, its name is another thing's, or its folder is absent."""
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (equals and name and Path(folder).is_dir()):
            raise UserError(f"config error: {field}: {pair!r} is not NAME=FOLDER of an existing folder")
        if not NAME.fullmatch(name) or set(name) == {"."}:
            raise UserError(f"config error: {field}: {name!r} names a folder; take letters, digits, '.', '_' and '-'")
        if name in ARMS or name in (*get_args(Source), "cloning"):
            raise UserError(f"config error: {field}: {name!r} is taken; choose another name")
        folders[name] = Path(folder)
    return folders


def vision_alone(folder: Path) -> bool:
    """Whether a model folder holds a vision model that knows no text; UserError if it holds none."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"config error: encoders: {folder}: {first_line(error)}") from error
    return not isinstance(config, CLIPConfig | VisionTextDualEncoderConfig)


def check_numbers(config: CompareConfig) -> None:
    """Refuse numbers that nothing can be trained or estimated with.

    Raises:
        UserError: names the field.
    """
    for field, values in (("seeds", config.seeds), ("demonstrations", config.demonstrations)):
        if not values or min(values) < 0:
            raise UserError(f"config error: {field}: {list(values)}; give at least one number, none below 0")
    with inside("align."):
        check_alignment(config.align)
    check_episodes(config.eval)
    if config.collect.kind != "demonstrations":
        raise UserError(
            f"config error: collect.kind: {config.collect.kind} cannot be cloned; play_scenes gives play to the alignments"
        )
    check_set_here(config, SET_HERE | SET_BY_ARMS)
    with inside("policy."):
        check_head(config.policy)
    sources = {ARMS[name].source for name in names_of(config.arms) if name in ARMS} - {"random"}
    taken_up = sources if config.policy.aligned_pooler else sources & {"cloned"}  # a cloned pooler is measured, too
    if taken_up:
        check_pooler(config.policy.head, config.align.loss)


def check_set_here(config: CompareConfig | SweepConfig, fields: Mapping[str, str]) -> None:
    """Refuse values that would be passed over: of `fields`, each with what decides instead, and of stage two's data.

    Raises:
        UserError: names the field.
    """
    usual = type(config)()
    for name, instead in fields.items():
        stage, _, field = name.partition(".")
        if getattr(getattr(config, stage), field) != getattr(getattr(usual, stage), field):
            raise UserError(f"config error: {name}: is set for every run; {instead} decides here")
    if config.policy.tower != type(usual)().policy.tower:
        raise UserError("config error: policy.tower: policies get the encoders of stage one; set align.tower")
    surplus = config_differences(config.policy.data, DataConfig())
    if surplus:
        raise UserError(
            f"config error: policy.data.{surplus[0]}: stage two gets align.data; set align.data.{surplus[0]}"
        )


def check_episodes(config: EvalConfig) -> None:
    """Refuse a single episode: it has no interval.

    Raises:
        UserError: names the field.
    """
    for field in ("episodes", "split_episodes", "grounding_episodes"):
        if getattr(config, field) == 1:
            raise UserError(f"config error: eval.{field}: 1 episode has no interval; give more")


def config_differences(config: DataConfig, other: DataConfig) -> list[str]:
    """Fields that differ."""
    return [field.name for field in fields(config) if getattr(config, field.name) != getattr(other, field.name)]
