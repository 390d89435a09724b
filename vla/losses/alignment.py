"""The terms of stage one, from embeddings and ids to named losses and the health of the batch.

No term keeps a mask of all pairs: parts of the rows are compared with all columns, and who belongs to whom is looked up by id.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vla.losses.contrastive import (
    at_least_float32,
    collision_rate,
    entropy,
    info_nce,
    info_nce_chance,
    info_nce_of,
    sigmoid_chance,
    sigmoid_loss,
    soft_info_nce,
    soft_targets,
    weighted_mean,
)
from vla.losses.pairing import Pairing, Relation
from vla.losses.rowwise import WHOLE, Share, Term, in_parts, spans

GROUP = 192  # images that are compared with each other's texts word by word
COSINES = 1 << 19  # of words with patches, computed at a time: what fits a CPU's cache is faster
WORDS = 128  # that are compared: a multiple of it, since kernels are compiled for every shape
SHARPNESS = 20.0  # of the softmax over patches
SLOPES = 1 << 22  # that lie together: glibc takes ever new memory for what is larger than 32 MiB
KEPT_COSINES = 1 << 24  # of a call, whose slopes are kept for the gradient; beyond they are computed anew


def vision_language_term(
    vision: Tensor, language: Tensor, scale: Tensor, pairs: Pairing, progress: Tensor, share: Share = WHOLE
) -> Term:
    """Symmetric multi-positive InfoNCE between images and the batch's distinct texts, positives by goal.

    An early frame does not determine its instruction, so images weigh in by their progress.

    Args:
        vision: (f, d) unit norm. language: (u, d) unit norm, one row a distinct text.
        scale: () exponentiated.
        pairs: which of them belong together.
        progress: (f,) in (0, 1], share of the episode that has passed.
        share: the part of the pairs to compare; terms of all shares add up.
    """
    progress = progress.to(at_least_float32(vision).dtype)
    images, texts, weight = len(vision), len(language), progress.sum()

    def to_texts(span: slice, vision: Tensor, language: Tensor, scale: Tensor) -> Term:
        positives, weights = pairs.positives(span), progress[span]
        loss = info_nce(vision[span], language, scale, positives, weights=weights)
        return weights.sum() / weight * _term(loss, info_nce_chance(positives, weights=weights))

    def to_images(span: slice, vision: Tensor, language: Tensor, scale: Tensor) -> Term:
        positives = pairs.positives(slice(None), span).T
        loss = info_nce(language[span], vision, scale, positives)
        return len(positives) / texts * _term(loss, info_nce_chance(positives))

    tensors = (vision, language, scale)
    of_images = in_parts(to_texts, images, texts, *tensors, share=share)
    return 0.5 * (of_images + in_parts(to_images, texts, images, *tensors, share=share))


def vision_language_sigmoid_term(
    vision: Tensor,
    language: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairing,
    progress: Tensor,
    share: Share = WHOLE,
) -> Term:
    """The same pairs as independent yes-or-no questions: the multi-label sigmoid loss, averaged over images.

    Args: those of `vision_language_term`, and () `bias` of all logits.
    """
    progress = progress.to(at_least_float32(vision).dtype)
    weight = progress.sum()

    def part(span: slice, vision: Tensor, language: Tensor, scale: Tensor, bias: Tensor) -> Term:
        positives, weights = pairs.positives(span), progress[span]
        loss = sigmoid_loss(vision[span], language, scale, bias, positives, weights=weights)
        return (
            weights.sum() / weight * _term(loss, sigmoid_chance(positives, weights=weights))
        )  # 0 bounds it from below

    return in_parts(part, len(vision), len(language), vision, language, scale, bias, share=share)


@dataclass(frozen=True)
class Group:
    """Consecutive images that are compared word by word, with the texts of their goals and the minimal pairs of these."""

    images: slice
    texts: Tensor  # (t,) ascending
    asked: int  # how many of them are of the images' goals

    def within(self, images: slice) -> "Group":
        """What it shares with some consecutive images, counted from the first of these."""
        first = max(self.images.start, images.start) - images.start
        return Group(
            slice(first, max(first, min(self.images.stop, images.stop) - images.start)), self.texts, self.asked
        )


def groups_of(pairs: Pairing) -> list[Group]:
    """Groups of at most `GROUP` images, so that comparing words with patches grows with the batch and not with its square.

    A batch's images are in the data set's order, so a group holds whole scenes: its negatives are the hard ones.
    """
    groups = []
    for images in spans(len(pairs.scene_of_frame), GROUP):
        asked = pairs.goal_texts.of(pairs.goal_of_row[pairs.rows_of(images)])
        paired = pairs.pair_texts.of(pairs.scene_of_frame[images])
        groups.append(Group(images, torch.cat([asked, paired]).unique(), len(asked)))
    return groups


def grouped_late_interaction(
    patches: Tensor, words: Tensor, words_mask: Tensor, groups: Sequence[Group], width: int
) -> Tensor:
    """(b, width) `late_interaction` of images with the texts of their group; 0 in columns beyond these.

    Args:
        patches: (b, n, d). words, words_mask: (u, l, d) and (u, l).
        groups: of these images, one after another. width: texts of the largest group of the batch.
    """
    parts = []
    for group in groups:
        own = patches[group.images]
        if len(group.texts):
            named = words.index_select(0, group.texts)
            similarity = late_interaction(own, named, words_mask[group.texts])
            parts.append(nn.functional.pad(similarity, (0, width - len(group.texts))))
        else:
            parts.append(own.new_zeros(len(own), width))
    return torch.cat(parts)


def word_patch_term(
    similarity: Tensor, scale: Tensor, pairs: Pairing, groups: Sequence[Group], share: Share = WHOLE
) -> Term:
    """Symmetric multi-positive InfoNCE on the late interaction of images and the texts of their group.

    Args:
        similarity: (f, t), see `grouped_late_interaction`. scale: () exponentiated.
        pairs: which of them belong together; texts that are merely true of an image are left out.
        groups: who is compared with whom.
        share: the groups to compare; terms of all shares add up.
    """
    told = torch.zeros(len(similarity), dtype=torch.bool, device=similarity.device)
    told[pairs.frame_of_row] = True
    groups = [group for group in groups if len(group.texts)]
    images, texts = int(told.sum()), sum(group.asked for group in groups)

    def of_group(number: slice, similarity: Tensor, scale: Tensor) -> Term:
        group = groups[number.start]
        shown = told[group.images].nonzero()[:, 0]
        logits = scale * at_least_float32(similarity[group.images, : len(group.texts)][shown])
        positives = pairs.positives(group.images, group.texts)[shown]
        valid = pairs.decided(group.images, group.texts)[shown]
        to_texts = _term(info_nce_of(logits, positives, valid=valid), info_nce_chance(positives, valid))
        own = positives.any(0)  # minimal pairs belong to no image
        positives, valid = positives.T[own], valid.T[own]
        to_images = _term(info_nce_of(logits.T[own], positives, valid=valid), info_nce_chance(positives, valid))
        return 0.5 * (len(logits) / images * to_texts + len(positives) / texts * to_images)

    return in_parts(of_group, len(groups), 1, similarity, scale, pairs=1, share=share)


def late_interaction(patches: Tensor, words: Tensor, words_mask: Tensor) -> Tensor:
    """(b, u) mean over a text's words of the best cosine among an image's patches (arXiv:2111.07783).

    Best is a softmax-weighted mean, so that at the start, when all patches are equally wrong, all of them learn.

    Args:
        patches: (b, n, d) unit norm. words: (u, l, d) unit norm. words_mask: (u, l) true for words.
    """
    real = words_mask.flatten().nonzero()[:, 0]  # (w,) positions of words that are not padding
    filled = nn.functional.pad(real, (0, -len(real) % WORDS))  # what is added counts for nothing
    named = words.flatten(0, 1)[filled]  # (w, d)
    cosines = max(1, len(named) * patches.shape[1])  # of an image
    best_of = partial(SoftBest.apply, named)
    if torch.is_grad_enabled() and len(patches) * cosines > KEPT_COSINES:
        best_of = partial(checkpoint, best_of, use_reentrant=False, preserve_rng_state=False)
    best = torch.cat([best_of(block) for block in patches.split(max(1, SLOPES // cosines))], dim=1)  # (w, b)
    text = real // words_mask.shape[1]  # (w,)
    share = 1 / words_mask.sum(-1).to(best.dtype)[text]  # (w,)
    return best.new_zeros(len(words), len(patches)).index_add(0, text, best[: len(real)] * share[:, None]).T


class SoftBest(torch.autograd.Function):
    """(w, d) words and (b, n, d) patches -> (w, b) each word's mean cosine with an image's patches, weighted by their softmax.

    The products are the towers' work, in their precision; everything after is float32. For the gradient the cosines' slopes alone are kept.
    """

    @staticmethod
    def forward(ctx, words: Tensor, patches: Tensor) -> Tensor:
        kind = words.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else words.dtype
        words, patches = words.to(precision), patches.to(precision)
        slopes = at_least_float32(words[:0]).new_empty(len(words), *patches.shape[:2])
        best = slopes.new_empty(slopes.shape[:2])
        for images in spans(len(patches), max(1, COSINES // max(1, len(words) * patches.shape[1]))):
            cosines = at_least_float32(words @ patches[images].flatten(0, 1).T).view_as(slopes[:, images])
            weights = (SHARPNESS * cosines).softmax(-1)
            best[:, images] = (weights * cosines).sum(-1)
            away = cosines - best[:, images, None]
            torch.addcmul(weights, weights, away, value=SHARPNESS, out=slopes[:, images])
        ctx.save_for_backward(words, patches, slopes)
        return best

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        words, patches, slopes = ctx.saved_tensors
        of_cosines = (gradient[..., None] * slopes).flatten(1).to(words.dtype)  # (w, b * n)
        return of_cosines @ patches.flatten(0, 1), (of_cosines.T @ words).view_as(patches)


def soft_term(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    encoded: Tensor,
    beta: float,
    invalid: Callable[[slice], Tensor],
    weights: Tensor,
    share: Share = WHOLE,
) -> Term:
    """Symmetric InfoNCE between rows and rows, soft targets by the distance of what the keys encode.

    Args:
        queries, keys: (b, d) unit norm. scale: () exponentiated.
        encoded: (b, ...) what the keys encode; targets fall with the mean squared difference.
        beta: width of the targets in the unit of the mean squared differences.
        invalid: rows -> (rows, b) bool, pairs that count neither way, symmetric; never a row with itself.
        weights: (b,), 0 leaves a row out as query.
        share: the rows to compare with all others; terms of all shares add up.
    """
    weights = weights.to(at_least_float32(queries).dtype)
    flat, weight, count = at_least_float32(encoded.flatten(1)), weights.sum(), len(queries)

    def part(span: slice, queries: Tensor, keys: Tensor, scale: Tensor) -> Term:
        valid, w = ~invalid(span), weights[span]
        targets = soft_targets(mean_squared_distances(flat, span), beta, valid)
        forward = soft_info_nce(queries[span], keys, scale, targets, valid=valid, weights=w)
        backward = soft_info_nce(keys[span], queries, scale, targets, valid=valid, weights=w)
        chance = weighted_mean(valid.sum(1).float().log(), w)
        return w.sum() / weight * Term((forward + backward) / 2, chance, entropy(targets, w))

    return in_parts(part, count, count, queries, keys, scale, share=share)


def near_duplicates(episode_id: Tensor, timestep: Tensor, gap: int, rows: slice = slice(None)) -> Tensor:
    """(rows, b) bool: other frames of the same episode closer than `gap` timesteps; neither positive nor negative."""
    index = torch.arange(len(timestep), device=timestep.device)
    close = (episode_id[rows, None] == episode_id[None, :]) & ((timestep[rows, None] - timestep[None, :]).abs() < gap)
    return close & (index[rows, None] != index[None, :])


def of_other_goals(asked: Relation, images: Tensor, rows: slice = slice(None)) -> Tensor:
    """(rows, n) bool: which of (n,) ascending images share no goal with those at `rows` among them.

    Args:
        asked: the goals of each image, at least one; without an instruction one that no other episode has.
    """
    goals = asked.of(images[rows])
    has = asked.table(images, goals).float()  # (n, goals)
    return has[rows] @ has.T == 0


def idle_chunks(action_chunk: Tensor, action_is_pad: Tensor, rest: Tensor, tolerance: float = 0.05) -> Tensor:
    """(b,) bool: chunks (b, h, a) that stay within `tolerance` of the resting action (a,), all normalised."""
    at_rest = ((action_chunk - rest).abs() <= tolerance).all(-1)  # (b, h)
    return (at_rest | action_is_pad).all(-1)


def mean_squared_distances(flat: Tensor, rows: slice = slice(None)) -> Tensor:
    """(b, n) -> (rows, b) mean squared differences, exactly zero between a row and itself."""
    index = torch.arange(len(flat), device=flat.device)
    squared = torch.cdist(flat[rows], flat).square() / flat.shape[1]
    return squared.masked_fill(index[rows, None] == index[None, :], 0.0)


def batch_health(
    goal_id: Tensor, text_id: Tensor, scene_id: Tensor, episode_id: Tensor, idle: Tensor
) -> dict[str, Tensor]:
    """Distinct goals, instructions and scenes, collision rate and idle-chunk rate of a batch of (b,) ids.

    Rows without a goal (-1) have no instruction; an episode of no known scene (-1) is one by itself.
    """
    scene_id = torch.where(scene_id >= 0, scene_id, -1 - episode_id)
    goal_id, text_id = goal_id[goal_id >= 0], text_id[goal_id >= 0]
    return {
        "distinct_goals": goal_id.unique().numel() * torch.ones(()),
        "distinct_instructions": text_id.unique().numel() * torch.ones(()),
        "distinct_scenes": scene_id.unique().numel() * torch.ones(()),
        "collision_rate": collision_rate(goal_id),
        "idle_rate": idle.float().mean(),
    }


def _term(loss: Tensor, chance: Tensor) -> Term:
    """A term whose floor is 0, because the log is of the *sum* over the positives: one good positive is enough for a row.

    Whoever belongs to whom, if everyone belongs to someone: choose pairs that belong together until each image and text is in
    one, and drop those that are not needed. What is left are stars, a centre and the leaves that are its own. With one direction for
    each star, everyone's negatives are in other stars, and the loss goes to 0 as the scale grows.
    """
    return Term(loss, chance, torch.zeros_like(chance))
