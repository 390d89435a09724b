"""From evaluations to answers: success with intervals, differences of arms, and which measure tells success."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vla.comparison.arms import CONTRASTS, Arm
from vla.comparison.chosen import chosen_arms, named, numbers_of
from vla.comparison.work import cloning_run, encoder_folder, evaluation_folder, policy_run
from vla.config import CompareConfig
from vla.eval.evaluation_report import LANGUAGE
from vla.eval.statistics import Estimate, crossed_interval, holm, paired_p_value
from vla.files import read_json
from vla.types import UserError

# Which episodes a number is of: by kind of episode and split.
GROUPS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "plain": ("success", lambda split: split == "train"),
    "perturbed": ("success", lambda split: split not in ("train", *LANGUAGE)),
    "held-out combinations": ("success", lambda split: split == "combination"),
    "paraphrases": ("success", lambda split: split == "paraphrase"),
    "unseen words": ("success", lambda split: split == "synonym"),
    "swapped instructions": ("swap", lambda split: True),
}
FEWEST_ENCODERS = 5  # fewer say nothing about a correlation
# What the report says that encoders know: of the instructed object, the proprio state and time to go; what fits what.
KNOWN = (
    "target_probe_r2",
    "state_probe_r2",
    "time_to_go_probe_r2",
    "context_to_action_r1",
    "image_to_text_r1",
    "zero_shot",
)
Outcomes = dict[tuple, bool]  # (split, level, task, seed) -> success
Runs = dict[tuple[str, int | None], list[dict[str, Outcomes]]]  # arm, demonstrations (None: as given) -> training seeds


def read_outcomes(path: Path) -> dict[str, Outcomes]:
    """The episodes of one eval.json, by group."""
    episodes = json.loads(path.read_text())["episodes"]
    outcomes: dict[str, Outcomes] = {}
    for group, (kind, belongs) in GROUPS.items():
        chosen = [e for e in episodes if e["kind"] == kind and belongs(e["split"])]
        if chosen:
            outcomes[group] = {(e["split"], e["level"], e["task"], e["seed"]): e["success"] for e in chosen}
    return outcomes


def read_levels(path: Path) -> dict[str, Outcomes]:
    """The plain and held-out episodes of one eval.json, by split and level as "camera/2"."""
    outcomes: dict[str, Outcomes] = {}
    for e in json.loads(path.read_text())["episodes"]:
        if e["kind"] == "success":
            name = f"{e['split']}/{e['level']}" if e["split"] != "train" else "train"
            outcomes.setdefault(name, {})[e["split"], e["level"], e["task"], e["seed"]] = e["success"]
    return outcomes


def estimate(runs: list[Outcomes], minus: list[Outcomes] | None = None) -> Estimate:
    """Mean success over training seeds and scenes, or the mean difference from `minus`, run by run and episode by episode.

    Episodes of one scene are one observation, their mean; scenes of one task are a stratum.

    Raises:
        UserError: the runs do not hold the same episodes.
    """
    keys = sorted(runs[0])
    for other in [*runs, *(minus or [])]:
        if sorted(other) != keys:
            raise UserError("the runs hold different episodes; evaluate them with the same seeds and splits")
    matrix = np.array([[run[key] for key in keys] for run in runs], float)
    if minus is not None:
        matrix = matrix - np.array([[run[key] for key in keys] for run in minus], float)
    _, first, scene = np.unique([scene_of(key) for key in keys], axis=0, return_index=True, return_inverse=True)
    means = np.stack([np.bincount(scene, row) for row in matrix]) / np.bincount(scene)
    _, strata, sizes = np.unique([keys[i][2] for i in first], return_inverse=True, return_counts=True)
    return crossed_interval(means, strata if sizes.min() > 1 else np.zeros(len(first)))


def scene_of(key: tuple) -> tuple[int, int]:
    """What tells scenes apart: the seed, which has scenes of its own in each level of held-out combinations.

    A perturbation may leave another task possible than the scene was chosen for, so an episode's task does not belong to it.
    """
    split, level, _, seed = key
    return (level if split == "combination" else 0), seed


def mcnemar_p_values(firsts: list[Outcomes], seconds: list[Outcomes]) -> list[float] | None:
    """McNemar's p-value for each training seed; None where several episodes show one scene and so are not independent."""
    scenes = [scene_of(key) for key in firsts[0]]
    if len(set(scenes)) < len(scenes):
        return None
    return [paired_p_value([a[key] for key in a], [b[key] for key in a]) for a, b in zip(firsts, seconds, strict=True)]


