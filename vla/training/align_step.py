"""One step of stage one up to the gradients: embed, compare, back-propagate, in pieces and on many processes if asked for.

Embeddings are made piece by piece and gathered, the loss is taken over the whole batch, then each piece carries on the
gradients of its own embeddings (gradient caching, arXiv:2101.06983). A process with one piece keeps its graph; one with
several embeds each anew, with the random state replayed, so that graphs do not grow with the batch. Either way the
gradients are those of the unbroken batch. Plain accumulation of losses over small batches would leave out the negatives
between them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from vla.config import LossConfig
from vla.losses.alignment import (
    Group,
    Pairing,
    batch_health,
    groups_of,
    idle_chunks,
    near_duplicates,
    pairing,
    soft_term,
    vision_language_sigmoid_term,
    vision_language_term,
    word_patch_term,
)
from vla.losses.rowwise import Term, spans
from vla.models.alignment import AlignmentModel, RowEmbeds, TextEmbeds
from vla.models.clip import pixel_values
from vla.training.checkpoint import restore_rng, rng_tensors
from vla.training.memory import give_back
from vla.training.processes import ALONE, Processes
from vla.types import TripletBatch

type Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class DeviceBatch:
    """A batch's f distinct images, u distinct texts and b rows in the order of their images, on the device."""

    pixels: Callable[[slice], Tensor]  # images -> (images, 3, H, W), normalised
    frame_of_row: Tensor  # (b,) ascending
    shown: Tensor  # (f,) the first row of each image
    input_ids: Tensor  # (u, l)
    attention_mask: Tensor  # (u, l)
    text_of_row: Tensor  # (b,)
    action_chunk: Tensor  # (b, h, a)
    action_is_pad: Tensor  # (b, h)
    state: Tensor  # (f, s)
    ids: dict[str, Tensor]  # goal_id, scene_id, episode_id, timestep, progress: (b,) each

    @cached_property
    def pairs(self) -> Pairing:
        """Which of its texts belong to which of its images."""
        ids = self.ids
        frames, texts = len(self.shown), len(self.input_ids)
        return pairing(self.frame_of_row, self.text_of_row, ids["goal_id"], ids["scene_id"], frames, texts)

    @cached_property
    def groups(self) -> list[Group]:
        """Which of its images and texts are compared word by word."""
        return groups_of(self.pairs)

    def rows(self, images: slice) -> slice:
        """The rows that show some consecutive images."""
        bounds = torch.tensor([images.start, images.stop], device=self.frame_of_row.device)
        return slice(*torch.searchsorted(self.frame_of_row, bounds).tolist())


