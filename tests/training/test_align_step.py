"""Embedding a batch in pieces gives the gradients of the unbroken batch."""

from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from tests.training.small_batch import MAIN, SIGMOID, TRANSITIONS, WITHIN_GOAL, gradients, make_batch, make_model, run
from vla.config import LossConfig
from vla.models.alignment import TERMS, AlignmentModel
from vla.training.align_step import embed_rows, embed_texts, forward_backward
from vla.training.align_terms import batch_terms
from vla.training.device_batch import DeviceBatch


def of_floats(batch: DeviceBatch) -> DeviceBatch:
    """A batch as training has it, in float32."""
    pixels = batch.pixels
    return replace(
        batch,
        pixels=lambda images: pixels(images).float(),
        action_chunk=batch.action_chunk.float(),
        state=batch.state.float(),
        ids=batch.ids | {"progress": batch.ids["progress"].float()},
    )


@pytest.mark.parametrize("chunk", [1, 3, 6])
@pytest.mark.parametrize(
    "loss",
    [
        MAIN,
        SIGMOID,
        TRANSITIONS,
        WITHIN_GOAL,
        LossConfig(word_patch=0.0),
        LossConfig(context_action=0.0, state=0.25),
    ],
    ids=str,
)
def test_pieces_give_every_gradient_of_the_whole(chunk, loss, monkeypatch):
    monkeypatch.setattr("vla.losses.alignment.GROUP", 4)
    whole, expected = run(0, loss)
    pieces, got = run(chunk, loss)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    assert set(got) == set(expected)
    assert "clip.text_model.embeddings.token_embedding.weight" in got
    scales = {name for name in expected if name.startswith("logit_scales.")}
    assert scales == {f"logit_scales.{name}" for name in TERMS if getattr(loss, name)}
    assert all(expected[name] for name in scales)  # every term has something to tell apart
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("chunk", [1, 3])
def test_minimal_pairs_change_the_gradients_and_pieces_give_them_too(chunk, monkeypatch):
    monkeypatch.setattr("vla.losses.alignment.GROUP", 4)
    without, _ = run(0, MAIN)
    whole, expected = run(0, MAIN, paired=True)
    pieces, got = run(chunk, MAIN, paired=True)
    assert whole > without
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-8), name


def test_the_last_piece_is_embedded_once_and_the_others_twice(monkeypatch):
    seen, embed = [], AlignmentModel.rows

    def counted(self, texts, mask, pixels, *rest, **more):
        seen.append(len(pixels))
        return embed(self, texts, mask, pixels, *rest, **more)

    monkeypatch.setattr(AlignmentModel, "rows", counted)
    run(3, MAIN)
    assert seen == [3, 3, 1, 3, 3]


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_rows_that_lack_something_leave_every_gradient_finite_and_the_same_in_pieces(chunk, monkeypatch):
    monkeypatch.setattr("vla.losses.alignment.GROUP", 4)  # the second group has no text
    loss = LossConfig(transition_action=0.5, transition_language=0.5, state=0.25)
    whole, expected = run(0, loss, partly=True)
    pieces, got = run(chunk, loss, partly=True)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-10, msg=name)


def test_with_dropout_pieces_give_the_gradients_of_piecewise_forwards_kept_in_memory():
    loss = MAIN
    _, got = run(2, loss, dropout=0.3)
    model, (ids, mask) = make_model(0.3)
    batch = make_batch(ids, mask)
    torch.manual_seed(5)
    texts = joined([embed_texts(model, batch, piece) for piece in (slice(0, 2), slice(2, 3))])
    pieces = (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7))
    rows = joined([embed_rows(model, batch, texts, loss, piece) for piece in pieces])
    terms, _ = batch_terms(model, batch, texts.language, rows, torch.zeros(3), loss, 2)
    sum(getattr(loss, name) * term.loss for name, term in terms.items()).backward()
    for name, gradient in gradients(model).items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-8), name


def joined(parts):
    return replace(
        parts[0], **{field.name: torch.cat([getattr(p, field.name) for p in parts]) for field in fields(parts[0])}
    )


def test_under_autocast_every_loss_is_float32_and_close_to_that_without():
    model, (ids, mask) = make_model()
    model, batch = model.float(), of_floats(make_batch(ids, mask))
    found = {}
    for name, autocast in (("full", nullcontext), ("mixed", partial(torch.autocast, "cpu", torch.bfloat16))):
        arguments = {"gap": 2, "chunk": 3, "autocast": autocast}
        total, terms, _ = forward_backward(model, batch, torch.zeros(3), TRANSITIONS, **arguments)
        assert {total.dtype, *(term.loss.dtype for term in terms.values())} == {torch.float32}, name
        found[name] = {pair: float(term.loss.detach()) for pair, term in terms.items()}
    assert found["mixed"] == pytest.approx(found["full"], rel=0.02)


def test_under_autocast_pieces_give_the_gradients_of_the_whole():
    model, (ids, mask) = make_model()
    model = model.float()
    batch = of_floats(make_batch(ids, mask))
    found = []
    for chunk in (0, 3):
        model.zero_grad()
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        forward_backward(model, batch, torch.zeros(3), TRANSITIONS, gap=2, chunk=chunk, autocast=autocast)
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    whole, pieces = (torch.cat([gradient.flatten() for gradient in of.values()]) for of in found)
    assert (pieces - whole).norm() <= 0.02 * whole.norm()


def test_dropout_draws_anew_in_the_next_step():
    model, (ids, mask) = make_model(0.3)
    batch = make_batch(ids, mask)
    arguments = {"gap": 2, "chunk": 3, "autocast": nullcontext}
    first, second = (forward_backward(model, batch, torch.zeros(3), MAIN, **arguments)[0] for _ in range(2))
    assert first != second
