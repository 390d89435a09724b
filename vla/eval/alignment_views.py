"""What an alignment report shows of held-out rows: a similarity heat map, a map of the embeddings, nearest neighbours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.manifold import TSNE

from vla.eval.alignment import Embedded

PICTURES = 8  # rows of the heat map
QUERIES, NEIGHBOURS = 4, 4


@dataclass(frozen=True)
class Views:
    """The numbers and pictures behind the drawings; b rows, p pictures against t texts, q queries with k neighbours."""

    position: np.ndarray  # (b, 2) t-SNE of the contexts; (0, 2) where there are too few
    goal_id: np.ndarray  # (b,)
    progress: np.ndarray  # (b,)
    similarity: np.ndarray  # (p, t) cosine of pooled images and instructions
    right: np.ndarray  # (p, t) bool, the instruction's goal is the picture's
    pictures: np.ndarray  # (p, H, W, 3) uint8
    instructions: tuple[str, ...]  # t
    neighbours: np.ndarray  # (q, 1 + k, H, W, 3) uint8, the query first
    neighbour_goal_id: np.ndarray  # (q, 1 + k)
    neighbour_instructions: tuple[str, ...]  # q * (1 + k), row by row
    named_goals: dict[str, str]  # goal id -> one of its instructions, the most frequent goals first


def views_of(held_out: Embedded, texts: Sequence[str]) -> Views:
    """Choose and compute what is shown; the same rows give the same views."""
    batch = held_out.batch
    goals, counts = np.unique(batch.goal_id, return_counts=True)
    text_of_goal = dict(zip(batch.goal_id.tolist(), batch.text_id.tolist(), strict=True))
    frequent = goals[np.argsort(-counts, kind="stable")]

    shown = late_rows_of_scenes(held_out)
    shown_goals = np.array(list(dict.fromkeys(batch.goal_id[shown].tolist())))
    asked = np.array([text_of_goal[goal] for goal in shown_goals.tolist()])

    rows = neighbour_rows(held_out)
    return Views(
        position=embedding_map(held_out.context),
        goal_id=batch.goal_id,
        progress=batch.progress,
        similarity=held_out.vision[shown] @ held_out.language[asked].T,
        right=batch.goal_id[shown][:, None] == shown_goals[None, :],
        pictures=batch.frames[batch.frame_of_row[shown]],
        instructions=tuple(texts[text] for text in asked),
        neighbours=np.stack([batch.frames[batch.frame_of_row[row]] for row in rows]),
        neighbour_goal_id=batch.goal_id[rows],
        neighbour_instructions=tuple(texts[text] for text in batch.text_id[rows].flatten()),
        named_goals={str(goal): texts[text_of_goal[int(goal)]] for goal in frequent[:8]},
    )


def late_rows_of_scenes(held_out: Embedded) -> np.ndarray:
    """(p,) the last row of each goal's first episode, goals of one scene after one another, scenes with many goals first."""
    batch = held_out.batch
    last = np.flatnonzero(np.append(batch.episode_id[1:] != batch.episode_id[:-1], True))
    scenes, counts = np.unique(batch.scene_id[last], return_counts=True)
    size = dict(zip(scenes.tolist(), counts.tolist(), strict=True))
    order = sorted(last.tolist(), key=lambda row: (-size[int(batch.scene_id[row])], int(batch.scene_id[row]), row))
    of_goal = {int(batch.goal_id[row]): row for row in reversed(order)}
    return np.array([row for row in order if of_goal[int(batch.goal_id[row])] == row][:PICTURES])


def neighbour_rows(held_out: Embedded) -> np.ndarray:
    """(q, 1 + k) rows spread over the held-out ones, each with those of other episodes that have the most similar context."""
    batch = held_out.batch
    queries = np.linspace(0, len(batch.episode_id) - 1, QUERIES + 2).round().astype(int)[1:-1]
    similarity = held_out.context[queries] @ held_out.context.T
    similarity[batch.episode_id[queries][:, None] == batch.episode_id[None, :]] = -np.inf
    count = min(NEIGHBOURS, int(np.isfinite(similarity).sum(1).min()))
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.concatenate([queries[:, None], nearest], axis=1)


def embedding_map(context: np.ndarray) -> np.ndarray:
    """(b, 2) t-SNE of unit-norm embeddings; empty for fewer than a dozen."""
    if len(context) < 12:
        return np.zeros((0, 2), np.float32)
    perplexity = min(30.0, (len(context) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=0).fit_transform(context)


def save_views(path: Path, views: Views) -> None:
    """Write the arrays as safetensors, the texts as JSON in its header."""
    values = {field.name: getattr(views, field.name) for field in fields(views)}
    arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    texts = {name: json.dumps(value) for name, value in values.items() if name not in arrays}
    save_file(arrays, path, metadata=texts)


def load_views(path: Path) -> Views:
    """Read what `save_views` wrote."""
    with safe_open(path, framework="numpy") as file:
        texts = {name: json.loads(value) for name, value in file.metadata().items()}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in texts.items()}
    return Views(**arrays, **lists)