def on_device(batch: TripletBatch, input_ids: Tensor, attention_mask: Tensor, device: torch.device) -> DeviceBatch:
    """Move a batch; of the (t, l) ids and masks of all texts, those that it holds."""
    order = np.argsort(batch.frame_of_row, kind="stable")

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[order]).to(device)

    def pixels(images: slice) -> Tensor:
        return pixel_values(torch.from_numpy(batch.frames[images]).to(device))

    shown = torch.from_numpy(np.unique(batch.frame_of_row[order], return_index=True)[1]).to(device)
    texts, text_of_row = moved(batch.text_id).unique(return_inverse=True)
    length = int(attention_mask[texts].sum(1).max())
    names = ("goal_id", "scene_id", "episode_id", "timestep", "progress")
    return DeviceBatch(
        pixels=pixels,
        frame_of_row=moved(batch.frame_of_row),
        shown=shown,
        input_ids=input_ids[texts, :length],
        attention_mask=attention_mask[texts, :length],
        text_of_row=text_of_row,
        action_chunk=moved(batch.action_chunk),
        action_is_pad=moved(batch.action_is_pad),
        state=moved(batch.state)[shown],
        ids={name: moved(getattr(batch, name)) for name in names},
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
    ids, shown, pairs = batch.ids, batch.shown, batch.pairs
    episode, timestep = ids["episode_id"], ids["timestep"]
    idle = idle_chunks(batch.action_chunk, batch.action_is_pad, rest.to(shown.device))
    moving = (~idle).float() if not idle.all() else torch.ones_like(idle, dtype=torch.float32)
    terms: dict[str, Term] = {}
    if loss.context_action:
        terms["context_action"] = soft_term(
            rows.context,
            rows.action,
            model.scale("context_action"),
            batch.action_chunk,
            loss.action_beta,
            partial(near_duplicates, episode, timestep, gap),
            moving,
        )
    if loss.vision_language:
        scale, progress = model.scale("vision_language"), ids["progress"][shown]
        if loss.vision_language_kind == "sigmoid":
            terms["vision_language"] = vision_language_sigmoid_term(
                rows.vision, language, scale, model.logit_bias, pairs, progress
            )
        else:
            terms["vision_language"] = vision_language_term(rows.vision, language, scale, pairs, progress)
    if rows.similarity is not None:
        terms["word_patch"] = word_patch_term(rows.similarity, model.scale("word_patch"), pairs, batch.groups)
    if rows.scene is not None and rows.state is not None:
        terms["state"] = soft_term(
            rows.scene,
            rows.state,
            model.scale("state"),
            batch.state,
            loss.state_beta,
            partial(near_duplicates, episode[shown], timestep[shown], gap),
            torch.ones(len(shown), device=shown.device),
        )
    if rows.pooled is not None and (loss.transition_action or loss.transition_language):
        terms |= transition_terms(model, batch, language, rows.pooled, rest, loss, gap)
    return terms, batch_health(ids["goal_id"], ids["scene_id"], idle)


def transition_terms(
    model: AlignmentModel,
    batch: DeviceBatch,
    language: Tensor,
    pooled: Tensor,
    rest: Tensor,
    loss: LossConfig,
    gap: int,
) -> dict[str, Term]:
    """The change between two pictures of an episode against the actions between them, and against the instructions.

    Unlike an early picture, a change says what is being done (DecisionNCE, arXiv:2402.18137).

    Args:
        language: (u, d) embeddings of the distinct texts. pooled: (f, q * width) of the images.
        rest: (a,) the resting action, normalised; what is missing of a chunk that ends early.
    """
    episode, timestep = batch.ids["episode_id"], batch.ids["timestep"]
    first, second = transitions(episode, timestep, gap, batch.action_chunk.shape[1])
    if not len(first):
        return {}
    before, after = (pooled.index_select(0, batch.frame_of_row[rows]) for rows in (first, second))
    change = model.transitions(before, after)
    terms: dict[str, Term] = {}
    if loss.transition_action:
        length = (timestep[second] - timestep[first])[:, None]
        beyond = torch.arange(batch.action_chunk.shape[1], device=length.device) >= length
        missing = batch.action_is_pad[first] | beyond
        chunk = torch.where(missing[..., None], rest.to(batch.action_chunk), batch.action_chunk[first])
        terms["transition_action"] = soft_term(
            change,
            model.action_projection(model.action_encoder(chunk, missing)),
            model.scale("transition_action"),
            chunk,
            loss.action_beta,
            partial(near_duplicates, episode[first], timestep[first], gap),
            torch.ones_like(timestep[first], dtype=torch.float32),
        )
    if loss.transition_language:
        ids = [batch.ids[name][first] for name in ("goal_id", "scene_id")]
        rows = torch.arange(len(first), device=first.device)
        pairs = pairing(rows, batch.text_of_row[first], *ids, frames=len(first), texts=len(language))
        asked = pairs.goal_texts.any(0).nonzero()[:, 0]  # others have no positive
        texts = torch.searchsorted(asked, batch.text_of_row[first])
        pairs = pairing(rows, texts, *ids, frames=len(first), texts=len(asked))
        terms["transition_language"] = vision_language_term(
            change,
            language.index_select(0, asked),
            model.scale("transition_language"),
            pairs,
            torch.ones_like(timestep[first], dtype=torch.float32),
        )
    return terms


def transitions(episode_id: Tensor, timestep: Tensor, gap: int, longest: int) -> tuple[Tensor, Tensor]:
    """(p,) and (p,) rows of one episode, one following the other by `gap` to `longest` timesteps."""
    order = torch.argsort(timestep, stable=True)
    order = order[torch.argsort(episode_id[order], stable=True)]
    first, second = order[:-1], order[1:]
    apart = timestep[second] - timestep[first]
    chosen = (episode_id[first] == episode_id[second]) & (apart >= gap) & (apart <= longest)
    return first[chosen], second[chosen]


def forward_backward(
    model: AlignmentModel,
    batch: DeviceBatch,
    rest: Tensor,
    loss: LossConfig,
    *,
    gap: int,
    chunk: int,
    autocast: Autocast,
    processes: Processes = ALONE,
) -> tuple[Tensor, dict[str, Term], dict[str, Tensor]]:
    """Set the parameters' gradients to those of the batch; returns the loss, its terms and the batch's health.

    Args:
        rest: (a,) the resting action, normalised.
        chunk: images, and texts, that are embedded at a time; 0 embeds all of the process's at once.
        autocast: makes the context the towers run in.
        processes: which share of the batch is this process's; all of them return the same.
    """
    text_shares, image_shares = processes.shares(len(batch.input_ids)), processes.shares(len(batch.shown))

    def rows_too(name: str, images: slice) -> slice:
        return batch.rows(images) if name in ROW_WISE else images

    def own(shares: list[slice]) -> list[slice]:
        share = shares[processes.rank]
        length = share.stop - share.start
        return [slice(share.start + s.start, share.start + s.stop) for s in spans(length, chunk or max(1, length))]

    own_texts = Pieces(own(text_shares), partial(embed_texts, model, batch), autocast)
    texts = own_texts.gathered(processes, text_shares)
    own_rows = Pieces(own(image_shares), partial(embed_rows, model, batch, texts, loss), autocast, rows_too)
    rows = own_rows.gathered(processes, image_shares)

    terms, health = batch_terms(model, batch, texts.language, rows, rest, loss, gap)
    total = torch.stack([getattr(loss, name) * term.loss for name, term in terms.items()]).sum()
    total.backward()
    if processes.rank > 0:  # all took the same loss: what hangs on it directly, as the scales do, counts once
        model.zero_grad()
        texts.language.grad = None
    own_rows.carry_on(rows)
    for name in names_of(texts):
        leaf = getattr(texts, name)
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    processes.add([getattr(texts, name).grad for name in names_of(texts)])
    own_texts.carry_on(texts)
    processes.add_gradients([p for p in model.parameters() if p.requires_grad])
    return total.detach(), terms, health


def embed_texts(model: AlignmentModel, batch: DeviceBatch, texts: slice) -> TextEmbeds:
    """Embed some of the batch's texts."""
    return model.texts(batch.input_ids[texts], batch.attention_mask[texts])


def embed_rows(
    model: AlignmentModel, batch: DeviceBatch, texts: TextEmbeds, loss: LossConfig, images: slice
) -> RowEmbeds:
    """Embed some of the batch's images and the rows that show them, what the switched-on terms need of them."""
    rows = batch.rows(images)
    return model.rows(
        texts,
        batch.attention_mask,
        batch.pixels(images),
        batch.frame_of_row[rows] - images.start,
        batch.text_of_row[rows],
        batch.action_chunk[rows],
        batch.action_is_pad[rows],
        batch.state[images] if loss.state else None,
        groups=batch.groups if loss.word_patch else (),
        first=images.start,
    )


ROW_WISE = ("context", "action")  # the other embeddings are of images


class Pieces[E: (TextEmbeds, RowEmbeds)]:
    """The embeddings of this process's pieces of a batch, and their way back."""

    def __init__(
        self,
        pieces: list[slice],
        embed: Callable[[slice], E],
        autocast: Autocast,
        places: Callable[[str, slice], slice] = lambda name, piece: piece,
    ) -> None:
        """Embed every piece; `places` says where an embedding of a piece is in the whole batch, by its name."""
        self.pieces, self.embed, self.autocast, self.places = pieces, embed, autocast, places
        self.random: list[dict[str, Tensor]] = []
        self.embeds: list[E] = []
        for piece in pieces:
            self.random.append(rng_tensors())
            with torch.set_grad_enabled(self.kept), autocast():
                self.embeds.append(embed(piece))
        if not pieces:  # more processes than texts or images: the shapes of one, and nothing of it
            with torch.no_grad(), autocast():
                one = embed(slice(0, 1))
            self.embeds.append(replace(one, **{name: getattr(one, name)[:0] for name in names_of(one)}))

    @property
    def kept(self) -> bool:
        """Whether the graph is kept: that of one piece is."""
        return len(self.pieces) == 1

    def gathered(self, processes: Processes, shares: list[slice]) -> E:
        """The embeddings of the whole batch, as leaves that collect gradients."""
        whole = {}
        for name in names_of(self.embeds[0]):
            own = torch.cat([getattr(part, name).detach() for part in self.embeds])
            lengths = [place.stop - place.start for place in (self.places(name, share) for share in shares)]
            whole[name] = processes.gather(own, lengths).requires_grad_()
        example = self.embeds[0]
        if not self.kept:
            self.embeds.clear()
        return replace(example, **whole)

    def carry_on(self, whole: E) -> None:
        """Back-propagate the gradients that the leaves have collected to what the pieces were made from."""
        after = rng_tensors()
        for number, piece in enumerate(self.pieces):
            if self.kept:
                part = self.embeds[0]
            else:
                restore_rng(self.random[number])
                with self.autocast():
                    part = self.embed(piece)
            pairs = [
                (getattr(part, name), getattr(whole, name).grad[self.places(name, piece)])
                for name in names_of(part)
                if getattr(part, name).requires_grad and getattr(whole, name).grad is not None
            ]
            if pairs:  # none of frozen texts
                torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
            if not self.kept:
                del part, pairs
                give_back()
        restore_rng(after)


def names_of(embeds: RowEmbeds | TextEmbeds) -> list[str]:
    """The embeddings that are there."""
    return [field.name for field in fields(embeds) if getattr(embeds, field.name) is not None]
