"""The stage-one sampler on small tables of episodes."""

import numpy as np

from vla.data.sampler import GoalSampler

LENGTHS = np.array([20, 20, 5, 20, 20, 30])
START = np.concatenate([[0], LENGTHS.cumsum()])
GOALS = np.array([0, 1, 0, 2, 3, 3])
SCENES = np.array([7, 7, 8, 8, -1, -1])


def sampler(**changes):
    settings = {"goals": 3, "episodes": 2, "frames": 4, "gap": 3, "same_scene": 0.5, "seed": 0}
    return GoalSampler(START, GOALS, SCENES, np.arange(6), **(settings | changes))


def episodes_of(rows):
    return np.searchsorted(START, rows, side="right") - 1


def test_frames_of_one_episode_are_at_least_the_gap_apart():
    for step in range(50):
        rows = sampler().rows(step)
        same = np.diff(episodes_of(rows)) == 0
        assert np.diff(rows)[same].min() >= 3


def test_a_short_episode_gives_fewer_frames_and_stays_inside_itself():
    for step in range(50):
        rows = sampler().rows(step)
        assert (episodes_of(rows) == 2).sum() <= 2
        assert rows.min() >= 0
        assert rows.max() < START[-1]


def test_a_batch_has_exactly_the_goals_asked_for():
    for step in range(50):
        assert len(np.unique(GOALS[episodes_of(sampler().rows(step))])) == 3


def test_more_goals_than_there_are_gives_all_of_them():
    assert set(GOALS[episodes_of(sampler(goals=99).rows(0))]) == {0, 1, 2, 3}


def test_few_goals_bring_more_episodes_so_that_the_batch_stays_large():
    goals = np.zeros(30, int)
    start = np.arange(0, 31 * 20, 20)
    rows = GoalSampler(
        start, goals, goals - 1, np.arange(30), goals=24, episodes=1, frames=2, gap=3, same_scene=0.5, seed=0
    ).rows(0)
    assert len(rows) == 48


def test_same_scene_one_ends_although_some_goals_share_no_scene():
    assert set(GOALS[episodes_of(sampler(same_scene=1.0, goals=4).rows(0))]) == {0, 1, 2, 3}


def test_same_scene_one_always_brings_two_goals_of_one_scene():
    for step in range(20):
        drawn = np.unique(episodes_of(sampler(same_scene=1.0, goals=2, episodes=1).rows(step)))
        assert len(set(SCENES[drawn])) == 1


def test_goals_of_one_scene_bring_the_frame_they_share():
    for step in range(20):
        rows = sampler(same_scene=1.0, goals=2, episodes=1).rows(step)
        assert {int(START[e]) for e in episodes_of(rows)} <= set(rows.tolist())


def test_episodes_of_one_scene_without_an_instruction_do_not_all_bring_the_frame_they_share():
    """Nothing would say whose actions follow."""
    untold = np.array([-1, -1, -1, -1])
    start = np.arange(0, 5 * 20, 20)
    settings = {"goals": 4, "episodes": 1, "frames": 2, "gap": 3, "same_scene": 1.0, "seed": 0}
    drawn = GoalSampler(start, untold, np.zeros(4, int), np.arange(4), **settings)
    assert any(len(set(start[:4].tolist()) & set(drawn.rows(step).tolist())) < 2 for step in range(5))


def test_a_batch_depends_on_seed_and_step_alone():
    one = sampler()
    one.rows(0)
    np.testing.assert_array_equal(one.rows(5), sampler().rows(5))
    assert not np.array_equal(sampler(seed=1).rows(5)[:8], sampler().rows(5)[:8])


def test_only_the_given_episodes_are_drawn():
    only = GoalSampler(
        START, GOALS, SCENES, np.array([1, 3]), goals=4, episodes=2, frames=2, gap=3, same_scene=0.5, seed=0
    )
    assert set(episodes_of(np.concatenate([only.rows(s) for s in range(20)]))) == {1, 3}


def test_few_goals_bring_whole_scenes_until_each_has_its_episodes():
    """Ten goals in each of fifty scenes: rows are as hard to tell apart by the picture as those of many goals."""
    goals, scenes, start = np.tile(np.arange(10), 50), np.repeat(np.arange(50), 10), np.arange(0, 501 * 20, 20)
    settings = {"goals": 96, "episodes": 1, "frames": 2, "gap": 3, "same_scene": 0.8, "seed": 0}
    few = GoalSampler(start, goals, scenes, np.arange(500), **settings)
    for step in range(5):
        rows = few.rows(step)
        drawn = np.unique(np.searchsorted(start, rows, side="right") - 1)
        assert np.bincount(goals[drawn]).tolist() == [10] * 10
        together = np.bincount(scenes[drawn])[scenes[drawn]] > 1
        assert together.mean() > 0.9
        assert np.isin(start[drawn], rows).mean() > 0.9  # they bring the picture that they share


def test_a_seed_draws_the_batches_that_it_always_drew():
    """Kept results can be made again."""
    rows = sampler(goals=4, episodes=1).rows(3)
    assert rows.tolist() == [21, 24, 32, 36, 0, 5, 8, 18, 48, 51, 55, 61, 91, 94, 98, 106]


def test_episodes_without_an_instruction_have_their_share_of_a_batch_and_no_more():
    """Five goals of a hundred demonstrations each, and a hundred episodes of play: a sixth of the batch is play."""
    goals = np.concatenate([np.repeat(np.arange(5), 100), np.full(100, -1)])
    start = np.arange(0, 601 * 20, 20)
    settings = {"goals": 96, "episodes": 1, "frames": 2, "gap": 3, "same_scene": 0.8, "seed": 0}
    mixed = GoalSampler(start, goals, np.full(600, -1), np.arange(600), **settings)
    for step in range(5):
        drawn = np.unique(np.searchsorted(start, mixed.rows(step), side="right") - 1)
        assert np.bincount(goals[drawn] + 1).tolist() == [16] * 6


def test_no_episode_of_a_goal_is_in_every_batch():
    settings = {"goals": 8, "episodes": 1, "frames": 1, "gap": 3, "same_scene": 0.0, "seed": 0}
    start, every = np.arange(0, 31 * 20, 20), np.arange(30)
    drawn = GoalSampler(start, np.zeros(30, int), np.full(30, -1), every, **settings)
    counts = np.bincount(np.concatenate([drawn.rows(step) for step in range(60)]) // 20, minlength=30)
    assert counts.max() < 40  # 16 on average
