"""Alignment measures on embeddings whose values are known, and which ones a real run reports."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vla.eval.alignment import Embedded, goal_probe, retrieval_measures
from vla.training.align import train_align
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
        text_id=goals,
        goal_id=goals,
        scene_id=goals,
        episode_id=goals,
        timestep=rows % 3,
        progress=(rows % 3 + 1) / 3,
        pair_id=np.full(ROWS, -1),
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


def test_the_goal_is_read_from_pictures_that_tell_it():
    perfect = embedded(np.eye(ROWS))
    assert goal_probe(perfect, perfect) == {"goal_probe": 1.0, "goal_probe/chance": pytest.approx(0.25)}


def test_a_run_reports_every_measure(align_config, tmp_path):
    clip = train_align(replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run")))
    metrics = json.loads((clip.parent / "alignment.json").read_text())["metrics"]
    expected = {"alignment", "modality_gap", "rank_me_context", "uniformity_vision", "uniformity_context_within_goal"}
    expected |= {"time_to_go_probe_r2", "state_probe_r2", "target_probe_r2", "zero_shot"}
    expected |= {"context_to_action_r1_of_other_text", "context_to_action_r1_of_other_image"}
    assert expected <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
