"""The matched comparison: same head, data, text features and episodes for every arm."""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from vla.comparison.arms import CONTRASTS
from vla.comparison.estimates import with_estimates
from vla.comparison.jobs import in_short, print_left, run_jobs
from vla.comparison.plan import chosen_arms, plan_jobs, write_json
from vla.comparison.report import comparison_report, demonstrations, interval
from vla.comparison.summary import summarise_comparison
from vla.config import CompareConfig, SweepConfig
from vla.config_io import filled, to_dict
from vla.eval.report import write_report
from vla.eval.statistics import episodes_needed, visible_difference
from vla.locks import waiting_lock
from vla.precision import chosen_precision
from vla.types import UserError
from vla.versions import versions

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BEFORE = {"transfer_weight": 0.0}  # what versions without the field did with transfer
GIVEN = ("encoders", "policies")  # NAME=FOLDER each; a name keeps its folder
GROWING = ("arms", "demonstrations", "seeds", "ablations", "output", *GIVEN)
# Changing these changes no result.
FREE_FIELDS = ("dry_run", "threads", "workers", "batch_size", "stream", "cache", "save_every", "log_every")


def compare(config: CompareConfig) -> Path | None:
    """Run what is left of the comparison, alone or together with other processes, and return the report.

    Raises:
        UserError: unusable configuration, or the folder was begun with another one.
    """
    torch.set_num_threads(config.policy.threads)
    for name in LAUNCHER:  # every job is a run of one process; `accelerate launch` only starts several of us
        os.environ.pop(name, None)
    folder = Path(config.output)
    config = with_precision(folder, config)
    jobs = with_estimates(config, plan_jobs(config))
    print("compare: " + in_short(jobs))
    can_see = power(config) if chosen_arms(config) else ""
    print(can_see or "policies as they are: no training seeds, no differences")
    if config.dry_run:
        print_left(jobs)
        return None
    check_same(folder, config)
    run_jobs(jobs, folder / "jobs", print)
    return finish(config, folder, can_see)


def finish(config: CompareConfig, folder: Path, can_see: str) -> Path:
    """Write comparison.json, its tables as CSV and report.html; several processes do so one after the other.

    Raises:
        UserError: the runs did not see the same demonstrations.
    """
    check_same_data(folder)
    report = folder / "report.html"
    with waiting_lock(folder / "jobs" / "report"):
        result = summarise_comparison(config)
        protocol = {"power": can_see, "training seeds": ", ".join(map(str, config.seeds))} if can_see else {}
        if (folder / "data.json").is_file():
            data = json.loads((folder / "data.json").read_text())
            result["data"] = data
            protocol["demonstrations"] = f"{data['root']}, {data['episodes']} episodes of {data['goals']} goals"
        protocol |= trained_with(folder)
        result |= {
            "command": " ".join(["python", *sys.argv]),
            "protocol": protocol | versions(),
            "config": to_dict(config),
        }
        write_json(folder / "comparison.json", result)
        for name in ("success", "levels", "contrasts", "validity"):
            write_csv(folder / f"{name}.csv", result[name])
        write_report(report, comparison_report(result))
    for row in result["success"]:
        if row["group"] == "plain":
            print(f"  {row['arm']:28} {demonstrations(row['demonstrations']):34} {interval(row)}")
    print(f"wrote {folder / 'comparison.json'} and {report}")
    return report


def records(folder: Path, name: str) -> dict[Path, dict]:
    """The JSON files of a name that trained encoders and policies left."""
    paths = (path for stage in ("align", "policy") for path in sorted(folder.glob(f"{stage}/**/{name}")))
    return {path: json.loads(path.read_text()) for path in paths}


def trained_with(folder: Path) -> dict[str, str]:
    """The commits and processors that encoders and policies were trained with; the report may be of others."""
    made = records(folder, "versions.json").values()
    commits = {commit for record in made for commit in record.get("commits", [record.get("commit")]) if commit}
    processors = {record["processor"] for record in made if "processor" in record}
    return {
        "trained at commit": ", ".join(sorted(commits)) or "unknown",
        "trained on": ", ".join(sorted(processors)) or "unknown",
    }


