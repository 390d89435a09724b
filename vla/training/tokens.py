"""Token cache: a frozen encoder's patch tokens of every frame, as memory-mapped fp16, several augmented copies each."""

import errno
import fcntl
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import CLIPModel

from vla.data.augmentation import Augmenter
from vla.data.episodes import Episodes
from vla.models.clip import patch_tokens, pixel_values
from vla.types import UserError

BATCH = 256


def open_tokens(
    clip: CLIPModel,
    episodes: Episodes,
    frames: np.ndarray,
    *,
    copies: int,
    augmenter: Augmenter,
    folder: Path,
    accelerator: Accelerator,
) -> np.ndarray:
    """The patch tokens of every row of `episodes`, computed if they are not there yet.

    Copy 0 is the plain picture, the others are augmented. An interrupted computation goes on where it stopped.

    Returns:
        (copies, r, n, w) float16, memory-mapped, read-only.
    Raises:
        UserError: the disk is full.
    """
    vision = clip.config.vision_config
    shape = (copies, len(episodes.frame_row), (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    settings = (shape, augmenter, episodes.fingerprint, episodes.camera, accelerator.mixed_precision)
    key = hashlib.sha256((repr(settings) + weights_digest(clip)).encode() + episodes.frame_row.tobytes()).hexdigest()[
        :16
    ]
    path, partial = folder / f"tokens_{key}.npy", folder / f"tokens_{key}.partial"
    progress = folder / f"tokens_{key}.rows"
    if path.is_file():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"tokens_{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run of the same encoder waits, then reads
        if not path.is_file():
            build(path, partial, progress, shape, clip, episodes, frames, augmenter, accelerator)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def build(
    path: Path,
    partial: Path,
    progress: Path,
    shape: tuple[int, ...],
    clip: CLIPModel,
    episodes: Episodes,
    frames: np.ndarray,
    augmenter: Augmenter,
    accelerator: Accelerator,
) -> None:
    """Compute a cache of `shape`, or go on with an interrupted one, and move it to `path`."""
    folder, size = path.parent, int(np.prod(shape)) * 2
    first = int(progress.read_text()) if progress.is_file() and partial.is_file() else 0
    try:
        if first == 0:
            if shutil.disk_usage(folder).free < size + (256 << 20):
                raise OSError(errno.ENOSPC, "not enough space", str(folder))
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape).flush()
        print(f"token cache: {shape[1]} frames x {shape[0]} copies, {size / 1e9:.1f} GB in {folder}")
        store = np.lib.format.open_memmap(partial, mode="r+")
        fill(store, clip, episodes, frames, first, augmenter, progress, accelerator)
        store.flush()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{folder}: disk full, {size / 1e9:.1f} GB needed; lower --cached_shifts, 0 keeps none"
            ) from error
        raise
    partial.rename(path)
    progress.unlink(missing_ok=True)


@torch.inference_mode()
def fill(
    store: np.ndarray,
    clip: CLIPModel,
    episodes: Episodes,
    frames: np.ndarray,
    first: int,
    augmenter: Augmenter,
    progress: Path,
    accelerator: Accelerator,
) -> None:
    """Compute the rows from `first` on; augmentation depends on the row and copy alone."""
    clip.eval()
    copies, total = store.shape[:2]
    bar = tqdm(total=total, initial=first, desc="token cache", unit="frame", mininterval=1.0)
    with bar:
        for begin in range(first, total, BATCH):
            rows = np.arange(begin, min(begin + BATCH, total))
            plain = episodes.gather_frames(frames, rows)
            for copy in range(copies):
                images = plain
                if copy:
                    images = augmenter(plain, np.random.default_rng([copy, begin]))
                with accelerator.autocast():
                    tokens = patch_tokens(clip, pixel_values(torch.from_numpy(images).to(accelerator.device)))
                store[copy, rows] = tokens.to(torch.float16).cpu().numpy()
            bar.update(len(rows))
            if begin // BATCH % 40 == 39:
                store.flush()
                progress.write_text(str(int(rows[-1]) + 1))


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
