"""Throughput and latency, with the peers measured in the same run on the same data."""

import itertools
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

from envs import env_class, make_env, make_expert
from vla.bench_alignment import alignment_speed
from vla.bench_evaluation import evaluation_speed
from vla.config import BatchConfig, BenchConfig, CollectConfig, DataConfig, TowerConfig
from vla.data.augmentation import augmenter
from vla.data.batches import training_batch
from vla.data.episodes import data_files, read_episodes, rows_of
from vla.data.frames import open_frames
from vla.files import write_json
from vla.locks import lock_folder
from vla.policies.concord import ConcordConfig, ConcordPolicy
from vla.training.align_setup import make_encoders, make_sampler, make_source
from vla.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, TASK_KEY, UserError
from vla.versions import versions

SMALL_SCENES = 600
TEXT = "push the red star to the left"
NOISE = 0.3  # std of the noise on the expert's executed velocity, as in collection


def bench(config: BenchConfig) -> Path:
    """Measure, print a table, write bench.json and return its path.

    Raises:
        UserError: the data set cannot be read, the output not written into, or a peer is not installed.
    """
    if find_spec("open_clip") is None:
        raise UserError("bench measures open_clip beside us, which is not installed: pip install open-clip-torch")
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    held = lock_folder(output)  # two would slow each other down
    root = Path(config.data) if config.data else small_data(output)
    read_episodes(root)  # names what is wrong with it
    for path in (*data_files(root), *root.glob("videos/**/*.mp4")):  # so that neither finds a cold page cache
        with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(file, nowhere)
    peer = lerobot_samples(root, config)
    ours = triplets(root, config)
    alignment = alignment_speed(root, len(os.sched_getaffinity(0)), config.alignment_steps, *config.alignment_rows)
    latency = policy_latency()
    simulator = tabletop_steps(config)
    with TemporaryDirectory(dir=output) as folder:
        policy = Path(config.policy) if config.policy else untrained_folder(Path(folder) / "policy")
        evaluation = evaluation_speed(policy, config.episodes, Path(folder))
    evaluation["policy"] = config.policy or "untrained"
    experts = {"plain": expert_episodes(config.expert_seeds, 0.0), "noisy": expert_episodes(config.expert_seeds, NOISE)}
    result = {
        "data": str(root),
        "threads": config.threads,
        "batch_size": config.batch_size,
        "horizon": config.horizon,
        "triplets_per_s": ours,
        "lerobot_samples_per_s": peer,
        "alignment": alignment,
        "policy_latency_ms": latency,
        "tabletop": simulator,
        "evaluation": evaluation,
        "expert": experts,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "versions": versions(),
    }
    path = output / "bench.json"
    write_json(path, result)
    print(f"  triplets with {config.horizon}-step chunks, augmented, warm frame store   {ours:10,.0f} /s")
    print(f"  LeRobotDataset with delta_timestamps, not augmented            {peer:10,.0f} /s")
    for line in alignment["in_words"]:
        print(f"  {line}")
    print(f"  one action, default tower, batch 1: p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms")
    print(
        f"  tabletop, 96 px, rendered every step {simulator['steps_per_s']:,.0f} steps/s, reset {simulator['reset_ms']:.1f} ms"
    )
    for name, run in evaluation["runs"].items():
        print(f"  {name:40} {run['episodes_per_minute']:8,.0f} episodes/min")
    for task, row in experts["plain"].items():
        noisy = experts["noisy"][task]
        print(
            f"  expert, {task:9} {row['successes']} of {row['n']} seeds, with noise {noisy['successes']} of {noisy['n']}"
        )
    print(f"{config.threads} thread(s); wrote {path}")
    held.close()
    return path


def small_data(output: Path) -> Path:
    """A tabletop data set to measure on."""
    from vla.integrations.collect import collect

    return collect(CollectConfig(output=str(output / "data"), scenes=SMALL_SCENES))


