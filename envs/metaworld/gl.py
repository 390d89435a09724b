"""An OpenGL backend for MuJoCo on machines without a screen, and without OpenGL libraries too."""

import ctypes
import ctypes.util
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFLIGHT = "import mujoco; m = mujoco.MjModel.from_xml_string('<mujoco/>'); mujoco.Renderer(m, 16, 16).close()"
_REMEDY = "set MUJOCO_GL to egl or osmesa and install `libegl1 libgl1` or `libosmesa6`, or the package lavavu-osmesa"


class RenderingError(ValueError):
    """Nothing to render with; the message names the variable and the packages."""


@contextmanager
def rendering() -> Iterator[None]:
    """Make whatever MuJoCo and OpenGL raise when they cannot draw a RenderingError."""
    try:
        yield
    except RenderingError:
        raise
    except Exception as error:
        chosen = os.environ.get("MUJOCO_GL", "of the system's own choice")
        raise RenderingError(f"cannot render with MUJOCO_GL {chosen} ({error}); {_REMEDY}") from error


def ensure_gl() -> str:
    """Choose a backend before MuJoCo is imported, and return its name; later calls change nothing.

    MUJOCO_GL is honoured. Otherwise: EGL if its libraries are there and a trial picture succeeds, OSMesa of the
    system, OSMesa of the wheel lavavu-osmesa.

    Raises:
        RenderingError: nothing works.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and chosen != "osmesa":
        return chosen
    if chosen is None and sys.platform != "linux":
        return "default"
    if chosen is None and _loads("EGL", "GL") and _renders("egl"):
        os.environ["MUJOCO_GL"] = "egl"
        return "egl"
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    if not _loads("OSMesa"):
        _use_bundled_osmesa()
    return "osmesa"


def _loads(*names: str) -> bool:
    return all(ctypes.util.find_library(name) for name in names)


def _renders(backend: str) -> bool:
    """Whether one small picture can be drawn within 20 s, in a process of its own since failures there may abort."""
    environment = os.environ | {"MUJOCO_GL": backend}
    try:
        result = subprocess.run([sys.executable, "-c", _PREFLIGHT], env=environment, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def _use_bundled_osmesa() -> None:
    """Load the wheel's private libraries by path and hand OSMesa to PyOpenGL, which looks for it by name only."""
    folder = _bundled_folder()
    if folder is None:
        raise RenderingError(f"no OpenGL library found to render with; {_REMEDY}")
    # They depend on each other: try until nothing more loads.
    pending = sorted(folder.glob("*.so*"))
    while pending:
        left = [path for path in pending if not _load(path)]
        if len(left) == len(pending):
            raise RenderingError(f"cannot load {left[0].name}; {_REMEDY}")
        pending = left
    from OpenGL import platform

    library = ctypes.CDLL(str(next(folder.glob("libOSMesa*"))), mode=ctypes.RTLD_GLOBAL)
    platform.PLATFORM.GL = platform.PLATFORM.OSMesa = library
    platform.PLATFORM.install(vars(platform))


def _bundled_folder() -> Path | None:
    try:
        distribution = importlib.metadata.distribution("lavavu-osmesa")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file("lavavu_osmesa.libs")))
    return folder if any(folder.glob("libOSMesa*")) else None


def _load(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
