"""The terms of stage one, from embeddings and ids to named losses and the health of the batch.

No term keeps a mask of all pairs: parts of the rows are compared with all columns, and who belongs to whom is looked up by id.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from vla.losses.rowwise import Term, in_parts, spans

GROUP = 192  # images that are compared with each other's texts word by word
COSINES = 1 << 19  # of words with patches, computed at a time: what fits a CPU's cache is faster
KEPT_COSINES = 1 << 23  # of a call, whose intermediate results are kept for the gradient; beyond they are computed anew


@dataclass(frozen=True)
class Pairing:
    """Which texts belong to which images, as lookups by id.

    A text belongs to the images that are asked one of its goals. Other images of a scene it is used in neither have it
    nor lack it: it names their objects truly.
    """

    frame_of_row: Tensor  # (b,) image of each row
    goal_of_row: Tensor  # (b,) index of each row's goal
    scene_of_frame: Tensor  # (f,) index of each image's scene, -1 where unknown
    goal_texts: Tensor  # (g, u) bool: the texts a goal is asked with
    scene_texts: Tensor  # (s, u) bool: the texts used in a scene
    pair_texts: Tensor  # (s, u) bool: minimal pairs that a scene has drawn; others know nothing of them

    def positives(self, frames: slice, texts: slice | Tensor = slice(None)) -> Tensor:
        """(frames, texts) bool."""
        first, stop, _ = frames.indices(len(self.scene_of_frame))
        rows = ((self.frame_of_row >= first) & (self.frame_of_row < stop)).nonzero()[:, 0]
        asked = self.goal_texts[self.goal_of_row[rows]][:, texts]  # (rows, texts)
        found = torch.zeros(stop - first, asked.shape[1], device=asked.device)
        return found.index_add_(0, self.frame_of_row[rows] - first, asked.float()) > 0

    def told(self) -> tuple[Tensor, Tensor, "Pairing"]:
        """(n,) images and (m,) texts that belong to any of the other side, and the lookups among these alone."""
        told = torch.zeros(len(self.scene_of_frame), dtype=torch.bool, device=self.frame_of_row.device)
        told[self.frame_of_row] = True
        asked = self.goal_texts.any(0)
        if told.all() and asked.all():
            return told.nonzero()[:, 0], asked.nonzero()[:, 0], self
        pairs = Pairing(
            frame_of_row=(told.cumsum(0) - 1)[self.frame_of_row],
            goal_of_row=self.goal_of_row,
            scene_of_frame=self.scene_of_frame[told],
            goal_texts=self.goal_texts[:, asked],
            scene_texts=self.scene_texts[:, asked],
            pair_texts=self.pair_texts[:, asked],
        )
        return told.nonzero()[:, 0], asked.nonzero()[:, 0], pairs

    def decided(self, frames: slice, texts: slice | Tensor = slice(None)) -> Tensor:
        """(frames, texts) bool: whether a text is right or wrong of an image, not merely true."""
        scene = self.scene_of_frame[frames]
        known = (scene >= 0)[:, None]
        named = self.scene_texts[scene.clamp_min(0)][:, texts] & known
        paired = self.pair_texts[scene.clamp_min(0)][:, texts] & known
        asked = self.goal_texts.any(0)[texts]
        return torch.where(asked, ~named | self.positives(frames, texts), paired)


def pairing(
    frame_of_row: Tensor,
    text_of_row: Tensor,
    goal_id: Tensor,
    scene_id: Tensor,
    frames: int,
    texts: int,
    pair_of_row: Tensor | None = None,
) -> Pairing:
    """The lookups of a batch: (b,) ids of its rows, which show `frames` images and are asked with `texts` texts.

    Rows without a goal (-1) belong to no text. `pair_of_row` is a minimal pair of each row's text, -1 where there is none.
    """
    asked = goal_id >= 0
    paired = text_of_row.new_full((0,), 0) if pair_of_row is None else pair_of_row[asked]
    frame_of_row, text_of_row, goal_id, scene_id = (x[asked] for x in (frame_of_row, text_of_row, goal_id, scene_id))
    goals, goal_of_row = goal_id.unique(return_inverse=True)
    scenes, scene_of_row = scene_id.unique(return_inverse=True)
    goal_texts = torch.zeros(len(goals), texts, dtype=torch.bool, device=goal_id.device)
    goal_texts[goal_of_row, text_of_row] = True
    scene_texts = torch.zeros(len(scenes), texts, dtype=torch.bool, device=goal_id.device)
    scene_texts[scene_of_row, text_of_row] = True
    pair_texts = torch.zeros_like(scene_texts)
    pair_texts[scene_of_row[: len(paired)][paired >= 0], paired[paired >= 0]] = True
    known = torch.where(scene_id >= 0, scene_of_row, -1)
    scene_of_frame = known.new_full((frames,), -1).index_copy_(0, frame_of_row, known)
    return Pairing(frame_of_row, goal_of_row, scene_of_frame, goal_texts, scene_texts, pair_texts)


def vision_language_term(vision: Tensor, language: Tensor, scale: Tensor, pairs: Pairing, progress: Tensor) -> Term:
    """Symmetric multi-positive InfoNCE between images and the batch's distinct texts, positives by goal.

    An early frame does not determine its instruction, so images weigh in by their progress.

    Args:
        vision: (f, d) unit norm. language: (u, d) unit norm, one row a distinct text.
        scale: () exponentiated.
        pairs: which of them belong together.
        progress: (f,) in (0, 1], share of the episode that has passed.
    """
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
    return 0.5 * (in_parts(to_texts, images, texts, *tensors) + in_parts(to_images, texts, images, *tensors))


def vision_language_sigmoid_term(
    vision: Tensor, language: Tensor, scale: Tensor, bias: Tensor, pairs: Pairing, progress: Tensor
) -> Term:
    """The same pairs as independent yes-or-no questions: the multi-label sigmoid loss, averaged over images.

    Args: those of `vision_language_term`, and () `bias` of all logits.
    """
    weight = progress.sum()

    def part(span: slice, vision: Tensor, language: Tensor, scale: Tensor, bias: Tensor) -> Term:
        positives, weights = pairs.positives(span), progress[span]
        loss = sigmoid_loss(vision[span], language, scale, bias, positives, weights=weights)
        return weights.sum() / weight * _term(loss, sigmoid_chance(positives, weights=weights))

    return in_parts(part, len(vision), len(language), vision, language, scale, bias)


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
        rows = (pairs.frame_of_row >= images.start) & (pairs.frame_of_row < images.stop)
        texts = pairs.goal_texts[pairs.goal_of_row[rows]].any(0)
        asked = int(texts.sum())
        scenes = pairs.scene_of_frame[images]
        texts |= pairs.pair_texts[scenes[scenes >= 0]].any(0)
        groups.append(Group(images, texts.nonzero()[:, 0], asked))
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


def word_patch_term(similarity: Tensor, scale: Tensor, pairs: Pairing, groups: Sequence[Group]) -> Term:
    """Symmetric multi-positive InfoNCE on the late interaction of images and the texts of their group.

    Args:
        similarity: (f, t), see `grouped_late_interaction`. scale: () exponentiated.
        pairs: which of them belong together; texts that are merely true of an image are left out.
        groups: who is compared with whom.
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

    return in_parts(of_group, len(groups), 1, similarity, scale, pairs=1)