def triplets(root: Path, config: BenchConfig) -> float:
    """Triplets a second of stage one's loader: sampling, frames, shift and colour, chunk, normalisation."""
    episodes = read_episodes(root)
    frames = open_frames(episodes, 96)
    everything = np.arange(len(episodes.goal_id))
    source = make_source(episodes, frames, rows_of(episodes, everything), config.horizon)
    shape = BatchConfig()
    shape = replace(shape, goals=max(1, config.batch_size // (shape.episodes * shape.frames)))
    sampler = make_sampler(shape, 0, episodes, [everything], [1.0])
    counter = itertools.count()

    def one_batch() -> int:
        batch = training_batch(source, sampler, next(counter), augmenter=augmenter(DataConfig()))
        batch.frames.load(slice(0, len(batch.frames)))
        return len(batch.frame_of_row)

    return rate(one_batch, config.seconds)


def lerobot_samples(root: Path, config: BenchConfig) -> float:
    """Items a second of LeRobotDataset by random access, with the same action chunk."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    dataset = LeRobotDataset(
        f"local/{root.name}", root=root, delta_timestamps={ACTION_KEY: [t / fps for t in range(config.horizon)]}
    )
    rng = np.random.default_rng(0)

    def one_item() -> int:
        dataset[int(rng.integers(len(dataset)))]
        return 1

    return rate(one_item, config.seconds)


def untrained_policy() -> ConcordPolicy:
    """The default policy for the tabletop, with random weights."""
    clip, tokenizer = make_encoders(TowerConfig(), 96, (TEXT,))
    config = ConcordConfig(
        device="cpu",
        precision="bf16",
        input_features={
            IMAGE_KEY: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            STATE_KEY: PolicyFeature(FeatureType.STATE, (4,)),
        },
        output_features={ACTION_KEY: PolicyFeature(FeatureType.ACTION, (3,))},
    )
    return ConcordPolicy(config, clip=clip, tokenizer=tokenizer).eval()


def untrained_folder(folder: Path) -> Path:
    """That policy as a folder with processors; states and actions pass through them as they are."""
    policy = untrained_policy()
    policy.save_pretrained(folder)
    stats = {
        key: {"q01": -torch.ones(size), "q99": torch.ones(size), "mean": torch.zeros(size), "std": torch.ones(size)}
        for key, size in ((STATE_KEY, 4), (ACTION_KEY, 3))
    }
    for processor in make_pre_post_processors(policy.config, dataset_stats=stats):
        processor.save_pretrained(folder)
    return folder


def policy_latency() -> dict[str, float]:
    """Milliseconds from an observation to an action chunk at batch 1, weights untrained, text already encoded."""
    policy = untrained_policy()
    observation = {IMAGE_KEY: torch.rand(1, 3, 96, 96), STATE_KEY: torch.zeros(1, 4), TASK_KEY: [TEXT]}
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        policy.predict_action_chunk(observation)
        times.append(1000 * (time.perf_counter() - begun))
    p50, p95 = np.percentile(times[20:], [50, 95])
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}


def tabletop_steps(config: BenchConfig) -> dict[str, float]:
    """Steps a second with a 96 px picture each, and milliseconds of a reset, of one environment."""
    env = make_env("tabletop", image_size=96, end_on_success=False)
    seeds, rng = itertools.count(), np.random.default_rng(0)
    env.reset(seed=0)
    ended = False

    def one_step() -> int:
        nonlocal ended
        if ended:
            env.reset(seed=next(seeds))
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 3).astype(np.float32))
        ended = terminated or truncated
        return 1

    def one_reset() -> int:
        env.reset(seed=next(seeds))
        return 1

    return {
        "steps_per_s": rate(one_step, config.seconds),
        "reset_ms": 1000 / rate(one_reset, config.seconds),
    }


def expert_episodes(seeds: int, noise: float) -> dict[str, dict[str, float]]:
    """{task: {"successes", "n", "timesteps"}} of the tabletop's expert; `timesteps` is the mean to success."""
    rows = {}
    for task in env_class("tabletop").TASKS:
        env = make_env("tabletop", tasks=(task,), end_on_success=True)
        env.render_observations = False
        lengths = []
        for seed in range(seeds):
            _, info = env.reset(seed=seed)
            expert, rng = make_expert("tabletop", env), np.random.default_rng([seed, 5])
            truncated, timesteps = False, 0
            while not (truncated or info["is_success"]):
                action = expert.act()
                action[:-1] += noise * rng.standard_normal(len(action) - 1).astype(np.float32)
                _, _, _, truncated, info = env.step(np.clip(action, -1, 1))
                timesteps += 1
            if info["is_success"]:
                lengths.append(timesteps)
        rows[task] = {"successes": len(lengths), "n": seeds, "timesteps": round(float(np.mean(lengths)), 1)}
    return rows


def rate(work: Callable[[], int], seconds: float) -> float:
    """Items a second of `work`, after one call to warm up."""
    work()
    items, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        items += work()
    return items / (time.perf_counter() - started)
