"""What stage one is made of: encoders, model, statistics, batches, held-out data, from a configuration."""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from vla.config import AlignConfig, BatchConfig, LossConfig, TowerConfig
from vla.config_io import to_dict
from vla.data.batches import TripletSource
from vla.data.episodes import Episodes, rows_of
from vla.data.minimal_pairs import MinimalPairs
from vla.data.mixture import Mixture, open_mixture, root_and_weight
from vla.data.normalization import Normalizers, NormStats, compute_norm_stats, normalize_quantile
from vla.data.sampler import GoalSampler, MixedSampler, shares
from vla.models.alignment import TERMS, AlignmentModel
from vla.models.clip_build import build_clip
from vla.models.clip_files import load_clip_at
from vla.training.pretrained import HeldOut, check_start, old_split
from vla.training.run import FREE_FIELDS
from vla.types import Indexed, UserError


def check_alignment(config: AlignConfig) -> None:
    """Refuse what no run of stage one can be made of.

    Raises:
        UserError: names the field.
    """
    check_start(config)
    check_terms(config)
    check_snapshots(config)


def check_terms(config: AlignConfig) -> None:
    """Refuse a loss without terms, options of terms that are off, transition terms whose batches hold no transition, and temperatures that are none."""
    if not switched_on(config.loss):
        raise UserError("config error: loss: the weight of every term is 0, so nothing would be trained")
    loss = config.loss
    pair_temperatures(loss)
    unused = [
        (option, term)
        for option, is_set, term in (
            ("minimal_pairs", loss.minimal_pairs, "word_patch"),
            ("state_within_goal", loss.state_within_goal, "state"),
            ("vision_language_kind", loss.vision_language_kind != "softmax", "vision_language"),
        )
        if is_set and not getattr(loss, term)
    ]
    if unused:
        option, term = unused[0]
        raise UserError(
            f"config error: loss.{option} changes the term loss.{term}, whose weight is 0; set --loss.{term} above 0, or leave it out"
        )
    batch = config.batch
    if config.loss.transition_action + config.loss.transition_language and (
        batch.frames < 2 or batch.gap > config.horizon
    ):
        raise UserError(
            "config error: loss.transition_action and loss.transition_language need two frames of an episode in a batch, at most "
            f"`horizon` apart; got batch.frames {batch.frames}, batch.gap {batch.gap}, horizon {config.horizon}"
        )


def switched_on(loss: LossConfig) -> list[str]:
    """The terms that have a weight."""
    return [name for name in TERMS if getattr(loss, name)]


def check_snapshots(config: AlignConfig) -> None:
    """Refuse snapshots that no step takes."""
    beyond = [step for step in config.snapshots if not 0 < step <= config.steps]
    if beyond:
        raise UserError(f"config error: snapshots: {beyond[0]} is not a step of 1 to {config.steps}")


# What processes of one run may have each for itself: where things are, and what decides no batch and no update.
OWN_FIELDS = (
    *FREE_FIELDS,
    "root",
    "pretrained",
    "vocabulary",
    "lexicon",
    "snapshots",
    "wise_ft",
    "forgetting",
)


