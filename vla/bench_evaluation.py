"""Closed-loop evaluation beside `lerobot-eval`: the same policy, environment and episodes, all cores for either."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vla.types import UserError

TASK = "place"
SEED = 1_000_000
FILMED = 10
TOGETHER = 50  # environments that lerobot-eval steps in one process, in its larger setting
APART = 8  # or in one each, which take up to 1 GB


def evaluation_speed(policy: Path, episodes: int, output: Path) -> dict[str, Any]:
    """Episodes a minute of both programs on one tabletop task, twice each, and in how many episodes they agree.

    LeRobot steps many environments in one process, or a few in one each; the faster run counts beside its default. It films ten episodes, which
    cannot be switched off; ours films as many successes and as many failures, where there are so many.

    Raises:
        UserError: one of the commands fails.
    """
    cores = len(os.sched_getaffinity(0))
    together, apart = min(TOGETHER, episodes), min(max(APART, cores), episodes)
    several = {
        f"lerobot-eval, {count} environments{where}": lerobot_eval(
            policy, episodes, output, [f"--eval.batch_size={count}", f"--eval.use_async_envs={kind}"]
        )
        for count, where, kind in ((together, "", "false"), (apart, " in processes of their own", "true"))
    }
    faster = min(several, key=lambda name: several[name]["seconds"])
    rows = {
        "lerobot-eval": lerobot_eval(policy, episodes, output, []),
        faster: several[faster],
        "evaluate, to the first success": evaluate(
            policy, episodes, output / "ended", cores, ["--end_on_success=true"]
        ),
        "evaluate, to the horizon": evaluate(policy, episodes, output / "whole", cores, []),
    }
    successes = [row.pop("successes") for row in rows.values()]
    agree = [sum(a == b for a, b in zip(successes[0], other, strict=True)) for other in successes[1:]]
    films = {"lerobot-eval": min(FILMED, episodes), "evaluate": len(list((output / "ended" / "videos").glob("*.mp4")))}
    return {"task": TASK, "episodes": episodes, "cores": cores, "films": films, "runs": rows, "agree": agree}


def lerobot_eval(policy: Path, episodes: int, output: Path, flags: list[str]) -> dict[str, Any]:
    """Its own measure of the seconds, which leaves out starting and loading."""
    folder = output / "lerobot"
    command = [str(Path(sys.executable).parent / "lerobot-eval"), f"--policy.path={policy}", "--policy.device=cpu"]
    command += ["--env.type=concord_tabletop", f"--env.task={TASK}", f"--eval.n_episodes={episodes}", f"--seed={SEED}"]
    seconds = timed([*command, f"--output_dir={folder}", *flags])
    info = json.loads((folder / "eval_info.json").read_text())
    return figures(episodes, info["overall"]["eval_s"], seconds, info["per_task"][0]["metrics"]["successes"])


def evaluate(policy: Path, episodes: int, output: Path, cores: int, flags: list[str]) -> dict[str, Any]:
    """This project's command; its own measure of the seconds leaves out starting and loading, too."""
    command = [sys.executable, "-m", "vla.cli", "evaluate", f"--policy={policy}", f"--output={output}"]
    command += [
        "--env=tabletop",
        f"--tasks=[{TASK}]",
        f"--episodes={episodes}",
        f"--seed={SEED}",
        "--splits=[none]",
        f"--videos={FILMED}",
    ]
    seconds = timed([*command, "--grounding_episodes=0", "--failures=0", f"--workers={cores}", *flags])
    result = json.loads((output / "eval.json").read_text())
    return figures(episodes, result["wall_time_s"], seconds, [e["success"] for e in result["episodes"]])


def figures(episodes: int, seconds: float, command_seconds: float, successes: list[bool]) -> dict[str, Any]:
    """What is kept of one run."""
    return {
        "episodes_per_minute": 60 * episodes / seconds,
        "seconds": round(seconds, 1),
        "command_seconds": round(command_seconds, 1),
        "successes": [bool(success) for success in successes],
    }


def timed(command: list[str]) -> float:
    """Wall seconds of a command.

    Raises:
        UserError: it fails.
    """
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{Path(command[0]).name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return time.perf_counter() - started
