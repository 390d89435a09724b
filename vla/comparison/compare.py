"""The matched comparison: same head, data, text features and episodes for every arm."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vla.comparison.arms import ARMS, CONTRASTS
from vla.comparison.begun import check_same, check_same_data, comparable, records, with_precision
from vla.comparison.chosen import chosen_arms, names_of, numbers_of
from vla.comparison.data import drop_caches, env_name
from vla.comparison.estimates import with_estimates
from vla.comparison.jobs import in_short, leave_the_launcher, needed, print_left, refuse_failed, run_jobs
from vla.comparison.plan import plan_jobs
from vla.comparison.report import comparison_report, demonstrations, interval
from vla.comparison.summary import summarise_comparison
from vla.comparison.work import evaluation_folder
from vla.config import CompareConfig
from vla.config_io import inside, to_dict
from vla.eval.evaluate import tasks_and_splits
from vla.eval.report import write_report
from vla.eval.statistics import episodes_needed, visible_difference
from vla.files import read_json, write_json
from vla.locks import waiting_lock
from vla.versions import command_line, versions


def compare(config: CompareConfig) -> Path | None:
    """Run what is left of the comparison, alone or together with other processes, and return the report.

    Raises:
        UserError: unusable configuration, the folder was begun with another one, or a job failed by a user's error.
    """
    torch.set_num_threads(config.policy.threads)
    leave_the_launcher()
    folder = Path(config.output)
    config = with_precision(folder, config)
    jobs = plan_jobs(config)
    jobs = with_estimates(config, jobs) if needed(jobs) else jobs  # which may need a GPU or a start that is not here
    print("compare: " + in_short(jobs))
    can_see = power(config) if chosen_arms(config) else ""
    print(can_see or "policies as they are: no training seeds, no differences")
    check_same(folder, config, keep=not config.dry_run)
    if config.dry_run:
        print_left(jobs)
        return None
    failed = run_jobs(jobs, folder / "jobs", print, comparable(config))
    if not failed:
        drop_caches((folder / "cache").glob("*"))  # tokens that were left behind
        return finish(config, folder, can_see)
    try:
        if (part := finished_part(config)) and not reported_whole(folder):
            finish(part, folder, can_see, tuple(failed))
    finally:
        refuse_failed(failed, folder)


def reported_whole(folder: Path) -> bool:
    """Whether there is a report of arms of which none failed; one that lacks some does not take its place."""
    path = folder / "comparison.json"
    return path.is_file() and not read_json(path).get("failed")


def finished_part(config: CompareConfig) -> CompareConfig | None:
    """The comparison of what was evaluated with every training seed; None if nothing was."""

    def whole(name: str, counts: Iterable[int | str], seeds: Iterable[int]) -> bool:
        folders = [evaluation_folder(config, name, count, seed) for count in counts for seed in seeds]
        return all((folder / "report.html").is_file() for folder in folders)

    chosen = chosen_arms(config)
    arms = {name for name, arm in chosen.items() if whole(name, numbers_of(config, arm), config.seeds)}
    if "aligned-frozen" not in arms:  # whose number of demonstrations those beside it have
        arms -= {name for name, arm in chosen.items() if name not in ARMS and arm.number is not None}
    part = replace(
        config,
        arms=tuple(
            text
            for text, name in zip(config.arms, names_of(config.arms), strict=True)
            if name in arms and ARMS[name].after in ("", *arms)
        ),
        encoders=tuple(pair for pair in config.encoders if pair.partition("=")[0] in arms),
        policies=tuple(pair for pair in config.policies if whole(pair.partition("=")[0], ("given",), (0,))),
    )
    snapshots = tuple(step for step in config.align.snapshots if f"aligned-frozen@{step}" in arms)
    part = replace(part, align=replace(config.align, snapshots=snapshots if "aligned-frozen" in arms else ()))
    return part if part.arms or part.encoders or part.policies else None


def finish(config: CompareConfig, folder: Path, can_see: str, failed: Sequence[str] = ()) -> Path:
    """Write comparison.json, its tables as CSV and report.html, which says what `failed`; several processes do so one after the other.

    Raises:
        UserError: the runs did not see the same demonstrations.
    """
    check_same_data(folder)
    report = folder / "report.html"
    with waiting_lock(folder / "jobs" / "report"):
        result = summarise_comparison(config)
        protocol = {"power": can_see, "training seeds": ", ".join(map(str, config.seeds))} if can_see else {}
        if data := read_json(folder / "data.json"):
            result["data"] = data
            protocol["demonstrations"] = f"{data['root']}, {data['episodes']} episodes of {data['goals']} goals"
        protocol |= (
            fewer_than_asked(folder)
            | trained_with(folder)
            | ({"failed, and left out": ", ".join(failed)} if failed else {})
        )
        result |= {
            "failed": list(failed),
            "command": command_line(),
            "protocol": protocol | versions(),
            "config": to_dict(config),
        }
        write_json(folder / "comparison.json", result)
        for name in ("success", "levels", "contrasts", "measures", "validity"):
            write_csv(folder / f"{name}.csv", result[name])
        write_report(report, comparison_report(result))
    for row in result["success"]:
        if row["group"] == "plain":
            print(f"  {row['arm']:28} {demonstrations(row['demonstrations']):34} {interval(row)}")
    print(f"wrote {folder / 'comparison.json'} and {report}")
    return report


def fewer_than_asked(folder: Path) -> dict[str, str]:
    """How many demonstrations of a task policies cloned, where that is less than the number that they are listed under."""
    found: dict[int, set[int]] = {}
    for path in folder.glob("policy/*/*/*/policy/concord.json"):
        if path.parents[1].name == "rollouts":  # of a policy that was looked at in training
            continue
        asked = int(path.parents[2].name)
        found.setdefault(asked, set()).update(read_json(path).get("episodes", {}).values())
    told = [
        f"{min(of)} to {max(of)} instead of {asked}" for asked, of in sorted(found.items()) if of and min(of) < asked
    ]
    return {"demonstrations of each task that there were": ", ".join(told)} if told else {}


def trained_with(folder: Path) -> dict[str, str]:
    """The commits and processors that encoders and policies were trained with; the report may be of others."""
    made = records(folder, "versions.json").values()
    commits = {commit for record in made for commit in record.get("commits", [record.get("commit")]) if commit}
    every = [one for record in made for one in (record, *record.get("before", []))]
    processors = {record["processor"] for record in every if "processor" in record}
    return {
        "trained at commit": ", ".join(sorted(commits)) or "unknown",
        "trained on": ", ".join(sorted(processors)) or "unknown",
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys as a table; an empty list leaves an empty file."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)


def power(config: CompareConfig) -> str:
    """What the comparison can show, before it runs."""
    seeds, episodes = len(config.seeds), config.eval.episodes
    arms = chosen_arms(config)
    pairs = [*CONTRASTS, *(("aligned-frozen", name, "") for name, arm in arms.items() if arm.name)]
    trained = {name: numbers_of(config, arm) for name, arm in arms.items()}
    planned = max(  # pairs that are corrected together
        sum(number in trained.get(first, ()) and number in trained.get(second, ()) for first, second, _ in pairs)
        for number in config.demonstrations
    )
    text = f"{seeds} training seed{'s' if seeds > 1 else ''} of {episodes} plain episodes see {seen_points(seeds, episodes)}"
    if planned > 1:
        text += (
            f" ({seen_points(seeds, episodes, 0.05 / planned)} where it is the strictest of {planned} corrected ones)"
        )
    with inside("eval."):
        _, levels = tasks_and_splits(replace(config.eval, env=env_name(config)), {})
    if config.eval.split_episodes and levels:
        text += f"; each split level sees {seen_points(seeds, config.eval.split_episodes)}"
    text += f"; 10 points take {episodes_needed(0.1, seeds)} episodes"
    return text + " (80 % power at success around 70 %, if training seeds agree)"


def seen_points(seeds: int, episodes: int, alpha: float = 0.05) -> str:
    """The smallest difference that is seen, in words."""
    difference = visible_difference(seeds, episodes, alpha=alpha)
    return f"a difference of {100 * difference:.0f} points" if difference < 1 else "no difference"
