"""The stage-one batch: P goals x K episodes x M frames, ragged, with several goals of one scene on purpose.

A batch is a pure function of (seed, step), so resuming needs only the step.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


class GoalSampler:
    """Draws rows such that every batch has positives (episodes of one goal) and hard negatives.

    Hard negatives are other goals of the same scene, and other times of the same episode at least `gap` apart. Episodes
    drawn as goals of one scene give their first frame too, which they share: one picture, many instructions. Those without an
    instruction do not: nothing would tell whose actions follow.
    An episode too short for M frames gives fewer; a goal with fewer than K episodes gives what it has, and where there
    are fewer than P goals, K is raised accordingly. Further episodes of a goal bring their scenes as the first ones do.
    Episodes without an instruction have the share of a batch that they have of all episodes, in place of as many goals.
    """

    def __init__(
        self,
        start: np.ndarray,  # (e + 1,) rows of episode i are start[i]:start[i + 1]
        goal_id: np.ndarray,  # (e,)
        scene_id: np.ndarray,  # (e,), -1 where unknown
        positions: np.ndarray,  # episodes to draw from
        *,
        goals: int,
        episodes: int,
        frames: int,
        gap: int,
        same_scene: float,
        seed: int,
    ) -> None:
        self.start, self.goal_id = start, goal_id
        self.frames, self.gap = frames, gap
        self.same_scene, self.seed = same_scene, seed
        by_goal: dict[int, list[int]] = defaultdict(list)
        by_scene: dict[int, list[int]] = defaultdict(list)
        for position in positions:
            by_goal[self._goal(int(position))].append(int(position))
            if scene_id[position] >= 0:
                by_scene[int(scene_id[position])].append(int(position))
        self.by_goal = {goal: np.array(members) for goal, members in by_goal.items()}
        untold = sum(goal < 0 for goal in self.by_goal)
        share = untold / len(positions)
        self.untold = min(untold, round(goals * episodes * share))
        self.goals = min(len(self.by_goal) - untold, round(goals * (1 - share)))
        if 0 < untold < len(self.by_goal):  # at least one of each kind
            self.untold, self.goals = max(1, self.untold), max(1, self.goals)
        # Where there are fewer goals than asked for, more episodes of each keep the batch as large.
        self.episodes = max(episodes, -(-(goals * episodes - self.untold) // max(1, self.goals)))
        self.positions = np.asarray(positions)
        self.shared_scenes = [np.array(m) for m in by_scene.values() if len({self._goal(p) for p in m}) > 1]
        self.scene_of = {int(p): members for members in self.shared_scenes for p in members}

    def rows(self, step: int) -> np.ndarray:
        """(b,) int64 rows of batch `step`, grouped by episode, in time order."""
        rng = np.random.default_rng([self.seed, step])
        scenes = iter(rng.permutation(len(self.shared_scenes)))
        singles = iter(rng.permutation(self.positions))
        left = {True: self.goals, False: self.untold}  # to be drawn, by whether there is an instruction
        drawn: dict[int, dict[int, bool]] = {}  # by goal: episodes in order, and whether they give their first frame
        others: dict[int, np.ndarray] = {}  # by goal: all episodes but its first one, in the order they are due in

        def draw(anchors: Sequence[int]) -> None:
            for anchor in map(int, anchors):
                goal = self._goal(anchor)
                if goal not in drawn:
                    if not left[goal >= 0]:
                        continue
                    left[goal >= 0] -= 1
                    members, drawn[goal] = self.by_goal[goal], {}
                    others[goal] = rng.permutation(members[members != anchor])
                if len(drawn[goal]) < self.episodes:
                    drawn[goal].setdefault(anchor, len(anchors) > 1 and goal >= 0)

        while any(left.values()):
            scene = next(scenes, None) if rng.random() < self.same_scene else None
            if scene is not None:
                draw(rng.permutation(self.shared_scenes[scene]))
            elif self._goal(single := int(next(singles))) not in drawn:
                draw([single])
        for goal, episodes in drawn.items():
            for other in others[goal].tolist():
                if len(episodes) < self.episodes and other not in episodes:
                    members = self.scene_of.get(other)
                    together = members is not None and rng.random() < self.same_scene
                    draw([other, *rng.permutation(members[members != other])] if together else [other])
        chosen = [pair for episodes in drawn.values() for pair in episodes.items()]
        return np.concatenate([self._frames(rng, position, first) for position, first in chosen])

    def _goal(self, position: int) -> int:
        """The goal of an episode; one without an instruction has one of its own."""
        goal = int(self.goal_id[position])
        return goal if goal >= 0 else -1 - position

    def _frames(self, rng: np.random.Generator, position: int, first: bool) -> np.ndarray:
        """Up to M sorted rows of one episode with random spacings of at least `gap`, from its first row on if asked for."""
        length = int(self.start[position + 1] - self.start[position])
        count = min(self.frames, 1 + (length - 1) // self.gap)
        slack = length - 1 - (count - 1) * self.gap
        spare = np.sort(rng.integers(0, slack + 1, size=count))
        if first:
            spare[0] = 0
        return self.start[position] + spare + self.gap * np.arange(count)


class MixedSampler:
    """Batches of several data sets: each one's sampler draws its share."""

    def __init__(self, samplers: Sequence[GoalSampler]) -> None:
        self.samplers = samplers
        self.seed = samplers[0].seed

    def rows(self, step: int) -> np.ndarray:
        """(b,) int64 rows of batch `step`, data set by data set."""
        return np.concatenate([sampler.rows(step) for sampler in self.samplers])


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split by weights, at least one each; the sizes differ from the exact ones by less than one, save for that."""
    ends = np.round(total * np.cumsum(weights) / np.sum(weights)).astype(int)
    return [max(1, int(n)) for n in np.diff([0, *ends])]
