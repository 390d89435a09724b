"""Token cache: a frozen encoder's patch tokens of the pictures that a run reads, as memory-mapped fp16, augmented copies, too."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import CLIPModel

from vla.data.augmentation import Augmenter
from vla.data.episodes import Episodes
from vla.data.frames import make_cache
from vla.files import is_disk_full
from vla.models.clip import patch_tokens, pixel_values
from vla.types import UserError

BATCH = 256
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (m,) copies and rows -> (m, n, w) float16


def open_tokens(
    clip: CLIPModel,
    episodes: Episodes,
    frames: np.ndarray,
    needed: np.ndarray,
    *,
    augmenter: Augmenter,
    folder: Path,
    accelerator: Accelerator,
) -> np.ndarray:
    """The patch tokens of rows of `episodes`; the `needed` ones are computed if they are not there yet.

    Copy 0 is the plain picture, the others are augmented. An interrupted computation goes on where it stopped.

    Args:
        needed: (copies, r) bool. What is computed for one run stays for the next one, which may need more.
    Returns:
        (copies, r, n, w) float16, memory-mapped, read-only; undefined where not needed.
    Raises:
        UserError: the disk is full.
    """
    vision = clip.config.vision_config
    shape = (*needed.shape, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    settings = (shape, frames.shape[1:], augmenter, episodes.fingerprint, episodes.camera, accelerator.mixed_precision)
    told = (repr(settings) + weights_digest(clip)).encode() + episodes.frame_row.tobytes()
    key = hashlib.sha256(told).hexdigest()[:16]
    path, marks = folder / f"tokens_{key}.npy", folder / f"computed_{key}.npy"
    encode = partial(encoded, clip, episodes, frames, augmenter, accelerator)
    make_cache(folder)
    with (folder / f"tokens_{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run of the same encoder waits, then adds what else it needs
        try:
            extend(path, marks, shape, needed, encode)
        except OSError as error:
            if is_disk_full(error):
                raise UserError(
                    f"{folder}: disk full; free some space, then add --resume=true, or begin another run with a lower cached_shifts, 0 keeps none"
                ) from error
            raise
    return np.load(path, mmap_mode="r", allow_pickle=False)


@torch.inference_mode()
def encoded(
    clip: CLIPModel,
    episodes: Episodes,
    frames: np.ndarray,
    augmenter: Augmenter,
    accelerator: Accelerator,
    copies: np.ndarray,
    rows: np.ndarray,
) -> np.ndarray:
    """(m, n, w) float16 tokens of (m,) copies of rows; augmentation depends on the row and copy alone."""
    images = episodes.gather_frames(frames, rows)
    for place in np.flatnonzero(copies):
        rng = np.random.default_rng([copies[place], rows[place]])
        images[place] = augmenter(images[place][None], rng)[0]
    clip.eval()
    with accelerator.autocast():
        tokens = patch_tokens(clip, pixel_values(torch.from_numpy(images).to(accelerator.device)))
    return tokens.to(torch.float16).cpu().numpy()


def extend(path: Path, marks: Path, shape: tuple[int, ...], needed: np.ndarray, encode: Encode) -> None:
    """Compute what is needed and not yet in the cache at `path`; `marks` is a file that says what is."""
    if path.is_file() and marks.is_file():
        computed = np.load(marks, allow_pickle=False)
    else:
        marks.unlink(missing_ok=True)  # of tokens that somebody deleted
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape).flush()  # takes no space yet
        computed = np.zeros_like(needed)
    missing = np.argwhere(needed & ~computed)  # (m, 2) copy and row
    if not len(missing):
        return
    size = len(missing) * int(np.prod(shape[2:])) * 2
    if shutil.disk_usage(path.parent).free < size + (256 << 20):
        raise OSError(errno.ENOSPC, "not enough space", str(path))
    print(f"token cache: {len(missing)} of {needed.size} pictures, {size / 1e9:.1f} GB in {path.parent}")
    fill(path, missing, computed, marks, encode)


def fill(path: Path, missing: np.ndarray, computed: np.ndarray, marks: Path, encode: Encode) -> None:
    """Compute the (m, 2) missing copies and rows and mark them."""
    partial_marks = marks.with_suffix(".partial")
    store = np.load(path, mmap_mode="r", allow_pickle=False)
    # Written as a file: a full disk is an error then, and not the death of the process as in mapped memory.
    with path.open("r+b") as file, tqdm(total=len(missing), desc="token cache", unit="picture", mininterval=1.0) as bar:
        for first in range(0, len(missing), BATCH):
            copies, rows = missing[first : first + BATCH].T
            for copy, row, picture in zip(copies, rows, encode(copies, rows), strict=True):
                file.seek(store.offset + (copy * store.shape[1] + row) * picture.nbytes)
                file.write(picture.tobytes())
            computed[copies, rows] = True
            bar.update(len(rows))
            if first // BATCH % 40 == 39 or first + BATCH >= len(missing):
                file.flush()
                os.fsync(file.fileno())
                with partial_marks.open("wb") as marked:
                    np.save(marked, computed)
                partial_marks.rename(marks)


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
