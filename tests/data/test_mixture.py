"""Several data sets as one, some without words or actions."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import debug, logged, without
from vla.config import CollectConfig, DataConfig
from vla.data.batches import TripletSource
from vla.data.episodes import read_episodes, rows_of
from vla.data.frames import open_frames
from vla.data.mixture import Stores, joined, open_mixture
from vla.data.sampler import shares
from vla.integrations.collect import collect
from vla.models.clip import tokenize
from vla.training.align import train_align
from vla.training.align_setup import make_encoders, make_model, make_sampler, make_stats
from vla.training.align_step import forward_backward
from vla.training.device_batch import on_device
from vla.types import ACTION_KEY, STATE_KEY, UserError


@pytest.fixture(scope="module")
def captions(data_root, tmp_path_factory):
    """Pictures and texts alone."""
    return without(data_root, tmp_path_factory.mktemp("captions") / "set", ACTION_KEY, STATE_KEY)


@pytest.fixture(scope="module")
def play(data_root, tmp_path_factory):
    """Pictures and actions alone."""
    return without(data_root, tmp_path_factory.mktemp("play") / "set", words=False)


def test_stores_are_indexed_like_one_array():
    stores = [np.arange(3 * 12, dtype=np.uint8).reshape(3, 2, 2, 3), 100 + np.zeros((2, 2, 2, 3), np.uint8)]
    whole = np.concatenate(stores)
    several = Stores(stores)
    assert len(several) == 5
    rows = np.array([4, 0, 2, 3, 0])
    np.testing.assert_array_equal(several[rows], whole[rows])


def test_goals_of_several_data_sets_are_told_by_name_and_scenes_are_apart(data_root):
    own = read_episodes(data_root)
    both, count = joined([own, own]), len(own.goal_id)
    np.testing.assert_array_equal(both.goal_id[:count], both.goal_id[count:])
    assert [both.goals[g] for g in both.goal_id[:count]] == [own.goals[g] for g in own.goal_id]
    assert [both.texts[t] for t in both.text_id[count:]] == [own.texts[t] for t in own.text_id]
    assert not set(both.scene_id[:count]) & set(both.scene_id[count:])
    rows = len(own.frame_row)
    np.testing.assert_array_equal(both.action[rows:], own.action)
    np.testing.assert_array_equal(both.frame_row[rows:], own.frame_row + rows)
    np.testing.assert_array_equal(np.diff(both.start), np.tile(own.length(), 2))


def test_one_instruction_spelt_in_two_ways_is_one_goal_of_two_data_sets(data_root):
    own = read_episodes(data_root)
    loud = replace(own, texts=tuple(text.upper() for text in own.texts), goals=tuple(g.upper() for g in own.goals))
    both, count = joined([own, loud]), len(own.goal_id)
    np.testing.assert_array_equal(both.goal_id[:count], both.goal_id[count:])
    assert set(both.goals) == set(own.goals)


def test_numbered_goals_mean_nothing_outside_their_data_set(data_root, tmp_path):
    own = read_episodes(data_root)
    numbers, texts = tuple(str(i) for i in range(len(own.goals))), tuple(f"{text} please" for text in own.texts)
    numbered = replace(own, goals=numbers, texts=texts, collected={}, root=tmp_path)
    parts = joined([own, numbered, replace(numbered, texts=tuple(f"now {text}" for text in own.texts))])
    first, second, third = (set(goals) for goals in np.split(parts.goal_id, 3))
    assert not first & second | second & third | first & third
    moved = replace(numbered, root=tmp_path / "elsewhere")
    assert joined([own, moved]).goals == joined([own, numbered]).goals


@pytest.mark.parametrize("captions_first", [False, True])
def test_a_caption_asks_for_the_goal_that_another_data_set_names(data_root, captions_first):
    own = read_episodes(data_root)
    texts = tuple(text.upper() for text in own.texts)
    captions = replace(own, texts=texts, goals=texts, goal_id=own.text_id, collected={})
    both = joined([captions, own] if captions_first else [own, captions])
    count = len(own.goal_id)
    np.testing.assert_array_equal(both.goal_id[:count], both.goal_id[count:])
    assert both.goals == tuple(sorted(own.goals))


def test_a_text_that_asks_for_several_goals_elsewhere_tells_itself(data_root):
    own = read_episodes(data_root)
    vague = replace(own, texts=("do it",), text_id=np.zeros_like(own.text_id))
    captions = replace(vague, goals=("do it",), goal_id=np.zeros_like(own.goal_id), collected={})
    assert len(np.unique(own.goal_id)) > 1
    both, count = joined([vague, captions]), len(own.goal_id)
    assert not set(both.goal_id[:count]) & set(both.goal_id[count:])


def test_a_data_set_in_which_a_text_is_vague_keeps_no_others_apart(data_root, tmp_path):
    own = read_episodes(data_root)
    numbers = {"goals": tuple(str(i) for i in range(len(own.goals))), "collected": {}}
    clear = replace(
        own, texts=("do it",), text_id=np.zeros_like(own.text_id), goal_id=np.zeros_like(own.goal_id), **numbers
    )
    vague = replace(clear, goal_id=own.goal_id, root=tmp_path)
    captions = replace(clear, goals=("do it",))
    for parts in ([clear, captions, vague], [clear, vague, captions]):
        goals = {id(part): set(of) for part, of in zip(parts, np.split(joined(parts).goal_id, 3), strict=True)}
        assert goals[id(clear)] == goals[id(captions)]
        assert not goals[id(clear)] & goals[id(vague)]


def test_a_data_set_that_names_no_goal_has_none(data_root):
    own = read_episodes(data_root)
    silent = replace(own, goal_id=np.full_like(own.goal_id, -1), goals=(), collected={})
    assert (joined([own, silent]).goal_id[len(own.goal_id) :] == -1).all()


def test_a_data_set_beside_itself_is_refused(data_root):
    with pytest.raises(UserError, match=r"more: .* is data\.root itself"):
        open_mixture(DataConfig(root=str(data_root), image_size=48, holdout=0.3), [f"{data_root}/../debug=2"], 0)


def test_a_damaged_further_data_set_is_named(data_root, tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{")
    with pytest.raises(UserError, match=r"info\.json: damaged"):
        open_mixture(DataConfig(root=str(data_root), image_size=48, holdout=0.3), [str(tmp_path)], 0)


def test_data_sets_that_do_not_fit_are_refused(data_root):
    own = read_episodes(data_root)
    with pytest.raises(UserError, match="action has 2 dimensions"):
        joined([own, replace(own, action=own.action[:, :2])])
    with pytest.raises(UserError, match="recorded at 99 Hz"):
        joined([own, replace(own, fps=99)])


@pytest.mark.parametrize("more", ["=2", "somewhere=many", "somewhere=0", "somewhere=-1", "somewhere=nan"])
def test_a_weight_that_is_none_is_refused(data_root, more):
    with pytest.raises(UserError, match="with a positive weight"):
        open_mixture(DataConfig(root=str(data_root), image_size=48, holdout=0.3), [more], 0)


def test_a_batch_is_shared_by_weight():
    assert shares(96, [1.0, 0.5, 0.5]) == [48, 24, 24]
    assert shares(10, [1.0, 1.0, 1.0]) == [3, 4, 3]
    assert shares(4, [1.0, 0.001]) == [4, 1]


def test_what_a_data_set_lacks_is_unknown(data_root, captions, play):
    mixture = open_mixture(DataConfig(root=str(data_root), image_size=48, holdout=0.3), [str(captions), f"{play}=2"], 0)
    own, pictures, unspoken = mixture.train
    episodes, weights = mixture.episodes, mixture.weights
    assert weights == [1.0, 1.0, 2.0]
    acted = np.isfinite(episodes.action).all(1)[episodes.start[:-1]]
    assert [acted[part].mean() for part in (own, pictures, unspoken)] == [1, 0, 1]
    assert (episodes.goal_id[np.concatenate([own, pictures])] >= 0).all()
    assert (episodes.goal_id[unspoken] == -1).all()
    assert set(mixture.validation) < set(range(pictures[0]))
    store = open_frames(read_episodes(play), 48)
    row = episodes.start[unspoken[3]]
    np.testing.assert_array_equal(
        mixture.frames[episodes.frame_row[[row]]][0], store[row - episodes.start[unspoken[0]]]
    )


def test_batches_hold_rows_of_every_data_set(align_config, captions, play):
    mixture = open_mixture(align_config.data, [str(captions), f"{play}=2"], 0)
    batch = replace(align_config.batch, goals=12, episodes=1)
    rows = make_sampler(batch, 0, mixture.episodes, mixture.train, mixture.weights).rows(3)
    ends = [members[-1] + 1 for members in mixture.train]
    part = np.searchsorted(ends, mixture.episodes.episode_of_row[rows], side="right")
    drawn = [len(np.unique(mixture.episodes.episode_of_row[rows[part == number]])) for number in range(3)]
    assert drawn == [3, 3, 6]


def test_actions_are_needed_of_the_first_data_set(captions):
    with pytest.raises(UserError, match=r"no feature 'observation\.state' \(and 1 more"):
        open_mixture(DataConfig(root=str(captions), image_size=48), [], 0)


def test_stage_one_aligns_on_all_of_them(align_config, captions, play, tmp_path):
    config = replace(align_config, more=(str(captions), str(play)), output=str(tmp_path / "run"))
    train_align(config)
    lines = logged(tmp_path / "run")
    for term in ("context_action", "word_patch", "vision_language", "state"):
        assert np.isfinite(lines[0][f"{term}/loss"]), term
    record = json.loads((tmp_path / "run" / "alignment.json").read_text())
    assert record["data"]["episodes"] == 3 * 24


def test_collected_play_feeds_only_the_terms_that_need_no_instruction(align_config, tmp_path):
    played = collect(debug(CollectConfig, "collect", output=str(tmp_path / "play"), kind="play", scenes=4))
    mixture = open_mixture(align_config.data, [str(played)], 0)
    episodes, config = mixture.episodes, align_config
    loss = replace(config.loss, transition_action=1.0, transition_language=1.0)
    clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts)
    model = make_model(replace(config, loss=loss), clip, episodes)
    stats = make_stats(episodes, rows_of(episodes, np.concatenate(mixture.train)))
    rows = rows_of(episodes, mixture.train[1])[::7]
    batch = TripletSource(episodes, mixture.frames, stats, config.horizon).gather(rows)
    batch = on_device(batch, *tokenize(tokenizer, episodes.texts), torch.device("cpu"))
    _, terms, _ = forward_backward(model, batch, torch.zeros(3), loss, gap=3, chunk=0, autocast=nullcontext)
    assert set(terms) == {"context_action", "state", "transition_action"}
