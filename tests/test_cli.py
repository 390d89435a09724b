"""What a user sees: exit statuses, one-line errors, help."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *flags], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "name",
    [
        "collect",
        "train_align",
        "train_policy",
        "evaluate",
        "compare",
        "sweep",
        "doctor",
        "bench",
        "pipeline",
        "results",
    ],
)
def test_every_script_has_help(name):
    result = script(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "--config_path" in result.stdout


def test_help_may_be_cut_short():
    command = [sys.executable, str(ROOT / "scripts" / "compare.py"), "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train_align", ["--bacth=1"], "config error: bacth is not a field of AlignConfig; did you mean batch?"),
        ("train_align", ["--data.root=/nowhere"], "/nowhere: not a LeRobotDataset"),
        ("train_policy", ["--config_path=absent.yaml"], "config error: absent.yaml: no such file"),
        ("evaluate", ["--policy=/nowhere"], "/nowhere: not a policy folder"),
        (
            "collect",
            ["--env.name=kitchen", "--output=/tmp/none"],
            "config error: env.name: env 'kitchen' is not one of",
        ),
    ],
)
def test_a_mistake_ends_with_status_2_and_one_line(name, flags, message, tmp_path):
    if name.startswith("train"):
        flags = [*flags, f"--output={tmp_path}/run"]
    result = script(name, *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_console_command_lists_its_verbs():
    from vla.cli import VERBS

    result = subprocess.run([sys.executable, "-m", "vla.cli"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)
