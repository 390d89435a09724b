"""The stage-one terms: masks, idle chunks, and what weighs in."""

import torch
from torch.nn.functional import normalize

from vla.losses.alignment import (
    goal_positives,
    idle_chunks,
    mean_squared_distances,
    near_duplicates,
    soft_term,
    vision_language_term,
)


def test_frames_of_one_episode_closer_than_the_gap_are_near_duplicates():
    close = near_duplicates(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 9, 0]), gap=3)
    assert close.nonzero().tolist() == [[0, 1], [1, 0]]


def test_a_chunk_at_rest_up_to_its_padding_is_idle():
    chunk = torch.tensor([[[0.0], [0.9]], [[0.9], [0.9]], [[0.01], [0.0]]])
    pad = torch.tensor([[False, True], [False, False], [False, False]])
    assert idle_chunks(chunk, pad, torch.zeros(1)).tolist() == [True, False, True]


def test_mean_squared_distances_average_over_all_other_axes():
    x = torch.tensor([[[0.0, 0.0]], [[1.0, 3.0]]])
    torch.testing.assert_close(mean_squared_distances(x), torch.tensor([[0.0, 5.0], [5.0, 0.0]]))


def test_images_weigh_in_by_their_progress():
    vision = normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    language = normalize(vision + torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), dim=-1)
    positives = torch.eye(2, dtype=torch.bool)
    scale = torch.tensor(5.0)
    first = vision_language_term(vision, language, scale, positives, torch.tensor([1.0, 0.01]))
    second = vision_language_term(vision, language, scale, positives, torch.tensor([0.01, 1.0]))
    assert first.loss != second.loss


def test_a_row_of_weight_zero_stays_a_key_but_is_no_query():
    queries = normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    keys = normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    distances = 1 - torch.eye(3)
    valid = torch.ones(3, 3, dtype=torch.bool)
    term = soft_term(queries, keys, torch.tensor(5.0), distances, 0.1, valid, torch.tensor([1.0, 1.0, 0.0]))
    term.loss.backward()
    assert queries.grad[2].abs().max() > 0  # as a key of the backward direction
    alone = soft_term(queries, keys, torch.tensor(5.0), distances, 0.1, valid, torch.tensor([0.0, 0.0, 1.0]))
    assert alone.loss != term.loss


def test_texts_of_every_goal_asked_of_a_shared_picture_are_its_positives():
    positives = goal_positives(
        torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5]), torch.tensor([1, 0, 2]), torch.tensor([6, 5, 5])
    )
    assert positives.tolist() == [[True, True, True], [False, True, True]]


def test_a_text_asked_with_two_goals_is_right_for_both():
    positives = goal_positives(torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([0, 0]), torch.tensor([6]))
    assert positives.all()
