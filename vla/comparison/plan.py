"""What a comparison runs: data, encoders, their measures, policies, evaluations.

Every encoder gets the text tower of the aligned one of its seed, so that arms differ in what they see, not in how they read.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, CLIPConfig, CLIPModel, VisionTextDualEncoderConfig

from vla.comparison.arms import ARMS, Arm, Source
from vla.comparison.jobs import Job
from vla.config import CompareConfig, DataConfig, EnvConfig, EvalConfig, SweepConfig
from vla.data.batches import TripletSource
from vla.data.episodes import limit_per_task, read_episodes, rows_of, task_of_episode
from vla.data.frames import open_pictures
from vla.data.mixture import open_mixture, root_and_weight
from vla.eval.alignment import measure_alignment
from vla.eval.evaluate import evaluate
from vla.files import write_whole
from vla.integrations.collect import checked_tasks, collect
from vla.models.clip import (
    load_clip,
    resize_positions,
    save_clip,
    tokenize,
    untrained,
    with_text_of,
    with_vision_of,
)
from vla.policies.concord import ConcordPolicy
from vla.training.align import train_align
from vla.training.align_setup import check_snapshots, make_encoders, make_model, make_stats
from vla.training.policy import check_head, train_policy
from vla.types import UserError

ALIGNED = (
    "none",
    "language",
    "action",
    "all",
)  # sources that are alignments, named by what of the triplets is shuffled
NAME = re.compile(r"[A-Za-z0-9._-]+")  # of folders
SET_HERE = {  # fields that every run gets from elsewhere
    "align.output": "output",
    "align.seed": "seeds",
    "policy.output": "output",
    "policy.seed": "seeds",
    "policy.encoder": "encoders",
    "eval.output": "output",
    "eval.policy": "policies",
}
SET_BY_ARMS = dict.fromkeys(
    ("align.shuffle", "policy.start", "policy.tune", "policy.tuned_part", "policy.hide"), "arms"
)
OWN_POOLER = ("none", "cloned")  # sources whose pooler was trained on the text features that all arms have


def named(pairs: tuple[str, ...], field: str) -> dict[str, Path]:
    """NAME=FOLDER texts as a mapping; UserError if one is not of that form, its name is another thing's, or its folder is absent."""
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (equals and name and Path(folder).is_dir()):
            raise UserError(f"config error: {field}: {pair!r} is not NAME=FOLDER of an existing folder")
        if not NAME.fullmatch(name) or set(name) == {"."}:
            raise UserError(f"config error: {field}: {name!r} names a folder; take letters, digits, '.', '_' and '-'")
        if name in ARMS or name in (*get_args(Source), "cloning"):
            raise UserError(f"config error: {field}: {name!r} is taken; choose another name")
        folders[name] = Path(folder)
    return folders