def summarise_comparison(config: CompareConfig) -> dict[str, Any]:
    """Everything the report says, as plain data."""
    arms = chosen_arms(config)
    runs: Runs = {}
    rows, minutes, levels = [], {}, []
    for name, arm in arms.items():
        for count in numbers_of(config, arm):
            files = [evaluation_folder(config, name, count, seed) / "eval.json" for seed in config.seeds]
            runs[name, count] = [read_outcomes(file) for file in files]
            levels += level_rows(name, count, [read_levels(file) for file in files])
            minutes[name, count] = np.mean([wall_minutes(config, name, arm, count, seed) for seed in config.seeds])
    for name in named(config.policies, "policies"):
        file = evaluation_folder(config, name, "given", 0) / "eval.json"
        runs[name, None] = [read_outcomes(file)]
        levels += level_rows(name, None, [read_levels(file)])
    for (name, count), members in runs.items():
        for group in members[0]:
            row = {"arm": name, "demonstrations": count, "group": group}
            row |= asdict(estimate([member[group] for member in members]))
            rows.append(row | {"minutes": minutes.get((name, count))})
    pairs = CONTRASTS + tuple(
        ("aligned-frozen", name, f"alignment against {arm.says}") for name, arm in arms.items() if arm.name
    )
    return {
        "arms": {name: arm.says for name, arm in arms.items()},
        "success": rows,
        "levels": levels,
        "contrasts": contrasts(runs, config.demonstrations, pairs),
        "measures": measures_rows(config),
        "validity": validity(config, runs),
    }


def level_rows(name: str, count: int | None, members: list[dict[str, Outcomes]]) -> list[dict[str, Any]]:
    """Success of one arm on every split and level."""
    return [
        {
            "arm": name,
            "demonstrations": count,
            "split": split.partition("/")[0],
            "level": int(split.partition("/")[2] or 0),
        }
        | asdict(estimate([member[split] for member in members]))
        for split in members[0]
    ]


def wall_minutes(config: CompareConfig, name: str, arm: Arm, count: int, seed: int) -> float:
    """Minutes of training behind one policy, what pretrained its encoder included."""
    seconds = trained_seconds(policy_run(config, name, count, seed))
    if arm.after:
        seconds += trained_seconds(policy_run(config, arm.after, count, seed))
    if arm.source == "cloned":
        seconds += trained_seconds(cloning_run(config, seed))
    elif arm.source not in ("random", "named", "vision"):
        record = json.loads((Path(config.output) / "align" / arm.source / str(seed) / "alignment.json").read_text())
        seconds += record["seconds"] * (arm.snapshot / record["steps"] if arm.snapshot else 1)
    return seconds / 60


