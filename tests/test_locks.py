"""Two processes never write into one folder."""

import errno
import subprocess
import sys

import pytest

from vla import locks
from vla.locks import lock_folder
from vla.types import UserError

HOLD = (
    "import sys; from vla.locks import lock_folder; from pathlib import Path; kept = lock_folder(Path(sys.argv[1])); "
)


def test_a_folder_that_another_process_writes_into_is_refused(tmp_path):
    command = [sys.executable, "-c", HOLD + "print('held', flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing into it"):
            lock_folder(tmp_path)
        other.kill()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written into .*; choose an --output elsewhere"):
        lock_folder(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def missing(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "lockf", missing)
    with pytest.raises(UserError, match=r"cannot be locked \(Function not implemented\)"):
        lock_folder(tmp_path)


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    command = [sys.executable, "-c", HOLD + "import os; os.kill(os.getpid(), 9)", str(tmp_path)]
    assert subprocess.run(command).returncode == -9
    lock_folder(tmp_path).close()
