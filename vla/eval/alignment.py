"""Measures of an alignment on held-out episodes: retrieval, zero-shot instruction accuracy, probes."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from torch import Tensor

from vla.data.batches import TripletSource
from vla.data.episodes import Episodes, task_of_episode
from vla.eval.retrieval import alignment, rank_me, recall_at_k, recall_at_k_chance, uniformity
from vla.losses.contrastive import unit
from vla.models.alignment import AlignmentModel
from vla.models.clip import Encoder, patch_embeds, pixel_values, text_features, vision_features, word_embeds
from vla.types import TripletBatch, UserError

RANKS = (1, 5, 10)  # k of R@k
MAX_ROWS = 1500
BATCH = 250


@dataclass(frozen=True)
class Embedded:
    """Features of some rows; b rows, u texts of the data set, all numpy float32."""

    batch: TripletBatch
    vision: np.ndarray  # (b, d)
    language: np.ndarray  # (u, d), 0 for texts that nothing compares
    context: np.ndarray  # (b, d)
    context_of_other_text: np.ndarray  # (b, d), the pictures with the instructions of other rows
    context_of_other_image: np.ndarray  # (b, d), the instructions with the pictures of other rows
    action: np.ndarray  # (b, d)
    pooled_context: np.ndarray  # (b, q * width), before the projection
    pooled_scene: np.ndarray  # (b, q * width), pooled without a text


def measure_alignment(
    model: AlignmentModel,
    source: TripletSource,
    train: np.ndarray,
    positions: np.ndarray,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> tuple[dict[str, float], Embedded]:
    """All measures on the episodes at `positions`, each `NAME` with its `NAME/chance` where one exists, and the rows' features.

    Probes are fitted on the episodes at `train`, evenly chosen.

    Raises:
        UserError: features are not finite.
    """
    held_out = embed_rows(model, source, spread_rows(source, positions, 12), input_ids, attention_mask)
    seen = embed_rows(model, source, spread_rows(source, train, 4), input_ids, attention_mask, compares_texts=False)
    for name, values in (*vars(held_out).items(), *vars(seen).items()):
        if name != "batch" and not np.isfinite(values).all():
            raise UserError(
                "features of the data are not finite, the encoder has diverged; train it anew, with another --output and a lower "
                "--optimizer.lr, or --precision=no where it was bf16"
            )
    measures = retrieval_measures(held_out)
    measures |= zero_shot_measures(held_out.vision, held_out.language, held_out.batch, source.episodes)
    measures |= probe_measures(seen, held_out, source)
    texts = np.unique(held_out.batch.text_id)
    measures["modality_gap"] = float(np.linalg.norm(held_out.vision.mean(0) - held_out.language[texts].mean(0)))
    own = held_out.language[held_out.batch.text_id]
    measures["alignment"] = alignment(held_out.vision, own)
    measures["alignment_context_action"] = alignment(held_out.context, held_out.action)
    for name in ("vision", "context", "action"):
        measures[f"rank_me_{name}"] = rank_me(getattr(held_out, name))
        measures[f"uniformity_{name}"] = uniformity(getattr(held_out, name))
    if len(texts) > 1:
        measures["uniformity_language"] = uniformity(held_out.language[texts])
    goals = [held_out.context[held_out.batch.goal_id == goal] for goal in np.unique(held_out.batch.goal_id)]
    within = [uniformity(members) for members in goals if len(members) > 1]
    if within:
        measures["uniformity_context_within_goal"] = float(np.mean(within))
    return measures, held_out


@torch.no_grad()
def encoder_measures(
    clip: Encoder, source: TripletSource, positions: np.ndarray, input_ids: Tensor, attention_mask: Tensor
) -> dict[str, float]:
    """The measures that need the encoders alone, on the episodes at `positions`: retrieval and zero-shot accuracy."""
    batch = source.gather(spread_rows(source, positions, 12))
    device = clip.logit_scale.device
    used = compared_texts(batch, source.episodes)
    language = language_embeds(clip, input_ids, attention_mask, used)
    vision = []
    for first in range(0, len(batch.frame_of_row), BATCH):
        frames = batch.frames[batch.frame_of_row[first : first + BATCH]]
        pixels = pixel_values(torch.from_numpy(frames).to(device))
        vision.append(unit(clip.visual_projection(vision_features(clip, pixels)[1])))
    features = torch.cat(vision).float().cpu().numpy(), language
    return picture_text_measures(*features, batch) | zero_shot_measures(*features, batch, source.episodes)


def compared_texts(batch: TripletBatch, episodes: Episodes) -> np.ndarray:
    """(n,) the texts that measures of a batch compare: all wordings of the goals that are asked of its rows or in their scenes."""
    in_scene = (episodes.scene_id >= 0) & np.isin(episodes.scene_id, batch.scene_id)
    goals = np.unique(episodes.goal_id[in_scene | np.isin(episodes.goal_id, batch.goal_id)])
    told = np.isin(episodes.goal_id, goals[goals >= 0])
    return np.union1d(episodes.text_id[told], batch.text_id)


def language_embeds(clip: Encoder, input_ids: Tensor, attention_mask: Tensor, used: np.ndarray) -> np.ndarray:
    """(u, d) unit-norm embeddings of the (n,) `used` texts, some at a time; 0 for the other ones, which may be millions of captions."""
    embeds = np.zeros((len(input_ids), clip.text_projection.out_features), np.float32)
    for first in range(0, len(used), BATCH):
        texts = used[first : first + BATCH]
        tokens = (t[texts].to(clip.logit_scale.device) for t in (input_ids, attention_mask))
        embeds[texts] = unit(clip.text_projection(text_features(clip, *tokens)[1])).float().cpu().numpy()
    return embeds


def spread_rows(source: TripletSource, positions: np.ndarray, most: int) -> np.ndarray:
    """At most MAX_ROWS rows, spread over the episodes: up to `most` of each, at least two, first and last included."""
    start = source.episodes.start
    per_episode = max(2, min(most, MAX_ROWS // max(1, len(positions))))
    count = min(len(positions), MAX_ROWS // per_episode)
    positions = positions[np.linspace(0, len(positions) - 1, count).round().astype(int)]
    return np.concatenate(
        [np.unique(np.linspace(start[p], start[p + 1] - 1, per_episode).round().astype(int)) for p in positions]
    )


def of_another_goal(goal_id: np.ndarray) -> np.ndarray:
    """(b,) for each row the first one of another goal from half of all rows away on; that row itself where all have one goal."""
    other = np.roll(np.arange(len(goal_id)), len(goal_id) // 2)
    if len(np.unique(goal_id)) > 1:
        while (same := goal_id[other] == goal_id).any():
            other[same] = (other[same] + 1) % len(goal_id)
    return other


@torch.no_grad()
def embed_rows(
    model: AlignmentModel,
    source: TripletSource,
    rows: np.ndarray,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    compares_texts: bool = True,
) -> Embedded:
    """Embed (b,) rows, not augmented, in evaluation mode's float32; `language` is 0 unless something `compares_texts`.

    The other row, whose text or picture the counterfactual contexts get, is of another goal, unless there is one alone.
    """
    device = model.clip.logit_scale.device
    batch = source.gather(rows)
    compared = compared_texts(batch, source.episodes) if compares_texts else np.empty(0, np.int64)
    language = language_embeds(model.clip, input_ids, attention_mask, compared)
    used, text_of_rows = np.unique(batch.text_id, return_inverse=True)
    mask = attention_mask[used].to(device)
    words, _ = text_features(model.clip, input_ids[used].to(device), mask)
    named = word_embeds(model.clip, words)
    columns: dict[str, list[Tensor]] = {}
    other = of_another_goal(batch.goal_id)
    # Most rows in one part with their other one, so that the tower sees few pictures twice.
    order = np.argsort(np.arange(len(rows)) % max(1, len(rows) // 2), kind="stable")
    for first in range(0, len(rows), BATCH):
        own = order[first : first + BATCH]
        others = other[own]
        shown, place = np.unique(batch.frame_of_row[np.concatenate([own, others])], return_inverse=True)
        here, there = torch.from_numpy(place).to(device).split(len(own))
        pixels = pixel_values(torch.from_numpy(batch.frames[shown]).to(device))
        tokens, pooled = vision_features(model.clip, pixels)
        told, told_others = (torch.from_numpy(text_of_rows[chosen]).to(device) for chosen in (own, others))
        context = partial(model.context_features, tokens, patch_embeds(model.clip, tokens), words, named, mask)
        contexts = context(here, told), context(here, told_others), context(there, told)
        chunk = torch.from_numpy(batch.action_chunk[own]).to(device)
        pad = torch.from_numpy(batch.action_is_pad[own]).to(device)
        outputs = {
            "vision": unit(model.clip.visual_projection(pooled[here])),
            "context": model.context_projection(contexts[0]),
            "context_of_other_text": model.context_projection(contexts[1]),
            "context_of_other_image": model.context_projection(contexts[2]),
            "action": model.action_projection(model.action_encoder(chunk, pad)),
            "pooled_context": contexts[0],
            "pooled_scene": model.scene_features(tokens[here]),
        }
        for name, value in outputs.items():
            columns.setdefault(name, []).append(value.float().cpu())
    back = np.argsort(order)
    arrays = {name: torch.cat(values).numpy()[back] for name, values in columns.items()}
    return Embedded(batch=batch, language=language, **arrays)


def retrieval_measures(held_out: Embedded) -> dict[str, float]:
    """Multi-positive R@1, R@5 and R@10: image -> instruction, instruction -> image, context -> action chunk.

    The last one also counterfactually, with the instruction or the picture of another row in the context: an embedding
    that uses both falls to chance level.

    For actions a key is right if it is the row's own chunk or one at most 0.01 mean squared units away.
    """
    batch = held_out.batch
    flat = batch.action_chunk.reshape(len(batch.action_chunk), -1)
    squared = (flat**2).sum(1)
    distance = (squared[:, None] + squared[None, :] - 2 * flat @ flat.T) / flat.shape[1]
    near = distance <= 0.01
    np.fill_diagonal(near, True)
    measures = picture_text_measures(held_out.vision, held_out.language, batch)
    measures |= recalls("context_to_action", held_out.context @ held_out.action.T, near)
    for other in ("text", "image") if len(np.unique(batch.goal_id)) > 1 else ():
        similarity = getattr(held_out, f"context_of_other_{other}") @ held_out.action.T
        for k in RANKS:
            name = f"context_to_action_r{k}_of_other_{other}"
            measures[name] = recall_at_k(similarity, near, k)
            measures[f"{name}/chance"] = measures[f"context_to_action_r{k}/chance"]
    return measures


def picture_text_measures(vision: np.ndarray, language: np.ndarray, batch: TripletBatch) -> dict[str, float]:
    """R@1, R@5 and R@10 between the distinct pictures and texts of b rows: (b, d), and (u, d) of all texts.

    A text is right for a picture if a goal that was told by it was asked of that picture; goals of one scene may share its first one.
    """
    pictures, shown, picture = np.unique(batch.frame_of_row, return_index=True, return_inverse=True)
    texts, text = np.unique(batch.text_id, return_inverse=True)
    goals, goal = np.unique(batch.goal_id, return_inverse=True)
    asked, told = (np.zeros((count, len(goals)), bool) for count in (len(pictures), len(texts)))
    asked[picture, goal] = told[text, goal] = True
    similarity = vision[shown] @ language[texts].T  # (pictures, texts)
    right = asked @ told.T
    return recalls("image_to_text", similarity, right) | recalls("text_to_image", similarity.T, right.T)


def recalls(name: str, similarity: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """Multi-positive R@1, R@5 and R@10 beside their chance levels."""
    measures = {}
    for k in RANKS:
        measures[f"{name}_r{k}"] = recall_at_k(similarity, positives, k)
        measures[f"{name}_r{k}/chance"] = recall_at_k_chance(positives, k)
    return measures


def zero_shot_measures(
    vision: np.ndarray, language: np.ndarray, batch: TripletBatch, episodes: Episodes
) -> dict[str, float]:
    """Is the episode's own instruction the most similar one among its scene's goals, in the second half of it?

    Where scenes are unknown or have one goal, the candidates are the instructions of all held-out goals. "zero_shot_reworded"
    tells every goal in other words of the data set, for episodes whose goal has them; "zero_shot_reworded/own_words" is of the
    same rows in the episodes' own words.
    """
    late = batch.progress > 0.5
    scene_goals: dict[int, dict[int, int]] = {}
    wordings: dict[int, list[int]] = {}
    for scene, goal, text in zip(episodes.scene_id, episodes.goal_id, episodes.text_id, strict=True):
        if goal >= 0:
            scene_goals.setdefault(int(scene), {}).setdefault(int(goal), int(text))
            wordings.setdefault(int(goal), []).append(int(text))
    wordings = {goal: sorted(set(texts)) for goal, texts in wordings.items()}
    everything = dict(zip(batch.goal_id.tolist(), batch.text_id.tolist(), strict=True))
    measured: dict[str, list[float]] = {}
    for row in np.flatnonzero(late):
        scene, own = int(batch.scene_id[row]), int(batch.goal_id[row])
        candidates = scene_goals.get(scene, {}) if scene >= 0 else {}
        if len(candidates) < 2:
            candidates = everything
        if len(candidates) < 2:
            continue
        candidates = candidates | {own: int(batch.text_id[row])}
        told = {"zero_shot": candidates}
        if len(wordings.get(own, ())) > 1:
            told["zero_shot_reworded/own_words"] = candidates
            told["zero_shot_reworded"] = {
                goal: next_of(wordings[goal], text) for goal, text in candidates.items() if goal >= 0
            }
        for name, texts in told.items():
            best = list(texts)[int((language[list(texts.values())] @ vision[row]).argmax())]
            measured.setdefault(name, []).append(best == own)
            if "/" not in name:
                measured.setdefault(f"{name}/chance", []).append(1 / len(texts))
    return {name: float(np.mean(values)) for name, values in measured.items()}


def next_of(values: list[int], value: int) -> int:
    """The one after `value`, which is among them, the first one after the last."""
    return values[(values.index(value) + 1) % len(values)]


def probe_measures(seen: Embedded, held_out: Embedded, source: TripletSource) -> dict[str, float]:
    """Linear probes on held-out episodes, fitted on seen ones.

    R^2 for the proprio state, from the patch tokens pooled without a text, and for the share of the episode that is left and
    the instructed object's position, from the text-conditioned context; the latter also without the text. Accuracy for
    the goal and the task, from the pooled image, among those that were seen.
    """
    to_go = [1 - e.batch.progress[:, None] for e in (seen, held_out)]
    measures = {
        "state_probe_r2": ridge_r2(seen.pooled_scene, seen.batch.state, held_out.pooled_scene, held_out.batch.state),
        "time_to_go_probe_r2": ridge_r2(seen.pooled_context, to_go[0], held_out.pooled_context, to_go[1]),
    }
    task = task_of_episode(source.episodes)
    labels = {
        "goal": (seen.batch.goal_id, held_out.batch.goal_id),
        "task": (task[seen.batch.episode_id], task[held_out.batch.episode_id]),
    }
    for name, (fitted, asked) in labels.items():
        measures |= class_probe(f"{name}_probe", seen.vision, fitted, held_out.vision, asked)
    if source.episodes.target is not None:
        targets = [
            source.episodes.target[source.episodes.start[e.batch.episode_id] + e.batch.timestep]
            for e in (seen, held_out)
        ]
        known = [np.isfinite(target).all(1) for target in targets]
        if all(rows.any() for rows in known):
            for name, features in (("target_probe_r2", "pooled_context"), ("target_probe_r2_no_text", "pooled_scene")):
                fitted, asked = (getattr(e, features)[rows] for e, rows in zip((seen, held_out), known, strict=True))
                measures[name] = ridge_r2(fitted, targets[0][known[0]], asked, targets[1][known[1]])
    return measures


def class_probe(
    name: str, seen: np.ndarray, seen_labels: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Accuracy of a linear classifier on the held-out rows whose label it was fitted on, and that of the commonest label.

    Nothing if it cannot be fitted or asked.

    Args:
        name: of the measure. seen, features: (b, d) and (h, d). seen_labels, labels: (b,) and (h,), of any kind.
    """
    known = np.isin(labels, seen_labels)
    classes, counts = np.unique(labels[known], return_counts=True)
    if len(np.unique(seen_labels)) < 2 or len(classes) == 0:
        return {}
    right = RidgeClassifier(alpha=1.0).fit(seen, seen_labels).predict(features[known]) == labels[known]
    return {name: float(right.mean()), f"{name}/chance": float(counts.max() / counts.sum())}


def ridge_r2(seen: np.ndarray, seen_targets: np.ndarray, features: np.ndarray, targets: np.ndarray) -> float:
    """R^2, averaged over target dimensions that vary, of a ridge regression fitted on the seen rows."""
    mean, std = seen.mean(0), seen.std(0) + 1e-6
    model = Ridge(alpha=10.0).fit((seen - mean) / std, seen_targets)
    predicted = model.predict((features - mean) / std).reshape(targets.shape)
    residual = ((targets - predicted) ** 2).sum(0)
    total = ((targets - targets.mean(0)) ** 2).sum(0)
    varies = total > 1e-8
    return float((1 - residual[varies] / total[varies]).mean()) if varies.any() else float("nan")
