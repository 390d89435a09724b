"""A sweep: stage one, stage two and evaluation once for every value of a field, down to closed-loop success.

    python scripts/sweep.py --config_path configs/sweep/demo.yaml --sweep.align.loss.temperature=0.03,0.07,0.2

Several swept fields give every combination. Ablations (`--ablations`, or in the YAML file) are one change at a time from the
configuration as it is. Points that differ in stage two alone share their alignment.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vla.comparison.begun import check_same, comparable, with_precision
from vla.comparison.chosen import SET_BY_POINTS, SET_HERE, check_episodes, check_set_here
from vla.comparison.data import check_data_there, check_evaluable, clone_cached, drop_caches, env_name, open_beside
from vla.comparison.estimates import stage_seconds
from vla.comparison.jobs import Job, in_short, leave_the_launcher, needed, print_left, refuse_failed, run_jobs
from vla.comparison.points import (
    SWEPT,
    Point,
    ablation_points,
    alignment_of,
    at_point,
    folder_name,
    label,
    points,
    share_of,
)
from vla.comparison.summary import Outcomes, estimate, read_outcomes
from vla.comparison.sweep_report import MEASURES, measured, sweep_report
from vla.config import SweepConfig
from vla.config_io import ConfigError, inside, to_dict
from vla.data.episodes import read_episodes
from vla.data.frames import open_pictures
from vla.eval.evaluate import evaluate
from vla.eval.report import with_interval, write_report
from vla.files import read_json, write_json
from vla.integrations.collect import collect
from vla.locks import waiting_lock
from vla.policies.concord.modeling_concord import WEIGHTS
from vla.training.align import train_align
from vla.training.align_export import export_share
from vla.training.align_setup import check_alignment
from vla.training.start import check_pooler
from vla.training.unused import unused_options
from vla.versions import command_line, versions


def sweep(config: SweepConfig, swept: dict[str, tuple[str, ...]]) -> Path | None:
    """Run what is left of the sweep, alone or together with other processes, and return its folder; None of a dry run.

    Raises:
        UserError: nothing is swept, a field or value that cannot be, or a job failed by a user's error.
    """
    if not (swept or config.ablations):
        raise ConfigError(
            "nothing is swept; add --sweep.FIELD=a,b,c, as in --sweep.align.loss.temperature=0.03,0.07,0.2, or --ablations"
        )
    if swept and config.ablations:
        raise ConfigError(f"ablations: leave out --sweep.{next(iter(swept))}, or give --ablations=[]")
    check_points(config)
    torch.set_num_threads(config.policy.threads)
    leave_the_launcher()
    folder = Path(config.output)
    config = with_precision(folder, config)
    chosen = points(swept) if swept else ablation_points(config.ablations)
    configured = [(point, at_point(config, point)) for point in chosen]
    refuse_unused_fields(configured)
    by_name: dict[str, tuple[Job, SweepConfig]] = {}
    for _, at in configured:
        with inside("align."):
            check_alignment(at.align)
        if at.policy.aligned_pooler:
            check_pooler(at.policy.head, at.align.loss)
    users: dict[Path, list[Path]] = {}  # the policies that read each cache of tokens
    for (point, at), seed in product(configured, config.seeds):
        users.setdefault(cache_folder(at, folder, point, seed), []).append(policy_folder(folder, point, seed))
    for (point, at), seed in product(configured, config.seeds):
        readers = users[cache_folder(at, folder, point, seed)]
        by_name |= {job.name: (job, at) for job in jobs_of(at, folder, point, seed, readers)}
    left = {
        job.name for job in needed([job for job, _ in by_name.values()])
    }  # others need no estimate, nor what it loads
    jobs = [replace(job, seconds=seconds_of(job, at)) if job.name in left else job for job, at in by_name.values()]
    print("sweep: " + in_short(jobs))
    check_same(folder, config, keep=not config.dry_run)
    if config.dry_run:
        print_left(jobs)
        return None
    failed = run_jobs(jobs, folder / "jobs", print, comparable(config))
    if not failed:
        drop_caches((folder / "cache").glob("*"))  # tokens that were left behind
    done = [point for point in chosen if all(result_of(folder, point, seed).is_file() for seed in config.seeds)]
    if done:
        finish(config, swept, done, chosen, folder)
    refuse_failed(failed, folder)
    return folder


def seconds_of(job: Job, config: SweepConfig) -> float:
    """The seconds that a job at a point's configuration will take."""
    stages = stage_seconds(config)
    stage = job.name.partition("-")[0]
    if stage == "policy" and config.policy.tune:
        return config.policy.steps * stages["tuned step"]
    return stages.get(stage, 10.0)