def shared_settings(config: AlignConfig) -> str:
    """Everything that the processes of one run must have in common, as text; what data sets hold is compared apart."""

    def shared(tree: dict) -> dict:
        return {k: shared(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in OWN_FIELDS}

    weights = [root_and_weight(text)[1] for text in config.more]
    tower = config.tower
    given = [bool(path) for path in (tower.pretrained, tower.vocabulary, tower.lexicon)]
    return json.dumps(shared(to_dict(config)) | {"more": weights, "given": given}, sort_keys=True)


def pair_temperatures(loss: LossConfig) -> dict[str, tuple[float, bool]]:
    """What `loss.temperatures` says: the initial temperature of a pair, and whether it is learned.

    Raises:
        UserError: no such pair, or a value that is no temperature.
    """
    found: dict[str, tuple[float, bool]] = {}
    for text in loss.temperatures:
        pair, _, value = text.partition("=")
        number = value.removeprefix("fixed:")
        if pair not in TERMS:
            raise UserError(f"config error: loss.temperatures: {text!r} names no pair; they are {', '.join(TERMS)}")
        try:
            start = float(number)
        except ValueError:
            start = 0.0
        if not 0.01 <= start < float("inf"):
            raise UserError(
                f"config error: loss.temperatures: {text!r} is not {pair}=VALUE or {pair}=fixed:VALUE with a value of at least 0.01"
            )
        found[pair] = start, loss.learn_temperature and number == value
    return found


def minimal_pairs(
    loss: LossConfig, episodes: Episodes, train: np.ndarray, tell: Callable[[str], None]
) -> MinimalPairs | None:
    """The minimal pairs of (e,) training episodes, if they are asked for; `tell` is told how many episodes have one.

    Raises:
        UserError: no episode has one.
    """
    if not (loss.minimal_pairs and loss.word_patch):
        return None
    pairs = MinimalPairs(episodes, train)
    ids = (episodes.text_id[train], episodes.goal_id[train], episodes.scene_id[train])
    share = float((pairs.draw(*ids, np.random.default_rng(0)) >= 0).mean())
    if not share:
        raise UserError(
            f"config error: loss.minimal_pairs: in no instruction of {episodes.root} can one word be exchanged so that it names what its "
            "scene lacks (scene_id and target_position tell); leave it out"
        )
    tell(f"minimal pairs: for {100 * share:.0f} % of the episodes")
    return pairs


def make_source(episodes: Episodes, frames: Indexed, rows: np.ndarray, horizon: int) -> TripletSource:
    """Triplets of episodes and their pictures, normalised by the statistics of the (r,) training rows."""
    return TripletSource(episodes, frames, make_stats(episodes, rows), horizon)


def make_stats(episodes: Episodes, rows: np.ndarray) -> Normalizers:
    """Statistics of the actions and states that (r,) rows have."""
    known = [values[rows][np.isfinite(values[rows]).all(1)] for values in (episodes.action, episodes.state)]
    return Normalizers(*map(compute_norm_stats, known))


def resting_action(episodes: Episodes, rows: np.ndarray, stats: NormStats) -> Tensor:
    """(a,) the median action of those of (r,) rows that have one, normalised; chunks that stay there are idle."""
    return torch.from_numpy(normalize_quantile(np.nanmedian(episodes.action[rows], axis=0), stats))


def make_sampler(
    batch: BatchConfig, seed: int, episodes: Episodes, parts: list[np.ndarray], weights: list[float]
) -> MixedSampler:
    """The batches' rows: each data set, whose training episodes are one of `parts`, gives goals by its weight."""
    samplers = []
    for number, (positions, goals) in enumerate(zip(parts, shares(batch.goals, weights), strict=True)):
        own = asdict(batch) | {"goals": goals, "seed": seed + (number << 20)}
        samplers.append(GoalSampler(episodes.start, episodes.goal_id, episodes.scene_id, positions, **own))
    return MixedSampler(samplers)


def make_model(config: AlignConfig, clip: CLIPModel, episodes: Episodes) -> AlignmentModel:
    """The encoders with everything else that stage one trains, untrained."""
    return AlignmentModel(
        clip,
        horizon=config.horizon,
        action_dim=episodes.action.shape[1],
        state_dim=episodes.state.shape[1],
        pooler_width=config.loss.pooler_width,
        queries=config.loss.queries,
        temperature=config.loss.temperature,
        learn_temperature=config.loss.learn_temperature,
        temperatures=pair_temperatures(config.loss),
        sigmoid=config.loss.vision_language_kind == "sigmoid",
        transitions=config.loss.transition_action + config.loss.transition_language > 0,
    )


def make_encoders(tower: TowerConfig, image_size: int, texts: tuple[str, ...], resumed: bool = False):
    """Encoders with fresh weights, or pretrained ones adapted to the image size; returns (CLIPModel, tokenizer).

    Those of a `resumed` run await the weights of its checkpoint.
    """
    if tower.pretrained is None:
        sizes = {key: value for key, value in asdict(tower).items() if key not in ("pretrained", "locked", "lora_rank")}
        return build_clip(texts, image_size=image_size, resumed=resumed, **sizes)
    return load_clip_at(tower.pretrained, image_size)


def held_out_data(config: AlignConfig, mixture: Mixture) -> dict[str, HeldOut]:
    """What an encoder is measured on along the way from a pretrained start: the held-out episodes of new and old data."""
    rows = rows_of(mixture.episodes, np.concatenate(mixture.train))
    source = make_source(mixture.episodes, mixture.frames, rows, config.horizon)
    return {"new": HeldOut(source, mixture.validation)} | old_data(config)


def old_data(config: AlignConfig) -> dict[str, HeldOut]:
    """The held-out episodes of the data set that forgetting is measured on, if there is one.

    Where the start's own run is there, they are those that it held out, and `old_goals` are those of them whose goals the start
    is known never to have trained on, if they are several.
    """
    if config.forgetting is None:
        return {}
    data, seed, known = old_split(config)
    mixture = open_mixture(data, (), seed, partial=True)  # encoders need pictures and texts alone
    episodes, (train,), validation = mixture.episodes, mixture.train, mixture.validation
    source = make_source(episodes, mixture.frames, rows_of(episodes, train), config.horizon)
    old = {"old": HeldOut(source, validation)}
    new_goals = validation[~np.isin(episodes.goal_id[validation], episodes.goal_id[train])]
    if known and len(np.unique(episodes.goal_id[new_goals])) > 1:
        old["old_goals"] = HeldOut(source, new_goals)
    return old


def shuffled_labels(goal_id: np.ndarray, seed: int) -> np.ndarray:
    """(e,) whose instruction each episode gets in the shuffled-language control; episodes without one (-1) stay without."""
    labels, told = np.arange(len(goal_id)), np.flatnonzero(goal_id >= 0)
    labels[told] = np.random.default_rng([seed, 7]).permutation(told)
    return labels
