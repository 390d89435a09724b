"""Episodes of a collected data set recorded once more: whether the environment here is the one that it was collected in."""

from dataclasses import asdict, dataclass

import numpy as np

from vla.config import CollectConfig
from vla.config_io import filled, merge_mapping
from vla.data.episodes import Episodes
from vla.data.streaming import StreamedFrames
from vla.integrations.collect import checked_tasks, environment_of, plan_shards, recorded

REPLAYED = 3  # episodes
PICTURE_LIMIT = 2.0  # grey levels of 255, mean over a picture
NUMBER_LIMIT = 1e-3  # of states and actions
ADVICE = (
    "; the environment is not the one of this data: install the versions that meta/concord.json names, or collect anew"
)


@dataclass(frozen=True)
class Replay:
    """The largest differences of `count` episodes from what was recorded; `problem` is one line, empty if all is well."""

    count: int
    pictures: float  # grey levels, mean over the picture that differs most
    numbers: float  # of states and actions
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.count} episodes recorded again: pictures within {self.pictures:.2g} of 255, states and actions within {self.numbers:.2g}"


def replay(episodes: Episodes) -> Replay | None:
    """Record the first, the middle and the last episode again; None for data that is not, or not all of, what collection wrote."""
    made_with = (episodes.extra or {}).get("config")
    if not made_with:
        return None
    config = CollectConfig()
    merge_mapping(
        config,
        filled(made_with, asdict(config)) | {"output": str(episodes.root), "workers": 1},
        str(episodes.root / "meta" / "concord.json"),
        "",
    )
    jobs = [job for shard in plan_shards(config, checked_tasks(config)) for job in shard]
    if len(jobs) != len(episodes.episode_index):
        return None
    env = environment_of(config)
    pictures = StreamedFrames(episodes, config.env.image_size)
    worst, numbers = 0.0, 0.0
    chosen = np.unique(np.linspace(0, len(jobs) - 1, REPLAYED).round().astype(int)).tolist()
    for position in chosen:
        again = recorded(config, env, *jobs[position])
        rows = np.arange(episodes.start[position], episodes.start[position + 1])
        if len(rows) != len(again.action):
            problem = f"episode {episodes.episode_index[position]} has {len(rows)} timesteps, recorded again {len(again.action)}"
            return Replay(len(chosen), np.nan, np.nan, problem + ADVICE)
        stored = episodes.gather_frames(pictures, rows).astype(np.float32)
        worst = max(worst, float(np.abs(stored - again.frames).mean((1, 2, 3)).max()))
        for old, new in ((episodes.state[rows], again.state), (episodes.action[rows], again.action)):
            numbers = max(numbers, float(np.abs(old - new).max()))
    same = worst <= PICTURE_LIMIT and numbers <= NUMBER_LIMIT
    return Replay(len(chosen), worst, numbers, "" if same else "recorded again, episodes come out otherwise" + ADVICE)
