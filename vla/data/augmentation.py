"""Image augmentation on uint8 batches: random shift and colour. No flips, which change the meaning of "left"."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of b pictures: a shift in pixels, and a colour look-up table, unless colours stay."""

    shifts: np.ndarray  # (b, 2) down and right
    most: int  # largest shift
    tables: np.ndarray | None  # (b, 1, 256, 3) uint8

    def apply(self, frames: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        """Change (n, H, W, 3) uint8 frames, which are the (n,) `pictures` of the batch; returns new memory."""
        out = np.empty_like(frames)
        for index, picture in enumerate(pictures):
            moved = shift(frames[index], *self.shifts[picture], self.most) if self.most else frames[index]
            if self.tables is None:
                out[index] = moved
            else:
                cv2.LUT(moved, self.tables[picture], dst=out[index])
        return out


def draw_augmentation(rng: np.random.Generator, count: int, shift_px: int, color_jitter: float) -> Augmentation:
    """Shift each of `count` pictures by up to `shift_px` (edges repeated) and change its brightness, contrast and colours.

    Args:
        rng: all randomness.
        shift_px: largest shift on each axis.
        color_jitter: gains and contrast in 1 +- this, a different gain for each channel by a quarter of it.
    """
    shifts = rng.integers(-shift_px, shift_px + 1, size=(count, 2))
    return Augmentation(shifts, shift_px, color_tables(rng, count, color_jitter) if color_jitter else None)


def augment(frames: np.ndarray, rng: np.random.Generator, shift_px: int, color_jitter: float) -> np.ndarray:
    """(b, H, W, 3) uint8 -> the same, augmented; see `draw_augmentation`."""
    return draw_augmentation(rng, len(frames), shift_px, color_jitter).apply(frames, np.arange(len(frames)))


def shift(image: np.ndarray, down: int, right: int, most: int) -> np.ndarray:
    """(H, W, 3) moved by whole pixels, at most `most`, edges repeated."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, most, most, most, most, cv2.BORDER_REPLICATE)
    return padded[most - down : most - down + height, most - right : most - right + width]


def color_tables(rng: np.random.Generator, count: int, strength: float) -> np.ndarray:
    """(count, 1, 256, 3) uint8 look-up tables: contrast about the middle, then gain."""
    levels = np.arange(256, dtype=np.float32)
    contrast = rng.uniform(1 - strength, 1 + strength, size=(count, 1, 1))
    gain = rng.uniform(1 - strength, 1 + strength, size=(count, 1, 1))
    balance = rng.uniform(1 - strength / 4, 1 + strength / 4, size=(count, 3, 1))
    changed = ((levels - 128) * contrast + 128) * gain * balance
    return np.ascontiguousarray(np.clip(changed, 0, 255).astype(np.uint8).transpose(0, 2, 1)[:, None])