def refuse_unused_fields(chosen: Sequence[tuple[Point, SweepConfig]]) -> None:
    """Refuse a field that changes nothing at any of the points that name it.

    Args:
        chosen: points, and the configuration at each.
    Raises:
        UserError: says what it needs.
    """
    needs: dict[str, list[str]] = {}
    for point, at in chosen:
        unused = {
            f"{stage}.{name}": what
            for stage in SWEPT
            for name, what in unused_options(
                getattr(at, stage), [name.partition(".")[2] for name in point if name.startswith(f"{stage}.")]
            ).items()
        }
        for name in point:
            needs.setdefault(name, []).append(unused.get(name, ""))
    for name, every in needs.items():
        if all(every):
            raise ConfigError(f"{name} changes nothing without {every[0]}; leave it out")


def check_points(config: SweepConfig) -> None:
    """Refuse what no point can be trained or estimated with.

    Raises:
        UserError: names the field.
    """
    if not config.seeds or min(config.seeds) < 0:
        raise ConfigError(f"seeds: {list(config.seeds)}; give at least one number, none below 0")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds: {list(config.seeds)} repeats a value")
    check_episodes(config.eval)
    check_set_here(config, SET_HERE | SET_BY_POINTS)


def alignment_folder(folder: Path, point: Point, seed: int) -> Path:
    """The stage-one run of a point and training seed."""
    return folder / "align" / alignment_of(point) / str(seed)


def share_folder(folder: Path, point: Point, seed: int, share: float) -> Path:
    """What is exported at a share of the way of that run."""
    return alignment_folder(folder, point, seed) / "wise_ft" / f"{share:g}"


def policy_folder(folder: Path, point: Point, seed: int) -> Path:
    """The policy of a point and training seed."""
    return folder / "policy" / folder_name(point) / str(seed) / "policy"


def cache_folder(config: SweepConfig, folder: Path, point: Point, seed: int) -> Path:
    """Where the tokens of the encoder of a point and training seed are kept while policies read them."""
    share = share_of(config, point)
    return folder / "cache" / f"{alignment_of(point)}{'' if share is None else f'@{share:g}'}-{seed}"


def result_of(folder: Path, point: Point, seed: int) -> Path:
    """The evaluation of a point and training seed."""
    return folder / "eval" / folder_name(point) / str(seed) / "eval.json"


