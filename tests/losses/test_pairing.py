"""Lookups of who belongs to whom, against tables of all pairs."""

import pytest
import torch

from vla.losses.pairing import Relation, distinct, pairing

FRAMES, TEXTS, ROWS = 11, 7, 40


def test_a_relation_is_a_table_of_the_part_that_is_asked_for():
    relation = Relation(torch.tensor([0, 0, 2, 5]), torch.tensor([1, 3, 3, 0]))
    assert relation.table(torch.tensor([0, 2]), torch.tensor([0, 3])).tolist() == [[False, True], [False, True]]
    assert relation.table(torch.tensor([4]), torch.tensor([0, 1])).tolist() == [[False, False]]
    assert relation.of(torch.tensor([0, 2])).tolist() == [1, 3]


def test_a_relation_holds_each_pair_once():
    relation = distinct(torch.tensor([1, 0, 1]), torch.tensor([2, 2, 2]))
    assert (relation.owner.tolist(), relation.other.tolist()) == ([0, 1], [2, 2])


def ids() -> dict[str, torch.Tensor]:
    """Random rows: images of several rows, texts of several goals, no goal or scene for some, minimal pairs for some."""
    generator = torch.Generator().manual_seed(2)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (ROWS,), generator=generator)

    frame = draw(0, FRAMES).sort().values
    scene_of_frame = torch.randint(-1, 3, (FRAMES,), generator=generator)
    return {
        "frame_of_row": frame,
        "text_of_row": draw(0, TEXTS - 2),
        "goal_id": draw(-1, 4),
        "scene_id": scene_of_frame[frame],
        "pair_of_row": torch.where(draw(0, 2) > 0, TEXTS - 1, -1),
    }


def tables(of: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(f, u) positives and decided pairs, by looking at every row."""
    rows = [dict(zip(of, values, strict=True)) for values in zip(*(x.tolist() for x in of.values()), strict=True)]
    rows = [row for row in rows if row["goal_id"] >= 0]
    asked = {row["text_of_row"] for row in rows}
    positives = torch.zeros(FRAMES, TEXTS, dtype=torch.bool)
    decided = torch.zeros(FRAMES, TEXTS, dtype=torch.bool)
    for frame in range(FRAMES):
        goals = {row["goal_id"] for row in rows if row["frame_of_row"] == frame}
        scenes = {row["scene_id"] for row in rows if row["frame_of_row"] == frame} - {-1}
        same_scene = [row for row in rows if row["scene_id"] in scenes]
        asked_there = {row["goal_id"] for row in same_scene}
        for text in range(TEXTS):
            right = any(row["goal_id"] in goals and row["text_of_row"] == text for row in rows)
            named = any(row["text_of_row"] == text and row["goal_id"] in asked_there for row in rows)
            positives[frame, text] = right
            paired = any(row["pair_of_row"] == text for row in same_scene)
            decided[frame, text] = (right or not named) if text in asked else paired
    return positives, decided


@pytest.mark.parametrize("frames", [slice(None), slice(3, 8)], ids=str)
@pytest.mark.parametrize("texts", [slice(None), slice(1, 4), torch.tensor([0, 2, 6])], ids=str)
def test_lookups_are_those_of_tables_of_all_pairs(frames, texts):
    pairs = pairing(**ids(), frames=FRAMES, texts=TEXTS)
    positives, decided = tables(ids())
    assert torch.equal(pairs.positives(frames, texts), positives[frames][:, texts])
    assert torch.equal(pairs.decided(frames, texts), decided[frames][:, texts])


def test_another_wording_of_what_a_scene_is_asked_is_not_wrong_of_its_other_images():
    """Scene 0 is asked goals 0 and 1, goal 1 as text 1; scene 1 asks goal 1 as text 2."""
    row = torch.arange(3)
    pairs = pairing(row, row, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), frames=3, texts=3)
    assert pairs.decided(slice(None)).tolist() == [[True, False, False], [False, True, True], [True, True, True]]


def test_what_a_scene_is_asked_elsewhere_in_the_data_is_not_wrong_of_its_images():
    """Scene 5 asks goal 8, scene 6 goal 9 here; elsewhere scene 5 asks goal 9, and a goal and a scene that the batch lacks."""
    row = torch.arange(2)
    asked_in = torch.tensor([[5, 8], [5, 9], [5, 70], [60, 8]])
    pairs = pairing(row, row, row + 8, row + 5, frames=2, texts=2, asked_in=asked_in)
    assert pairs.decided(slice(None)).tolist() == [[True, False], [True, True]]
    assert pairs.positives(slice(None)).tolist() == [[True, False], [False, True]]


def test_who_belongs_to_anyone_keeps_the_same_positives():
    pairs = pairing(**ids(), frames=FRAMES, texts=TEXTS)
    images, texts, told = pairs.told()
    assert torch.equal(told.positives(slice(None)), pairs.positives(slice(None))[images][:, texts])
    assert pairs.positives(slice(None)).sum() == told.positives(slice(None)).sum()


def test_lookups_grow_with_the_rows_and_not_with_their_square():
    count = 3000
    index = torch.arange(count)
    pairs = pairing(index, index, index, index, count, count)
    tensors = [pairs.frame_of_row, pairs.goal_of_row, pairs.scene_of_frame]
    tensors += [side for relation in (pairs.goal_texts, pairs.scene_goals) for side in vars(relation).values()]
    assert sum(tensor.numel() for tensor in tensors) == 7 * count
