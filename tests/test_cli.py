"""What a user sees: exit statuses, one-line errors, help."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from vla.cli import VERBS, main, run
from vla.types import first_line

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


def test_a_command_whose_reader_has_gone_ends_without_a_traceback():
    code = "import sys; from vla import cli; cli.VERBS['doctor'] = lambda argv: [print(n) for n in range(9)]; sys.exit(cli.run('doctor', []))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_mistake_ends_a_script_with_status_2_and_one_line(tmp_path):
    result = script("train_align", "--data.root=/nowhere", f"--output={tmp_path}/run")
    assert result.returncode == 2
    assert "/nowhere: not a LeRobotDataset" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("align", ["--bacth=1"], "config error: bacth is not a field of AlignConfig; did you mean batch?"),
        ("policy", ["--config_path=absent.yaml"], "config error: absent.yaml: no such file"),
        ("evaluate", ["--policy=/nowhere"], "/nowhere: not a policy folder"),
        ("collect", ["--env.name=kitchen"], "config error: env.name: env 'kitchen' is not one of"),
    ],
)
def test_a_mistake_is_one_line_whatever_the_verb(verb, flags, message, tmp_path, capsys):
    assert run(verb, [*flags, f"--output={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_an_unknown_verb_lists_the_verbs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["concord", "traim"])
    assert main() == 2
    assert "'traim' is not a verb; known: collect, align, policy" in capsys.readouterr().err


def test_the_doctor_ends_with_what_it_found(encoder, capsys):
    assert run("doctor", [f"--encoder={encoder}"]) == 0
    assert f"{encoder}: 48 px, patch 12, width 32" in capsys.readouterr().out
    assert run("doctor", [f"--encoder={encoder}/nowhere"]) == 2
    assert "doctor: encoder need attention" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on_and_ends_with_status_130(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "collect.py"), f"--output={tmp_path}/data", "--workers=1"]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even if the tests run in the background
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listens) as process:
        try:
            while not list(tmp_path.glob("data.parts/shard_*.json")):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted; run the same command again" in told
    assert "Traceback" not in told


def test_a_line_is_in_a_log_file_as_soon_as_it_is_printed(tmp_path):
    code = "import os; from vla import cli; cli.VERBS['doctor'] = lambda argv: (print('begun'), os._exit(0)); cli.run('doctor', [])"
    command, buffered = [sys.executable, "-c", code], os.environ | {"PYTHONUNBUFFERED": ""}
    with (tmp_path / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, check=True, env=buffered, cwd=ROOT, timeout=60)
    assert (tmp_path / "log.txt").read_text() == "begun\n"


def test_an_error_without_a_message_is_named_by_its_kind():
    assert first_line(AssertionError()) == "AssertionError()"


def test_the_console_command_lists_its_verbs():
    result = subprocess.run([sys.executable, "-m", "vla.cli"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in VERBS)