def check_same_data(folder: Path) -> None:
    """Refuse to compare runs of one data set that saw different files of it, as runs of several machines may have.

    Raises:
        UserError: two fingerprints; names a run of each.
    """
    for name in ("alignment.json", "concord.json"):
        first: dict[str, tuple[str, Path]] = {}
        for path, record in records(folder, name).items():
            data = record["data"]
            seen, other = first.setdefault(data["root"], (data["fingerprint"], path))
            if seen != data["fingerprint"]:
                raise UserError(
                    f"{path}: was trained on another {data['root']} than {other} (fingerprints {data['fingerprint']} "
                    f"and {seen}); choose another --output for one of them"
                )


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys as a table; an empty list leaves an empty file."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)


def check_same(folder: Path, config: CompareConfig | SweepConfig) -> None:
    """Refuse to mix the results of two configurations; arms, encoders, seeds, numbers and ablations may be added.

    Fields that a folder of an older version does not know had their defaults.

    Raises:
        UserError: a field that changes results differs from what the folder was begun with, or a name had another folder.
    """
    path = folder / "begun.json"
    wanted, usual = comparable(config), comparable(type(config)())
    given = {field: dict(pair.partition("=")[::2] for pair in getattr(config, field, ())) for field in GIVEN}
    begun = without(json.loads(path.read_text()), FREE_FIELDS) if path.is_file() else wanted | given
    made_with = filled(begun, usual | (BEFORE if begun.get("transfer") else {}))
    differ = [key for key in wanted if made_with[key] != wanted[key]]
    if differ:
        raise UserError(f"{folder}: was begun with another {', '.join(differ)}; choose another --output")
    for field, folders in given.items():
        before = begun.get(field, {})
        for name in folders:
            if before.get(name, folders[name]) != folders[name]:
                raise UserError(f"{folder}: {field}: {name!r} was {before[name]} before; choose another name")
        begun[field] = before | folders
    write_json(path, begun)


def with_precision[C: (CompareConfig, SweepConfig)](folder: Path, config: C) -> C:
    """With one precision for every job: of "auto", the folder's if it was begun, else what suits this machine."""
    path = folder / "begun.json"
    begun = json.loads(path.read_text()) if path.is_file() else {}

    def of(stage: str) -> str:
        wanted = getattr(config, stage).precision
        return chosen_precision(begun.get(stage, {}).get("precision", wanted) if wanted == "auto" else wanted)

    align, policy = (replace(getattr(config, stage), precision=of(stage)) for stage in ("align", "policy"))
    return replace(config, align=align, policy=policy)


def comparable(config: CompareConfig | SweepConfig) -> dict:
    """What changes results, and may not change within a folder."""
    fields = {key: value for key, value in to_dict(config).items() if key not in GROWING}
    return json.loads(json.dumps(without(fields, FREE_FIELDS)))


def without(tree: dict, names: tuple[str, ...]) -> dict:
    """The mapping without some keys, at any depth; `policy.batch_size` stays, since training depends on it."""
    return {
        key: without(value, names) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in names or (key == "batch_size" and "steps" in tree)
    }


def power(config: CompareConfig) -> str:
    """What the comparison can show, before it runs."""
    seeds, episodes = len(config.seeds), config.eval.episodes
    planned = sum(first in config.arms and second in config.arms for first, second, _ in CONTRASTS)
    planned += len(config.encoders) if "aligned-frozen" in config.arms else 0
    text = f"{seeds} training seed{'s' if seeds > 1 else ''} of {episodes} plain episodes see {points(seeds, episodes)}"
    if planned > 1:
        text += f" ({points(seeds, episodes, 0.05 / planned)} where it is the strictest of {planned} corrected ones)"
    if config.eval.split_episodes:
        text += f"; each split level sees {points(seeds, config.eval.split_episodes)}"
    text += f"; 10 points take {episodes_needed(0.1, seeds)} episodes"
    return text + " (80 % power at success around 70 %, if training seeds agree)"


def points(seeds: int, episodes: int, alpha: float = 0.05) -> str:
    """The smallest difference that is seen, in words."""
    difference = visible_difference(seeds, episodes, alpha=alpha)
    return f"a difference of {100 * difference:.0f} points" if difference < 1 else "no difference"
