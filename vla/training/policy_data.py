"""What stage two clones: its episodes, the tokens its steps will read, and the samples of one step."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla.config import PolicyTrainConfig
from vla.data.augmentation import augmenter
from vla.data.episodes import Episodes, limit_per_task, rows_of, select
from vla.data.mixture import Mixture, root_and_weight
from vla.data.normalization import Normalizers, normalize_quantile
from vla.data.triplets import gather_chunks
from vla.types import Indexed, TripletBatch, UserError

Draw = Callable[[int], tuple[np.ndarray, np.random.Generator]]  # step -> (b,) rows, what gives its other random numbers


@dataclass(frozen=True)
class CloningBatch:
    """One step's samples. `inputs` is (b, n, w) fp16 tokens of the cache, or (b, H, W, 3) uint8 frames."""

    rows: np.ndarray
    inputs: np.ndarray
    state: np.ndarray  # (b, s) normalised
    text_id: np.ndarray  # (b,)
    action_chunk: np.ndarray  # (b, h, a) normalised
    action_is_pad: np.ndarray  # (b, h)
    triplets: TripletBatch | None = None  # of the auxiliary loss


@dataclass(frozen=True)
class Cloned:
    """What is cloned: episodes with their pictures, what normalises them, and which encoder reads them."""

    episodes: Episodes
    frames: Indexed  # (r, H, W, 3) uint8
    stats: Normalizers
    encoder_digest: str  # of its weights before the training
    tokens: np.ndarray | None  # (copies, r, n, w) fp16, where a frozen encoder's are cached


def cloned_episodes(config: PolicyTrainConfig, mixture: Mixture) -> tuple[Episodes, list[np.ndarray], np.ndarray]:
    """The episodes to clone, and the positions among them of each data set's training episodes and of the held-out ones.

    Scenes are held out before failures are left out, so that stage one, which trains on failures as well, holds out the same.

    Raises:
        UserError: a data set without a success to train on, none held out, or one without actions or states.
    """
    everything = mixture.episodes
    cloned = np.flatnonzero(everything.success | config.failures)
    (*parts, validation) = (np.flatnonzero(np.isin(cloned, part)) for part in (*mixture.train, mixture.validation))
    roots = [config.data.root, *(root_and_weight(text)[0] for text in config.more)]
    for root, part in zip(roots, parts, strict=True):
        if not len(part):
            raise UserError(f"{root}: no training episode succeeded; clone failures with --failures=true")
    if not len(validation):
        raise UserError(f"{config.data.root}: no held-out episode succeeded; change --data.holdout")
    episodes = select(everything, cloned)
    for root, part in zip(roots[1:], parts[1:], strict=True):
        rows = rows_of(episodes, part)
        if not (np.isfinite(episodes.action[rows]).all() and np.isfinite(episodes.state[rows]).all()):
            raise UserError(f"{root}: lacks actions or states; only stage one can use it")
    parts[0] = limit_per_task(episodes, parts[0], config.data.episodes_per_task, config.seed)
    return episodes, parts, validation


def draw_rows(
    seed: int, rows_of_part: Sequence[np.ndarray], samples: Sequence[int], step: int
) -> tuple[np.ndarray, np.random.Generator]:
    """The (b,) rows of a step, as many `samples` of each data set's, and what gives the step's other random numbers."""
    rng = np.random.default_rng([seed, step, 2])
    drawn = [part[rng.integers(len(part), size=n)] for part, n in zip(rows_of_part, samples, strict=True)]
    return np.concatenate(drawn), rng


def needed_tokens(
    config: PolicyTrainConfig,
    count: int,
    draw: Draw,
    validation_rows: np.ndarray,
) -> np.ndarray:
    """(copies, count) bool: which copies of which of `count` rows the steps `draw`, or the validation reads."""
    needed = np.zeros((config.cached_shifts, count), bool)
    needed[0, validation_rows] = True
    for step in range(config.steps):
        rows, rng = draw(step)
        needed[draw_copies(rng, config.cached_shifts, len(rows)), rows] = True
    return needed


def draw_copies(rng: np.random.Generator, copies: int, count: int) -> np.ndarray:
    """(count,) which copy of the token cache each sample of a step reads; the first numbers after its rows."""
    return rng.integers(copies, size=count)


def gather(
    config: PolicyTrainConfig, cloned: Cloned, rows: np.ndarray, rng: np.random.Generator | None
) -> CloningBatch:
    """Samples of (b,) rows; without `rng` nothing is augmented."""
    episodes, tokens = cloned.episodes, cloned.tokens
    chunk, pad = gather_chunks(episodes, rows, config.head.horizon)
    if tokens is not None:
        copies = np.zeros(len(rows), int) if rng is None else draw_copies(rng, len(tokens), len(rows))
        inputs = tokens[copies, rows]
    else:
        inputs = episodes.gather_frames(cloned.frames, rows)
        if rng is not None:
            inputs = augmenter(config.data)(inputs, rng)
    return CloningBatch(
        rows=rows,
        inputs=inputs,
        state=normalize_quantile(episodes.state[rows], cloned.stats.state),
        text_id=episodes.text_id[episodes.episode_of_row[rows]],
        action_chunk=normalize_quantile(chunk, cloned.stats.action),
        action_is_pad=pad,
    )


def digest(batch: CloningBatch) -> str:
    """A fingerprint of the sampled rows, so that a resumed run can be compared."""
    return hashlib.sha256(batch.rows.tobytes()).hexdigest()[:16]