def vision_alone(folder: Path) -> bool:
    """Whether a model folder holds a vision model that knows no text; UserError if it holds none."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"config error: encoders: {folder}: {str(error).strip().splitlines()[0]}") from error
    return not isinstance(config, CLIPConfig | VisionTextDualEncoderConfig)


def chosen_arms(config: CompareConfig) -> dict[str, Arm]:
    """The arms that are trained, by name.

    Raises:
        UserError: unknown or repeated names, or several training seeds or numbers of demonstrations that are equal.
    """
    check_numbers(config)
    arms = {}
    for name in config.arms:
        if name not in ARMS:
            raise UserError(f"config error: arms: {name!r} is not an arm; known: {', '.join(ARMS)}")
        arms[name] = ARMS[name]
        if arms[name].after not in ("", *config.arms):
            raise UserError(f"config error: arms: {name} goes on from {arms[name].after}; name that, too")
    for name, folder in named(config.encoders, "encoders").items():
        alone = vision_alone(folder)
        what = "the vision model" if alone else "the encoder"
        arms[name] = Arm("vision" if alone else "named", f"{what} {folder}, frozen", name=name)
    if "aligned-frozen" in arms:
        for step in config.align.snapshots:
            arms[f"aligned-frozen@{step}"] = Arm("none", f"aligned for the first {step} steps, frozen", snapshot=step)
    policies = named(config.policies, "policies")
    for field, values in (
        ("arms", [*config.arms, *[pair.partition("=")[0] for pair in (*config.encoders, *config.policies)]]),
        ("demonstrations", config.demonstrations),
        ("seeds", config.seeds),
    ):
        if len(set(values)) < len(values):
            raise UserError(f"config error: {field}: {list(values)} repeats a value")
    if config.transfer:
        known = checked_tasks(config.collect)
        rest = [task for task in known if task not in config.transfer]
        unknown = [task for task in config.transfer if task not in known]
        if unknown or not rest:
            what = f"{unknown[0]!r} is not a task" if unknown else "no task is left for the encoders"
            raise UserError(f"config error: transfer: {what}; known: {', '.join(known)}")
    if config.play_scenes and not Path(play_root(config)).is_dir():
        checked_tasks(replace(config.collect, kind="play"))
    if not (arms or policies):
        raise UserError("config error: arms: name at least one arm, encoder or policy")
    return arms


def check_numbers(config: CompareConfig) -> None:
    """Refuse numbers that nothing can be trained or estimated with.

    Raises:
        UserError: names the field.
    """
    for field, values in (("seeds", config.seeds), ("demonstrations", config.demonstrations)):
        if not values or min(values) < 0:
            raise UserError(f"config error: {field}: {list(values)}; give at least one number, none below 0")
    check_snapshots(config.align, "align.")
    check_episodes(config.eval)
    check_set_here(config, SET_HERE | SET_BY_ARMS)
    check_head(config.policy)


def check_set_here(config: CompareConfig | SweepConfig, fields: Mapping[str, str]) -> None:
    """Refuse values that would be passed over: of `fields`, each with what decides instead, and of stage two's data.

    Raises:
        UserError: names the field.
    """
    usual = type(config)()
    for name, instead in fields.items():
        stage, _, field = name.partition(".")
        if getattr(getattr(config, stage), field) != getattr(getattr(usual, stage), field):
            raise UserError(f"config error: {name}: is set for every run; {instead} decides here")
    surplus = config_differences(config.policy.data, DataConfig())
    if surplus:
        raise UserError(
            f"config error: policy.data.{surplus[0]}: stage two gets align.data; set align.data.{surplus[0]}"
        )


def check_episodes(config: EvalConfig) -> None:
    """Refuse a single episode: it has no interval.

    Raises:
        UserError: names the field.
    """
    for field in ("episodes", "split_episodes", "grounding_episodes"):
        if getattr(config, field) == 1:
            raise UserError(f"config error: eval.{field}: 1 episode has no interval; give more")


def config_differences(config: DataConfig, other: DataConfig) -> list[str]:
    """Fields that differ."""
    return [field.name for field in fields(config) if getattr(config, field.name) != getattr(other, field.name)]


def numbers_of(config: CompareConfig, arm: Arm) -> tuple[int, ...]:
    """The numbers of demonstrations an arm is trained on: all, or the middle one for a snapshot of the alignment."""
    return config.demonstrations if not arm.snapshot else (config.demonstrations[len(config.demonstrations) // 2],)


def plan_jobs(config: CompareConfig) -> list[Job]:
    """All jobs in a good order: seed by seed, so that the first seed's results are there early."""
    folder, arms = Path(config.output), chosen_arms(config)
    jobs = [Job("data", folder / "data.json", partial(make_data, config))] if arms else []
    for seed in config.seeds if arms else ():
        sources = list(dict.fromkeys(["none", *(arm.source for arm in arms.values() if not arm.name)]))
        if "cloned" in sources and "random" not in sources:
            sources.append("random")
        for source in sorted(sources, key=("none", "random", "cloned", "language", "action", "all").index):
            jobs += encoder_jobs(config, source, seed)
        for name, arm in arms.items():
            if arm.snapshot or arm.source == "vision":
                jobs += finished_encoder_jobs(config, arm.encoder, seed, ("data", f"align-none-{seed}"))
            for count in numbers_of(config, arm):
                run = folder / "policy" / name / str(count) / str(seed)
                encoder = f"encoder-{arm.encoder}-{seed}"
                after = (f"policy-{arm.after}-{count}-{seed}",) if arm.after else ()
                jobs.append(
                    Job(
                        f"policy-{name}-{count}-{seed}",
                        run / "policy",
                        partial(make_policy, config, name, arm, count, seed),
                        ("data",) if arm.source == "named" else (encoder, *after),
                    )
                )
                jobs.append(evaluation_job(config, f"{name}-{count}-{seed}", run / "policy", (jobs[-1].name,)))
    for name, policy in named(config.policies, "policies").items():
        jobs.append(evaluation_job(config, f"{name}-given-0", policy, ()))
    return jobs


