"""Who belongs to whom in a batch: lookups by id, of which only the part that is being compared becomes a table."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Relation:
    """Pairs of ids: which others an owner has."""

    owner: Tensor  # (n,)
    other: Tensor  # (n,)

    def of(self, owners: Tensor) -> Tensor:
        """(m,) the distinct others that any of some owners has, ascending."""
        return self.other[torch.isin(self.owner, owners)].unique()

    def table(self, owners: Tensor, others: Tensor) -> Tensor:
        """(o, t) bool: who of (o,) owners has which of (t,) others, both distinct and ascending."""
        inside = torch.isin(self.owner, owners) & torch.isin(self.other, others)
        found = torch.zeros(len(owners), len(others), dtype=torch.bool, device=self.owner.device)
        found[torch.searchsorted(owners, self.owner[inside]), torch.searchsorted(others, self.other[inside])] = True
        return found


@dataclass(frozen=True)
class Pairing:
    """Which texts belong to which images.

    A text belongs to the images that are asked one of its goals. Other images of a scene where such a goal is asked, in this batch or
    elsewhere in the data and in whatever words, neither have it nor lack it: it names their objects truly.
    """

    texts: int  # u, how many there are
    frame_of_row: Tensor  # (b,) image of each row
    goal_of_row: Tensor  # (b,) index of each row's goal
    scene_of_frame: Tensor  # (f,) index of each image's scene, -1 where unknown
    goal_texts: Relation  # the texts a goal is asked with
    scene_goals: Relation  # which of the batch's goals are asked in a scene, here or elsewhere in the data
    pair_texts: Relation  # minimal pairs that a scene has drawn; others know nothing of them

    def positives(self, frames: slice, texts: slice | Tensor = slice(None)) -> Tensor:
        """(frames, texts) bool; `texts` ascending."""
        first, stop, _ = frames.indices(len(self.scene_of_frame))
        rows = self.rows_of(frames)
        goals, goal = self.goal_of_row[rows].unique(return_inverse=True)
        asked = self.goal_texts.table(goals, self.ids(texts))[goal]  # (rows, texts)
        found = torch.zeros(stop - first, asked.shape[1], dtype=torch.bool, device=asked.device)
        return found.index_add_(0, self.frame_of_row[rows] - first, asked)  # of bools, a sum is an "or"

    def decided(self, frames: slice, texts: slice | Tensor = slice(None)) -> Tensor:
        """(frames, texts) bool: whether a text is right or wrong of an image, not merely true; `texts` ascending."""
        ids = self.ids(texts)
        scenes, scene = self.scene_of_frame[frames].unique(return_inverse=True)  # -1 owns nothing
        goals = self.scene_goals.of(scenes)
        shares = self.scene_goals.table(scenes, goals).float() @ self.goal_texts.table(goals, ids).float()
        named, paired = (shares > 0)[scene], self.pair_texts.table(scenes, ids)[scene]
        asked = torch.isin(ids, self.goal_texts.other)
        return torch.where(asked, ~named | self.positives(frames, texts), paired)

    def told(self) -> tuple[Tensor, Tensor, "Pairing"]:
        """(n,) images and (m,) texts that belong to any of the other side, and the lookups among these alone."""
        images, asked = self.frame_of_row.unique(), self.goal_texts.other.unique()
        pairs = Pairing(
            texts=len(asked),
            frame_of_row=torch.searchsorted(images, self.frame_of_row),
            goal_of_row=self.goal_of_row,
            scene_of_frame=self.scene_of_frame[images],
            goal_texts=Relation(self.goal_texts.owner, torch.searchsorted(asked, self.goal_texts.other)),
            scene_goals=self.scene_goals,
            pair_texts=Relation(*self.pair_texts.owner.new_empty(2, 0)),
        )
        return images, asked, pairs

    def rows_of(self, frames: slice) -> Tensor:
        """(n,) rows that show some consecutive images."""
        first, stop, _ = frames.indices(len(self.scene_of_frame))
        return ((self.frame_of_row >= first) & (self.frame_of_row < stop)).nonzero()[:, 0]

    def ids(self, texts: slice | Tensor) -> Tensor:
        """(t,) the texts that a slice or (t,) ids name."""
        return torch.arange(self.texts, device=self.frame_of_row.device)[texts]


def pairing(
    frame_of_row: Tensor,
    text_of_row: Tensor,
    goal_id: Tensor,
    scene_id: Tensor,
    frames: int,
    texts: int,
    pair_of_row: Tensor | None = None,
    asked_in: Tensor | None = None,
) -> Pairing:
    """The lookups of a batch: (b,) ids of its rows, which show `frames` images and are asked with `texts` texts.

    Rows without a goal (-1) belong to no text. `pair_of_row` is a minimal pair of each row's text, -1 where there is none.
    `asked_in` (n, 2) are scenes and goals, by id, that are asked in them by the whole data, not by this batch alone.
    """
    asked = goal_id >= 0
    paired = torch.full_like(text_of_row, -1) if pair_of_row is None else pair_of_row
    frame_of_row, text_of_row, goal_id, scene_id, paired = (
        x[asked] for x in (frame_of_row, text_of_row, goal_id, scene_id, paired)
    )
    goals, goal_of_row = goal_id.unique(return_inverse=True)
    scenes, scene_of_row = scene_id.unique(return_inverse=True)
    scene_of_row = torch.where(scene_id >= 0, scene_of_row, -1)
    known = scene_of_row >= 0
    drawn = known & (paired >= 0)
    owner, asked_goal = scene_of_row[known], goal_of_row[known]
    if asked_in is not None:
        here = asked_in[torch.isin(asked_in[:, 0], scenes) & torch.isin(asked_in[:, 1], goals)]
        owner = torch.cat([owner, torch.searchsorted(scenes, here[:, 0].contiguous())])
        asked_goal = torch.cat([asked_goal, torch.searchsorted(goals, here[:, 1].contiguous())])
    return Pairing(
        texts=texts,
        frame_of_row=frame_of_row,
        goal_of_row=goal_of_row,
        scene_of_frame=scene_of_row.new_full((frames,), -1).index_copy_(0, frame_of_row, scene_of_row),
        goal_texts=distinct(goal_of_row, text_of_row),
        scene_goals=distinct(owner, asked_goal),
        pair_texts=distinct(scene_of_row[drawn], paired[drawn]),
    )


def distinct(owner: Tensor, other: Tensor) -> Relation:
    """The relation of (n,) owners with (n,) others, each pair once."""
    return Relation(*torch.stack([owner, other]).unique(dim=1).contiguous()) if len(owner) else Relation(owner, other)
