"""Checks of the machine and of what a user names, one line each, with a remedy where something is wrong."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from vla.config import DoctorConfig
from vla.types import RANGE_FLOOR, UserError, first_line


@dataclass(frozen=True)
class Check:
    """`problem` is empty where all is well; `optional` problems are told but are no failure."""

    name: str
    found: str
    problem: str = ""
    optional: bool = False


def doctor(config: DoctorConfig) -> None:
    """Print the table.

    Raises:
        UserError: something needed does not work.
    """
    failed = []
    for check in checks(config):
        mark = "ok  " if not check.problem else "note" if check.optional else "FAIL"
        print(f"  {mark}  {check.name:14} {check.found}")
        if check.problem:
            print(f"        {'':14} {check.problem}")
            if not check.optional:
                failed.append(check.name)
    if failed:
        raise UserError(f"doctor: {', '.join(failed)} need attention; the remedies are above")


def checks(config: DoctorConfig) -> Iterator[Check]:
    """All checks, made one after the other."""
    yield machine()
    yield disk()
    yield attempt("torch", torch_found)
    yield attempt("lerobot", plugin_found, "reinstall: rm -f .venv/ready; make setup")
    yield attempt("rendering", rendering_found, "only Meta-World needs OpenGL; the tabletop does not", optional=True)
    if config.data:
        yield from data_checks(Path(config.data), config.camera)
    if config.encoder:
        yield attempt("encoder", lambda: encoder_found(Path(config.encoder)))
    if config.policy:
        yield from policy_checks(Path(config.policy))


def attempt(name: str, look: Callable[[], str], remedy: str = "", *, optional: bool = False) -> Check:
    """A check that has failed when `look` raises."""
    try:
        return Check(name, look())
    except Exception as error:  # noqa: BLE001 - whatever is wrong is what the user wants to read
        return Check(name, "does not work", f"{first_line(error)}{'; ' if remedy else ''}{remedy}", optional)


def machine() -> Check:
    """Python, cores, memory."""
    memory = psutil.virtual_memory().available / 2**30
    found = f"Python {platform.python_version()}, {os.cpu_count()} cores, {memory:.1f} GiB of memory free"
    return Check("machine", found, "" if memory > 4 else "training the default sizes needs about 4 GiB", optional=True)


def disk() -> Check:
    """Space in the current folder."""
    free = shutil.disk_usage(".").free / 1e9
    problem = "" if free > 10 else "the demo needs about 10 GB; set --data.cache and --output elsewhere"
    return Check("disk", f"{free:.0f} GB free", problem, optional=True)


def torch_found() -> str:
    import torch

    from vla.precision import chosen_precision

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU, the CPU is used"
    products = "" if chosen_precision("auto") == "bf16" else "; no fast bfloat16 here: towers compute in float32"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {device}{products}"


def plugin_found() -> str:
    """Whether LeRobot's own discovery finds this package."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    if "concord" not in PreTrainedConfig.get_known_choices():
        raise UserError("LeRobot does not find the policy type concord")
    if "concord_tabletop" not in EnvConfig.get_known_choices():
        raise UserError("LeRobot does not find the environment concord_tabletop")
    return "finds policy type concord, environments concord_tabletop and concord_metaworld"


def rendering_found() -> str:
    """Draw one Meta-World picture."""
    from envs import make_env

    env = make_env("metaworld", tasks=("reach-v3",), image_size=32)
    env.reset(seed=0)
    env.close()
    return f"Meta-World draws through MUJOCO_GL={os.environ.get('MUJOCO_GL', 'default')}"


def data_checks(root: Path, camera: str | None) -> Iterator[Check]:
    """Every problem of a data set, and what it can be used for if it lacks words, actions or states."""
    from vla.data.validation import validate

    problems = validate(root, partial=True)
    for problem in problems:
        yield Check("data", str(root), problem)
    if problems:
        return
    from vla.data.episodes import read_episodes

    try:
        episodes = read_episodes(root, camera, partial=True)
    except UserError as error:
        yield Check("data", "does not work", str(error))
        return
    damaged = damaged_videos(episodes)
    for problem in damaged:
        yield Check("data", str(root), problem)
    if not damaged:
        yield Check("data", described(episodes), lacking(episodes), optional=True)
        if problem := narrow(episodes):
            yield Check("units", "fine movements", problem, optional=True)
        yield from replay_checks(episodes)