def trained_seconds(run: Path) -> float:
    """Seconds of a stage-two run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["seconds"] for line in reversed(lines) if "seconds" in line)


def contrasts(
    runs: Runs,
    demonstrations: Iterable[int],
    pairs: Iterable[tuple[str, str, str]],
) -> list[dict[str, Any]]:
    """Differences of arms; p-values are Holm's over all arms that are compared in one group at the same numbers of demonstrations.

    Against scratch there is the difference from scratch with the next larger number that it has, too.
    """
    pairs, numbers = list(pairs), sorted(demonstrations, key=lambda count: count or np.inf)
    against_scratch = [pair for pair in pairs if pair[1] == "scratch"]
    larger = [
        (fewer, more)
        for place, fewer in enumerate(numbers)
        for more in [number for number in numbers[place + 1 :] if ("scratch", number) in runs][:1]
    ]
    rows = []
    for count, other, compared in [
        *((count, count, pairs) for count in demonstrations),
        *((fewer, more, against_scratch) for fewer, more in larger),
    ]:
        for group in GROUPS:
            family = []
            for first, second, says in compared:
                a, b = runs.get((first, count)), runs.get((second, other))
                if not (a and b and group in a[0]):
                    continue
                firsts, seconds = [run[group] for run in a], [run[group] for run in b]
                difference = estimate(firsts, minus=seconds)
                family.append(
                    {"first": first, "second": second, "says": says, "group": group}
                    | {"demonstrations": count, "demonstrations_of_second": other}
                    | asdict(difference)
                    | {"mcnemar_p": mcnemar_p_values(firsts, seconds)}
                )
            for row, corrected in zip(family, holm([row["p_value"] for row in family]), strict=True):
                row["holm_p"] = corrected
            rows += family
    return rows


def validity(config: CompareConfig, runs: Runs) -> list[dict[str, Any]]:
    """Spearman's correlation of each measure of an encoder with the success of the frozen policies on it.

    Over encoders, snapshots of the alignment among them, each the mean of its training seeds; at each number of demonstrations.
    """
    rows = []
    for count in config.demonstrations:
        there = {name: arm for name, arm in measured_arms(config).items() if (name, count) in runs}
        if len(there) < FEWEST_ENCODERS:
            continue
        measured = [mean_measures(config, arm) for arm in there.values()]
        for group in runs[next(iter(there)), count][0]:
            success = [np.mean([np.mean(list(run[group].values())) for run in runs[name, count]]) for name in there]
            for measure in measured[0]:
                values = [m[measure] for m in measured if measure in m]
                if (
                    measure.endswith("/chance")
                    or len(values) < len(measured)
                    or np.ptp(values) == 0
                    or np.ptp(success) == 0
                ):
                    continue
                rho = float(stats.spearmanr(values, success).statistic)
                low, high = fisher_interval(rho, len(values))
                row = {
                    "measure": measure,
                    "group": group,
                    "demonstrations": count,
                    "rho": rho,
                    "low": low,
                    "high": high,
                }
                rows.append(row | {"encoders": len(values)})
    return rows


def measures_rows(config: CompareConfig) -> list[dict[str, Any]]:
    """What the encoder of each frozen arm knows by each of `KNOWN` that was measured, and the chance level if there is one."""
    rows = []
    for name, arm in measured_arms(config).items():
        for seed, file in zip(config.seeds, measures_of(config, arm), strict=True):
            found = read_json(file)
            rows += [
                {"arm": name, "seed": seed, "measure": m, "value": found[m], "chance": found.get(f"{m}/chance")}
                for m in KNOWN
                if m in found
            ]
    return rows


def measured_arms(config: CompareConfig) -> dict[str, Arm]:
    """The arms that show an encoder as it is, frozen, and with all that it can know, if no measures of it failed."""
    return {
        name: arm
        for name, arm in chosen_arms(config).items()
        if arm.source != "named" and arm.tuned_part == "nothing" and arm.hide == "none" and is_measured(config, arm)
    }


def measures_of(config: CompareConfig, arm: Arm) -> list[Path]:
    """Where the measures of an arm's encoders are, one of each training seed."""
    return [encoder_folder(config, arm.encoder, seed).parent / "measures.json" for seed in config.seeds]


def is_measured(config: CompareConfig, arm: Arm) -> bool:
    """Whether no measures of an arm's encoders failed."""
    return all(file.is_file() for file in measures_of(config, arm))


def mean_measures(config: CompareConfig, arm: Arm) -> dict[str, float]:
    """An encoder's alignment measures, averaged over training seeds; those that every seed has."""
    seeds = [read_json(file) for file in measures_of(config, arm)]
    return {name: float(np.mean([m[name] for m in seeds])) for name in seeds[0] if all(name in m for m in seeds)}


def fisher_interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation of n >= 4 pairs (Fisher's z with Bonett and Wright's variance, 2000).

    A perfect correlation counts as half way to the next one that n pairs can have.
    """
    most = 1 - 6 / (n**3 - n)
    bounded = float(np.clip(rho, -most, most))
    half = 1.96 * np.sqrt((1 + bounded**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(bounded) - half), np.tanh(np.arctanh(bounded) + half)
    return float(min(low, rho)), float(max(high, rho))
