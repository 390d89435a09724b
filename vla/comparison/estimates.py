"""How long the jobs of a comparison or a sweep take, from the tower's speed on this machine."""

import math
import time
from dataclasses import replace

import torch

from envs import env_class
from vla.comparison.chosen import chosen_arms, steps_of
from vla.comparison.data import env_name
from vla.comparison.jobs import Job
from vla.config import CompareConfig, SweepConfig, TowerConfig
from vla.config_io import inside
from vla.eval.evaluate import tasks_and_splits
from vla.integrations.collect import checked_tasks
from vla.models.clip import patch_tokens
from vla.policies.loading import check_device
from vla.precision import multiplies_bf16
from vla.training.align_setup import make_encoders

# Timesteps of an episode that is evaluated, s to simulate and draw one look, s to collect an episode.
TYPICAL = {"tabletop": (60, 4e-3, 0.04), "metaworld": (250, 25e-3, 0.6)}
MEASURED: dict[str, tuple[float, float]] = {}
DEMONSTRATED = 1 / 3  # of those timesteps, in a demonstration


def stage_seconds(config: CompareConfig | SweepConfig) -> dict[str, float]:
    """Seconds of each stage with a frozen encoder, by the first word of the job's name; "tuned step" is of a fine-tuned one."""
    forward, training = tower_speed(config, "cuda" if torch.cuda.is_available() else "cpu")
    check_device("config error: eval.device:", config.eval.device)
    acting, _ = tower_speed(config, config.eval.device)
    batch, policy = config.align.batch, config.policy
    env = env_name(config)
    with inside("eval."):
        _, levels = tasks_and_splits(replace(config.eval, env=env), {})
    pictures = 0.65 * batch.goals * batch.episodes * batch.frames  # goals of a scene share their first picture
    timesteps, look, episode = TYPICAL.get(env, TYPICAL["metaworld"])
    evaluated = config.eval.episodes + len(levels) * config.eval.split_episodes + 3 * config.eval.grounding_episodes
    looks = timesteps / policy.head.n_action_steps
    several = env_class(config.collect.env.name).SEVERAL_GOALS
    demos = config.collect.scenes * (config.collect.goals_per_scene if several else len(checked_tasks(config.collect)))
    seen = policy.steps * policy.batch_size
    cache = demos * timesteps * DEMONSTRATED * policy.cached_shifts
    encoded = cache * (1 - math.exp(-seen / cache)) if cache else seen  # the cache has what the steps draw
    return {
        "data": episode * demos,
        "align": config.align.steps * pictures * training * 1.5,  # the words, the losses and the update
        "policy": seen * 8e-4 + encoded * forward,
        "tuned step": policy.batch_size * training * 1.3,
        "eval": evaluated * looks * (acting + look),
    }


def with_estimates(config: CompareConfig, jobs: list[Job]) -> list[Job]:
    """The jobs of a comparison with the seconds they will take."""
    stages, arms = stage_seconds(config), chosen_arms(config)
    stages["data"] *= 1 + config.play_scenes / config.collect.scenes

    def seconds(job: Job) -> float:
        stage, _, rest = job.name.partition("-")
        if stage == "cloning":
            return config.cloning_steps * stages["tuned step"]
        if stage == "policy" and (arm := arms[rest.rsplit("-", 2)[0]]).tuned_part != "nothing":
            return steps_of(config, arm) * stages["tuned step"]
        return stages.get(stage, 10.0)

    return [replace(job, seconds=seconds(job)) for job in jobs]


def tower_speed(config: CompareConfig | SweepConfig, device: str) -> tuple[float, float]:
    """Seconds a picture of the vision tower on a device, forward alone and with its gradients; measured once for each tower."""
    tower, size = replace(config.align.tower, vocabulary=None, lexicon=None), config.align.data.image_size
    key = repr((tower, size, config.align.precision, device))
    if key not in MEASURED:
        MEASURED[key] = measured_speed(tower, size, config.align.precision, torch.device(device))
    return MEASURED[key]


def measured_speed(tower: TowerConfig, size: int, precision: str, device: torch.device) -> tuple[float, float]:
    """What `tower_speed` says, measured."""
    clip = make_encoders(tower, size, ("a text",))[0].to(device)
    pictures = torch.zeros(32, 3, size, size, device=device)
    times: list[float] = []

    def step(gradients: bool) -> None:
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and multiplies_bf16(device))
        with torch.set_grad_enabled(gradients), bf16:
            total = patch_tokens(clip, pictures).float().sum()
        if gradients:
            total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for gradients in (False, True):
        step(gradients)
        started = time.perf_counter()
        step(gradients)
        times.append((time.perf_counter() - started) / len(pictures))
    return times[0], times[1]
