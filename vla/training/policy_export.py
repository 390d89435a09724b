"""What stage two leaves behind: averaged weights, checkpoints and the policy folder."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vla.config import PolicyTrainConfig
from vla.data.episodes import Episodes, task_of_episode
from vla.data.normalization import Normalizers
from vla.eval.golden import drawn_at, write_golden
from vla.files import read_json, whole_folder, write_json
from vla.models.clip_files import load_clip_at
from vla.policies.concord import ConcordPolicy
from vla.policies.loading import load_chunk_policy
from vla.training.auxiliary import started_encoder
from vla.training.checkpoint import (
    check_trained_on,
    latest_checkpoint,
    load_checkpoint,
    own_random_numbers,
    restore_rng,
    restoring,
    rng_tensors,
    save_checkpoint,
)
from vla.training.optim import Optimizers
from vla.training.policy_data import Cloned
from vla.training.run import RunFolder
from vla.training.tokens import weights_digest
from vla.types import UserError
from vla.versions import versions


def trained_parameters(policy: ConcordPolicy) -> dict[str, Tensor]:
    """What the optimiser changes, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def update_average(averaged: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """averaged <- decay * averaged + (1 - decay) * current."""
    get_ema_multi_avg_fn(decay)(list(averaged.values()), [current[name] for name in averaged], None)


@contextmanager
def averaged_weights(policy: ConcordPolicy, averaged: dict[str, Tensor]) -> Iterator[None]:
    """The policy with its averaged weights; afterwards it has its own again."""
    parameters = trained_parameters(policy)
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    copy_values(parameters, averaged)
    try:
        yield
    finally:
        copy_values(parameters, kept)


@torch.no_grad()
def copy_values(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for name, p in parameters.items():
        p.copy_(values[name])


@dataclass(frozen=True)
class Trained:
    """What a step changes: the policy, its optimiser, its averaged weights, and the parameters of the auxiliary loss."""

    policy: ConcordPolicy
    optimizer: Optimizers
    averaged: dict[str, Tensor]
    others: dict[str, Tensor]


def checkpoint(run: RunFolder, step: int, trained: Trained, cloned: Cloned, seconds: float) -> None:
    """Everything that step + 1 depends on; a frozen encoder is in its own folder and is not repeated, only its digest."""
    tensors, meta = trained.optimizer.tensors()
    groups = {
        "model": trained_parameters(trained.policy),
        "averaged": trained.averaged,
        "optimizer": tensors,
        "rng": rng_tensors(),
    }
    groups |= {"auxiliary": trained.others} if trained.others else {}
    state = {
        "step": step,
        "optimizer": meta,
        "data": cloned.episodes.fingerprint,
        "labels": cloned.episodes.labels(),
        "encoder": cloned.encoder_digest,
        "stats": plain(cloned.stats),
        "seconds": seconds,
    }
    save_checkpoint(run.folder, step, groups, state)


def restore(run: RunFolder, trained: Trained, cloned: Cloned) -> tuple[int, float]:
    """Load the last checkpoint of the run, if any; returns the number of steps done and the seconds they took.

    Raises:
        UserError: a damaged checkpoint, or one of other data, another encoder, other statistics or another version.
    """
    path = latest_checkpoint(run.folder)
    if path is None:
        run.truncate(0)
        return 0, 0.0
    tensors, state = load_checkpoint(path)
    check_trained_on(path, state, cloned.episodes)
    if state.get("encoder", cloned.encoder_digest) != cloned.encoder_digest:  # an older version does not say
        raise UserError(
            f"{path}: was trained on an encoder that has changed since; restore that, or choose another --output"
        )
    if state.get("stats", plain(cloned.stats)) != plain(cloned.stats):
        raise UserError(
            f"{path}: was trained with other statistics of states and actions; restore the policy it began from, or choose another --output"
        )
    with restoring(path):
        copy_values(trained_parameters(trained.policy), tensors["model"])
        copy_values(trained.averaged, tensors["averaged"])
        copy_values(trained.others, tensors.get("auxiliary", {}))
        trained.optimizer.restore(tensors["optimizer"], state["optimizer"])
    restore_rng(tensors["rng"])
    run.truncate(state["step"])
    return state["step"], state["seconds"]


def plain(stats: Normalizers) -> dict[str, dict[str, list[float]]]:
    """Statistics as JSON has them."""
    return {key: {name: value.tolist() for name, value in of.items()} for key, of in stats.by_key().items()}


def export(
    folder: Path, config: PolicyTrainConfig, policy: ConcordPolicy, cloned: Cloned, positions: np.ndarray
) -> Path:
    """Write a LeRobot policy folder with its processors and golden observations; it appears whole or not at all.

    `positions` (n,) are the training episodes of the first data set.
    """
    episodes = cloned.episodes
    dataset_stats = {
        key: {name: torch.from_numpy(value) for name, value in values.items()}
        for key, values in cloned.stats.by_key().items()
    }
    record = {
        "env": episodes.collected.get("env"),
        "tasks": episodes.collected.get("tasks", []),
        "episodes": of_tasks(episodes, positions),
        "drawn_at": drawn_at(episodes, config.data.image_size),
        "data": {"root": config.data.root, "fingerprint": episodes.fingerprint},
        "more": config.more,
        "encoder": started_encoder(Path(config.start)) if config.start else config.encoder,
        "encoder_weights": cloned.encoder_digest,
        "start": config.start,
        "tune": config.tune,
        "steps": config.steps,
        "seed": config.seed,
        "versions": versions(),
    }
    with whole_folder(folder) as partial:
        policy.save_pretrained(partial)
        for processor in make_pre_post_processors(policy.config, dataset_stats=dataset_stats):
            processor.save_pretrained(partial)
        write_json(partial / "concord.json", record)
        with own_random_numbers():  # loading draws some
            loaded = load_chunk_policy(partial)
        write_golden(partial, loaded, episodes, cloned.frames, positions, cloned.stats.action)
    return folder


def of_tasks(episodes: Episodes, positions: np.ndarray) -> dict[str, int]:
    """How many of the episodes at `positions` are of each task of their data set, also of a task that none is of.

    Where tasks are not named, each of what may be thousands of goals is one; then the smallest and the largest number.
    """
    counts = Counter(task_of_episode(episodes)[positions].tolist())
    if "tasks" not in episodes.collected:
        return {"fewest": min(counts.values()), "most": max(counts.values())}
    return {**dict.fromkeys(sorted(episodes.collected["tasks"]), 0), **counts}


def check_finished_on(config: PolicyTrainConfig, policy: Path) -> None:
    """Refuse to take a finished policy for one on the encoder that is there now, where that can be told.

    Raises:
        UserError: it was trained on other weights.
    """
    before = read_json(policy / "concord.json").get("encoder_weights")
    if before is None or config.start or not Path(config.encoder).is_dir():
        return
    clip, _ = load_clip_at(config.encoder, config.data.image_size)
    if weights_digest(clip) != before:
        raise UserError(
            f"{policy}: was trained on an encoder that {config.encoder} no longer holds; choose another --output, or delete {policy.parent} to train anew"
        )