def encoder_jobs(config: CompareConfig, source: str, seed: int) -> list[Job]:
    """The jobs that make and measure one encoder."""
    folder = Path(config.output)
    needs: tuple[str, ...] = ("data",) if source == "none" else ("data", f"align-none-{seed}")
    jobs = []
    if source in ALIGNED:
        align = replace(
            config.align,
            output=str(folder / "align" / source / str(seed)),
            more=aligned_beside(config),
            shuffle=source,
            seed=seed,
            resume=True,
        )
        jobs.append(
            Job(f"align-{source}-{seed}", Path(align.output) / "report.html", partial(train_align, align), ("data",))
        )
        needs = (*needs, jobs[-1].name)
    if source == "cloned":
        run = folder / "policy" / "cloning" / str(seed)
        jobs.append(
            Job(
                f"cloning-{seed}",
                run / "policy",
                partial(clone_everything, config, seed),
                (f"encoder-random-{seed}",),
            )
        )
        needs = (*needs, jobs[-1].name)
    return jobs + finished_encoder_jobs(config, source, seed, needs)


def finished_encoder_jobs(config: CompareConfig, encoder: str, seed: int, needs: tuple[str, ...]) -> list[Job]:
    """The jobs that give a trained encoder its text tower and measure it."""
    path, name = encoder_folder(config, encoder, seed), f"encoder-{encoder}-{seed}"
    measures = path.parent / "measures.json"
    return [
        Job(name, path, partial(make_encoder, config, encoder, seed), needs),
        Job(f"measures-{encoder}-{seed}", measures, partial(measure, config, encoder, seed), (name,)),
    ]


def evaluation_job(config: CompareConfig, name: str, policy: Path, needs: tuple[str, ...]) -> Job:
    """The evaluation of one policy, the same episodes for all."""
    output = Path(config.output) / "eval" / name
    return Job(f"eval-{name}", output / "report.html", partial(evaluate_policy, config, policy, output), needs)


def evaluate_policy(config: CompareConfig, policy: Path, output: Path) -> None:
    """Evaluate a policy on the tasks of the demonstrations, whatever it was trained on, unless transfer or `eval.tasks` names others."""
    made_with = tuple(record_of(config.align.data.root).get("tasks", ()))
    tasks = config.transfer or config.eval.tasks or made_with or checked_tasks(config.collect)
    evaluate(replace(config.eval, policy=str(policy), output=str(output), env=env_name(config), tasks=tasks, workers=1))


def env_name(config: CompareConfig | SweepConfig) -> str:
    """The environment that is evaluated in: the one that is named, else that of the demonstrations."""
    return config.eval.env or record_of(config.align.data.root).get("env", config.collect.env.name)


def record_of(root: str) -> dict:
    """How a data set was collected; nothing of one that is not there, or not from here."""
    path = Path(root) / "meta" / "concord.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def encoder_folder(config: CompareConfig, encoder: str, seed: int) -> Path:
    """Where an encoder that arms start from is."""
    return Path(config.output) / "encoders" / encoder / str(seed) / "clip"


