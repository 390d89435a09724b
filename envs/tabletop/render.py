"""The camera: anti-aliased pictures of the table at any size, and what perturbs them."""

from dataclasses import dataclass

import cv2
import numpy as np

from envs.tabletop.physics import GRIPPER_RADIUS, World, outline
from envs.tabletop.scene import TABLE_HALF, ZONE_HALF, Scene

RGB = {
    "red": (214, 40, 40),
    "green": (46, 150, 62),
    "blue": (36, 92, 204),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 170),
    "orange": (240, 130, 30),
    "pink": (246, 160, 196),
    "brown": (122, 84, 52),
}
TABLE_RGB = (226, 220, 208)
GRIPPER_RGB = (25, 25, 30)
_BITS = 6  # sub-pixel bits of OpenCV's fixed-point coordinates


@dataclass(frozen=True)
class View:
    """How the camera sees the table: a shift (m) and rotation (deg) of the camera, light, and the table's texture."""

    shift: tuple[float, float] = (0.0, 0.0)
    rotation_deg: float = 0.0
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of the RGB channels
    gradient: float = 0.0  # relative brightness change from the left edge to the right one
    texture: str = "plain"  # plain, stripes, checker or speckle
    contrast: float = 0.0  # of the texture, share of the full range
    texture_seed: int = 0


class Camera:
    """Draws a world for one scene and view. `size` px a side; the picture spans the table exactly if not perturbed."""

    def __init__(self, size: int, scene: Scene, view: View) -> None:
        self.size, self.scene, self.view = size, scene, view
        angle = np.deg2rad(view.rotation_deg)
        c, s = np.cos(angle), np.sin(angle)
        k = size / (2 * TABLE_HALF)  # px / m
        # (x, y) m -> (column, row) px, y pointing up; pixel centres are at integers.
        self._matrix = np.array([[k * c, -k * s], [-k * s, -k * c]])
        self._offset = (size - 1) / 2 - self._matrix @ np.array(view.shift)
        self._px = k
        self._outlines = [outline(t.shape) for t in scene.objects + scene.distractors]
        self._colors = [RGB[t.color] for t in scene.objects + scene.distractors]
        self._background = self._draw_background()
        columns = np.linspace(-0.5, 0.5, size)[None, :, None]
        light = np.array(view.gain)[None, None, :] * (1 + view.gradient * columns)
        self._light = None if np.allclose(light, 1.0) else np.broadcast_to(light, (size, size, 3)).astype(np.float32)

    def picture(self, world: World) -> np.ndarray:
        """(size, size, 3) uint8 RGB."""
        image = self._background.copy()
        order = [i for i in range(len(self._outlines)) if i != world.held]
        for index in order + ([world.held] if world.held is not None else []):
            body = world.bodies[index]
            self._polygon(image, self._place(self._outlines[index], body.position, body.angle), self._colors[index])
        self._draw_gripper(image, world)
        if self._light is not None:
            image = np.clip(image * self._light, 0, 255).astype(np.uint8)
        return image

    def _place(self, points: np.ndarray, position: tuple[float, float], angle: float) -> np.ndarray:
        c, s = np.cos(angle), np.sin(angle)
        return points @ np.array([[c, s], [-s, c]]) + np.array(position)

    def _pixels(self, points: np.ndarray) -> np.ndarray:
        pixels = points @ self._matrix.T + self._offset
        return np.round(pixels * (1 << _BITS)).astype(np.int32)

    def _polygon(self, image: np.ndarray, points: np.ndarray, color: tuple[int, int, int]) -> None:
        cv2.fillPoly(image, [self._pixels(points)], color, cv2.LINE_AA, _BITS)

    def _draw_gripper(self, image: np.ndarray, world: World) -> None:
        centre = tuple(int(v) for v in self._pixels(world.gripper_position[None])[0])
        one = 1 << _BITS
        if not world.closed:  # raised: an open ring
            radius, thickness = 0.024 * self._px, max(1, round(0.006 * self._px))
            cv2.circle(image, centre, round(radius * one), GRIPPER_RGB, thickness, cv2.LINE_AA, _BITS)
        elif world.held is None:  # lowered: a solid disc
            cv2.circle(image, centre, round(GRIPPER_RADIUS * self._px * one), GRIPPER_RGB, -1, cv2.LINE_AA, _BITS)
        else:  # holding: a small disc with a white rim
            cv2.circle(image, centre, round(0.013 * self._px * one), (255, 255, 255), -1, cv2.LINE_AA, _BITS)
            cv2.circle(image, centre, round(0.008 * self._px * one), GRIPPER_RGB, -1, cv2.LINE_AA, _BITS)

    def _draw_background(self) -> np.ndarray:
        image = np.empty((self.size, self.size, 3), np.uint8)
        image[:] = TABLE_RGB
        if self.view.texture != "plain":
            change = 255 * self.view.contrast * _texture(self.view.texture, self.size, self.view.texture_seed)
            image = np.clip(image + change[:, :, None], 0, 255).astype(np.uint8)
        square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
        for zone in self.scene.zones:
            pale = tuple(int(0.62 * t + 0.38 * c) for t, c in zip(TABLE_RGB, RGB[zone.color], strict=True))
            centre = np.array([zone.x, zone.y])
            self._polygon(image, centre + ZONE_HALF * square, RGB[zone.color])
            self._polygon(image, centre + (ZONE_HALF - 0.008) * square, pale)
        return image


def _texture(kind: str, size: int, seed: int) -> np.ndarray:
    """(size, size) in [-1, 0], resolution-independent for stripes and checker."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    if kind == "stripes":
        return -((columns * 9 + rows * 3) % 1 < 0.5).astype(float)
    if kind == "checker":
        return -(((columns * 8).astype(int) + (rows * 8).astype(int)) % 2).astype(float)
    if kind == "speckle":
        coarse = np.random.default_rng(seed).uniform(-1, 0, size=(24, 24)).astype(np.float32)
        return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    raise ValueError(f"texture {kind!r} is not one of plain, stripes, checker, speckle")
