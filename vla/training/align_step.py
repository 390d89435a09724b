"""One step of stage one up to the gradients: embed, compare, back-propagate, in pieces where memory asks for it.

In pieces, the whole batch is embedded without gradients, the loss is taken over all of it, and each piece is embedded once
more to carry on the gradients of its own embeddings (gradient caching, arXiv:2101.06983). The texts are a leaf of
their own, shared by all pieces. Random state is replayed, so the gradients are those of the unbroken batch. Plain accumulation of losses over small
batches would leave out the negatives between them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from vla.config import LossConfig
from vla.losses.alignment import (
    Term,
    batch_health,
    goal_positives,
    idle_chunks,
    mean_squared_distances,
    near_duplicates,
    other_scene,
    soft_term,
    vision_language_term,
    word_patch_term,
)
from vla.models.alignment import AlignmentModel, RowEmbeds, TextEmbeds
from vla.models.clip import pixel_values
from vla.training.checkpoint import restore_rng, rng_tensors
from vla.types import TripletBatch


@dataclass(frozen=True)
class DeviceBatch:
    """A batch's f distinct images, u distinct texts and b rows on the device, for `AlignmentModel` and the losses."""

    pixels: Tensor  # (f, 3, H, W)
    frame_of_row: Tensor  # (b,)
    input_ids: Tensor  # (u, l)
    attention_mask: Tensor  # (u, l)
    text_of_row: Tensor  # (b,)
    action_chunk: Tensor  # (b, h, a)
    action_is_pad: Tensor  # (b, h)
    state: Tensor  # (f, s)
    shown: Tensor  # (f,) a row of each image
    ids: dict[str, Tensor]  # goal_id, scene_id, episode_id, timestep, progress: (b,) each


def on_device(batch: TripletBatch, input_ids: Tensor, attention_mask: Tensor, device: torch.device) -> DeviceBatch:
    """Move a batch; of the (t, l) ids and masks of all texts, those that it holds."""
    names = ("goal_id", "scene_id", "episode_id", "timestep", "progress")
    text_id = torch.from_numpy(batch.text_id).to(device)
    shown = torch.from_numpy(np.unique(batch.frame_of_row, return_index=True)[1]).to(device)
    texts, text_of_row = text_id.unique(return_inverse=True)
    length = int(attention_mask[texts].sum(1).max())
    return DeviceBatch(
        pixels=pixel_values(torch.from_numpy(batch.frames).to(device)),
        frame_of_row=torch.from_numpy(batch.frame_of_row).to(device),
        input_ids=input_ids[texts, :length],
        attention_mask=attention_mask[texts, :length],
        text_of_row=text_of_row,
        action_chunk=torch.from_numpy(batch.action_chunk).to(device),
        action_is_pad=torch.from_numpy(batch.action_is_pad).to(device),
        state=torch.from_numpy(batch.state).to(device)[shown],
        shown=shown,
        ids={name: torch.from_numpy(getattr(batch, name)).to(device) for name in names},
    )


def batch_terms(
    model: AlignmentModel,
    batch: DeviceBatch,
    language: Tensor,
    rows: RowEmbeds,
    rest: Tensor,
    loss: LossConfig,
    gap: int,
) -> tuple[dict[str, Term], dict[str, Tensor]]:
    """The loss terms that are switched on, and the health of the batch.

    Args:
        language: (u, d) embeddings of the distinct texts. rows: those of images and rows.
        rest: (a,) the resting action, normalised.
    """
    ids, shown, text_of_row = batch.ids, batch.shown, batch.text_of_row
    texts = len(batch.input_ids)
    goal_of_text = ids["goal_id"].new_zeros(texts).index_copy_(0, text_of_row, ids["goal_id"])
    positives = goal_positives(batch.frame_of_row, ids["goal_id"], text_of_row, goal_of_text)
    valid = ~near_duplicates(ids["episode_id"], ids["timestep"], gap)
    idle = idle_chunks(batch.action_chunk, batch.action_is_pad, rest.to(shown.device))
    moving = (~idle).float() if not idle.all() else torch.ones_like(idle, dtype=torch.float32)
    terms: dict[str, Term] = {}
    if loss.context_action:
        terms["context_action"] = soft_term(
            rows.context,
            rows.action,
            model.scale("context_action"),
            mean_squared_distances(batch.action_chunk),
            loss.action_beta,
            valid,
            moving,
        )
    if loss.vision_language:
        terms["vision_language"] = vision_language_term(
            rows.vision, language, model.scale("vision_language"), positives, ids["progress"][shown]
        )
    if rows.similarity is not None:
        valid_texts = other_scene(ids["scene_id"], text_of_row, texts)[shown]
        terms["word_patch"] = word_patch_term(rows.similarity, model.scale("word_patch"), positives, valid_texts)
    if rows.scene is not None and rows.state is not None:
        terms["state"] = soft_term(
            rows.scene,
            rows.state,
            model.scale("state"),
            mean_squared_distances(batch.state),
            loss.state_beta,
            valid[shown][:, shown],
            torch.ones(len(shown), device=shown.device),
        )
    return terms, batch_health(ids["goal_id"], ids["scene_id"], idle)


