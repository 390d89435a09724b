"""What stage two starts from: a new policy on an encoder, or one that was trained before."""

from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature

from vla.config import HeadConfig, LossConfig, PolicyTrainConfig
from vla.data.episodes import Episodes
from vla.data.normalization import Normalizers, NormStats
from vla.models.clip_files import load_clip_at
from vla.policies.concord import ConcordConfig, ConcordPolicy
from vla.policies.concord.processor_concord import floored_stats
from vla.policies.loading import LOAD_ERRORS, load_processors
from vla.precision import chosen_precision
from vla.training.align_setup import make_encoders
from vla.training.checkpoint import load_tensors
from vla.training.pretrained import beside
from vla.types import ACTION_KEY, STATE_KEY, UserError, first_line


def make_policy(config: PolicyTrainConfig, episodes: Episodes) -> ConcordPolicy:
    """A new policy on the encoder that the configuration names, or the one that it goes on from.

    Raises:
        UserError: no such encoder or policy, or one that does not fit.
    """
    if config.start:
        return started_policy(config, policy_config(config, episodes))
    if config.encoder == "random":
        if config.tower.pretrained or config.tower.lora_rank or config.tower.locked:
            raise UserError(
                "config error: tower: pretrained, locked and lora_rank are stage one's; encoder=random is untrained, --encoder=FOLDER names a trained one"
            )
        clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts)
    else:
        clip, tokenizer = load_clip_at(config.encoder, config.data.image_size, "--data.image_size")
    policy = ConcordPolicy(policy_config(config, episodes), clip=clip, tokenizer=tokenizer)
    if starts_trained(config):
        load_pooler(policy, beside(config.encoder))
    return policy


def policy_config(config: PolicyTrainConfig, episodes: Episodes) -> ConcordConfig:
    """What LeRobot is told of the policy."""
    return ConcordConfig(
        device="cuda" if torch.cuda.is_available() else "cpu",
        input_features={
            episodes.camera: PolicyFeature(FeatureType.VISUAL, (3, config.data.image_size, config.data.image_size)),
            STATE_KEY: PolicyFeature(FeatureType.STATE, (episodes.state.shape[1],)),
        },
        output_features={ACTION_KEY: PolicyFeature(FeatureType.ACTION, (episodes.action.shape[1],))},
        tune=config.tune,
        tuned_part=config.tuned_part,
        hide=config.hide,
        encoder_lr_scale=config.encoder_lr_scale,
        precision=chosen_precision(config.precision),
        image_size=config.data.image_size,
        **{name: value for name, value in asdict(config.head).items() if name != "token_noise"},
    )


def started_policy(config: PolicyTrainConfig, wanted: ConcordConfig) -> ConcordPolicy:
    """The policy that training goes on from, in the wanted configuration.

    Raises:
        UserError: no such policy, or another head, pooler, image size, state or action than the wanted one's.
    """
    folder = Path(config.start)
    if (folder / "policy" / "config.json").is_file():
        raise UserError(f"config error: start: {folder}: not a policy folder; did you mean {folder / 'policy'}?")
    if not (folder / "config.json").is_file():
        raise UserError(f"config error: start: {folder}: not a policy folder (no config.json)")
    try:
        before = PreTrainedConfig.from_pretrained(folder)
    except LOAD_ERRORS as error:  # an encoder's configuration, say
        raise UserError(f"config error: start: {folder}: not a policy folder ({first_line(error)})") from error
    if not isinstance(before, ConcordConfig):
        raise UserError(f"config error: start: {folder}: a {before.type} policy, not a concord one")
    for name in ("kind", "horizon", "queries", "width", "hidden", "layers", "image_size", "hide"):
        if getattr(before, name) != getattr(wanted, name):
            flag = {"image_size": "data.image_size", "hide": "hide"}.get(name, f"head.{name}")
            raise UserError(
                f"{folder}: was trained with {name} {getattr(before, name)}, not {getattr(wanted, name)}; set --{flag}={getattr(before, name)}"
            )
    for name in ("robot_state_feature", "action_feature"):
        if getattr(before, name).shape != getattr(wanted, name).shape:
            raise UserError(
                f"{folder}: {name} is {getattr(before, name).shape}, in {config.data.root} {getattr(wanted, name).shape}; "
                "name data of the same robot, or start from an encoder with --encoder instead"
            )
    return ConcordPolicy.from_pretrained(folder, config=wanted)


def policy_stats(folder: Path) -> Normalizers:
    """The statistics of states and actions inside a policy folder.

    Raises:
        UserError: files missing or damaged.
    """
    try:
        config = PreTrainedConfig.from_pretrained(folder)
        before, _ = load_processors(folder, config, "cpu")  # not that of the machine that trained it
        (stats,) = (step.stats for step in before.steps if getattr(step, "stats", None))
    except LOAD_ERRORS as error:
        raise UserError(f"config error: start: {folder}: no statistics in it: {first_line(error)}") from error
    stats = stats | floored_stats(stats)  # LeRobot's own training may have written others
    action, state = (
        NormStats(**{field.name: np.asarray(stats[key][field.name], np.float32) for field in fields(NormStats)})
        for key in (ACTION_KEY, STATE_KEY)
    )
    return Normalizers(action, state)


def starts_trained(config: PolicyTrainConfig) -> bool:
    """Whether the pooler starts trained: from stage one's, or from the policy that training goes on from."""
    return bool(config.start) or (config.aligned_pooler and config.encoder != "random")


def check_pooler(head: HeadConfig, loss: LossConfig) -> None:
    """Refuse sizes at which policies and stage one could not take up each other's pooler.

    Raises:
        UserError: names the fields of both stages.
    """
    if (head.queries, head.width) != (loss.queries, loss.pooler_width):
        raise UserError(
            "config error: policies and stage one share a pooler, which needs policy.head.queries = align.loss.queries and policy.head.width = "
            f"align.loss.pooler_width, got {head.queries} and {loss.queries}, {head.width} and {loss.pooler_width}"
        )


def load_pooler(policy: ConcordPolicy, path: Path) -> None:
    """Start the policy's pooler from stage one's."""
    if not path.is_file():
        raise UserError(f"{path}: missing; aligned_pooler needs what train_align.py writes beside clip/")
    weights = {k.removeprefix("pooler."): v for k, v in load_tensors(path).items() if k.startswith("pooler.")}
    try:
        policy.network.pooler.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its pooler does not fit; use the same queries, width and picture size in both stages "
            "(loss.queries = head.queries, loss.pooler_width = head.width, data.image_size) and the same version of concord"
        ) from error
