"""One writer for each output folder."""

import fcntl
from pathlib import Path
from typing import IO

from vla.files import is_disk_full
from vla.types import UserError

LOCK_NAME = "lock"


class FolderHeldError(UserError):
    """Another process writes into the folder."""


def lock_folder(folder: Path) -> IO[str]:
    """Take the folder, made if absent, while the returned file is referenced; the system frees it on any exit.

    Raises:
        FolderHeldError: another process writes into it.
        UserError: it cannot be made or locked.
    """
    file = lock_file(folder)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise FolderHeldError(
            f"{folder}: another process is writing into it; wait for it or choose another --output"
        ) from error
    except OSError as error:
        file.close()
        raise UserError(
            f"{folder}: cannot be locked ({error.strerror}); choose an --output on another file system"
        ) from error
    return file


def lock_file(folder: Path) -> IO[str]:
    """The file of a folder, made if absent, that its writer locks.

    Raises:
        UserError: the folder cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK_NAME).open("w")
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"{folder}: cannot be written into ({error.strerror}); choose an --output elsewhere") from error


def waiting_lock(folder: Path) -> IO[str]:
    """Take the folder as `lock_folder` does, once no other process has it."""
    file = lock_file(folder)
    fcntl.lockf(file, fcntl.LOCK_EX)
    return file
