"""From evaluations to answers: success with intervals, differences of arms, and which measure tells success."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vla.comparison.arms import CONTRASTS
from vla.comparison.plan import chosen_arms, encoder_folder, named, numbers_of
from vla.config import CompareConfig
from vla.eval.statistics import Estimate, crossed_interval, holm, paired_p_value

# Which episodes a number is of: by kind of episode and split.
GROUPS: dict[str, tuple[str, frozenset[str] | None]] = {
    "plain": ("success", frozenset({"train"})),
    "perturbed": ("success", frozenset({"distractors", "light", "texture", "camera", "position"})),
    "held-out combinations": ("success", frozenset({"combination"})),
    "new wording": ("success", frozenset({"paraphrase", "synonym"})),
    "swapped instructions": ("swap", None),
}
Outcomes = dict[tuple, bool]  # (split, level, task, seed) -> success


def read_outcomes(path: Path) -> dict[str, Outcomes]:
    """The episodes of one eval.json, by group."""
    episodes = json.loads(path.read_text())["episodes"]
    outcomes: dict[str, Outcomes] = {}
    for group, (kind, splits) in GROUPS.items():
        chosen = [e for e in episodes if e["kind"] == kind and (splits is None or e["split"] in splits)]
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
    """Mean success over training seeds and episodes, or the mean difference from `minus`, run by run and episode by episode.

    Raises:
        ValueError: the runs do not hold the same episodes.
    """
    keys = sorted(runs[0])
    for other in [*runs, *(minus or [])]:
        if sorted(other) != keys:
            raise ValueError("the runs hold different episodes; evaluate them with the same seeds and splits")
    matrix = np.array([[run[key] for key in keys] for run in runs], float)
    if minus is not None:
        matrix = matrix - np.array([[run[key] for key in keys] for run in minus], float)
    strata = np.array(["/".join(map(str, key[:3])) for key in keys])
    _, sizes = np.unique(strata, return_counts=True)
    return crossed_interval(matrix, strata if sizes.min() > 1 else np.zeros(len(keys)))


def summarise_comparison(config: CompareConfig) -> dict[str, Any]:
    """Everything the report says, as plain data."""
    folder, arms = Path(config.output), chosen_arms(config)
    runs: dict[tuple[str, int], list[dict[str, Outcomes]]] = {}
    rows, minutes, levels = [], {}, []
    for name, arm in arms.items():
        for count in numbers_of(config, arm):
            files = [folder / "eval" / f"{name}-{count}-{seed}" / "eval.json" for seed in config.seeds]
            runs[name, count] = [read_outcomes(file) for file in files]
            levels += level_rows(name, count, [read_levels(file) for file in files])
            minutes[name, count] = np.mean([wall_minutes(config, name, count, seed) for seed in config.seeds])
    for name in named(config.policies, "policies"):
        file = folder / "eval" / f"{name}-given-0" / "eval.json"
        runs[name, 0] = [read_outcomes(file)]
        levels += level_rows(name, 0, [read_levels(file)])
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
        "validity": validity(config, runs),
    }


def level_rows(name: str, count: int, members: list[dict[str, Outcomes]]) -> list[dict[str, Any]]:
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


def wall_minutes(config: CompareConfig, name: str, count: int, seed: int) -> float:
    """Minutes of training behind one policy, what pretrained its encoder included."""
    folder, arm = Path(config.output), chosen_arms(config)[name]
    seconds = trained_seconds(folder / "policy" / name / str(count) / str(seed))
    if arm.source == "cloned":
        seconds += trained_seconds(folder / "policy" / "cloning" / str(seed))
    elif arm.source not in ("random", "named", "vision"):
        record = json.loads((folder / "align" / arm.source / str(seed) / "alignment.json").read_text())
        seconds += record["seconds"] * (arm.snapshot / record["steps"] if arm.snapshot else 1)
    return seconds / 60


def trained_seconds(run: Path) -> float:
    """Seconds of a stage-two run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["seconds"] for line in reversed(lines) if "seconds" in line)


def contrasts(
    runs: dict[tuple[str, int], list[dict[str, Outcomes]]],
    demonstrations: Iterable[int],
    pairs: Iterable[tuple[str, str, str]],
) -> list[dict[str, Any]]:
    """Differences of arms; p-values are Holm's over all arms that are compared in one group at one number of demonstrations."""
    rows = []
    for count in demonstrations:
        for group in GROUPS:
            family = []
            for first, second, says in pairs:
                a, b = runs.get((first, count)), runs.get((second, count))
                if not (a and b and group in a[0]):
                    continue
                firsts, seconds = [run[group] for run in a], [run[group] for run in b]
                difference = estimate(firsts, minus=seconds)
                keys = sorted(firsts[0])
                pooled = [[run[key] for run in arm for key in keys] for arm in (firsts, seconds)]
                family.append(
                    {"first": first, "second": second, "says": says, "demonstrations": count, "group": group}
                    | asdict(difference)
                    | {"mcnemar_p": paired_p_value(*pooled)}
                )
            for row, corrected in zip(family, holm([row["p_value"] for row in family]), strict=True):
                row["holm_p"] = corrected
            rows += family
    return rows


def validity(config: CompareConfig, runs: dict[tuple[str, int], list[dict[str, Outcomes]]]) -> list[dict[str, Any]]:
    """Spearman's correlation of each measure of an encoder with the success of the frozen policies on it.

    Over encoders, snapshots of the alignment and training seeds, at each number of demonstrations.
    """
    arms = {
        name: arm
        for name, arm in chosen_arms(config).items()
        if arm.source not in ("named", "vision") and arm.tuned_part == "nothing" and arm.hide == "none"
    }
    rows = []
    for count in config.demonstrations:
        measured, success = [], []
        for name, arm in arms.items():
            if (name, count) not in runs:
                continue
            for number, seed in enumerate(config.seeds):
                path = encoder_folder(config, arm.encoder, seed).parent / "measures.json"
                measured.append(json.loads(path.read_text()))
                success.append({g: float(np.mean(list(o.values()))) for g, o in runs[name, count][number].items()})
        if len(measured) < 4:
            continue
        for measure in [m for m in measured[0] if not m.endswith("/chance") and all(m in other for other in measured)]:
            for group in success[0]:
                x, y = [m[measure] for m in measured], [s[group] for s in success]
                if np.ptp(x) == 0 or np.ptp(y) == 0:
                    continue
                rho, p = stats.spearmanr(x, y)
                low, high = fisher_interval(float(rho), len(x))
                rows.append(
                    {"measure": measure, "group": group, "demonstrations": count, "rho": float(rho), "low": low}
                    | {"high": high, "p_value": float(p), "encoders": len(x)}
                )
    return rows


def fisher_interval(rho: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation of n >= 4 pairs (Fisher's z with Bonett and Wright's variance, 2000)."""
    if abs(rho) >= 1:
        return rho, rho
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return float(np.tanh(np.arctanh(rho) - half)), float(np.tanh(np.arctanh(rho) + half))
