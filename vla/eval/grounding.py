"""Does the policy obey the instruction? Swapped, blank and wrong texts on the identical initial state.

Swap: the scene of a seed, told another of its goals that concerns another object. Follows the new: the told goal is
achieved. Does the old: not that, but the goal the seed would have given. Neither: the rest. Chance of the new: how often
the swapped goal gets done in the plain episode, where it is not told. The score is follows the new less chance of the
new, scene by scene: the share of goals that get done because they were told.
Blank and wrong text: the seed's own goal is scored while the policy is told nothing, or an instruction of another
scene. Their chance level is measured, not assumed: how often the seed's own goal gets done in the swapped episodes,
where the policy is told something else of the same scene.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from envs import make_env
from vla.eval.episode import EpisodeRecord, EpisodeSpec
from vla.eval.statistics import crossed_interval, summarise

SWAP, BLANK, WRONG = "swap", "blank", "wrong"


def grounding_specs(base: Sequence[EpisodeSpec]) -> list[EpisodeSpec]:
    """Swapped (where scenes have several goals), blank and wrong-text episodes on the scenes of `base`."""
    if not base:
        return []
    first = base[0]
    env = make_env(first.env, tasks=first.tasks, split=first.split, level=first.level, image_size=first.image_size)
    env.render_observations = False
    scenes = []
    for spec in base:
        env.reset(seed=spec.seed, options={"task": spec.task})
        scenes.append((env.goal_id, env.task_description, env.goals()))
    env.close()
    specs = []
    for number, (spec, (own, _, goals)) in enumerate(zip(base, scenes, strict=True)):
        other = swapped_goal(own, goals, spec.seed)
        if other is not None:
            specs.append(replace(spec, kind=SWAP, goal=other.goal_id, task=other.task))
        specs.append(replace(spec, kind=BLANK, goal=own, instruction=""))
        foreign = foreign_text(scenes, number)
        if foreign is not None:
            specs.append(replace(spec, kind=WRONG, goal=own, instruction=foreign))
    return specs


def foreign_text(scenes: Sequence[tuple[str, str, Any]], number: int) -> str | None:
    """The text of another (goal, text, goals) scene, about half the list away, that asks for something else."""
    _, text, goals = scenes[number]
    here = {goal.goal_id for goal in goals}
    order = [(number + len(scenes) // 2 + offset) % len(scenes) for offset in range(len(scenes))]
    return next((scenes[i][1] for i in order if scenes[i][0] not in here and scenes[i][1] != text), None)


def swapped_goal(own: str, goals: Sequence[Any], seed: int) -> Any | None:
    """Another goal of the scene that concerns another object, drawn by seed, each task equally likely."""
    others = [goal for goal in goals if goal.goal_id.split("/")[1:3] != own.split("/")[1:3]]
    if not others:
        return None
    rng = np.random.default_rng([seed, 4])
    tasks = sorted({goal.task for goal in others})
    task = tasks[int(rng.integers(len(tasks)))]
    candidates = [goal for goal in others if goal.task == task]
    return candidates[int(rng.integers(len(candidates)))]


def grounding_summary(records: Sequence[EpisodeRecord], base: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """The grounding measures; `base` holds the records of the plain episodes on the same scenes."""
    own = {record.seed: record.goal for record in base}
    untold = {record.seed: set(record.achieved) for record in base}
    swapped = [r for r in records if r.kind == SWAP]
    summary: dict[str, Any] = {}
    if swapped:
        old = [not r.success and own[r.seed] in r.achieved for r in swapped]
        summary["swap"] = {
            "follows_new": summarise(r.success for r in swapped),
            "does_old": summarise(old),
            "neither": summarise(not r.success and not o for r, o in zip(swapped, old, strict=True)),
            "chance_of_new": summarise(r.goal in untold[r.seed] for r in swapped),
        }
        gain = np.array([[float(r.success) - float(r.goal in untold[r.seed]) for r in swapped]])
        estimate = crossed_interval(gain, np.zeros(len(swapped))) if len(swapped) > 1 else None
        if estimate:
            interval = [max(estimate.low, -1.0), min(estimate.high, 1.0)]
            summary["score"] = {"value": estimate.value, "interval": interval, "n": len(swapped)}
        summary["chance"] = summarise(own[r.seed] in r.achieved for r in swapped)
    for kind in (BLANK, WRONG):
        chosen = [r for r in records if r.kind == kind]
        if chosen:
            summary[kind] = summarise(r.success for r in chosen)
    return summary
