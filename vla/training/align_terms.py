"""From a batch and its embeddings to the loss terms of stage one; rows that lack something are left out of what needs it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vla.config import LossConfig
from vla.losses.alignment import (
    batch_health,
    idle_chunks,
    near_duplicates,
    of_other_goals,
    soft_term,
    vision_language_sigmoid_term,
    vision_language_term,
    word_patch_term,
)
from vla.losses.pairing import distinct, pairing
from vla.losses.rowwise import PAIRS_AT_ONCE, WHOLE, Share, Term, spans
from vla.models.alignment import AlignmentModel, RowEmbeds
from vla.training.device_batch import DeviceBatch


def batch_terms(
    model: AlignmentModel,
    batch: DeviceBatch,
    language: Tensor,
    rows: RowEmbeds,
    rest: Tensor,
    loss: LossConfig,
    gap: int,
    share: Share = WHOLE,
) -> tuple[dict[str, Term], dict[str, Tensor]]:
    """The loss terms that are switched on, and the health of the batch.

    Args:
        language: (u, d) embeddings of the distinct texts. rows: those of images and rows.
        rest: (a,) the resting action, normalised.
        share: the part of the comparisons to make; terms of all shares add up. The health is always that of the whole batch.
    """
    idle = batch.still | idle_chunks(batch.action_chunk, batch.action_is_pad, rest.to(batch.shown.device))
    acted = (~batch.action_is_pad.all(1)).nonzero()[:, 0]
    terms = context_action_term(model, batch, rows, acted, idle, loss, gap, share)
    terms |= language_terms(model, batch, language, rows, loss, share)
    terms |= state_term(model, batch, rows, loss, gap, share)
    ids = batch.ids
    known_idle = idle[acted] if len(acted) else idle
    health = batch_health(ids["goal_id"], batch.text_of_row, ids["scene_id"], ids["episode_id"], known_idle)
    if rows.pooled is not None and (loss.transition_action or loss.transition_language):
        found = transitions(ids["episode_id"], ids["timestep"], gap, batch.action_chunk.shape[1])
        terms |= transition_terms(model, batch, language, rows.pooled, rest, loss, gap, found, share)
        health["transitions"] = torch.tensor(len(found[0]))
    return terms, health


def context_action_term(
    model: AlignmentModel,
    batch: DeviceBatch,
    rows: RowEmbeds,
    acted: Tensor,
    idle: Tensor,
    loss: LossConfig,
    gap: int,
    share: Share,
) -> dict[str, Term]:
    """Instructed pictures against the action chunks from there on; none if no row has an action.

    Args:
        acted: (n,) rows with an action. idle: (b,) bool, rows whose action says nothing; they weigh nothing unless all do.
        Others as in `batch_terms`.
    """
    if rows.context is None or rows.action is None or not len(acted):
        return {}
    moving = (~idle[acted]).float() if not idle.all() else torch.ones_like(acted, dtype=torch.float32)
    term = soft_term(
        rows.context.index_select(0, acted),
        rows.action.index_select(0, acted),
        model.scale("context_action"),
        batch.action_chunk[acted],
        loss.action_beta,
        partial(near_duplicates, batch.ids["episode_id"][acted], batch.ids["timestep"][acted], gap),
        moving,
        share,
    )
    return {"context_action": term}


def language_terms(
    model: AlignmentModel, batch: DeviceBatch, language: Tensor, rows: RowEmbeds, loss: LossConfig, share: Share
) -> dict[str, Term]:
    """Pooled pictures against the (u, d) instructions, and patches against words; arguments as in `batch_terms`."""
    terms: dict[str, Term] = {}
    images, texts, pairs = batch.pairs.told()
    if not len(images):
        return terms
    if loss.vision_language:
        scale, progress = model.scale("vision_language"), batch.ids["progress"][batch.shown][images]
        vision, named = rows.vision.index_select(0, images), language.index_select(0, texts)
        if loss.vision_language_kind == "sigmoid":
            terms["vision_language"] = vision_language_sigmoid_term(
                vision, named, scale, model.logit_bias, pairs, progress, share
            )
        else:
            terms["vision_language"] = vision_language_term(vision, named, scale, pairs, progress, share)
    if rows.similarity is not None:
        terms["word_patch"] = word_patch_term(
            rows.similarity, model.scale("word_patch"), batch.pairs, batch.groups, share
        )
    return terms


def state_term(
    model: AlignmentModel, batch: DeviceBatch, rows: RowEmbeds, loss: LossConfig, gap: int, share: Share
) -> dict[str, Term]:
    """Pictures against the states that they show, none if no state is known; arguments as in `batch_terms`."""
    if rows.scene is None or rows.state is None:
        return {}
    stated = batch.state.isfinite().all(1).nonzero()[:, 0]
    if not len(stated):
        return {}
    invalid, weights = state_pairs(batch, stated, gap, within_goal=loss.state_within_goal)
    if not weights.any():
        return {}
    term = soft_term(
        rows.scene.index_select(0, stated),
        rows.state.index_select(0, stated),
        model.scale("state"),
        batch.state[stated],
        loss.state_beta,
        invalid,
        weights,
        share,
    )
    return {"state": term}


def state_pairs(
    batch: DeviceBatch, stated: Tensor, gap: int, *, within_goal: bool
) -> tuple[Callable[[slice], Tensor], Tensor]:
    """Who of (n,) images with a state is not compared with whom, rows -> (rows, n) bool, and their (n,) weights.

    Within a goal, images are compared with those that share one with them; images of an episode without an instruction with
    each other. Who has nobody to be told from weighs nothing.
    """
    episode, known = batch.ids["episode_id"], batch.shown[stated]
    near = partial(near_duplicates, episode[known], batch.ids["timestep"][known], gap)
    if not within_goal:
        return near, torch.ones(len(known), device=known.device)
    goal = batch.ids["goal_id"]
    asked = distinct(batch.frame_of_row, torch.where(goal >= 0, goal, -1 - episode))

    def invalid(rows: slice) -> Tensor:
        return near(rows) | of_other_goals(asked, stated, rows)

    parts = spans(len(stated), max(1, PAIRS_AT_ONCE // len(stated)))
    return invalid, torch.cat([((~invalid(rows)).sum(1) > 1).float() for rows in parts])


def transition_terms(
    model: AlignmentModel,
    batch: DeviceBatch,
    language: Tensor,
    pooled: Tensor,
    rest: Tensor,
    loss: LossConfig,
    gap: int,
    found: tuple[Tensor, Tensor],
    share: Share = WHOLE,
) -> dict[str, Term]:
    """The change between two pictures of an episode against the actions between them, and against the instructions.

    Unlike an early picture, a change says what is being done (DecisionNCE, arXiv:2402.18137).

    Args:
        language: (u, d) embeddings of the distinct texts. pooled: (f, q * width) of the images.
        rest: (a,) the resting action, normalised; what is missing of a chunk that ends early.
        found: (p,) and (p,) rows, see `transitions`.
        share: the part of the comparisons to make; terms of all shares add up.
    """
    episode, timestep = batch.ids["episode_id"], batch.ids["timestep"]
    first, second = found
    terms: dict[str, Term] = {}
    if not len(first):
        return terms
    before, after = (pooled.index_select(0, batch.frame_of_row[rows]) for rows in (first, second))
    every = model.transitions(before, after)
    acted = (~batch.action_is_pad[first].all(1)).nonzero()[:, 0]
    if loss.transition_action and len(acted):
        begun, ended, change = first[acted], second[acted], every.index_select(0, acted)
        length = (timestep[ended] - timestep[begun])[:, None]
        beyond = torch.arange(batch.action_chunk.shape[1], device=length.device) >= length
        missing = batch.action_is_pad[begun] | beyond
        chunk = torch.where(missing[..., None], rest.to(batch.action_chunk), batch.action_chunk[begun])
        moving = ~(batch.still[begun] | idle_chunks(chunk, missing, rest.to(chunk)))
        terms["transition_action"] = soft_term(
            change,
            model.action_projection(model.action_encoder(chunk, missing)),
            model.scale("transition_action"),
            chunk,
            loss.action_beta,
            partial(near_duplicates, episode[begun], timestep[begun], gap),
            (moving if moving.any() else torch.ones_like(moving)).float(),
            share,
        )
    pairs = pairing(
        torch.arange(len(first), device=first.device),
        batch.text_of_row[first],
        batch.ids["goal_id"][first],
        batch.ids["scene_id"][first],
        frames=len(first),
        texts=len(language),
    )
    told, texts, pairs = pairs.told()
    if loss.transition_language and len(told):
        terms["transition_language"] = vision_language_term(
            every.index_select(0, told),
            language.index_select(0, texts),
            model.scale("transition_language"),
            pairs,
            torch.ones_like(told, dtype=torch.float32),
            share,
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
