"""Episodes of a collected data set recorded once more: whether the environment here is the one that it was collected in."""

from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np

from vla.config import CollectConfig
from vla.config_io import check, filled, merge_mapping
from vla.data.episodes import Episodes, spread
from vla.data.streaming import StreamedFrames
from vla.eval.golden import PICTURE_LIMIT
from vla.integrations.collect import checked_tasks, environment_of, plan_shards, recorded

REPLAYED = 3  # episodes
NUMBER_LIMIT = 1e-3  # of states and actions
ADVICE = (
    "the environment is not the one of this data: install the versions that meta/concord.json names, or collect anew"
)


@dataclass(frozen=True)
class Replay:
    """The largest differences of `count` episodes from what was recorded.

    `problem` is one line, empty if all is well; `reworded` is one about an instruction, which may have been changed on purpose.
    """

    count: int
    pictures: float = 0.0  # grey levels, mean over the picture that differs most
    numbers: float = 0.0  # of states and actions
    problem: str = ""
    reworded: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.count} episodes recorded again"
        return f"{self.count} episodes recorded again: pictures within {self.pictures:.2g} of 255, states and actions within {self.numbers:.2g}"


def replay(episodes: Episodes) -> Replay | None:
    """Record the first, the middle and the last episode again; None for data that is not, or not all of, what collection wrote.

    Raises:
        UserError: meta/concord.json holds no configuration of this version.
        Exception: whatever a simulator raises that cannot run here.
    """
    made_with = episodes.collected.get("config")
    if not isinstance(made_with, dict):
        return None
    config, where = CollectConfig(), str(episodes.root / "meta" / "concord.json")
    named = filled(made_with, asdict(config)) | {"output": str(episodes.root), "workers": 1}
    merge_mapping(config, named, where, "")
    check(config)
    jobs = [job for shard in plan_shards(config, checked_tasks(config)) for job in shard]
    if len(jobs) != len(episodes.episode_index):
        return None
    pictures = StreamedFrames(episodes, config.env.image_size)
    chosen = spread(np.arange(len(jobs)), REPLAYED).tolist()
    worst, numbers, reworded = 0.0, 0.0, ""
    with closing(environment_of(config)) as env:
        for position in chosen:
            again = recorded(config, env, *jobs[position])
            rows = np.arange(episodes.start[position], episodes.start[position + 1])
            told, now = (len(rows), bool(episodes.success[position])), (len(again.action), again.success)
            if told != now:
                return Replay(
                    len(chosen), problem=f"episode {position} had {in_words(*told)}, now {in_words(*now)}; {ADVICE}"
                )
            said = episodes.texts[episodes.text_id[position]]
            if said and said != again.instruction:
                reworded = f"episode {position} was told {said!r}, the environment says {again.instruction!r} now"
            stored = episodes.gather_frames(pictures, rows).astype(np.float32)
            worst = max(worst, float(np.abs(stored - again.frames).mean((1, 2, 3)).max()))
            for old, new in ((episodes.state[rows], again.state), (episodes.action[rows], again.action)):
                numbers = max(numbers, float(np.abs(old - new).max()))
    differ = worst > PICTURE_LIMIT or numbers > NUMBER_LIMIT
    what = f"they differ by {worst:.2g} of 255 in a picture and by {numbers:.2g} in states and actions; {ADVICE}"
    return Replay(len(chosen), worst, numbers, what if differ else "", reworded)


def in_words(timesteps: int, success: bool) -> str:
    """How an episode went."""
    return f"{timesteps} timesteps and {'success' if success else 'no success'}"
