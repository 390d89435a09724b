"""The ranges of actions and states that stage one's encoders of them were trained in, in the header of `alignment.safetensors`."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from vla.data.normalization import Normalizers

NAMES = ("action", "state")
ALIKE = 0.1  # of a range; within it the same action is nearly the same number


def ranges_of(stats: Normalizers) -> dict[str, str]:
    """What is written into the header: JSON by name."""
    bounds = {name: getattr(stats, name) for name in NAMES}
    return {name: json.dumps([one.q01.tolist(), one.q99.tolist()]) for name, one in bounds.items()}


def header_of(path: Path) -> dict[str, str]:
    """What the file's header says."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def other_ranges(path: Path, stats: Normalizers) -> str:
    """A note if the file's encoders know another scale of actions or states than `stats`; empty if not, or if the file does not say."""
    header, other = header_of(path), []
    for name in NAMES:
        low, high = np.array(json.loads(header.get(name, "[[], []]")))
        own = getattr(stats, name)
        if low.shape == own.q01.shape:
            apart = np.maximum(np.abs(low - own.q01), np.abs(high - own.q99)) / np.minimum(
                high - low, own.q99 - own.q01
            )
            other += [name] * bool((apart > ALIKE).any())
    if not other:
        return ""
    return (
        f"{path}: was trained where {' and '.join(other)} had other ranges than in this data, so the encoders of them that it brings have to "
        "learn what their numbers mean anew; more steps, or data of the same ranges, help"
    )
