"""A batch of stage one on the device, in the order of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vla.losses.alignment import Group, groups_of
from vla.losses.pairing import Pairing, pairing
from vla.models.clip import WORDS, pixel_values
from vla.types import TripletBatch


@dataclass(frozen=True)
class DeviceBatch:
    """A batch's f distinct images, u distinct texts and b rows in the order of their images, on the device."""

    pixels: Callable[[slice], Tensor]  # images -> (images, 3, H, W), normalised
    frame_of_row: Tensor  # (b,) ascending
    shown: Tensor  # (f,) the first row of each image
    input_ids: Tensor  # (u, l)
    attention_mask: Tensor  # (u, l)
    text_of_row: Tensor  # (b,)
    pair_of_row: Tensor  # (b,) text that differs in one word and is wrong of the row, -1 where there is none
    action_chunk: Tensor  # (b, h, a)
    action_is_pad: Tensor  # (b, h)
    still: Tensor  # (b,) bool, state and action stay where they are throughout the chunk
    state: Tensor  # (f, s)
    ids: dict[str, Tensor]  # goal_id, scene_id, episode_id, timestep, progress: (b,) each
    asked_in: Tensor  # (n, 2) scenes and the goals that are asked in them

    @cached_property
    def pairs(self) -> Pairing:
        """Which of its texts belong to which of its images."""
        ids = self.ids
        frames, texts = len(self.shown), len(self.input_ids)
        goal_id, scene_id, row = ids["goal_id"], ids["scene_id"], self.frame_of_row
        return pairing(row, self.text_of_row, goal_id, scene_id, frames, texts, self.pair_of_row, self.asked_in)

    @cached_property
    def groups(self) -> list[Group]:
        """Which of its images and texts are compared word by word."""
        return groups_of(self.pairs)

    def rows(self, images: slice) -> slice:
        """The rows that show some consecutive images."""
        bounds = torch.tensor([images.start, images.stop], device=self.frame_of_row.device)
        return slice(*torch.searchsorted(self.frame_of_row, bounds).tolist())


def on_device(
    batch: TripletBatch,
    input_ids: Tensor,
    attention_mask: Tensor,
    device: torch.device,
    hide: Callable[[Tensor], Tensor] = lambda mask: mask,
) -> DeviceBatch:
    """Move a batch; of the (t, l) ids and masks of all texts, which stay where they are, those that it holds, with some words hidden by `hide`."""
    order = np.argsort(batch.frame_of_row, kind="stable")

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[order]).to(device)

    def pixels(images: slice) -> Tensor:
        return pixel_values(torch.from_numpy(batch.frames[images]).to(device))

    shown = torch.from_numpy(np.unique(batch.frame_of_row[order], return_index=True)[1]).to(device)
    asked, paired = (torch.from_numpy(array[order]) for array in (batch.text_id, batch.pair_id))
    texts = torch.cat([asked, paired[paired >= 0]]).unique()
    whole = ~torch.isin(texts, asked)  # a minimal pair without the word that matters would be true
    length = int(attention_mask[texts].sum(1).max())
    length += -length % WORDS
    mask, whole = attention_mask[texts, :length].to(device), whole.to(device)
    names = ("goal_id", "scene_id", "episode_id", "timestep", "progress")
    return DeviceBatch(
        pixels=pixels,
        frame_of_row=moved(batch.frame_of_row),
        shown=shown,
        input_ids=input_ids[texts, :length].to(device),
        attention_mask=torch.where(whole[:, None], mask, hide(mask)),
        text_of_row=torch.searchsorted(texts, asked).to(device),
        pair_of_row=torch.where(paired >= 0, torch.searchsorted(texts, paired), -1).to(device),
        action_chunk=moved(batch.action_chunk),
        action_is_pad=moved(batch.action_is_pad),
        still=moved(batch.still),
        state=moved(batch.state)[shown],
        ids={name: moved(getattr(batch, name)) for name in names},
        asked_in=torch.from_numpy(batch.asked_in).to(device),
    )
