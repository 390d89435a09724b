"""Frame store: a camera's pictures, decoded once, resized, as one memory-mapped uint8 array."""

import errno
import fcntl
import os
import platform
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from vla.config import DataConfig
from vla.data.decoding import (
    RowGroup,
    decode_picture,
    is_video,
    open_video,
    read_pictures,
    resize,
    row_groups,
    videos_of,
)
from vla.data.episodes import Episodes
from vla.data.streaming import StreamedFrames
from vla.files import is_disk_full
from vla.types import UserError


def open_pictures(episodes: Episodes, data: DataConfig) -> np.ndarray | StreamedFrames:
    """A data set's pictures by row, as the configuration says: from the frame store, or decoded whenever they are read."""
    if data.stream:
        return StreamedFrames(episodes, data.image_size, data.workers)
    return open_frames(episodes, data.image_size, data.cache, data.workers)


def open_frames(episodes: Episodes, image_size: int, cache: str | None = None, workers: int = 2) -> np.ndarray:
    """The frame store of a data set, built if it is absent or damaged.

    Args:
        episodes: the data set; its `frame_row` indexes the result.
        image_size: side of the stored pictures, px.
        cache: folder of the store; default ROOT/.concord.
        workers: processes that decode.
    Returns:
        (rows of the data set, image_size, image_size, 3) uint8, memory-mapped, read-only.
    Raises:
        UserError: a picture cannot be decoded, or the disk is full.
    """
    folder = Path(cache) if cache else episodes.root / ".concord"
    path = folder / f"frames_{episodes.fingerprint}_{episodes.camera.replace('.', '_')}_{image_size}.npy"
    groups = row_groups(episodes.root)
    shape = (sum(group.rows for group in groups), image_size, image_size, 3)
    store = _open_if_whole(path, shape)
    if store is not None:
        return store
    make_cache(folder)
    partial_path = path.with_suffix(f".{platform.node()}.{os.getpid()}.partial")  # machines may share the disk
    _remove_abandoned(path)
    held = partial_path.open("wb")
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # it is not abandoned
        _need_space(folder, int(np.prod(shape)))
        np.lib.format.open_memmap(partial_path, mode="w+", dtype=np.uint8, shape=shape).flush()
        _take_space(partial_path)
        if is_video(episodes):
            _build_from_video(episodes, partial_path)
        else:
            _build_from_images(groups, episodes.camera, partial_path, workers)
        with partial_path.open("rb+") as file:
            os.fsync(file.fileno())
        partial_path.rename(path)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{folder}: disk full while building the frame store; set data.cache to another folder, or data.stream to true"
            ) from error
        raise
    finally:
        held.close()
        partial_path.unlink(missing_ok=True)
    return _open_if_whole(path, shape)


def _remove_abandoned(path: Path) -> None:
    """Delete what builds of this store left that were killed: as much as a whole one each."""
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        with suppress(OSError), left.open("r+b") as file:  # locked: somebody builds
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - left.stat().st_mtime > 60:  # and is not about to lock it
                left.unlink()


def _open_if_whole(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The store if it has the right shape and size; None (and the file gone) if not."""
    if not path.is_file():
        return None
    try:
        store = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        store = None
    if store is None or store.shape != shape or store.dtype != np.uint8:
        path.unlink()
        return None
    return store


def _need_space(folder: Path, size: int) -> None:
    if shutil.disk_usage(folder).free < size + (64 << 20):
        raise OSError(errno.ENOSPC, "not enough space", str(folder))


def make_cache(folder: Path) -> None:
    """Make the folder of pictures or tokens that are computed once.

    Raises:
        UserError: it cannot be made, as beside data that is shared read-only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"{folder}: cannot be written into ({error.strerror}); name another folder with --data.cache"
        ) from error


def _take_space(path: Path) -> None:
    """Take all of a sparse file's space: a disk that turns out to be full would kill whoever writes into mapped memory."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if is_disk_full(error):
                raise  # others: a file system that cannot


def _build_from_images(groups: list[RowGroup], camera: str, path: Path, workers: int) -> None:
    """Decode the images in the parquet files, row group by row group."""
    work = partial(_decode_group, path, camera)
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(sum(group.rows for group in groups)))
        if workers == 1 or len(groups) == 1:
            done = map(work, groups)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            done = pool.map(work, groups, chunksize=max(1, len(groups) // (8 * workers)))
        for count in done:
            bar.update(count)


def _decode_group(path: Path, camera: str, group: RowGroup) -> int:
    """Decode one row group into its rows of the store; returns how many."""
    cv2.setNumThreads(1)
    store = np.lib.format.open_memmap(path, mode="r+")
    for offset, picture in enumerate(read_pictures(group, camera).to_pylist()):
        store[group.first + offset] = resize(decode_picture(picture, camera, group, offset), store.shape[1])
    store.flush()
    return group.rows


def _build_from_video(episodes: Episodes, path: Path) -> None:
    """Decode the camera's videos from beginning to end."""
    store = np.lib.format.open_memmap(path, mode="r+")
    files, file_of_row, number_of_row = videos_of(episodes)
    with _bar(len(store)) as bar:
        for position, file in enumerate(files):
            rows = np.flatnonzero(file_of_row == position)
            wanted: dict[int, list[int]] = {}  # rows may share a frame
            for row in rows.tolist():
                wanted.setdefault(int(number_of_row[row]), []).append(row)
            with open_video(file) as container:
                container.streams.video[0].thread_type = "AUTO"
                for number, frame in enumerate(container.decode(video=0)):
                    if number in wanted:
                        same = wanted.pop(number)
                        store[same] = resize(frame.to_ndarray(format="rgb24"), store.shape[1])
                        bar.update(len(same))
            if wanted:
                raise UserError(f"{file}: {len(wanted)} frames are missing; the video is truncated")
    store.flush()


def _bar(frames: int) -> tqdm:
    """The bar of a store that is built."""
    return tqdm(total=frames, desc="frame store", unit="frame", mininterval=1.0)
