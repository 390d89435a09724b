"""The terms of stage one, from embeddings and ids to named losses and the health of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vla.losses.contrastive import (
    at_least_float32,
    collision_rate,
    entropy,
    info_nce,
    info_nce_chance,
    info_nce_of,
    soft_info_nce,
    soft_targets,
    weighted_mean,
)


@dataclass(frozen=True)
class Term:
    """One loss term with what makes its value readable, all () in nats."""

    loss: Tensor
    chance: Tensor
    floor: Tensor


def vision_language_term(
    vision: Tensor,
    language: Tensor,
    scale: Tensor,
    positives: Tensor,
    progress: Tensor,
) -> Term:
    """Symmetric multi-positive InfoNCE between images and the batch's distinct texts, positives by goal.

    An early frame does not determine its instruction, so images weigh in by their progress.

    Args:
        vision: (f, d) unit norm. language: (u, d) unit norm, one row a distinct text.
        scale: () exponentiated.
        positives: (f, u) bool, see `goal_positives`.
        progress: (f,) in (0, 1], share of the episode that has passed.
    """
    loss = info_nce(vision, language, scale, positives, weights=progress)
    back = info_nce(language, vision, scale, positives.T)
    chance = info_nce_chance(positives, weights=progress) + info_nce_chance(positives.T)
    return Term((loss + back) / 2, chance / 2, torch.zeros_like(loss))


def word_patch_term(similarity: Tensor, scale: Tensor, positives: Tensor, valid: Tensor) -> Term:
    """Symmetric multi-positive InfoNCE on the late interaction of images and texts (`late_interaction`).

    Args:
        similarity: (f, u). scale: () exponentiated.
        positives: (f, u) bool, see `goal_positives`.
        valid: (f, u) bool, False where a text of another goal is true of the picture too.
    """
    valid = valid | positives
    logits = scale * at_least_float32(similarity)
    loss = info_nce_of(logits, positives, valid=valid) + info_nce_of(logits.T, positives.T, valid=valid.T)
    chance = info_nce_chance(positives, valid) + info_nce_chance(positives.T, valid.T)
    return Term(loss / 2, chance / 2, torch.zeros_like(loss))


def late_interaction(patches: Tensor, words: Tensor, words_mask: Tensor, sharpness: float = 20.0) -> Tensor:
    """(b, u) mean over a text's words of the best cosine among an image's patches (arXiv:2111.07783).

    Best is a softmax-weighted mean, so that at the start, when all patches are equally wrong, all of them learn.

    Args:
        patches: (b, n, d) unit norm. words: (u, l, d) unit norm. words_mask: (u, l) true for words.
        sharpness: of the softmax over patches; infinite is the maximum.
    """
    with torch.autocast(patches.device.type, enabled=False):  # a scale of 100 would magnify rounding
        real = words_mask.flatten().nonzero()[:, 0]  # (w,) positions of words that are not padding
        named = words.flatten(0, 1)[real]  # (w, d)
        # Images at a time: what fits a CPU's cache is three times as fast.
        images = 4 if patches.device.type == "cpu" else len(patches)
        blocks = []
        for block in patches.split(images):
            cosines = (named @ block.flatten(0, 1).T).unflatten(-1, block.shape[:2])  # (w, images, n)
            blocks.append(((sharpness * cosines).softmax(-1) * cosines).sum(-1))
        best = torch.cat(blocks, dim=1)  # (w, b)
        text = real // words_mask.shape[1]  # (w,)
        share = 1 / words_mask.sum(-1).to(best.dtype)[text]  # (w,)
        return best.new_zeros(len(words), len(patches)).index_add(0, text, best * share[:, None]).T


def goal_positives(frame_of_row: Tensor, goal_of_row: Tensor, text_of_row: Tensor, goal_of_text: Tensor) -> Tensor:
    """(f, u) bool: the texts of an image's rows, and all others of their goals.

    Args:
        frame_of_row, goal_of_row, text_of_row: (b,) image index, goal id and text index of each row.
        goal_of_text: (u,) goal id of each text.
    """
    own = torch.nn.functional.one_hot(text_of_row, len(goal_of_text)).bool()
    same = (own | (goal_of_row[:, None] == goal_of_text[None, :])).float()  # (b, u)
    frames = int(frame_of_row.max()) + 1
    return same.new_zeros(frames, same.shape[1]).index_add_(0, frame_of_row, same) > 0


def other_scene(scene_of_row: Tensor, text_of_row: Tensor, texts: int) -> Tensor:
    """(b, u) bool: False where a text is used in the row's own scene, whose objects it then names truly."""
    known = scene_of_row >= 0
    same = (scene_of_row[:, None] == scene_of_row[None, :]) & known[:, None] & known[None, :]  # (b, b)
    uses = torch.nn.functional.one_hot(text_of_row, texts).float()  # (b, u)
    return (same.float() @ uses) == 0


def soft_term(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    distances: Tensor,
    beta: float,
    valid: Tensor,
    weights: Tensor,
) -> Term:
    """Symmetric InfoNCE between rows and rows, soft targets by the distance of what the keys encode.

    Args:
        queries, keys: (b, d) unit norm. scale: () exponentiated.
        distances: (b, b) symmetric. beta: width of the targets in the unit of the distances.
        valid: (b, b) symmetric bool with a true diagonal. weights: (b,), 0 leaves a row out as query.
    """
    targets = soft_targets(distances, beta, valid)
    forward = soft_info_nce(queries, keys, scale, targets, valid=valid, weights=weights)
    backward = soft_info_nce(keys, queries, scale, targets, valid=valid, weights=weights)
    return Term(
        (forward + backward) / 2,
        weighted_mean(valid.sum(1).float().log(), weights),
        entropy(targets, weights),
    )


def near_duplicates(episode_id: Tensor, timestep: Tensor, gap: int) -> Tensor:
    """(b, b) bool: other frames of the same episode closer than `gap` timesteps; neither positive nor negative."""
    close = (episode_id[:, None] == episode_id[None, :]) & ((timestep[:, None] - timestep[None, :]).abs() < gap)
    return close.fill_diagonal_(False)


def idle_chunks(action_chunk: Tensor, action_is_pad: Tensor, rest: Tensor, tolerance: float = 0.05) -> Tensor:
    """(b,) bool: chunks (b, h, a) that stay within `tolerance` of the resting action (a,), all normalised."""
    at_rest = ((action_chunk - rest).abs() <= tolerance).all(-1)  # (b, h)
    return (at_rest | action_is_pad).all(-1)


def mean_squared_distances(x: Tensor) -> Tensor:
    """(b, ...) -> (b, b) mean squared differences, float32 at least, exactly zero on the diagonal."""
    flat = at_least_float32(x.flatten(1))
    return (torch.cdist(flat, flat).square() / flat.shape[1]).fill_diagonal_(0.0)


def batch_health(goal_id: Tensor, scene_id: Tensor, idle: Tensor) -> dict[str, Tensor]:
    """Distinct goals and scenes, collision rate and idle-chunk rate of a batch of (b,) ids."""
    return {
        "distinct_goals": goal_id.unique().numel() * torch.ones(()),
        "distinct_scenes": scene_id.unique().numel() * torch.ones(()),
        "collision_rate": collision_rate(goal_id),
        "idle_rate": idle.float().mean(),
    }