def late_interaction(patches: Tensor, words: Tensor, words_mask: Tensor, sharpness: float = 20.0) -> Tensor:
    """(b, u) mean over a text's words of the best cosine among an image's patches (arXiv:2111.07783).

    Best is a softmax-weighted mean, so that at the start, when all patches are equally wrong, all of them learn.

    Args:
        patches: (b, n, d) unit norm. words: (u, l, d) unit norm. words_mask: (u, l) true for words.
        sharpness: of the softmax over patches; infinite is the maximum.
    """
    real = words_mask.flatten().nonzero()[:, 0]  # (w,) positions of words that are not padding
    named = words.flatten(0, 1)[real]  # (w, d)

    def best_of(named: Tensor, block: Tensor) -> Tensor:
        # The products are the towers' work, in their precision; everything after is float32.
        cosines = at_least_float32(named @ block.flatten(0, 1).T).unflatten(-1, block.shape[:2])  # (w, images, n)
        return ((sharpness * cosines).softmax(-1) * cosines).sum(-1)

    images = max(1, COSINES // max(1, len(named) * patches.shape[1]))
    if len(patches) * len(named) * patches.shape[1] <= KEPT_COSINES:
        best = torch.cat([best_of(named, block) for block in patches.split(images)], dim=1)  # (w, b)
    else:
        blocks = [checkpoint(best_of, named, block, use_reentrant=False) for block in patches.split(images)]
        best = torch.cat(blocks, dim=1)
    text = real // words_mask.shape[1]  # (w,)
    share = 1 / words_mask.sum(-1).to(best.dtype)[text]  # (w,)
    return best.new_zeros(len(words), len(patches)).index_add(0, text, best * share[:, None]).T


def soft_term(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    encoded: Tensor,
    beta: float,
    invalid: Callable[[slice], Tensor],
    weights: Tensor,
) -> Term:
    """Symmetric InfoNCE between rows and rows, soft targets by the distance of what the keys encode.

    Args:
        queries, keys: (b, d) unit norm. scale: () exponentiated.
        encoded: (b, ...) what the keys encode; targets fall with the mean squared difference.
        beta: width of the targets in the unit of the mean squared differences.
        invalid: rows -> (rows, b) bool, pairs that count neither way, symmetric; never a row with itself.
        weights: (b,), 0 leaves a row out as query.
    """
    flat, weight, count = at_least_float32(encoded.flatten(1)), weights.sum(), len(queries)

    def part(span: slice, queries: Tensor, keys: Tensor, scale: Tensor) -> Term:
        valid, w = ~invalid(span), weights[span]
        targets = soft_targets(mean_squared_distances(flat, span), beta, valid)
        forward = soft_info_nce(queries[span], keys, scale, targets, valid=valid, weights=w)
        backward = soft_info_nce(keys[span], queries, scale, targets, valid=valid, weights=w)
        chance = weighted_mean(valid.sum(1).float().log(), w)
        return w.sum() / weight * Term((forward + backward) / 2, chance, entropy(targets, w))

    return in_parts(part, count, count, queries, keys, scale)


def near_duplicates(episode_id: Tensor, timestep: Tensor, gap: int, rows: slice = slice(None)) -> Tensor:
    """(rows, b) bool: other frames of the same episode closer than `gap` timesteps; neither positive nor negative."""
    index = torch.arange(len(timestep), device=timestep.device)
    close = (episode_id[rows, None] == episode_id[None, :]) & ((timestep[rows, None] - timestep[None, :]).abs() < gap)
    return close & (index[rows, None] != index[None, :])


def idle_chunks(action_chunk: Tensor, action_is_pad: Tensor, rest: Tensor, tolerance: float = 0.05) -> Tensor:
    """(b,) bool: chunks (b, h, a) that stay within `tolerance` of the resting action (a,), all normalised."""
    at_rest = ((action_chunk - rest).abs() <= tolerance).all(-1)  # (b, h)
    return (at_rest | action_is_pad).all(-1)


def mean_squared_distances(flat: Tensor, rows: slice = slice(None)) -> Tensor:
    """(b, n) -> (rows, b) mean squared differences, exactly zero between a row and itself."""
    index = torch.arange(len(flat), device=flat.device)
    squared = torch.cdist(flat[rows], flat).square() / flat.shape[1]
    return squared.masked_fill(index[rows, None] == index[None, :], 0.0)


def batch_health(goal_id: Tensor, scene_id: Tensor, idle: Tensor) -> dict[str, Tensor]:
    """Distinct goals and scenes, collision rate and idle-chunk rate of a batch of (b,) ids; rows without a goal (-1) do not count."""
    goal_id = goal_id[goal_id >= 0]
    return {
        "distinct_goals": goal_id.unique().numel() * torch.ones(()),
        "distinct_scenes": scene_id.unique().numel() * torch.ones(()),
        "collision_rate": collision_rate(goal_id),
        "idle_rate": idle.float().mean(),
    }


def _term(loss: Tensor, chance: Tensor) -> Term:
    """A term whose loss can reach zero."""
    return Term(loss, chance, torch.zeros_like(chance))
