"""One step of stage one up to the gradients: embed, compare, back-propagate, in pieces and on many processes if asked for.

Embeddings are made piece by piece and gathered, each process compares its share of the rows with the whole batch, then each piece carries on the
gradients of its own embeddings (gradient caching, arXiv:2101.06983). Only the last piece's graph is kept; the others are
embedded anew, with the random state replayed, so that graphs do not grow with the batch. The gradients are those of the
unbroken batch. Plain accumulation of losses over small batches would leave out the negatives
between them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from vla.config import LossConfig
from vla.losses.rowwise import Share, Term, spans
from vla.models.alignment import AlignmentModel, RowEmbeds, TextEmbeds
from vla.training.align_terms import batch_terms
from vla.training.checkpoint import restore_rng, rng_tensors
from vla.training.device_batch import DeviceBatch
from vla.training.memory import give_back
from vla.training.processes import ALONE, Processes

type Autocast = Callable[[], AbstractContextManager]


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
    """Add the gradients of the batch to those of the parameters, which with several processes have none before; returns the loss, its terms and the batch's health.

    A batch whose rows lack what every term needs has no terms and the loss 0.

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

    share = Share(processes.rank, processes.count)
    terms, health = batch_terms(model, batch, texts.language, rows, rest, loss, gap, share)
    total = sum((getattr(loss, name) * term.loss for name, term in terms.items()), torch.zeros((), device=rest.device))
    if terms:
        total.backward()
    collected = [getattr(rows, name).grad for name in names_of(rows)]
    processes.add([gradient for gradient in collected if gradient is not None])  # of all shares
    own_rows.carry_on(rows)
    for name in names_of(texts):
        leaf = getattr(texts, name)
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    processes.add([getattr(texts, name).grad for name in names_of(texts)])
    own_texts.carry_on(texts)
    processes.add_gradients([p for p in model.parameters() if p.requires_grad])
    return *over_all(processes, total.detach(), terms), health


def over_all(processes: Processes, total: Tensor, terms: dict[str, Term]) -> tuple[Tensor, dict[str, Term]]:
    """The loss () and its terms, of which each process has a share, summed over all in place."""
    terms = {name: Term(term.loss.detach(), term.chance, term.floor) for name, term in terms.items()}
    processes.add([total, *(value for term in terms.values() for value in vars(term).values())])
    return total, terms


def embed_texts(model: AlignmentModel, batch: DeviceBatch, texts: slice) -> TextEmbeds:
    """Embed some of the batch's texts."""
    return model.texts(batch.input_ids[texts], batch.attention_mask[texts])


def embed_rows(
    model: AlignmentModel, batch: DeviceBatch, texts: TextEmbeds, loss: LossConfig, images: slice
) -> RowEmbeds:
    """Embed some of the batch's images and the rows that show them, what the switched-on terms need of them."""
    rows, every = batch.rows(images), batch.groups if loss.word_patch else []
    text_of_row, mask = batch.text_of_row[rows], batch.attention_mask
    groups = [group for group in (group.within(images) for group in every) if group.images.start < group.images.stop]
    if images.stop - images.start < len(batch.shown):  # a piece needs few of the texts
        needed = torch.cat([text_of_row, *(group.texts for group in groups)]).unique()
        texts = TextEmbeds(*(x.index_select(0, needed) for x in (texts.words, texts.named, texts.language)))
        groups = [replace(group, texts=torch.searchsorted(needed, group.texts)) for group in groups]
        text_of_row, mask = torch.searchsorted(needed, text_of_row), mask[needed]
    return model.rows(
        texts,
        mask,
        batch.pixels(images),
        batch.frame_of_row[rows] - images.start,
        text_of_row,
        batch.action_chunk[rows],
        batch.action_is_pad[rows],
        batch.state[images].nan_to_num() if loss.state else None,
        groups=groups,
        width=max((len(group.texts) for group in every), default=0),
        acted=loss.context_action > 0,
    )


GIVE_BACK = 1024  # pictures or texts after which freed memory is given back; more often would cost more time than it saves memory
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
        """Embed every piece; `places` says where an embedding of a piece is in the whole batch, by its name.

        What is kept of them goes into memory taken beforehand, so that every piece finds the memory of the one before free.
        """
        self.pieces, self.embed, self.autocast, self.places = pieces, embed, autocast, places
        self.random: list[dict[str, Tensor]] = []
        self.own: dict[str, Tensor] = {}  # embeddings of all pieces, by name
        self.last: E | None = None  # of the last piece, with its graph
        for number, piece in enumerate(pieces):
            self.random.append(rng_tensors())
            last = number == len(pieces) - 1
            with torch.set_grad_enabled(last), autocast():
                part = embed(piece)
            for name in names_of(part):
                first, place = places(name, pieces[0]).start, places(name, piece)
                made = getattr(part, name).detach()
                if name not in self.own:
                    self.own[name] = made.new_empty(places(name, pieces[-1]).stop - first, *made.shape[1:])
                self.own[name][place.start - first : place.stop - first] = made
            if last:
                self.last = part
        if not pieces:  # more processes than texts or images: the shapes of one, and nothing of it
            with torch.no_grad(), autocast():
                self.last = embed(slice(0, 1))
            self.own = {name: getattr(self.last, name)[:0] for name in names_of(self.last)}

    def gathered(self, processes: Processes, shares: list[slice]) -> E:
        """The embeddings of the whole batch, as leaves that collect gradients."""
        whole = {}
        for name in names_of(self.last):
            lengths = [place.stop - place.start for place in (self.places(name, share) for share in shares)]
            whole[name] = processes.gather(self.own.pop(name), lengths).requires_grad_()
        return replace(self.last, **whole)

    def carry_on(self, whole: E) -> None:
        """Back-propagate the gradients that the leaves have collected to what the pieces were made from."""
        after = rng_tensors()
        for number in reversed(range(len(self.pieces))):
            piece, part, self.last = self.pieces[number], self.last, None
            if part is None:
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
            del part, pairs
            if piece.start // GIVE_BACK != piece.stop // GIVE_BACK:
                give_back()
        restore_rng(after)


def names_of(embeds: RowEmbeds | TextEmbeds) -> list[str]:
    """The embeddings that are there."""
    return [field.name for field in fields(embeds) if getattr(embeds, field.name) is not None]
