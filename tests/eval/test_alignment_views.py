"""What the alignment report shows of held-out rows, on embeddings whose neighbours are known."""

from dataclasses import replace

import numpy as np

from tests.eval.test_alignment_measures import embedded
from vla.eval.alignment_report import answers, view_figures
from vla.eval.alignment_views import load_views, save_views, views_of

TEXTS = ("reach the red cube", "cost: $5 and $6", "push", "place")


def held_out():
    """Four goals of three rows each; contexts are those of the goal, pictures are grey by row."""
    rows = np.arange(12)
    perfect = embedded(np.eye(12))
    batch = replace(
        perfect.batch,
        frames=np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (12, 8, 8, 3)),
        episode_id=rows // 3 * 10 + rows % 3,
    )
    return replace(perfect, batch=batch, context=np.eye(4)[rows // 3].astype(np.float32))


def test_the_heat_map_has_one_right_instruction_for_each_picture():
    views = views_of(held_out(), TEXTS)
    assert views.instructions == TEXTS
    np.testing.assert_array_equal(views.right, np.eye(4, dtype=bool))
    np.testing.assert_array_equal(views.similarity, np.eye(4))
    assert views.pictures[:, 0, 0, 0].tolist() == [0, 3, 6, 9]  # of each goal the first episode


def test_neighbours_have_the_most_similar_context_and_are_of_other_episodes():
    views = views_of(held_out(), TEXTS)
    shown = views.neighbours[:, :, 0, 0, 0]  # pictures are grey by their row
    assert all(len(set(row)) == len(row) for row in shown.tolist())
    np.testing.assert_array_equal(views.neighbour_goal_id[:, 1:3], np.repeat(views.neighbour_goal_id[:, :1], 2, axis=1))


def test_views_come_back_from_disk_and_can_be_drawn(tmp_path):
    views = views_of(held_out(), TEXTS)
    save_views(tmp_path / "views.safetensors", views)
    read = load_views(tmp_path / "views.safetensors")
    for name, value in vars(views).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    figures = view_figures(read)
    assert len(figures) == 3
    assert "reach the red cube" in figures[0].svg
    assert "$5" in figures[0].svg


def test_a_handful_of_rows_has_no_map():
    few = held_out()
    names = ("frame_of_row", "state", "action_chunk", "action_is_pad", "text_id", "goal_id", "scene_id", "episode_id", "timestep", "progress")  # fmt: skip
    batch = replace(few.batch, **{name: getattr(few.batch, name)[:6] for name in names})
    views = views_of(replace(few, batch=batch, context=few.context[:6], vision=few.vision[:6]), TEXTS)
    assert views.position.shape == (0, 2)
    assert len(view_figures(views)) == 2


def test_no_sentence_of_the_report_speaks_of_a_context_that_nothing_trained():
    metrics = {"context_to_action_r1": 0.5, "context_to_action_r1/chance": 0.1}
    assert "find their own action chunk first 50 %" in answers(metrics, {"context_action": 1.0})[0]
    assert answers(metrics, {"context_action": 0.0}) == []
