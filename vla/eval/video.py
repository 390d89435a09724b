"""Small mp4 videos of rollouts, with the instruction as a caption in the picture."""

from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np

SIDE = 256  # px
CAPTION = 32  # px


def write_video(path: Path, frames: list[np.ndarray], fps: int, caption: str) -> None:
    """H.264 of (H, W, 3) uint8 frames, at most about 30 a second, caption below.

    Raises:
        ValueError: no frames.
    """
    if not frames:
        raise ValueError(f"{path}: no frames to write")
    every = max(1, round(fps / 30))
    pictures = np.stack([captioned(frame, caption) for frame in frames[::every]])
    iio.imwrite(
        path, pictures, plugin="pyav", codec="libx264", fps=max(1, round(fps / every)), out_pixel_format="yuv420p"
    )


def beside_attention(frame: np.ndarray, attention: np.ndarray | None) -> np.ndarray:
    """(H, W, 3) and (side, side) -> (H, 2 W, 3): the frame, and the frame lit where the policy looks; without attention as it is."""
    if attention is None:
        return frame
    height, width = frame.shape[:2]
    light = cv2.resize(attention / attention.max(), (width, height), interpolation=cv2.INTER_CUBIC)
    lit = frame * (0.15 + 0.85 * np.clip(light, 0, 1)[:, :, None])
    return np.hstack([frame, lit.astype(np.uint8)])


def captioned(frame: np.ndarray, caption: str) -> np.ndarray:
    """(H, W, 3) -> (SIDE + CAPTION, SIDE * W / H, 3) with the text under the picture."""
    width = 2 * round(SIDE * frame.shape[1] / frame.shape[0] / 2)
    picture = cv2.resize(frame, (width, SIDE), interpolation=cv2.INTER_AREA)
    strip = np.full((CAPTION, width, 3), 24, np.uint8)
    scale = 0.42
    while cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] > width - 8 and scale > 0.2:
        scale -= 0.02
    cv2.putText(strip, caption, (4, 20), cv2.FONT_HERSHEY_SIMPLEX, scale, (240, 240, 240), 1, cv2.LINE_AA)
    return np.vstack([picture, strip])
