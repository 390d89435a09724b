"""Embedding a batch in pieces gives the gradients of the unbroken batch."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import small_alignment_model
from vla.config import LossConfig
from vla.models.alignment import AlignmentModel
from vla.models.clip import tokenize
from vla.training.align_step import DeviceBatch, batch_terms, embed, forward_backward, joined, split

TEXTS = ("push the red star left", "reach the blue circle", "pick up the green cross", "take the green cross")
GOALS = torch.tensor([0, 1, 2, 2])


def make_model(dropout: float = 0.0) -> tuple[AlignmentModel, tuple[torch.Tensor, torch.Tensor]]:
    model, tokenizer = small_alignment_model(TEXTS, layers=2)
    if dropout:
        for name in ("visual_projection", "text_projection"):
            setattr(model.clip, name, torch.nn.Sequential(getattr(model.clip, name), torch.nn.Dropout(dropout)))
    return model.double().train(), tokenize(tokenizer, TEXTS)


def make_batch(ids: torch.Tensor, mask: torch.Tensor) -> DeviceBatch:
    """11 rows on 7 images: a ragged last piece, images of several rows, idle and padded chunks."""
    torch.manual_seed(1)
    frame_of_row = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 6, 2, 1])
    text_of_row = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2])
    rows, frames = len(frame_of_row), 7
    shown = torch.tensor([int((frame_of_row == f).nonzero()[0]) for f in range(frames)])
    chunks = torch.rand(rows, 4, 3, dtype=torch.float64) * 2 - 1
    chunks[4] = 0.0
    pad = torch.zeros(rows, 4, dtype=torch.bool)
    pad[2, 2:] = True
    return DeviceBatch(
        pixels=torch.randn(frames, 3, 24, 24, dtype=torch.float64),
        frame_of_row=frame_of_row,
        input_ids=ids,
        attention_mask=mask,
        text_of_row=text_of_row,
        action_chunk=chunks,
        action_is_pad=pad,
        state=torch.rand(frames, 2, dtype=torch.float64),
        shown=shown,
        ids={
            "goal_id": GOALS[text_of_row],
            "scene_id": frame_of_row // 3,
            "episode_id": text_of_row + 4 * (frame_of_row // 3),
            "timestep": frame_of_row,
            "progress": torch.linspace(0.1, 1, rows, dtype=torch.float64),
        },
    )


def gradients(model: AlignmentModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(chunk: int, loss: LossConfig, dropout: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, (ids, mask) = make_model(dropout)
    batch = make_batch(ids, mask)
    torch.manual_seed(5)
    total, _, _ = forward_backward(model, batch, torch.zeros(3), loss, gap=2, chunk=chunk, autocast=nullcontext)
    return total.detach(), gradients(model)


@pytest.mark.parametrize("chunk", [1, 3, 6])
@pytest.mark.parametrize(
    "loss", [LossConfig(), LossConfig(state=0.0, word_patch=0.0), LossConfig(context_action=0.0)], ids=str
)
def test_pieces_give_every_gradient_of_the_whole(chunk, loss):
    whole, expected = run(0, loss)
    pieces, got = run(chunk, loss)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    assert set(got) == set(expected)
    assert {"logit_scales.vision_language", "clip.text_model.embeddings.token_embedding.weight"} <= set(got)
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_with_dropout_pieces_give_the_gradients_of_piecewise_forwards_kept_in_memory():
    loss = LossConfig()
    _, got = run(3, loss, dropout=0.3)
    model, (ids, mask) = make_model(0.3)
    batch = make_batch(ids, mask)
    torch.manual_seed(5)
    texts = model.texts(ids, mask)
    pieces, order = split(batch, 3)
    rows = joined([embed(model, piece, texts, loss) for piece in pieces], order)
    terms, _ = batch_terms(model, batch, texts.language, rows, torch.zeros(3), loss, 2)
    sum(getattr(loss, name) * term.loss for name, term in terms.items()).backward()
    for name, gradient in gradients(model).items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-8), name


def test_dropout_draws_anew_in_the_next_step():
    model, (ids, mask) = make_model(0.3)
    batch = make_batch(ids, mask)
    arguments = {"gap": 2, "chunk": 3, "autocast": nullcontext}
    first, second = (forward_backward(model, batch, torch.zeros(3), LossConfig(), **arguments)[0] for _ in range(2))
    assert first != second