def replay_checks(episodes) -> Iterator[Check]:
    """Whether episodes that this project collected come out the same again."""
    from vla.integrations.replay import replay

    try:
        replayed = replay(episodes)
    except Exception as error:  # noqa: BLE001 - a simulator that is absent or cannot draw raises what it likes
        yield Check("replay", "not possible here", first_line(error), optional=True)
        return
    if replayed:
        what = replayed.problem or replayed.reworded
        yield Check("replay", str(replayed), what, optional=not replayed.problem)


def damaged_videos(episodes) -> list[str]:
    """The camera's videos that are missing or have no picture that can be decoded, one line each."""
    from vla.data.decoding import is_video, open_video, videos_of

    problems = []
    try:
        files = videos_of(episodes)[0] if is_video(episodes) else []
    except UserError as error:
        return [str(error)]
    for file in files:
        try:
            with open_video(file) as container:
                next(container.decode(video=0))
        except (UserError, StopIteration) as error:
            problems.append(str(error) or f"{file}: a video without pictures")
    return problems


def described(episodes) -> str:
    """How large a data set is, and how much of what was asked was done."""
    told = episodes.goal_id >= 0
    succeeded = f", {100 * episodes.success[told].mean():.0f} % succeeded" if told.any() else ""
    return (
        f"{episodes.root}: {len(told)} episodes, {len(episodes.frame_row)} frames, "
        f"{len(set(episodes.goal_id[told].tolist()))} goals{succeeded}"
    )


def narrow(episodes) -> str:
    """Which actions and states vary too little in their units to be normalised to -1..1; empty if none does."""
    from vla.data.normalization import compute_norm_stats

    found = []
    for name in ("action", "state"):
        values = getattr(episodes, name)
        values = values[np.isfinite(values).all(1)]
        if values.size:
            stats = compute_norm_stats(values)
            moves = (stats.q99 - stats.q01 < 1.001 * RANGE_FLOOR) & (stats.max > stats.min)
            found += [f"{name} {dimension}" for dimension in np.flatnonzero(moves)]
    if not found:
        return ""
    return f"{', '.join(found)}: from q01 to q99 less than {RANGE_FLOOR}, so hardly learned; convert the units, metres to millimetres, say"


def lacking(episodes) -> str:
    """What a data set lacks and which terms of stage one it feeds then; empty if it lacks nothing."""
    untold = int((episodes.goal_id < 0).sum())
    whole = untold == len(episodes.goal_id)
    no_actions, no_states = episodes.action.shape[1] == 0, episodes.state.shape[1] == 0
    lacks = ["actions"] * no_actions + ["states"] * no_states + ["instructions"] * whole
    feeds = ["context_action", "transition_action"] * (not no_actions) + ["state"] * (not no_states)
    words = ["vision_language", "word_patch", "transition_language"]
    if lacks:
        terms = feeds + words * (not whole)
        return f"has no {' and no '.join(lacks)}: for --more of stage one only, where it feeds {', '.join(terms) or 'nothing'}"
    return f"{untold} episodes have no instruction: they feed {', '.join(feeds)} alone" if untold else ""


def encoder_found(folder: Path) -> str:
    from vla.models.clip_files import load_clip

    clip, _ = load_clip(str(folder))
    vision = clip.config.vision_config
    return f"{folder}: {vision.image_size} px, patch {vision.patch_size}, width {vision.hidden_size}"


def policy_checks(folder: Path) -> Iterator[Check]:
    """Whether a policy loads, and whether it and its environment still are what they were in training."""
    from vla.eval.evaluate import trained_on
    from vla.eval.golden import check_golden
    from vla.policies.loading import load_chunk_policy

    try:
        policy = load_chunk_policy(folder)
        golden = check_golden(folder, policy, trained_on(folder).get("env"))
    except UserError as error:
        yield Check("policy", "does not work", str(error))
        return
    found = f"{folder}: {type(policy.policy).__name__} loads"
    if golden is None:
        yield Check("policy", found)
    else:
        yield Check("policy", f"{found}, {golden}", golden.problem or golden.why_not, optional=not golden.problem)
