"""What stage one aligns on: episodes and pictures, the rows of its batches, and what it is measured on."""

import hashlib
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from vla.config import AlignConfig
from vla.data.augmentation import augmenter
from vla.data.batches import TripletSource, training_batch
from vla.data.episodes import Episodes, rows_of
from vla.data.minimal_pairs import MinimalPairs
from vla.data.mixture import open_mixture
from vla.data.sampler import MixedSampler
from vla.training.align_setup import (
    make_sampler,
    make_source,
    minimal_pairs,
    old_data,
    resting_action,
    shared_settings,
    shuffled_labels,
)
from vla.training.pretrained import HeldOut
from vla.training.processes import Processes, check_same_data, check_same_settings, in_turn, refusal, together
from vla.types import TripletBatch


@dataclass(frozen=True)
class AlignData:
    """Everything of the data sets that a run needs; positions are those of episodes."""

    episodes: Episodes
    source: TripletSource
    sampler: MixedSampler
    train: np.ndarray  # positions
    chosen: str  # a digest of them
    instructed: (
        np.ndarray
    )  # positions of the first data set's training episodes with an instruction, which probes are fitted on
    validation: np.ndarray  # positions, all with an instruction
    rest: Tensor  # (a,) the resting action, normalised
    pairs: MinimalPairs | None
    labels: np.ndarray | None  # (e,) the episode whose instruction each one gets, if they are shuffled
    old: dict[str, HeldOut]  # what forgetting is measured on


def open_data(config: AlignConfig, accelerator: Accelerator, processes: Processes) -> AlignData:
    """Open all data sets, on every process the same.

    Raises:
        UserError: unusable data, other data or settings on another process, or no training episode with an instruction.
    """
    mixture, old = in_turn(
        accelerator,
        lambda: (open_mixture(config.data, config.more, config.seed), old_data(config)),
        mine_first=accelerator.is_local_main_process,
    )
    episodes, train = mixture.episodes, np.concatenate(mixture.train)
    chosen = hashlib.sha256(train.tobytes()).hexdigest()[:16]
    check_same_data(processes, episodes, chosen, accelerator.device)
    check_same_settings(processes, shared_settings(config), accelerator.device)
    instructed = mixture.train[0][episodes.goal_id[mixture.train[0]] >= 0]
    if not len(instructed):
        raise refusal(f"{config.data.root}: no training episode has an instruction; lower --data.holdout")
    rows = rows_of(episodes, train)
    # It reads pictures, which may be damaged on one machine alone.
    source = together(accelerator, lambda: make_source(episodes, mixture.frames, rows, config.horizon))
    return AlignData(
        episodes=episodes,
        source=source,
        sampler=make_sampler(config.batch, config.seed, episodes, mixture.train, mixture.weights),
        train=train,
        chosen=chosen,
        instructed=instructed,
        validation=mixture.validation,
        rest=resting_action(episodes, rows, source.stats.action),
        pairs=together(accelerator, lambda: minimal_pairs(config.loss, episodes, train, accelerator.print)),
        labels=shuffled_labels(episodes.goal_id, config.seed) if config.shuffle in ("language", "all") else None,
        old=old,
    )


def make_batch(config: AlignConfig, data: AlignData, processes: Processes, step: int) -> TripletBatch:
    """The triplets of a step, of all processes; unless they are embedded in pieces, this process's pictures are read already."""
    batch = training_batch(
        data.source,
        data.sampler,
        step,
        augmenter=augmenter(config.data),
        text_of_episode=data.labels,
        shuffle_actions=config.shuffle in ("action", "all"),
        pairs=data.pairs,
    )
    if not config.chunk:
        batch.frames.load(processes.shares(len(batch.frames))[processes.rank])
    return batch
