"""What a result was made with."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vla.files import read_json, write_json

PACKAGES = (
    "lerobot_policy_concord",
    "torch",
    "transformers",
    "lerobot",
    "accelerate",
    "gymnasium",
    "pymunk",
    "metaworld",
    "mujoco",
    "numpy",
    "opencv-python-headless",
)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter, the commit if there is one, processor and cores."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit:
        found["commit"] = commit
    import torch  # not before: collection has processes that do without

    from vla.precision import multiplies_bf16

    products = "with" if multiplies_bf16(torch.device("cpu")) else "without"
    return found | {"processor": f"{_processor()} {products} bfloat16", "cores": str(os.cpu_count())}


def write_versions(path: Path) -> dict[str, Any]:
    """Write the versions now; under `commits` all that something was begun or gone on with at, and under `before` other versions that it had.

    Returns:
        the versions now, with `commits` and `before` if there were others.
    """
    old = read_json(path)
    commits, before = old.pop("commits", []), old.pop("before", [])
    now = versions()
    commits = list(dict.fromkeys([*commits, now["commit"]])) if "commit" in now else commits
    old.pop("commit", None)
    before += [old] if old and old != {k: v for k, v in now.items() if k != "commit"} and old not in before else []
    earlier = {"before": before} if before else {}
    write_json(path, now | {"commits": commits} | earlier)
    return now | ({"commits": commits} if len(commits) > 1 else {}) | earlier


def told(record: dict[str, Any]) -> dict[str, str]:
    """What `write_versions` gives as lines of a table: all commits, and how earlier versions differed."""
    now = {name: value for name, value in record.items() if name not in ("commits", "before")}
    every = {"commit": ", then ".join(record["commits"])} if "commits" in record else {}
    earlier = [", ".join(f"{k} {v}" for k, v in old.items() if now.get(k) != v) for old in record.get("before", [])]
    return now | every | ({"begun with": "; ".join(earlier)} if earlier else {})


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_line() -> str:
    """The command that runs, quoted for a shell."""
    return shlex.join(["python", *sys.argv])
