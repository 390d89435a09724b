"""Evaluation of a policy folder: success by task and split, grounding, videos, one JSON and one report."""

import csv
import time
from concurrent.futures import Executor
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2

from envs import ENVIRONMENTS, env_class, make_env
from envs.metaworld.gl import RenderingError
from vla.config import EvalConfig
from vla.config_io import changed, filled, to_dict
from vla.eval.episode import EpisodeRecord, EpisodeSpec
from vla.eval.evaluation_report import evaluation_report, failures_report
from vla.eval.golden import check_golden
from vla.eval.grounding import grounding_specs, grounding_summary
from vla.eval.report import write_report
from vla.eval.rollouts import rollout_workers, run_rollouts, seconds_so_far
from vla.eval.statistics import summarise
from vla.files import read_json, write_json
from vla.locks import lock_folder
from vla.policies.concord.modeling_concord import WEIGHTS
from vla.policies.loading import LeRobotChunkPolicy, load_chunk_policy
from vla.types import UserError
from vla.versions import command_line, write_versions

FILMED_AT_ONCE = 4


def evaluate(config: EvalConfig) -> Path:
    """Run the evaluation and return its folder.

    Raises:
        UserError: unknown environment, task or split, nothing to render with, or a policy that cannot be loaded.
    """
    cv2.setNumThreads(1)
    policy_folder = Path(config.policy)
    make_policy = partial(load_chunk_policy, policy_folder, config.device)
    with rollout_workers(make_policy, config.workers) as workers:
        try:
            # Loaded here as well: it fails early, before anything is simulated.
            return evaluate_with(config, policy_folder, make_policy(), workers)
        except RenderingError as error:
            raise UserError(f"metaworld: {error}") from error


def evaluate_with(
    config: EvalConfig, policy_folder: Path, policy: LeRobotChunkPolicy, workers: Executor | None
) -> Path:
    """`evaluate` in processes that load the policy already."""
    trained = trained_on(policy_folder)
    config = replace(config, env=config.env or trained.get("env"))
    if config.env is None:
        raise UserError(
            f"{policy_folder}: names no environment; add --env=tabletop, or another of {', '.join(ENVIRONMENTS)}"
        )
    tasks, splits = tasks_and_splits(config, trained)
    check_sizes(config.env, *sizes_of(policy), "the policy")
    output = Path(config.output) if config.output else default_output(config, policy_folder)
    lock = lock_folder(output)
    if not begin(output, config):
        print(f"{output}: already complete")
        return output
    made_with = write_versions(output / "versions.json")
    golden = check_golden(policy_folder, policy, config.env)
    if golden and golden.problem:
        print(f"warning: {policy_folder}: {golden.problem}")

    image_size = trained.get("drawn_at") or trained.get("image_size", 96)
    base = plan(config, tasks, "train", 1, config.episodes, image_size)
    specs = list(base)
    for split, level in splits:
        specs += plan(config, tasks, split, level, config.split_episodes, image_size)
    specs += grounding_specs(base[: config.grounding_episodes])
    journal = output / "episodes.jsonl"
    started = time.perf_counter() - seconds_so_far(journal)  # of an evaluation that goes on
    print(f"evaluate: {len(specs)} episodes of {config.env} with {config.workers} processes into {output}")
    records = run_rollouts(
        policy,
        specs,
        batch_size=config.batch_size,
        workers=workers,
        journal=journal,
    )
    films = film(config, policy, workers, [specs[i] for i in chosen_plain(config, records)], output / "videos")
    failures = film(config, policy, workers, [specs[i] for i in chosen_failures(config, records)], output / "failures")
    result = summary(config, records) | {
        "wall_time_s": round(time.perf_counter() - started, 1),
        "command": command_line(),
        "config": to_dict(config),
        "policy": trained,
        "golden": golden.as_dict() if golden else None,
        "versions": made_with,
    }
    write(output, result, records)
    if failures:
        write_report(output / "failures.html", failures_report(result, output, failures))
    write_report(output / "report.html", evaluation_report(result, output, films))
    lock.close()
    print(table(result))
    print(
        f"wrote {output / 'eval.json'} and {output / 'report.html'}"
        + bool(failures) * f"; failures: {output / 'failures.html'}"
    )
    return output


