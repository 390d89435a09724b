"""Triplets on a real data set: what rows share, and that sharing changes no pixel."""

from dataclasses import replace

import numpy as np
import pytest

from vla.data.augmentation import Augmenter
from vla.data.batches import TripletSource, training_batch
from vla.data.episodes import read_episodes
from vla.data.frames import open_frames
from vla.data.normalization import Normalizers, compute_norm_stats
from vla.data.sampler import GoalSampler


@pytest.fixture(scope="module")
def source(data_root):
    episodes = read_episodes(data_root)
    frames = open_frames(episodes, 48, workers=1)
    stats = Normalizers(compute_norm_stats(episodes.action), compute_norm_stats(episodes.state))
    return TripletSource(episodes, frames, stats, horizon=4)


def test_every_row_shows_its_own_picture(source):
    rows = np.arange(len(source.episodes.state))
    batch = source.gather(rows)
    np.testing.assert_array_equal(batch.frames[batch.frame_of_row], source.episodes.gather_frames(source.frames, rows))


def test_time_spent_on_pictures_counts_those_that_were_not_loaded_ahead(source):
    frames = source.gather(np.arange(20)).frames
    frames.load(slice(0, 5))
    frames[slice(0, 5)]
    assert frames.seconds == 0
    frames[slice(5, 10)]
    assert frames.seconds > 0


def test_a_row_is_still_if_nothing_moves_through_its_chunk(source):
    episodes = source.episodes
    first, end = episodes.start[0], episodes.start[1]
    assert end - first > 6
    state = episodes.state.copy()
    state[first:end, 0] = np.arange(end - first)  # moves at every timestep,
    state[end - 5 : end, 0] = state[end - 5, 0]  # then waits for four
    action = np.zeros_like(episodes.action)
    turning = np.zeros_like(action)
    turning[:, 0] = np.arange(len(action)) % 5
    rows = np.arange(first, end)

    def still(state: np.ndarray, action: np.ndarray) -> list[int]:
        stats = Normalizers(compute_norm_stats(action), compute_norm_stats(np.nan_to_num(state)))
        waiting = TripletSource(replace(episodes, state=state, action=action), source.frames, stats, horizon=2)
        return np.flatnonzero(waiting.gather(rows).still).tolist()

    assert still(state, action) == [len(rows) - 5, len(rows) - 4, len(rows) - 3, len(rows) - 2]
    assert still(np.full_like(state, np.nan), action) == []
    assert still(state[:, :0], action) == []
    assert still(np.zeros_like(state), turning) == []  # states that say nothing


def test_goals_of_one_scene_share_the_picture_they_start_from(source):
    starts = source.episodes.start[:-1]
    batch = source.gather(starts)
    scenes = np.unique(source.episodes.scene_id)
    assert len(batch.frames) == len(scenes) < len(starts)


def test_a_batch_knows_what_its_scenes_are_asked_in_other_episodes(source):
    episodes = source.episodes
    scene = int(episodes.scene_id[0])
    (members,) = np.nonzero(episodes.scene_id == scene)
    asked = {(scene, int(goal)) for goal in episodes.goal_id[members]}
    assert len(asked) > 1
    assert {tuple(pair) for pair in source.gather(episodes.start[:1]).asked_in.tolist()} == asked


def test_shuffled_instructions_are_shuffled_in_what_scenes_are_asked_too(source):
    episodes = source.episodes
    shuffled = np.roll(np.arange(len(episodes.goal_id)), 1)
    batch = source.gather(episodes.start[:-1], shuffled)
    expected = zip(episodes.scene_id.tolist(), episodes.goal_id[shuffled].tolist(), strict=True)
    assert {tuple(pair) for pair in batch.asked_in.tolist()} == {pair for pair in expected if min(pair) >= 0}
    assert batch.goal_id.tolist() == episodes.goal_id[shuffled][batch.episode_id].tolist()


def test_progress_is_the_share_of_the_episode_that_has_passed(source):
    first, stop = source.episodes.start[1:3]
    expected = np.arange(1, stop - first + 1) / (stop - first)
    np.testing.assert_allclose(source.gather(np.arange(first, stop)).progress, expected, rtol=1e-6)


def test_training_pictures_are_augmented_anew_in_every_step(source):
    episodes, shifts = source.episodes, []
    settings = {"goals": 4, "episodes": 1, "frames": 2, "gap": 3, "same_scene": 0.5, "seed": 0}
    every = np.arange(len(episodes.goal_id))
    sampler = GoalSampler(episodes.start, episodes.goal_id, episodes.scene_id, every, **settings)
    for step in (0, 1):
        changes = {"augmenter": Augmenter(4, 0.2), "text_of_episode": None, "shuffle_actions": False}
        batch = training_batch(source, sampler, step, **changes)
        assert (batch.frames[:] != source.gather(sampler.rows(step)).frames[:]).any()
        shifts.append(batch.frames.augmentation.shifts[:4])
    assert not np.array_equal(*shifts)


def test_units_of_states_and_actions_do_not_matter(source):
    episodes, rows = source.episodes, np.arange(0, len(source.episodes.state), 7)
    other = replace(episodes, action=3 * episodes.action + 1, state=3 * episodes.state + 1)
    stats = Normalizers(compute_norm_stats(other.action), compute_norm_stats(other.state))
    plain, changed = source.gather(rows), TripletSource(other, source.frames, stats, horizon=4).gather(rows)
    np.testing.assert_allclose(changed.action_chunk, plain.action_chunk, atol=1e-4)
    np.testing.assert_allclose(changed.state, plain.state, atol=1e-4)
