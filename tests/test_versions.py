"""What a result says it was made with."""

import shlex
import sys

from vla.versions import command_line


def test_the_command_runs_again_as_it_was_typed(monkeypatch):
    argv = ["scripts/sweep.py", "--ablations=[align.steps=1 align.horizon=4,align.steps=2]", "--output=my runs/a"]
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(command_line()) == ["python", *argv]
