"""Alignment measures on embeddings whose values are known, and which ones a real run reports."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla.data.episodes import read_episodes
from vla.data.frames import open_pictures
from vla.eval.alignment import (
    Embedded,
    class_probe,
    compared_texts,
    embed_rows,
    of_another_goal,
    probe_measures,
    retrieval_measures,
    spread_rows,
    zero_shot_measures,
)
from vla.eval.retrieval import alignment
from vla.models.clip import pixel_values, tokenize
from vla.training.align import train_align
from vla.training.align_setup import make_encoders, make_model, make_source
from vla.types import TripletBatch

ROWS = 12


def embedded(context_of_other_text: np.ndarray) -> Embedded:
    """Four goals of three rows each; contexts, actions and pictures are one-hot by row or goal."""
    rows, goals = np.arange(ROWS), np.arange(ROWS) // 3
    batch = TripletBatch(
        frames=np.zeros((ROWS, 1, 1, 3), np.uint8),
        frame_of_row=rows,
        state=np.zeros((ROWS, 2), np.float32),
        action_chunk=np.eye(ROWS, dtype=np.float32)[:, None],
        action_is_pad=np.zeros((ROWS, 1), bool),
        still=np.zeros(ROWS, bool),
        text_id=goals,
        goal_id=goals,
        scene_id=goals,
        episode_id=goals,
        timestep=rows % 3,
        progress=(rows % 3 + 1) / 3,
        pair_id=np.full(ROWS, -1),
        asked_in=np.empty((0, 2), np.int64),
    )
    each, by_goal = np.eye(ROWS), np.eye(4)[goals]
    return Embedded(
        batch=batch,
        vision=by_goal,
        language=np.eye(4),
        context=each,
        context_of_other_text=context_of_other_text,
        context_of_other_image=each,
        action=each,
        pooled_context=each,
        pooled_scene=each,
    )


def test_perfect_embeddings_find_everything_and_a_context_of_another_text_does_not():
    measures = retrieval_measures(embedded(np.eye(ROWS)[::-1]))
    for name in ("image_to_text_r1", "text_to_image_r1", "context_to_action_r1"):
        assert measures[name] == 1
        assert measures[f"{name}/chance"] < 0.5
    assert measures["context_to_action_r1_of_other_text"] == 0
    assert measures["context_to_action_r1_of_other_image"] == 1  # this one ignores its picture


def test_every_instruction_asked_of_a_shared_picture_is_right_for_it():
    everything = embedded(np.eye(ROWS))
    batch = replace(everything.batch, frame_of_row=np.arange(ROWS) // 6)  # two goals share each picture
    perfect = replace(everything, batch=batch, vision=np.repeat([[1.0, 0.9, 0, 0], [0, 0, 0.9, 1.0]], 6, axis=0))
    measures = retrieval_measures(perfect)
    assert measures["image_to_text_r1"] == measures["text_to_image_r1"] == 1
    assert measures["image_to_text_r1/chance"] == measures["text_to_image_r1/chance"] == 0.5


def test_ten_guesses_find_at_least_as_much_as_five():
    measures = retrieval_measures(embedded(np.eye(ROWS)))
    for name in ("image_to_text", "text_to_image", "context_to_action"):
        assert measures[f"{name}_r10"] == 1
        assert measures[f"{name}_r10/chance"] >= measures[f"{name}_r5/chance"]


def test_zero_shot_is_measured_in_other_words_of_the_same_goals_too():
    told = embedded(np.eye(ROWS))
    batch = replace(told.batch, scene_id=np.zeros(ROWS, int))
    goals = np.arange(4)
    episodes = SimpleNamespace(
        scene_id=np.repeat([0, 1], 4), goal_id=np.tile(goals, 2), text_id=np.concatenate([goals, goals + 4])
    )
    understood = zero_shot_measures(told.vision, np.eye(4)[np.tile(goals, 2)], batch, episodes)
    assert understood == {
        "zero_shot": 1.0,
        "zero_shot/chance": 0.25,
        "zero_shot_reworded": 1.0,
        "zero_shot_reworded/chance": 0.25,
        "zero_shot_reworded/own_words": 1.0,
    }
    mistaken = zero_shot_measures(told.vision, np.eye(4)[[*goals, 1, 2, 3, 0]], batch, episodes)
    assert (mistaken["zero_shot"], mistaken["zero_shot_reworded"]) == (1.0, 0.0)
    some_reworded = SimpleNamespace(
        scene_id=np.array([0, 0, 0, 0, 1]), goal_id=np.array([*goals, 0]), text_id=np.arange(5)
    )
    of_goal_0 = zero_shot_measures(told.vision, np.eye(4)[[0, 2, 1, 3, 0]], batch, some_reworded)
    assert (of_goal_0["zero_shot"], of_goal_0["zero_shot_reworded/own_words"]) == (0.5, 1.0)
    twice = SimpleNamespace(  # goal 0 is asked there in text 4 by an earlier episode than the one that is measured
        scene_id=np.zeros(5, int), goal_id=np.array([1, 0, 0, 2, 3]), text_id=np.array([1, 4, 0, 2, 3])
    )
    own = zero_shot_measures(told.vision, np.eye(4)[[*goals, 1]], batch, twice)
    assert (own["zero_shot_reworded/own_words"], own["zero_shot_reworded"]) == (1.0, 0.0)
    of_one_wording = SimpleNamespace(scene_id=np.zeros(4, int), goal_id=goals, text_id=goals)
    assert "zero_shot_reworded" not in zero_shot_measures(told.vision, np.eye(4), batch, of_one_wording)


def test_alignment_is_the_mean_squared_distance_of_partners():
    assert alignment(np.eye(3), np.eye(3)) == 0
    assert alignment(np.eye(4), np.eye(4)[[1, 0, 2, 3]]) == 1


def test_counterfactual_contexts_have_the_text_or_the_picture_of_another_episode_whatever_the_parts(
    align_config, monkeypatch
):
    monkeypatch.setattr("vla.eval.alignment.BATCH", 7)  # a last part of one row
    episodes = read_episodes(align_config.data.root)
    rows = np.arange(len(episodes.timestep))
    source = make_source(episodes, open_pictures(episodes, align_config.data), rows, align_config.horizon)
    clip, tokenizer = make_encoders(align_config.tower, align_config.data.image_size, episodes.texts)
    model = make_model(align_config, clip, episodes).eval()
    ids, mask = tokenize(tokenizer, episodes.texts)
    found = embed_rows(model, source, spread_rows(source, np.arange(5), 3), ids, mask)
    rows, batch = np.arange(15), found.batch
    other = of_another_goal(batch.goal_id)
    assert (batch.goal_id != batch.goal_id[other]).all()

    @torch.no_grad()
    def context(pictures: np.ndarray, texts: np.ndarray) -> np.ndarray:
        pixels = pixel_values(torch.from_numpy(batch.frames[batch.frame_of_row[pictures]]))
        embeds = model.texts(ids, mask)
        chunks = torch.from_numpy(batch.action_chunk), torch.from_numpy(batch.action_is_pad)
        text = torch.from_numpy(batch.text_id[texts])
        return model.rows(embeds, mask, pixels, torch.from_numpy(rows), text, *chunks, None).context.numpy()

    np.testing.assert_allclose(found.context, context(rows, rows), atol=1e-5)
    np.testing.assert_allclose(found.context_of_other_text, context(rows, other), atol=1e-5)
    np.testing.assert_allclose(found.context_of_other_image, context(other, rows), atol=1e-5)


def test_only_texts_that_are_compared_are_embedded(align_config):
    episodes = read_episodes(align_config.data.root)
    count = len(episodes.texts)
    episodes = replace(episodes, texts=(*episodes.texts, "a caption", "another one"))
    rows = np.arange(len(episodes.timestep))
    source = make_source(episodes, open_pictures(episodes, align_config.data), rows, align_config.horizon)
    clip, tokenizer = make_encoders(align_config.tower, align_config.data.image_size, episodes.texts)
    model, tokens = make_model(align_config, clip, episodes).eval(), tokenize(tokenizer, episodes.texts)
    found = embed_rows(model, source, spread_rows(source, np.arange(24), 3), *tokens)
    with torch.no_grad():
        expected = model.texts(*tokens).language.numpy()
    np.testing.assert_allclose(found.language[:count], expected[:count], atol=1e-5)
    assert not found.language[count:].any()
    few = source.gather(episodes.start[:1])
    (scene,) = episodes.scene_id[:1]
    goals = episodes.goal_id[episodes.scene_id == scene]
    asking = np.unique(episodes.text_id[np.isin(episodes.goal_id, goals)])
    assert compared_texts(few, episodes).tolist() == asking.tolist()


def test_a_target_that_is_unknown_in_some_rows_is_read_in_the_others(align_config):
    episodes = read_episodes(align_config.data.root)
    target = episodes.target.copy()
    target[episodes.start[0]] = np.nan
    episodes, rows = replace(episodes, target=target), np.arange(len(episodes.timestep))
    source = make_source(episodes, open_pictures(episodes, align_config.data), rows, align_config.horizon)
    clip, tokenizer = make_encoders(align_config.tower, align_config.data.image_size, episodes.texts)
    model = make_model(align_config, clip, episodes).eval()
    found = embed_rows(model, source, spread_rows(source, np.arange(5), 3), *tokenize(tokenizer, episodes.texts))
    assert np.isfinite(probe_measures(found, found, source)["target_probe_r2"])


def test_the_other_row_is_of_another_goal_where_there_is_one():
    assert of_another_goal(np.array([0, 1, 0, 1, 0, 1])).tolist() == [3, 4, 5, 0, 1, 2]
    assert of_another_goal(np.array([0, 1, 0, 1])).tolist() == [3, 0, 1, 2]  # half of all rows away is the same goal
    assert of_another_goal(np.array([5, 5])).tolist() == [1, 0]


def test_the_goal_is_read_from_pictures_that_tell_it():
    features, labels = np.eye(8), np.arange(8) % 4
    found = class_probe("goal_probe", features, labels, features, labels)
    assert found == {"goal_probe": 1.0, "goal_probe/chance": pytest.approx(0.25)}
    assert class_probe("goal_probe", features, np.zeros(8), features, labels) == {}


def test_a_run_reports_every_measure(align_config, tmp_path):
    clip = train_align(replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run")))
    metrics = json.loads((clip.parent / "alignment.json").read_text())["metrics"]
    expected = {
        "alignment",
        "alignment_context_action",
        "modality_gap",
        "rank_me_context",
        "uniformity_vision",
        "uniformity_context_within_goal",
    }
    expected |= {"time_to_go_probe_r2", "state_probe_r2", "target_probe_r2", "zero_shot", "zero_shot_reworded"}
    expected |= {f"context_to_action_r{k}_of_other_{other}" for k in (1, 5, 10) for other in ("text", "image")}
    assert expected <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