def make_data(config: CompareConfig) -> None:
    """Collect the demonstrations, unless the data sets are there, and decode their pictures once."""
    known = checked_tasks(config.collect)
    roots = {cloned_root(config): config.transfer or known}
    roots[config.align.data.root] = tuple(task for task in known if task not in config.transfer)
    record = {}
    for root, tasks in roots.items():
        if not (Path(root) / "meta" / "info.json").is_file():
            scenes = config.collect.scenes if root == config.align.data.root else max(4, config.collect.scenes // 10)
            collect(replace(config.collect, output=root, env=env_of(config, tasks), scenes=scenes))
        episodes = read_episodes(root, config.align.data.camera)
        there = set(task_of_episode(episodes))
        if config.transfer and not there <= set(tasks):
            raise UserError(
                f"{root}: has episodes of {sorted(there - set(tasks))[0]}, which transfer keeps apart; choose another root"
            )
        cache = config.align.data.cache if root == config.align.data.root else None
        open_pictures(episodes, replace(config.align.data, cache=cache))
        record[root] = {"fingerprint": episodes.fingerprint, **counts(episodes)}
        record[root] |= {"collected with": (episodes.extra or {}).get("config")}
    own = record.pop(config.align.data.root)
    own |= {"root": config.align.data.root} | ({"cloned": record} if record else {})
    if config.play_scenes:
        own |= {"play": make_play(config, roots[config.align.data.root])}
    write_json(Path(config.output) / "data.json", own)


def make_play(config: CompareConfig, tasks: tuple[str, ...]) -> dict:
    """Collect play of some tasks, unless it is there, in scenes that no demonstration shows; returns what is recorded of it.

    Raises:
        UserError: the play that is there is of other tasks or of another number of scenes.
    """
    root, collected = play_root(config), config.collect
    shown = record_of(config.align.data.root).get("config", {"seed": collected.seed, "scenes": collected.scenes})
    if not (Path(root) / "meta" / "info.json").is_file():
        scenes = {"scenes": config.play_scenes, "seed": shown["seed"] + shown["scenes"]}
        collect(replace(collected, output=root, kind="play", env=env_of(config, tasks), **scenes))
    episodes = read_episodes(root, partial=True)
    other = sorted(set((episodes.extra or {}).get("tasks", ())) - set(tasks))
    if other:
        raise UserError(f"{root}: has play of {other[0]}, which transfer keeps apart; choose another root")
    made_with = (episodes.extra or {}).get("config")
    if made_with and made_with["scenes"] != config.play_scenes:
        raise UserError(
            f"{root}: has play of {made_with['scenes']} scenes, not play_scenes={config.play_scenes}; choose another root"
        )
    open_pictures(episodes, config.align.data)
    return {"root": root, "fingerprint": episodes.fingerprint, **counts(episodes), "collected with": made_with}


def env_of(config: CompareConfig, tasks: tuple[str, ...]) -> EnvConfig:
    """The environment to collect some of the tasks in."""
    env = config.collect.env
    return env if tasks == checked_tasks(config.collect) else replace(env, tasks=tasks)


def play_root(config: CompareConfig) -> str:
    """The data set of play."""
    return config.align.data.root + "_play"


def aligned_beside(config: CompareConfig) -> tuple[str, ...]:
    """What alignments see beside the demonstrations: play with the weight of its scenes."""
    weight = config.play_scenes / config.collect.scenes
    return (*config.align.more, *((f"{play_root(config)}={weight:g}",) if config.play_scenes else ()))


def cloned_root(config: CompareConfig) -> str:
    """The data set that policies clone: that of the encoders, or one of the tasks that these never see."""
    return config.align.data.root + ("_transfer" if config.transfer else "")


def counts(episodes) -> dict[str, int]:
    """How large a data set is."""
    return {"episodes": len(episodes.goal_id), "frames": len(episodes.frame_row), "goals": len(episodes.goals)}


def make_encoder(config: CompareConfig, encoder: str, seed: int) -> None:
    """Write an encoder with the aligned text tower, and its pooler beside it if it has one."""
    clip_folder = encoder_folder(config, encoder, seed)
    source, _, snapshot = encoder.partition("@")
    image_size = config.align.data.image_size
    aligned = Path(config.output) / "align" / "none" / str(seed)
    text_clip, tokenizer = load_clip(aligned / "clip")
    extra = {}
    if source in ALIGNED:
        run = Path(config.output) / "align" / source / str(seed)
        run = run / "snapshots" / snapshot if snapshot else run
        clip, _ = load_clip(run / "clip")
        extra = load_file(run / "alignment.safetensors")
    elif source == "cloned":
        policy = ConcordPolicy.from_pretrained(Path(config.output) / "policy" / "cloning" / str(seed) / "policy")
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
    if isinstance(clip, CLIPModel):
        clip = with_text_of(clip, text_clip)
    clip_folder.parent.mkdir(parents=True, exist_ok=True)
    if extra:
        save_file(extra, clip_folder.parent / "alignment.safetensors")
    partial_folder = clip_folder.with_name("clip.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    save_clip(partial_folder, clip, tokenizer)
    partial_folder.rename(clip_folder)


def measure(config: CompareConfig, encoder: str, seed: int) -> None:
    """The alignment measures of an encoder; what it has no weights for (a pooler, an action encoder) is untrained."""
    align = config.align
    torch.set_num_threads(align.threads)
    torch.manual_seed(seed)
    folder = encoder_folder(config, encoder, seed)
    clip, tokenizer = load_clip(folder)
    clip = resize_positions(clip, align.data.image_size)
    mixture = open_mixture(replace(align.data, episodes_per_task=None), aligned_beside(config), seed)
    episodes, own = mixture.episodes, mixture.train[0]
    limited = limit_per_task(episodes, own, align.data.episodes_per_task, seed)
    stats = make_stats(episodes, rows_of(episodes, np.concatenate([limited, *mixture.train[1:]])))  # the alignment's
    model = make_model(align, clip, episodes)
    extra = folder.parent / "alignment.safetensors"
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
    """Train the policy of one arm, number of demonstrations and seed; its token cache goes when nobody needs it."""
    folder = Path(config.output)
    if arm.source == "named":
        encoder, cache = str(named(config.encoders, "encoders")[name]), folder / "cache" / f"{name}-{seed}"
    else:
        encoder = str(encoder_folder(config, arm.encoder, seed))
        cache = folder / "cache" / f"{arm.encoder}-{seed}"
    tune = arm.tuned_part != "nothing"
    steps = config.policy.steps if not tune else config.scratch_steps if arm.source == "random" else config.tuned_steps
    broad = config.align.data.root
    more = (f"{broad}={config.transfer_weight}",) if config.transfer and config.transfer_weight else ()
    more += config.policy.more
    for root in (cloned_root(config), *(root_and_weight(text)[0] for text in more)):
        link_frames(config, root, cache)
    data = replace(config.align.data, root=cloned_root(config), episodes_per_task=count or None, cache=str(cache))
    optimizer = config.policy.optimizer
    if arm.after:
        optimizer = replace(optimizer, lr=optimizer.lr * config.tuned_lr_scale)
    train_policy(
        replace(
            config.policy,
            output=str(folder / "policy" / name / str(count) / str(seed)),
            encoder=encoder,
            start=str(folder / "policy" / arm.after / str(count) / str(seed) / "policy") if arm.after else None,
            data=data,
            more=more,
            optimizer=optimizer,
            aligned_pooler=config.policy.aligned_pooler and (Path(encoder).parent / "alignment.safetensors").is_file(),
            tune=tune,
            tuned_part=arm.tuned_part if tune else "all",
            pooler_lr_scale=config.policy.pooler_lr_scale if arm.source in OWN_POOLER and not arm.snapshot else 1.0,
            encoder_lr_scale=1.0 if arm.source == "random" else config.policy.encoder_lr_scale,
            auxiliary=config.policy.auxiliary if tune and arm.source != "random" else 0.0,
            hide=arm.hide,
            steps=steps,
            seed=seed,
            resume=True,
        )
    )
    arms = chosen_arms(config)
    siblings = [name] if arm.source == "named" else [other for other in arms if arms[other].encoder == arm.encoder]
    runs = [(other, number) for other in siblings for number in numbers_of(config, arms[other])]
    paths = [folder / "policy" / other / str(number) / str(seed) / "policy" for other, number in runs]
    if all(path.exists() for path in paths):
        shutil.rmtree(cache, ignore_errors=True)


def clone_everything(config: CompareConfig, seed: int) -> None:
    """Train an untrained tower by cloning on all demonstrations: the encoder that the cloning-pretrained arm freezes."""
    cache = Path(config.output) / "cache" / f"cloning-{seed}"
    link_frames(config, config.align.data.root, cache)
    train_policy(
        replace(
            config.policy,
            output=str(Path(config.output) / "policy" / "cloning" / str(seed)),
            encoder=str(encoder_folder(config, "random", seed)),
            data=replace(config.align.data, cache=str(cache)),
            aligned_pooler=False,
            auxiliary=0.0,
            tune=True,
            tuned_part="vision",
            encoder_lr_scale=1.0,
            steps=config.cloning_steps,
            seed=seed,
            resume=True,
        )
    )
    shutil.rmtree(cache, ignore_errors=True)


def link_frames(config: CompareConfig, root: str, cache: Path) -> None:
    """Let a cache folder of its own share the decoded pictures of a data set."""
    cache.mkdir(parents=True, exist_ok=True)
    data = config.align.data
    shared = Path(data.cache) if data.cache and root == data.root else Path(root) / ".concord"
    for store in shared.glob("frames_*.npy"):
        if not (cache / store.name).exists():
            try:
                os.link(store, cache / store.name)
            except FileExistsError:  # another process was first
                continue
            except OSError:  # another file system, or a file system without links
                with suppress(FileExistsError):
                    (cache / store.name).symlink_to(store.resolve())


def write_json(path: Path, content: dict) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, default=float) + "\n")
