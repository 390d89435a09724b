"""One writer for each output folder."""

import fcntl
from pathlib import Path
from typing import IO

from vla.types import UserError

LOCK_NAME = "lock"


def lock_folder(folder: Path) -> IO[str]:
    """Take the folder, made if absent, while the returned file is referenced; the system frees it on any exit.

    Raises:
        UserError: another process writes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_NAME).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"{folder}: another process is writing into it; wait for it or choose another --output"
        ) from error
    return file


def waiting_lock(folder: Path) -> IO[str]:
    """Take the folder as `lock_folder` does, once no other process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_NAME).open("w")
    fcntl.lockf(file, fcntl.LOCK_EX)
    return file