def finish(
    config: SweepConfig, swept: dict[str, tuple[str, ...]], done: list[Point], chosen: list[Point], folder: Path
) -> None:
    """Write sweep.json, sweep.csv and report.html of the points that are done; several processes do so one after the other."""
    with waiting_lock(folder / "jobs" / "report"):
        rows = [row_of(config, folder, point, seed) for point in done for seed in config.seeds]
        reference = chosen[0] if chosen[0] in done and not swept else None
        points = [point_of(folder, point, config.seeds, reference) for point in done]
        result = {"swept": swept, "rows": rows, "points": points, "config": to_dict(config)}
        result["failed"] = [point for point in chosen if point not in done]
        result |= {"command": command_line(), "versions": versions()}
        write_json(folder / "sweep.json", result)
        fields = list(dict.fromkeys(name for point in done for name in point))
        with (folder / "sweep.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=[*fields, "seed", "success", "low", "high", "n", *measured(rows)])
            table.writeheader()
            table.writerows(csv_row(row) for row in rows)
        write_report(folder / "report.html", sweep_report(result))
    for row in rows:
        print(f"  {label(row['point']):40} seed {row['seed']}  {with_interval(row['success'], row['interval'])}")
    print(f"wrote {folder / 'sweep.json'} and {folder / 'report.html'}")


def jobs_of(config: SweepConfig, folder: Path, point: Point, seed: int, readers: Sequence[Path]) -> list[Job]:
    """The jobs of one point and training seed; points may share the first ones, and `readers` are the policies that share its encoder."""
    aligned = alignment_folder(folder, point, seed)
    trained = policy_folder(folder, point, seed)
    result = folder / "eval" / folder_name(point) / str(seed)
    share = share_of(config, point)
    encoder = (aligned if share is None else share_folder(folder, point, seed, share)) / "clip"
    align = replace(config.align, output=str(aligned), seed=seed, resume=True)
    align = align if share is None else replace(align, wise_ft=())
    data = replace(config.align.data, cache=str(cache_folder(config, folder, point, seed)))
    policy = replace(config.policy, output=str(trained.parent), encoder=str(encoder), data=data, seed=seed, resume=True)
    evaluation = replace(config.eval, policy=str(trained), output=str(result), env=env_name(config), workers=1)
    there = (Path(config.align.data.root) / "meta" / "info.json",)
    demonstrations = Job("data", folder / "data.json", partial(make_data, config), beside=there)
    first = Job(f"align-{alignment_of(point)}-{seed}", aligned / "report.html", partial(train_align, align), ("data",))
    taken = first
    if share is not None:
        name = f"share-{alignment_of(point)}-{share:g}-{seed}"
        taken = Job(name, encoder, partial(export_share, align, share), (first.name,))
    make = partial(clone_cached, config, policy, readers)
    second = Job(f"policy-{folder_name(point)}-{seed}", trained / WEIGHTS, make, (taken.name,))
    third = Job(
        f"eval-{folder_name(point)}-{seed}", result / "report.html", partial(evaluate, evaluation), (second.name,)
    )
    return [demonstrations, first, *([taken] if taken is not first else []), second, third]


def make_data(config: SweepConfig) -> None:
    """Collect the demonstrations, unless they are there, and decode their pictures once.

    Raises:
        UserError: of a sweep that was begun with them, other demonstrations came out.
    """
    data = config.align.data
    if not (Path(data.root) / "meta" / "info.json").is_file():
        collect(replace(config.collect, output=data.root))
    episodes = read_episodes(data.root, data.camera)
    check_evaluable(config, episodes)
    open_pictures(episodes, data)
    open_beside(config)
    check_data_there(Path(config.output))
    write_json(Path(config.output) / "data.json", {"root": data.root, "fingerprint": episodes.fingerprint})


def row_of(config: SweepConfig, folder: Path, point: Point, seed: int) -> dict[str, Any]:
    """What came out of one point and training seed."""
    aligned = json.loads((alignment_folder(folder, point, seed) / "alignment.json").read_text())
    measures = aligned["metrics"] | (aligned["way"][-1] if aligned["way"] else {})
    share = share_of(config, point)
    if share is not None:
        path = share_folder(folder, point, seed, share) / "measures.json"
        between = read_json(path)  # an older version wrote none
        measures = {name.removeprefix("new/"): value for name, value in between.items()}
    result = json.loads(result_of(folder, point, seed).read_text())
    return {
        "point": point,
        "seed": seed,
        "success": result["success_rate"],
        "interval": result["interval"],
        "n": result["n"],
        "grounding": result["grounding"].get("score"),
        "measures": {name: measures[name] for name in MEASURES if name in measures},
        "minutes": round(aligned["seconds"] / 60, 1),
    }


def point_of(folder: Path, point: Point, seeds: tuple[int, ...], reference: Point | None) -> dict[str, Any]:
    """Success at a point over training seeds, by group of episodes, and its difference from a reference."""

    def outcomes(at: Point) -> list[dict[str, Outcomes]]:
        return [read_outcomes(result_of(folder, at, seed)) for seed in seeds]

    here, there = outcomes(point), outcomes(reference) if reference is not None else []
    groups = {}
    for group in here[0]:
        firsts = [run[group] for run in here]
        groups[group] = {"success": asdict(estimate(firsts))}
        if there and point != reference:
            groups[group]["difference"] = asdict(estimate(firsts, minus=[run[group] for run in there]))
    return {"point": point, "groups": groups}


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV."""
    low, high = row["interval"]
    rates = {"seed": row["seed"], "success": row["success"], "low": low, "high": high, "n": row["n"]}
    return row["point"] | rates | row["measures"]