def forward_backward(
    model: AlignmentModel,
    batch: DeviceBatch,
    rest: Tensor,
    loss: LossConfig,
    *,
    gap: int,
    chunk: int,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, dict[str, Term], dict[str, Tensor]]:
    """Add the gradients of the batch to the parameters; returns the loss, its terms and the batch's health.

    `chunk` images are embedded at a time; 0 embeds all at once. `autocast` is the context the towers run in.
    """

    def total(language: Tensor, rows: RowEmbeds) -> tuple[Tensor, dict[str, Term], dict[str, Tensor]]:
        terms, health = batch_terms(model, batch, language, rows, rest, loss, gap)
        return torch.stack([getattr(loss, name) * term.loss for name, term in terms.items()]).sum(), terms, health

    if chunk == 0 or chunk >= len(batch.pixels):
        with autocast():
            texts = model.texts(batch.input_ids, batch.attention_mask)
            rows = embed(model, batch, texts, loss)
        result = total(texts.language, rows)
        result[0].backward()
        return result

    pieces, order = split(batch, chunk)
    random = [rng_tensors()]
    with torch.no_grad(), autocast():
        texts = leaves(model.texts(batch.input_ids, batch.attention_mask))
        parts = []
        for piece in pieces:
            random.append(rng_tensors())
            parts.append(embed(model, piece, texts, loss))
    after = rng_tensors()
    whole = leaves(joined(parts, order))
    result = total(texts.language, whole)
    result[0].backward()
    first_frame = 0
    for piece, rows, state in zip(pieces, order.split([len(p.frame_of_row) for p in pieces]), random[1:], strict=True):
        restore_rng(state)
        with autocast():
            again = embed(model, piece, texts, loss)
        frames = slice(first_frame, first_frame + len(piece.pixels))
        first_frame = frames.stop
        carry_on(again, {name: whole_gradient(whole, name, rows, frames) for name in names_of(again)})
    restore_rng(random[0])
    with autocast():
        again = model.texts(batch.input_ids, batch.attention_mask)
    carry_on(again, {name: getattr(texts, name).grad for name in names_of(again)})
    restore_rng(after)
    return result


def embed(model: AlignmentModel, batch: DeviceBatch, texts: TextEmbeds, loss: LossConfig) -> RowEmbeds:
    """Embed the images and rows of a batch, what the switched-on terms need of them."""
    return model.rows(
        texts,
        batch.attention_mask,
        batch.pixels,
        batch.frame_of_row,
        batch.text_of_row,
        batch.action_chunk,
        batch.action_is_pad,
        batch.state if loss.state else None,
        late=loss.word_patch > 0,
    )


ROW_WISE = ("context", "action")  # the other embeddings are of images


def split(batch: DeviceBatch, chunk: int) -> tuple[list[DeviceBatch], Tensor]:
    """Pieces of at most `chunk` images with the rows that show them, and the (b,) rows in the pieces' order.

    The pieces hold all texts; what only the losses read (`shown`, `ids`) stays the whole batch's.
    """
    pieces, order = [], []
    for first in range(0, len(batch.pixels), chunk):
        frames = slice(first, first + chunk)
        rows = ((batch.frame_of_row >= first) & (batch.frame_of_row < first + chunk)).nonzero()[:, 0]
        order.append(rows)
        pieces.append(
            replace(
                batch,
                pixels=batch.pixels[frames],
                state=batch.state[frames],
                frame_of_row=batch.frame_of_row[rows] - first,
                text_of_row=batch.text_of_row[rows],
                action_chunk=batch.action_chunk[rows],
                action_is_pad=batch.action_is_pad[rows],
            )
        )
    return pieces, torch.cat(order)


def joined(parts: list[RowEmbeds], order: Tensor) -> RowEmbeds:
    """The embeddings of the whole batch, rows back in their places."""
    whole = {}
    for name in names_of(parts[0]):
        values = torch.cat([getattr(part, name) for part in parts])
        whole[name] = torch.empty_like(values).index_copy_(0, order, values) if name in ROW_WISE else values
    return replace(parts[0], **whole)


def names_of(embeds: RowEmbeds | TextEmbeds) -> list[str]:
    """The embeddings that are there."""
    return [field.name for field in fields(embeds) if getattr(embeds, field.name) is not None]


def leaves[E: RowEmbeds | TextEmbeds](embeds: E) -> E:
    """The same values as leaves that collect gradients."""
    return replace(embeds, **{name: getattr(embeds, name).detach().requires_grad_() for name in names_of(embeds)})


def whole_gradient(whole: RowEmbeds, name: str, rows: Tensor, frames: slice) -> Tensor | None:
    """The part of an embedding's gradient that belongs to a piece; None if the loss does not depend on it."""
    gradient = getattr(whole, name).grad
    return gradient if gradient is None else gradient[rows] if name in ROW_WISE else gradient[frames]


def carry_on(embeds: RowEmbeds | TextEmbeds, gradients: dict[str, Tensor | None]) -> None:
    """Back-propagate gradients of embeddings to what they were made from."""
    pairs = [(getattr(embeds, name), gradient) for name, gradient in gradients.items() if gradient is not None]
    pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
