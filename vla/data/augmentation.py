"""Augmentation: random shift, pasted shapes and colour of uint8 pictures, hidden words of texts.

No flips, which change the meaning of "left".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor

from vla.config import DataConfig


@dataclass(frozen=True)
class Augmentation:
    """What is done to each of b pictures: a shift in pixels, shapes pasted, a colour look-up table unless colours stay."""

    shifts: np.ndarray  # (b, 2) down and right
    most: int  # largest shift
    shapes: list[list["Shape"]]  # (b,) of each picture
    colors: np.ndarray | None  # (b, 4) contrast and the gain of each channel

    def apply(self, frames: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        """Change (n, H, W, 3) uint8 frames, which are the (n,) `pictures` of the batch; returns new memory."""
        out = np.empty_like(frames)
        tables = None if self.colors is None else color_tables(self.colors[pictures])
        for index, picture in enumerate(pictures):
            moved = shift(frames[index], *self.shifts[picture], self.most) if self.most else frames[index]
            if self.shapes[picture]:
                moved = paste(moved, self.shapes[picture])
            if tables is None:
                out[index] = moved
            else:
                cv2.LUT(moved, tables[index], dst=out[index])
        return out


@dataclass(frozen=True)
class Shape:
    """A polygon in one colour."""

    corners: np.ndarray  # (n, 2) x and y as shares of the picture's sides
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Augmenter:
    """How pictures are augmented.

    shift_px: largest shift on each axis; edges are repeated.
    color_jitter: gains and contrast in 1 +- this, a different gain for each channel by a quarter of it.
    pasted_shapes: share of the pictures over which one to three random shapes are pasted.
    """

    shift_px: int
    color_jitter: float
    pasted_shapes: float = 0.0

    def draw(self, rng: np.random.Generator, count: int) -> Augmentation:
        """What happens to each of `count` pictures; `rng` gives all randomness."""
        shifts = rng.integers(-self.shift_px, self.shift_px + 1, size=(count, 2))
        colors = draw_colors(rng, count, self.color_jitter) if self.color_jitter else None
        numbers = np.zeros(count, int)
        if self.pasted_shapes:
            numbers = np.where(rng.random(count) < self.pasted_shapes, rng.integers(1, 4, size=count), 0)
        return Augmentation(shifts, self.shift_px, [[draw_shape(rng) for _ in range(n)] for n in numbers], colors)

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(b, H, W, 3) uint8 -> the same, augmented, new memory."""
        return self.draw(rng, len(frames)).apply(frames, np.arange(len(frames)))


def augmenter(data: DataConfig) -> Augmenter:
    """The augmentation that a configuration asks for."""
    return Augmenter(data.shift_px, data.color_jitter, data.pasted_shapes)


def draw_shape(rng: np.random.Generator) -> Shape:
    """A polygon of three to nine corners anywhere, 3 to 10 % of the picture's side in radius, light or dark."""
    corners = int(rng.integers(3, 10))
    angles = np.sort(rng.uniform(0, 2 * np.pi, size=corners))
    radius = rng.uniform(0.03, 0.1) * rng.uniform(0.6, 1.0, size=corners)
    around = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    red, green, blue = (rng.uniform(0, 255, size=3) * rng.uniform(0.1, 1.0)).astype(int).tolist()
    return Shape(rng.uniform(0, 1, size=2) + around, (red, green, blue))


def paste(image: np.ndarray, shapes: list[Shape]) -> np.ndarray:
    """(H, W, 3) with shapes drawn over it, anti-aliased; new memory."""
    image = np.ascontiguousarray(image).copy()
    fine = 1 << 4  # of a pixel
    for shape in shapes:
        corners = np.round(shape.corners * fine * np.array(image.shape[1::-1])).astype(np.int32)
        cv2.fillPoly(image, [corners], shape.color, lineType=cv2.LINE_AA, shift=4)
    return image


def shift(image: np.ndarray, down: int, right: int, most: int) -> np.ndarray:
    """(H, W, 3) moved by whole pixels, at most `most`, edges repeated."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, most, most, most, most, cv2.BORDER_REPLICATE)
    return padded[most - down : most - down + height, most - right : most - right + width]


def draw_colors(rng: np.random.Generator, count: int, strength: float) -> np.ndarray:
    """(count, 4) contrast, and gain times balance of each channel."""
    contrast = rng.uniform(1 - strength, 1 + strength, size=(count, 1))
    gain = rng.uniform(1 - strength, 1 + strength, size=(count, 1))
    balance = rng.uniform(1 - strength / 4, 1 + strength / 4, size=(count, 3))
    return np.concatenate([contrast, gain * balance], axis=1)


def color_tables(colors: np.ndarray) -> np.ndarray:
    """(n, 4) -> (n, 1, 256, 3) uint8 look-up tables: contrast about the middle, then gains."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    contrast, gains = colors[:, None, :1], colors[:, None, 1:]  # (n, 1, 1), (n, 1, 3)
    changed = ((levels - 128) * contrast + 128) * gains  # (n, 256, 3)
    return np.ascontiguousarray(np.clip(changed, 0, 255).astype(np.uint8)[:, None])


def hide_words(mask: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """(u, l) 1 for words -> the same with a share of the words hidden; a text's first and last token always stay."""
    place, last = torch.arange(mask.shape[1], device=mask.device), mask.sum(1, keepdim=True) - 1
    drawn = torch.from_numpy(rng.random(tuple(mask.shape)) < share).to(mask.device)
    return mask * ~(drawn & (place > 0) & (place < last))


def word_hider(data: DataConfig, seed: int, step: int) -> Callable[[Tensor], Tensor]:
    """What hides words of the texts of one step; the same for the same seed and step."""
    return partial(hide_words, share=data.word_dropout, rng=np.random.default_rng([seed, step, 3]))
