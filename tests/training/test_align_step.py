"""Embedding a batch in pieces gives the gradients of the unbroken batch."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from tests.conftest import ROOT, small_alignment_model
from vla.config import LossConfig
from vla.losses.alignment import mean_squared_distances
from vla.losses.contrastive import soft_info_nce, soft_targets
from vla.models.alignment import PAIRS, AlignmentModel
from vla.models.alignment import TRANSITIONS as TRANSITION_PAIRS
from vla.models.clip import tokenize
from vla.training.align_step import embed_rows, embed_texts, forward_backward
from vla.training.align_terms import batch_terms, transitions
from vla.training.device_batch import DeviceBatch
from vla.training.processes import ALONE, Processes

TEXTS = ("push the red star left", "pick up the green cross", "take the green cross")
PAIR = "push the red cross left"  # a minimal pair of the first, which nobody asks
GOALS = torch.tensor([0, 1, 1])


MAIN = LossConfig(state=0.25)
SIGMOID = LossConfig(vision_language_kind="sigmoid", state=0.25)
TRANSITIONS = LossConfig(transition_action=0.5, transition_language=0.5)
WITHIN_GOAL = LossConfig(state=0.25, state_within_goal=True)


def make_model(
    dropout: float = 0.0, texts: tuple[str, ...] = TEXTS
) -> tuple[AlignmentModel, tuple[torch.Tensor, torch.Tensor]]:
    model, tokenizer = small_alignment_model(TEXTS, layers=2, sigmoid=True, transitions=True)
    if dropout:
        for name in ("visual_projection", "text_projection"):
            setattr(model.clip, name, torch.nn.Sequential(getattr(model.clip, name), torch.nn.Dropout(dropout)))
    return model.double().train(), tokenize(tokenizer, texts)


def make_batch(ids: torch.Tensor, mask: torch.Tensor, partly: bool = False) -> DeviceBatch:
    """11 rows on 7 images: a ragged last piece, images of several rows, idle and padded chunks, scenes of one goal and of both.

    If `partly`, the last three images have no instruction, and others no action or no state. If `ids` has a text more than
    `TEXTS`, it is a minimal pair of the first.
    """
    torch.manual_seed(1)
    frame_of_row = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6])
    text_of_row = torch.tensor([0, 2, 1, 2, 2, 1, 0, 1, 0, 0, 1])
    rows, frames = len(frame_of_row), 7
    chunks = torch.rand(rows, 4, 3, dtype=torch.float64) * 2 - 1
    chunks[4] = 0.0
    pad = torch.zeros(rows, 4, dtype=torch.bool)
    pad[2, 2:] = True
    pixels = torch.randn(frames, 3, 24, 24, dtype=torch.float64)
    state = torch.rand(frames, 2, dtype=torch.float64)
    goal_id = GOALS[text_of_row]
    scene_id = torch.tensor([0, 0, 0, 1, 2, 1, 3])[frame_of_row]
    if partly:
        goal_id = torch.where(frame_of_row >= 4, -1, goal_id)
        pad[6] = True
        state[1] = torch.nan
    return DeviceBatch(
        pixels=lambda images: pixels[images],
        frame_of_row=frame_of_row,
        shown=torch.searchsorted(frame_of_row, torch.arange(frames)),
        input_ids=ids,
        attention_mask=mask,
        text_of_row=text_of_row,
        pair_of_row=torch.where((text_of_row == 0) & (len(ids) > len(TEXTS)), len(TEXTS), -1),
        action_chunk=chunks,
        action_is_pad=pad,
        still=torch.arange(rows) == 7,
        state=state,
        ids={
            "goal_id": goal_id,
            "scene_id": scene_id,
            "episode_id": text_of_row + 4 * scene_id,
            "timestep": frame_of_row + (frame_of_row >= 2),
            "progress": torch.linspace(0.1, 1, rows, dtype=torch.float64),
        },
        asked_in=torch.tensor([[3, int(GOALS[2])], [9, int(GOALS[0])]]),  # by episodes that are not in this batch
    )


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


def gradients(model: AlignmentModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(
    chunk: int,
    loss: LossConfig,
    dropout: float = 0.0,
    processes: Processes = ALONE,
    partly: bool = False,
    paired: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, (ids, mask) = make_model(dropout, (*TEXTS, PAIR) if paired else TEXTS)
    batch = make_batch(ids, mask, partly)
    torch.manual_seed(5)
    total, _, _ = forward_backward(
        model, batch, torch.zeros(3), loss, gap=2, chunk=chunk, autocast=nullcontext, processes=processes
    )
    return total.detach(), gradients(model)


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
    assert scales == {f"logit_scales.{name}" for name in (*PAIRS, *TRANSITION_PAIRS) if getattr(loss, name)}
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


def test_contexts_are_not_computed_where_their_term_is_off(monkeypatch):
    model, (ids, mask) = make_model()
    monkeypatch.setattr(AlignmentModel, "context_features", lambda *_: pytest.fail("pooled for nobody"))
    off = replace(MAIN, context_action=0.0)
    arguments = {"gap": 2, "chunk": 2, "autocast": nullcontext}
    _, terms, _ = forward_backward(model, make_batch(ids, mask), torch.zeros(3), off, **arguments)
    assert terms
    assert "context_action" not in terms


def test_a_batch_that_serves_no_term_has_no_gradients():
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask)
    batch = replace(batch, ids=batch.ids | {"goal_id": torch.full_like(batch.ids["goal_id"], -1)})
    loss = LossConfig(context_action=0.0, word_patch=0.0)
    total, terms, _ = forward_backward(model, batch, torch.zeros(3), loss, gap=2, chunk=0, autocast=nullcontext)
    assert total == 0
    assert not terms
    assert not any(gradient.any() for gradient in gradients(model).values())


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


def test_transitions_are_pairs_of_an_episode_neither_too_close_nor_too_far():
    episode = torch.tensor([7, 3, 7, 3, 7, 5])
    timestep = torch.tensor([9, 0, 1, 4, 3, 2])
    first, second = transitions(episode, timestep, 2, 5)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 3), (2, 4)]


def test_transitions_have_terms_whose_gradient_reaches_the_tower():
    _, got = run(0, replace(TRANSITIONS, context_action=0.0, word_patch=0.0, vision_language=0.0))
    assert got["clip.vision_model.embeddings.patch_embedding.weight"].norm() > 0
    assert got["transition_projection.layers.1.weight"].norm() > 0
    assert got["logit_scales.transition_language"] != 0


def test_the_number_of_transitions_of_a_batch_is_told():
    model, (input_ids, mask) = make_model()
    batch = make_batch(input_ids, mask)
    texts = embed_texts(model, batch, slice(None))
    rows = embed_rows(model, batch, texts, TRANSITIONS, slice(0, len(batch.shown)))
    health = batch_terms(model, batch, texts.language, rows, torch.zeros(3), TRANSITIONS, 2)[1]
    first, _ = transitions(batch.ids["episode_id"], batch.ids["timestep"], 2, batch.action_chunk.shape[1])
    assert health["transitions"] == len(first) > 0


def terms_of(batch: DeviceBatch, loss: LossConfig):
    model, _ = make_model()
    texts = embed_texts(model, batch, slice(None))
    rows = embed_rows(model, batch, texts, loss, slice(0, len(batch.shown)))
    return batch_terms(model, batch, texts.language, rows, torch.zeros(3), loss, 2)[0]


def without_last_image(batch: DeviceBatch) -> DeviceBatch:
    """All but the last image and the rows that show it."""
    rows = slice(0, int((batch.frame_of_row < len(batch.shown) - 1).sum()))
    row_wise = ("frame_of_row", "text_of_row", "pair_of_row", "action_chunk", "action_is_pad", "still")
    changed = {name: getattr(batch, name)[rows] for name in row_wise}
    ids = {name: values[rows] for name, values in batch.ids.items()}
    return replace(batch, **changed, shown=batch.shown[:-1], state=batch.state[:-1], ids=ids)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_rows_without_an_instruction_are_left_out_of_the_language_terms(sigmoid):
    loss = SIGMOID if sigmoid else LossConfig(transition_language=1.0)
    batch = make_batch(*make_model()[1])
    last = batch.frame_of_row == len(batch.shown) - 1
    unlabelled = replace(batch, ids=batch.ids | {"goal_id": torch.where(last, -1, batch.ids["goal_id"])})
    got, expected = terms_of(unlabelled, loss), terms_of(without_last_image(batch), loss)
    for name in ("vision_language", "word_patch", *([] if sigmoid else ["transition_language"])):
        torch.testing.assert_close(vars(got[name]), vars(expected[name]), msg=name)
    assert got["context_action"].loss != expected["context_action"].loss  # there they count


def test_a_batch_without_any_instruction_has_no_language_terms():
    batch = make_batch(*make_model()[1])
    unlabelled = replace(batch, ids=batch.ids | {"goal_id": torch.full_like(batch.ids["goal_id"], -1)})
    assert set(terms_of(unlabelled, TRANSITIONS)) == {"context_action", "transition_action"}


def test_rows_without_actions_or_states_are_left_out_of_those_terms():
    batch = make_batch(*make_model()[1])
    last = (batch.frame_of_row == len(batch.shown) - 1)[:, None]
    state = batch.state.clone()
    state[-1] = torch.nan
    pictures = replace(batch, action_is_pad=batch.action_is_pad | last, state=state)
    loss = LossConfig(transition_action=1.0, state=0.25)
    got, expected = terms_of(pictures, loss), terms_of(without_last_image(batch), loss)
    for name in ("context_action", "state", "transition_action"):
        torch.testing.assert_close(vars(got[name]), vars(expected[name]), msg=name)
    assert got["vision_language"].loss != expected["vision_language"].loss  # there they count


def compared_within_goals(batch: DeviceBatch, gap: int) -> torch.Tensor:
    """(f, f) bool: itself, and images that share a goal, or an episode without one, but for near-duplicates; row by row."""
    ids, images = batch.ids, range(len(batch.shown))
    asked = [
        {
            (goal, episode if goal < 0 else None)
            for shown, goal, episode in zip(batch.frame_of_row, ids["goal_id"], ids["episode_id"], strict=True)
            for goal, episode in [(int(goal), int(episode))]
            if shown == image
        }
        for image in images
    ]
    first = [(int(ids["episode_id"][row]), int(ids["timestep"][row])) for row in batch.shown]

    def near(one: int, other: int) -> bool:
        return first[one][0] == first[other][0] and abs(first[one][1] - first[other][1]) < gap

    return torch.tensor([[i == j or (bool(asked[i] & asked[j]) and not near(i, j)) for j in images] for i in images])


@pytest.mark.parametrize("partly", [False, True], ids=["labelled", "partly"])
def test_the_state_within_goals_is_the_loss_over_a_mask_of_all_pairs(partly, monkeypatch):
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask, partly)
    rows = embed_rows(model, batch, embed_texts(model, batch, slice(None)), WITHIN_GOAL, slice(0, 7))
    stated = batch.state.isfinite().all(1)
    valid = compared_within_goals(batch, 2)[stated][:, stated]
    weights = (valid.sum(1) > 1).double()
    assert 0 < weights.sum() < len(weights) or not partly  # somebody has nobody to be told from
    targets = soft_targets(mean_squared_distances(batch.state[stated]), WITHIN_GOAL.state_beta, valid)
    scene, state, scale = rows.scene[stated], rows.state[stated], model.scale("state")
    forward = soft_info_nce(scene, state, scale, targets, valid=valid, weights=weights)
    backward = soft_info_nce(state, scene, scale, targets, valid=valid, weights=weights)
    for pairs in (1 << 20, 5):
        monkeypatch.setattr("vla.training.align_terms.PAIRS_AT_ONCE", pairs)
        monkeypatch.setattr("vla.losses.rowwise.PAIRS_AT_ONCE", pairs)
        got = terms_of(batch, WITHIN_GOAL)["state"].loss
        torch.testing.assert_close(got, (forward + backward) / 2, rtol=1e-6, atol=0)


def test_the_main_term_is_the_loss_over_a_mask_of_all_pairs():
    loss, gap = MAIN, 3
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask)
    rows = embed_rows(model, batch, embed_texts(model, batch, slice(None)), loss, slice(0, 7))
    count = range(len(batch.frame_of_row))
    episode, timestep = batch.ids["episode_id"].tolist(), batch.ids["timestep"].tolist()
    valid = torch.tensor(
        [
            [i == j or not (episode[i] == episode[j] and abs(timestep[i] - timestep[j]) < gap) for j in count]
            for i in count
        ]
    )
    assert not valid.all()  # there are near-duplicates
    moving = torch.tensor([float(i not in (4, 7)) for i in count], dtype=torch.float64)  # these rest: action, state
    targets = soft_targets(mean_squared_distances(batch.action_chunk.flatten(1)), loss.action_beta, valid)
    arguments = {"valid": valid, "weights": moving}
    scale = model.scale("context_action")
    forward = soft_info_nce(rows.context, rows.action, scale, targets, **arguments)
    backward = soft_info_nce(rows.action, rows.context, scale, targets, **arguments)
    got, _ = batch_terms(model, batch, rows.vision[:0], rows, torch.zeros(3), replace(loss, vision_language=0.0), gap)
    torch.testing.assert_close(got["context_action"].loss, (forward + backward) / 2, rtol=1e-6, atol=0)


def test_the_term_of_transitions_is_the_loss_over_a_mask_of_all_pairs():
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask)
    rows = embed_rows(model, batch, embed_texts(model, batch, slice(None)), TRANSITIONS, slice(0, 7))
    episode, timestep = batch.ids["episode_id"].tolist(), batch.ids["timestep"].tolist()
    found, rest = [], torch.tensor([0.5, -0.5, 0.1], dtype=torch.float64)
    for first in range(len(episode)):
        later = [
            row for row in range(len(episode)) if episode[row] == episode[first] and timestep[row] > timestep[first]
        ]
        if later and 2 <= timestep[min(later, key=timestep.__getitem__)] - timestep[first] <= 4:
            found.append((first, min(later, key=timestep.__getitem__)))
    assert len(found) > 2
    assert {timestep[second] - timestep[first] for first, second in found} == {2}  # of chunks of 4
    chunks = torch.stack([batch.action_chunk[first] for first, _ in found])
    missing = torch.stack([batch.action_is_pad[first] for first, _ in found])
    for number, (first, second) in enumerate(found):
        missing[number, timestep[second] - timestep[first] :] = True
        chunks[number, missing[number]] = rest
    pooled = rows.pooled[batch.frame_of_row]
    change = model.transitions(*(pooled[list(side)] for side in zip(*found, strict=True)))
    action = model.action_projection(model.action_encoder(chunks, missing))
    valid = torch.tensor(
        [
            [i == j or episode[i] != episode[j] or abs(timestep[i] - timestep[j]) >= 2 for j, _ in found]
            for i, _ in found
        ]
    )
    targets = soft_targets(mean_squared_distances(chunks.flatten(1)), TRANSITIONS.action_beta, valid)
    scale = model.scale("transition_action")
    forward = soft_info_nce(change, action, scale, targets, valid=valid)
    backward = soft_info_nce(action, change, scale, targets, valid=valid)
    language = embed_texts(model, batch, slice(None)).language
    got = batch_terms(model, batch, language, rows, rest, TRANSITIONS, 2)[0]["transition_action"].loss
    torch.testing.assert_close(got, (forward + backward) / 2, rtol=1e-6, atol=0)


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


def test_transitions_without_movement_ask_for_nothing():
    loss = LossConfig(transition_action=1.0)
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask)
    rows = embed_rows(model, batch, embed_texts(model, batch, slice(None)), loss, slice(0, 7))
    first, _ = transitions(batch.ids["episode_id"], batch.ids["timestep"], 2, batch.action_chunk.shape[1])
    language = embed_texts(model, batch, slice(None)).language

    def asks(still: int) -> torch.Tensor:
        resting = replace(batch, still=torch.zeros_like(batch.still))
        resting.still[first[:still]] = True
        return batch_terms(model, resting, language, rows, torch.zeros(3), loss, 2)[0][
            "transition_action"
        ].loss.detach()

    assert len(first) > 2
    assert len({float(asks(0)), float(asks(1)), float(asks(2))}) == 3
    assert asks(len(first)) == asks(0)  # where all rest, all ask


def test_the_words_get_a_tenth_of_the_main_terms_gradient():
    only = LossConfig(word_patch=0.0, vision_language=0.0)

    def gradient(share: float | None) -> torch.Tensor:
        model, (ids, mask) = make_model()
        rows = model.rows
        if share is not None:
            model.rows = partial(rows, text_gradient=share)
        forward_backward(model, make_batch(ids, mask), torch.zeros(3), only, gap=2, chunk=0, autocast=nullcontext)
        return model.clip.text_model.embeddings.token_embedding.weight.grad

    torch.testing.assert_close(gradient(None), gradient(1.0) / 10)


def test_a_batch_whose_goals_have_one_picture_each_has_no_state_term_within_them():
    batch = make_batch(*make_model()[1])
    alone = replace(batch, ids=batch.ids | {"goal_id": batch.frame_of_row})
    assert "state" not in terms_of(alone, WITHIN_GOAL)
    assert "state" in terms_of(alone, MAIN)


def test_dropout_draws_anew_in_the_next_step():
    model, (ids, mask) = make_model(0.3)
    batch = make_batch(ids, mask)
    arguments = {"gap": 2, "chunk": 3, "autocast": nullcontext}
    first, second = (forward_backward(model, batch, torch.zeros(3), MAIN, **arguments)[0] for _ in range(2))
    assert first != second


CASES = {  # chunk, loss, and which batch
    "whole": (0, MAIN, {}),
    "pieces": (1, MAIN, {}),
    "sigmoid": (0, SIGMOID, {}),
    "transitions": (1, TRANSITIONS, {}),
    "within_goal": (1, WITHIN_GOAL, {}),
    "minimal_pairs": (1, MAIN, {"paired": True}),
    "partly": (0, LossConfig(transition_action=0.5, transition_language=0.5, state=0.25), {"partly": True}),
}


def one_of_many(rank: int, count: int, folder: Path) -> None:
    """A process: leaves what it computed in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    for name, (chunk, loss, which) in CASES.items():
        total, found = run(chunk, loss, processes=Processes(rank, count), **which)
        save_file(found | {"total": total}, folder / f"{name}_{rank}.safetensors")
    own = torch.full((1 + rank,), float(rank), dtype=torch.bfloat16)
    whole = Processes(rank, count).gather(own, list(range(1, count + 1)))
    save_file({"whole": whole}, folder / f"bfloat16_{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])  # of 7 images and 3 texts: uneven shares, and one without a text
def many(request, tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of some processes computed, by case."""
    count, folder = request.param, tmp_path_factory.mktemp("many")
    command = [sys.executable, __file__, str(count), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    members = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(count)]
    assert [member.wait(300) for member in members] == [0] * count
    names = [*CASES, "bfloat16"]
    return [{name: load_file(folder / f"{name}_{rank}.safetensors") for name in names} for rank in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_processes_give_every_gradient_of_one(many, case):
    _, loss, which = CASES[case]
    total, expected = run(0, loss, **which)
    for rank, computed in enumerate(many):
        torch.testing.assert_close(computed[case]["total"], total, rtol=1e-12, atol=0)
        got = {name: tensor for name, tensor in computed[case].items() if name != "total"}
        assert set(got) == set(expected)
        for key, gradient in expected.items():
            error = (got[key] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error < 1e-5, f"process {rank}, {key}: {error:.1e}"


def test_ragged_shares_in_reduced_precision_cross_processes(many):
    expected = [float(rank) for rank in range(len(many)) for _ in range(rank + 1)]
    assert all(computed["bfloat16"]["whole"].tolist() == expected for computed in many)


if __name__ == "__main__":
    one_of_many(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))


def test_a_batch_uses_what_is_asked_elsewhere_and_progress():
    batch = make_batch(*make_model()[1])
    elsewhere = replace(batch, asked_in=torch.tensor([[2, 0]]))  # image 4's scene, asked goal 1 here
    assert batch.pairs.decided(slice(None))[4].tolist() == [True, True, True]
    assert elsewhere.pairs.decided(slice(None))[4].tolist() == [False, True, True]
    even = replace(batch, ids=batch.ids | {"progress": torch.ones_like(batch.ids["progress"])})
    assert terms_of(batch, MAIN)["vision_language"].loss != terms_of(even, MAIN)["vision_language"].loss
