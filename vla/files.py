"""Files that neither a crash nor a full disk can ruin."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vla.types import UserError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or somebody's share of it, is full; safetensors says so in words alone."""
    said = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return (int(said[1]) if said else getattr(error, "errno", None)) in FULL


def write_whole(path: Path, text: str) -> None:
    """Write or replace a text file; whatever happens meanwhile leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` at the end; an error leaves the old one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def fsync(path: Path) -> None:
    """Have the disk hold a file or folder, should the machine go down."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict:
    """The object in a file; an empty one if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: damaged ({first_line(error)}); restore it, or make anew what it belongs to"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (not a JSON object); restore it, or make anew what it belongs to")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, default=float) + "\n")
