"""Each term of stage one is the loss over a mask of all pairs that its rows say; rows that lack something are left out of it."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.training.small_batch import MAIN, SIGMOID, TRANSITIONS, WITHIN_GOAL, gradients, make_batch, make_model, run
from vla.config import LossConfig
from vla.losses.alignment import mean_squared_distances
from vla.losses.contrastive import soft_info_nce, soft_targets
from vla.models.alignment import AlignmentModel
from vla.training.align_step import embed_rows, embed_texts, forward_backward
from vla.training.align_terms import batch_terms, transitions
from vla.training.device_batch import DeviceBatch


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


def test_a_batch_that_serves_no_term_has_no_gradients():
    model, (ids, mask) = make_model()
    batch = make_batch(ids, mask)
    batch = replace(batch, ids=batch.ids | {"goal_id": torch.full_like(batch.ids["goal_id"], -1)})
    loss = LossConfig(context_action=0.0, word_patch=0.0)
    total, terms, _ = forward_backward(model, batch, torch.zeros(3), loss, gap=2, chunk=0, autocast=nullcontext)
    assert total == 0
    assert not terms
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_contexts_are_not_computed_where_their_term_is_off(monkeypatch):
    model, (ids, mask) = make_model()
    monkeypatch.setattr(AlignmentModel, "context_features", lambda *_: pytest.fail("pooled for nobody"))
    off = replace(MAIN, context_action=0.0)
    arguments = {"gap": 2, "chunk": 2, "autocast": nullcontext}
    _, terms, _ = forward_backward(model, make_batch(ids, mask), torch.zeros(3), off, **arguments)
    assert terms
    assert "context_action" not in terms


def test_a_batch_uses_what_is_asked_elsewhere_and_progress():
    batch = make_batch(*make_model()[1])
    elsewhere = replace(batch, asked_in=torch.tensor([[2, 0]]))  # image 4's scene, asked goal 1 here
    assert batch.pairs.decided(slice(None))[4].tolist() == [True, True, True]
    assert elsewhere.pairs.decided(slice(None))[4].tolist() == [False, True, True]
    even = replace(batch, ids=batch.ids | {"progress": torch.ones_like(batch.ids["progress"])})
    assert terms_of(batch, MAIN)["vision_language"].loss != terms_of(even, MAIN)["vision_language"].loss


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


def test_a_batch_whose_goals_have_one_picture_each_has_no_state_term_within_them():
    batch = make_batch(*make_model()[1])
    alone = replace(batch, ids=batch.ids | {"goal_id": batch.frame_of_row})
    assert "state" not in terms_of(alone, WITHIN_GOAL)
    assert "state" in terms_of(alone, MAIN)


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