def trained_on(policy_folder: Path) -> dict[str, Any]:
    """What the policy folder says about its training; empty for policies of other programs."""
    record = read_json(policy_folder / "concord.json")
    config = read_json(policy_folder / "config.json")
    shapes = [f["shape"] for f in config.get("input_features", {}).values() if f.get("type") == "VISUAL"]
    return record | {"image_size": shapes[0][-1]} if shapes else record


def tasks_and_splits(config: EvalConfig, trained: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The tasks and the further (split, level) pairs to evaluate."""
    try:
        environment = env_class(config.env)
    except ValueError as error:
        raise UserError(f"config error: env: {error}") from error
    tasks = config.tasks or (tuple(trained.get("tasks", ())) if trained.get("env") == config.env else ())
    tasks = tasks or environment.TASKS
    for task in tasks:
        if task not in environment.TASKS:
            raise UserError(f"config error: tasks: {task!r} is not a task of {config.env}; known: {environment.TASKS}")
    if config.end_on_success and config.grounding_episodes:
        raise UserError(
            "config error: end_on_success: grounding needs episodes that run on; set grounding_episodes to 0, or leave it out"
        )
    known = environment.splits()
    names = list(config.splits)
    if names == ["all"]:
        names = [name for name in known if name != "train"]
    names = [name for name in names if name != "none"]
    if "train" in names or len(set(names)) < len(names):
        what = "train is evaluated in any case" if "train" in names else f"{names} repeats a split"
        raise UserError(f"config error: splits: {what}; leave it out")
    for name in names:
        if name not in known:
            raise UserError(f"config error: splits: {name!r} is not a split of {config.env}; known: {', '.join(known)}")
    return tasks, [(name, level) for name in names for level in known[name]]


def sizes_of(policy: LeRobotChunkPolicy) -> list[int | None]:
    """The dimensions of a policy's state and action; None of what it does not say."""
    config = policy.policy.config
    return [feature and feature.shape[0] for feature in (config.robot_state_feature, config.action_feature)]


def check_sizes(env: str, state: int | None, action: int | None, whose: str) -> None:
    """Refuse a policy, or demonstrations, of another robot.

    Raises:
        UserError: names both sizes.
    """
    environment = make_env(env)
    for name, size, space in (
        ("state", state, environment.observation_space["agent_pos"]),
        ("action", action, environment.action_space),
    ):
        if size is not None and (size,) != space.shape:
            raise UserError(
                f"config error: env: {env} has {space.shape[0]} {name} dimensions, {whose} {size}; it is of another environment"
            )
    environment.close()


def default_output(config: EvalConfig, policy_folder: Path) -> Path:
    """outputs/eval/ENV/NAME, NAME being the training run's folder."""
    name = policy_folder.resolve().parent.name if policy_folder.name == "policy" else policy_folder.name
    return Path("outputs") / "eval" / config.env / name


def begin(output: Path, config: EvalConfig) -> bool:
    """Whether there is something left to do; an interrupted evaluation of the same policy and configuration goes on.

    Raises:
        UserError: `output` holds an evaluation of another policy or configuration.
    """
    weights = Path(config.policy) / WEIGHTS
    comparable, usual = (
        {k: v for k, v in to_dict(c).items() if k not in ("output", "workers", "batch_size", "device")}
        for c in (config, EvalConfig())
    )
    stamp = {
        "config": comparable,
        "weights": [weights.stat().st_size, weights.stat().st_mtime_ns],
        "policy": read_json(Path(config.policy) / "config.json"),
    }
    path = output / "begun.json"
    if begun := read_json(path):
        found = list(changed(filled(begun["config"], usual), comparable).values())
        if begun["weights"] != stamp["weights"]:
            found.append("other weights")
        before = begun.get("policy", stamp["policy"])  # an older version does not say
        found += changed({"policy": before}, {"policy": stamp["policy"]}).values()
        if found:
            raise UserError(
                f"{output}: holds an evaluation with {'; '.join(found)}; delete it or choose another --output"
            )
    write_json(path, stamp)
    return not (output / "report.html").is_file()


def plan(
    config: EvalConfig, tasks: tuple[str, ...], split: str, level: int, count: int, image_size: int
) -> list[EpisodeSpec]:
    """`count` episodes spread evenly over the tasks; seeds are the same in every split, so that they pair."""
    return [
        EpisodeSpec(
            env=config.env,
            task=tasks[i % len(tasks)],
            seed=config.seed + i,
            tasks=tasks,
            split=split,
            level=level,
            image_size=image_size,
            end_on_success=config.end_on_success,
        )
        for i in range(count)
    ]


def chosen_plain(config: EvalConfig, records: list[EpisodeRecord]) -> list[int]:
    """The first few successes and failures of the plain episodes."""
    plain = [i for i, r in enumerate(records) if r.kind == "success" and r.split == "train"]
    return [i for wanted in (True, False) for i in [j for j in plain if records[j].success == wanted][: config.videos]]


def chosen_failures(config: EvalConfig, records: list[EpisodeRecord]) -> list[int]:
    """Up to `failures` failed episodes, taken in turn from every split and the swapped ones."""
    parts: dict[tuple, list[int]] = {}
    for index, record in enumerate(records):
        if record.kind in ("success", "swap") and not record.success:
            parts.setdefault((record.kind, record.split, record.level), []).append(index)
    turns = [index for turn in zip_longest(*parts.values()) for index in turn if index is not None]
    return sorted(turns[: config.failures])


def film(
    config: EvalConfig,
    policy: LeRobotChunkPolicy,
    workers: Executor | None,
    specs: list[EpisodeSpec],
    folder: Path,
) -> list[EpisodeRecord]:
    """Run episodes once more, with a camera; encoding takes longest, so every process gets its share, a few at a time: a film of them may take 90 MB."""
    return run_rollouts(
        policy,
        specs,
        batch_size=max(1, min(config.batch_size, FILMED_AT_ONCE, -(-len(specs) // config.workers))),
        workers=workers,
        video_folder=folder,
    )


def summary(config: EvalConfig, records: list[EpisodeRecord]) -> dict[str, Any]:
    """Rates and intervals by task and split, and the grounding measures."""
    success = [r for r in records if r.kind == "success"]
    plain = [r for r in success if r.split == "train"]
    splits: dict[str, Any] = {}
    for record in success:
        splits.setdefault(f"{record.split}/{record.level}" if record.split != "train" else "train", []).append(record)
    tasks = list(dict.fromkeys(r.task for r in plain))
    return {
        **summarise(r.success for r in plain),
        "success_final": None if config.end_on_success else summarise(bool(r.success_final) for r in plain),
        "tasks": {task: summarise(r.success for r in plain if r.task == task) for task in tasks},
        "splits": {
            name: summarise(r.success for r in members)
            | {"final": None if config.end_on_success else summarise(bool(r.success_final) for r in members)}
            for name, members in splits.items()
        },
        "grounding": grounding_summary([r for r in records if r.kind != "success"], plain),
        "episodes": [asdict(r) for r in records],
    }


def write(output: Path, result: dict[str, Any], records: list[EpisodeRecord]) -> None:
    """The episodes as CSV, then all of it as eval.json, whole or not at all."""
    with (output / "episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[k for k in asdict(records[0]) if k not in ("achieved", "video")])
        writer.writeheader()
        for record in records:
            writer.writerow({k: v for k, v in asdict(record).items() if k in writer.fieldnames})
    write_json(output / "eval.json", result)


def table(result: dict[str, Any]) -> str:
    """The compact table that ends the command."""

    def line(name: str, part: dict[str, Any]) -> str:
        low, high = part["interval"]
        return f"  {name:28} {100 * part['success_rate']:5.1f} %  [{100 * low:3.0f}, {100 * high:3.0f}]  n={part['n']}"

    lines = ["success", line("all tasks", result)]
    if result["success_final"]:
        lines.append(line("at the final timestep", result["success_final"]))
    lines += [line(task, part) for task, part in result["tasks"].items()]
    lines += ["splits"] + [line(name, part) for name, part in result["splits"].items() if name != "train"]
    grounding = dict(result["grounding"])
    if grounding:
        lines.append("grounding")
        score = grounding.pop("score", None)
        if score:
            lines.append(line("score: done because told", {"success_rate": score["value"]} | score))
        for name, part in grounding.pop("swap", {}).items():
            lines.append(line(f"swap: {name}", part))
        lines += [line(name, part) for name, part in grounding.items()]
    return "\n".join(lines)
