"""What the jobs of a comparison do: make and measure encoders, train policies and evaluate them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vla.comparison.arms import Arm
from vla.comparison.chosen import chosen_arms, named, numbers_of, steps_of
from vla.comparison.data import aligned_beside, clone_cached, cloned_root, env_name, evaluated_tasks
from vla.config import CompareConfig
from vla.data.batches import TripletSource
from vla.data.episodes import limit_per_task, rows_of
from vla.data.mixture import open_mixture
from vla.eval.alignment import measure_alignment
from vla.eval.evaluate import evaluate
from vla.files import write_json
from vla.models.clip import tokenize
from vla.models.clip_files import load_clip, load_clip_at, untrained, with_text_of, with_vision_of
from vla.policies.concord import ConcordPolicy
from vla.training.align_export import write_clip
from vla.training.align_setup import make_encoders, make_model, make_stats
from vla.training.pretrained import beside, from_stage_one
from vla.training.ranges import header_of
from vla.types import UserError

# Sources that are alignments, named by what of the triplets is shuffled.
ALIGNED = ("none", "language", "action", "all")
OWN_POOLER = ("none", "cloned")  # sources whose pooler was trained on the text features that all arms have


def encoder_folder(config: CompareConfig, encoder: str, seed: int) -> Path:
    """Where an encoder that arms start from is."""
    return Path(config.output) / "encoders" / encoder / str(seed) / "clip"


def policy_run(config: CompareConfig, name: str, count: int, seed: int) -> Path:
    """The stage-two run of an arm, number of demonstrations and training seed."""
    return Path(config.output) / "policy" / name / str(count) / str(seed)


def cloning_run(config: CompareConfig, seed: int) -> Path:
    """The run that trains an encoder by cloning on all demonstrations: that of scratch, which does the same, if it takes as many steps."""
    own = Path(config.output) / "policy" / "cloning" / str(seed)
    same_data = not config.transfer and config.align.data.episodes_per_task is None
    same = same_data and config.scratch_steps == config.cloning_steps
    return policy_run(config, "scratch", 0, seed) if same and not own.exists() else own  # older versions had two


def evaluation_folder(config: CompareConfig, name: str, count: int | str, seed: int) -> Path:
    """The evaluation of a policy; of one that is given, the count is "given" and the seed 0."""
    return Path(config.output) / "eval" / f"{name}-{count}-{seed}"


def make_encoder(config: CompareConfig, encoder: str, seed: int) -> None:
    """Write an encoder with the aligned text tower, and its pooler beside it if it has one."""
    clip_folder = encoder_folder(config, encoder, seed)
    source, _, snapshot = encoder.partition("@")
    image_size = config.align.data.image_size
    aligned = Path(config.output) / "align" / "none" / str(seed)
    text_clip, tokenizer = load_clip(aligned / "clip")
    extra, header = {}, {}
    if source in ALIGNED:
        run = Path(config.output) / "align" / source / str(seed)
        run = run / "snapshots" / snapshot if snapshot else run
        clip, _ = load_clip(run / "clip")
        extra, header = load_file(beside(run / "clip")), header_of(beside(run / "clip"))
    elif source == "cloned":
        policy = ConcordPolicy.from_pretrained(cloning_run(config, seed) / "policy")
        clip = policy.clip
        pooler = policy.network.pooler.state_dict()
        extra = {f"pooler.{name}": value.contiguous() for name, value in pooler.items()}
    elif source == "random":
        torch.manual_seed(seed)
        texts = open_mixture(config.align.data, aligned_beside(config), seed).episodes.texts
        clip, _ = make_encoders(replace(config.align.tower, lexicon=None), image_size, texts)  # gets the aligned words
        if config.align.tower.pretrained:
            clip = untrained(clip)
    else:
        torch.manual_seed(seed)
        clip = with_vision_of(named(config.encoders, "encoders")[encoder], text_clip, image_size)
    clip = with_text_of(clip, text_clip)
    clip_folder.parent.mkdir(parents=True, exist_ok=True)
    if extra:
        save_file(extra, beside(clip_folder), metadata=header)
    write_clip(clip_folder, clip, tokenizer)


def measure(config: CompareConfig, encoder: str, seed: int) -> None:
    """The alignment measures of an encoder; what it has no weights for (a pooler, an action encoder) is untrained."""
    align = config.align
    torch.set_num_threads(align.threads)
    torch.manual_seed(seed)
    folder = encoder_folder(config, encoder, seed)
    clip, tokenizer = load_clip_at(folder, align.data.image_size)
    mixture = open_mixture(replace(align.data, episodes_per_task=None), aligned_beside(config), seed)
    episodes, own = mixture.episodes, mixture.train[0]
    limited = limit_per_task(episodes, own, align.data.episodes_per_task, seed)
    stats = make_stats(episodes, rows_of(episodes, np.concatenate([limited, *mixture.train[1:]])))  # the alignment's
    model = make_model(align, clip, episodes)
    extra = beside(folder)
    if extra.is_file():
        surplus = model.load_state_dict(load_file(extra), strict=False).unexpected_keys
        if surplus:
            raise UserError(f"{extra}: unexpected keys {surplus[:3]}; delete {folder.parent} and run again")
    model.eval()
    measures, _ = measure_alignment(
        model,
        TripletSource(episodes, mixture.frames, stats, align.horizon),
        own[episodes.goal_id[own] >= 0],
        mixture.validation,
        *tokenize(tokenizer, episodes.texts),
    )
    write_json(folder.parent / "measures.json", measures)


def make_policy(config: CompareConfig, name: str, arm: Arm, count: int, seed: int) -> None:
    """Train the policy of one arm, number of demonstrations and seed."""
    folder, arms = Path(config.output), chosen_arms(config)
    if arm.source == "named":
        encoder, cache = str(named(config.encoders, "encoders")[name]), folder / "cache" / f"{name}-{seed}"
    else:
        encoder = str(encoder_folder(config, arm.encoder, seed))
        cache = folder / "cache" / f"{arm.encoder}-{seed}"
    tune = arm.tuned_part != "nothing"
    broad = config.align.data.root
    more = (f"{broad}={config.transfer_weight}",) if config.transfer and config.transfer_weight else ()
    data = replace(config.align.data, root=cloned_root(config), episodes_per_task=count or None, cache=str(cache))
    optimizer = config.policy.optimizer
    if arm.after:
        optimizer = replace(optimizer, lr=optimizer.lr * config.tuned_lr_scale)
    policy = replace(
        config.policy,
        output=str(policy_run(config, name, count, seed)),
        encoder=encoder,
        start=str(policy_run(config, arm.after, count, seed) / "policy") if arm.after else None,
        data=data,
        more=more + config.policy.more,
        optimizer=optimizer,
        aligned_pooler=config.policy.aligned_pooler and from_stage_one(encoder),
        tune=tune,
        tuned_part=arm.tuned_part if tune else "all",
        pooler_lr_scale=config.policy.pooler_lr_scale if arm.source in OWN_POOLER and not arm.snapshot else 1.0,
        encoder_lr_scale=1.0 if arm.source == "random" else config.policy.encoder_lr_scale,
        auxiliary=config.policy.auxiliary if tune and arm.source != "random" else 0.0,
        hide=arm.hide,
        steps=steps_of(config, arm),
        seed=seed,
        resume=True,
    )
    frozen = [other for other, sibling in arms.items() if sibling.tuned_part == "nothing"]  # others read no tokens
    siblings = [name] if arm.source == "named" else [other for other in frozen if arms[other].encoder == arm.encoder]
    runs = [(other, number) for other in siblings for number in numbers_of(config, arms[other])]
    clone_cached(config, policy, [policy_run(config, other, number, seed) / "policy" for other, number in runs])


def clone_everything(config: CompareConfig, seed: int) -> None:
    """Train an untrained tower by cloning on all demonstrations: the encoder that the cloning-pretrained arm freezes."""
    policy = replace(
        config.policy,
        output=str(cloning_run(config, seed)),
        encoder=str(encoder_folder(config, "random", seed)),
        data=replace(config.align.data, cache=str(Path(config.output) / "cache" / f"cloning-{seed}")),
        aligned_pooler=False,
        pooler_lr_scale=1.0,
        auxiliary=0.0,
        tune=True,
        tuned_part="vision",
        encoder_lr_scale=1.0,
        steps=config.cloning_steps,
        seed=seed,
        resume=True,
    )
    clone_cached(config, policy, [cloning_run(config, seed) / "policy"])


def evaluate_policy(config: CompareConfig, policy: Path, output: Path) -> None:
    """Evaluate a policy on the tasks of the demonstrations, whatever it was trained on, unless transfer or `eval.tasks` names others."""
    tasks = config.transfer or evaluated_tasks(config)
    evaluate(replace(config.eval, policy=str(policy), output=str(output), env=env_name(config), tasks=tasks, workers=1))
