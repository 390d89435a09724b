"""The stage-one terms: masks, idle chunks, what weighs in, and that parts of the pairs make the whole."""

from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from vla.losses import rowwise
from vla.losses.alignment import (
    SoftBest,
    batch_health,
    grouped_late_interaction,
    groups_of,
    idle_chunks,
    late_interaction,
    mean_squared_distances,
    near_duplicates,
    soft_term,
    vision_language_sigmoid_term,
    vision_language_term,
    word_patch_term,
)
from vla.losses.contrastive import info_nce, info_nce_of, soft_info_nce, soft_targets
from vla.losses.pairing import pairing
from vla.losses.rowwise import WHOLE, Share


def test_frames_of_one_episode_closer_than_the_gap_are_near_duplicates():
    close = near_duplicates(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 9, 0]), gap=3)
    assert close.nonzero().tolist() == [[0, 1], [1, 0]]


def test_a_chunk_at_rest_up_to_its_padding_is_idle():
    chunk = torch.tensor([[[0.0], [0.9]], [[0.9], [0.9]], [[0.01], [0.0]]])
    pad = torch.tensor([[False, True], [False, False], [False, False]])
    assert idle_chunks(chunk, pad, torch.zeros(1)).tolist() == [True, False, True]


def test_mean_squared_distances_average_over_all_other_axes():
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(mean_squared_distances(x), torch.tensor([[0.0, 5.0], [5.0, 0.0]]))
    torch.testing.assert_close(mean_squared_distances(x, slice(1, 2)), torch.tensor([[5.0, 0.0]]))


def one_to_one(count: int):
    """Image i asked with text i, a goal and a scene of its own."""
    index = torch.arange(count)
    return pairing(index, index, index, index, count, count)


def test_images_weigh_in_by_their_progress():
    vision = normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    language = normalize(vision + torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), dim=-1)
    scale = torch.tensor(5.0)
    first = vision_language_term(vision, language, scale, one_to_one(2), torch.tensor([1.0, 0.01]))
    second = vision_language_term(vision, language, scale, one_to_one(2), torch.tensor([0.01, 1.0]))
    assert first.loss != second.loss


def none_invalid(count: int):
    return lambda rows: torch.zeros(len(range(count)[rows]), count, dtype=torch.bool)


def test_a_row_of_weight_zero_stays_a_key_but_is_no_query():
    queries = normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    keys = normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    encoded = torch.arange(3.0)[:, None]
    arguments = (queries, keys, torch.tensor(5.0), encoded, 0.1, none_invalid(3))
    term = soft_term(*arguments, torch.tensor([1.0, 1.0, 0.0]))
    term.loss.backward()
    assert queries.grad[2].abs().max() > 0  # as a key of the backward direction
    assert soft_term(*arguments, torch.tensor([0.0, 0.0, 1.0])).loss != term.loss


def test_texts_of_every_goal_asked_of_a_shared_picture_are_its_positives():
    pairs = pairing(
        torch.tensor([0, 0, 1]), torch.tensor([1, 0, 2]), torch.tensor([5, 6, 5]), torch.tensor([-1, -1, -1]), 2, 3
    )
    assert pairs.positives(slice(None)).tolist() == [[True, True, True], [False, True, True]]
    assert pairs.positives(slice(1, 2), slice(0, 2)).tolist() == [[False, True]]


def test_a_text_asked_with_two_goals_is_right_for_both():
    pairs = pairing(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([5, 6]), torch.tensor([-1, -1]), 2, 1)
    assert pairs.positives(slice(None)).all()


def test_a_text_of_the_same_scene_with_another_goal_is_undecided_unless_the_scene_is_unknown():
    rows, goals = torch.tensor([0, 1]), torch.tensor([5, 6])
    known = pairing(rows, rows, goals, torch.tensor([3, 3]), 2, 2)
    assert known.decided(slice(None)).tolist() == [[True, False], [False, True]]
    assert pairing(rows, rows, goals, torch.tensor([-1, -1]), 2, 2).decided(slice(None)).all()


def batch(images: int = 9, texts: int = 5):
    """Embeddings in double precision, and ids with repeated goals, scenes and episodes."""
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    vision, language = normalize(draw(images, 6), dim=-1), normalize(draw(texts, 6), dim=-1)
    rows = torch.arange(images)
    pairs = pairing(rows, rows % texts, (rows % texts) // 2, rows // 4, images, texts)
    leaves = [vision, language, torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)]
    progress = torch.linspace(0.1, 1, images, dtype=torch.float64)
    invalid = partial(near_duplicates, rows // 3, rows, 2)
    return [leaf.requires_grad_() for leaf in leaves], pairs, progress, invalid, draw(images, 6)


def vision_language_of(leaves, pairs, progress, invalid, encoded, share=WHOLE):
    return vision_language_term(*leaves[:3], pairs, progress, share)


def sigmoid_of(leaves, pairs, progress, invalid, encoded, share=WHOLE):
    return vision_language_sigmoid_term(*leaves, pairs, progress, share)


def word_patch_of(leaves, pairs, progress, invalid, encoded, share=WHOLE):
    return word_patch_term(leaves[0] @ leaves[1].T, leaves[2], pairs, groups_of(pairs), share)


def soft_of(leaves, pairs, progress, invalid, encoded, share=WHOLE):
    keys = normalize(leaves[0].roll(1, 0), dim=-1)
    return soft_term(leaves[0], keys, leaves[2], encoded, 0.3, invalid, progress, share)


TERMS = [vision_language_of, sigmoid_of, word_patch_of, soft_of]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("pairs", [1, 17, 30])
def test_parts_of_the_pairs_give_the_value_and_the_gradients_of_all_at_once(term, pairs, monkeypatch):
    leaves, *rest = batch()
    whole = term(leaves, *rest)
    expected = torch.autograd.grad(whole.loss, leaves, allow_unused=True)
    monkeypatch.setattr(rowwise, "PAIRS_AT_ONCE", pairs)
    parts = term(leaves, *rest)
    for name in ("loss", "chance", "floor"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(parts.loss, leaves, allow_unused=True), expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("count", [2, 4, 20])  # of 9 images and 5 texts: some of twenty have nothing to compare
def test_the_shares_of_processes_add_up_to_the_value_and_the_gradients_of_one(term, count, monkeypatch):
    monkeypatch.setattr("vla.losses.alignment.GROUP", 3)
    leaves, *rest = batch()
    whole = term(leaves, *rest)
    expected = torch.autograd.grad(whole.loss, leaves, allow_unused=True, materialize_grads=True)
    shares = [term(leaves, *rest, Share(rank, count)) for rank in range(count)]
    for name in ("loss", "chance", "floor"):
        total = sum(getattr(share, name) for share in shares)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-6, atol=0)
    each = [torch.autograd.grad(share.loss, leaves, allow_unused=True, materialize_grads=True) for share in shares]
    for got, want in zip(zip(*each, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(got), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "count", "at_once", "most"), [(8, 2, 8, 4), (9, 4, 9, 3), (3, 4, 3, 1), (20, 3, 5, 8), (21, 2, 2, 11)]
)
def test_each_process_compares_its_share_of_the_rows(rows, count, at_once, most):
    seen: list[list[int]] = []

    def part(span: slice, x: torch.Tensor) -> rowwise.Term:
        assert span.stop - span.start <= at_once
        seen[-1] += range(rows)[span]
        return rowwise.Term(x[span].sum(), torch.zeros(()), torch.zeros(()))

    for rank in range(count):
        seen.append([])
        leaf = torch.ones(rows, requires_grad=True)
        rowwise.in_parts(part, rows, rows, leaf, pairs=at_once * rows, share=Share(rank, count))
    assert sorted(row for rows_of_one in seen for row in rows_of_one) == list(range(rows))
    assert max(map(len, seen)) == most


def test_the_terms_are_the_losses_over_masks_of_all_pairs():
    leaves, pairs, progress, invalid, encoded = batch()
    vision, language, scale, _ = leaves
    positives, valid = pairs.positives(slice(None)), pairs.decided(slice(None))
    both = info_nce(vision, language, scale, positives, weights=progress) + info_nce(
        language, vision, scale, positives.T
    )
    torch.testing.assert_close(vision_language_term(vision, language, scale, pairs, progress).loss, both / 2)
    logits = scale * vision @ language.T
    answers = torch.where(positives, 1, -1) * (logits + leaves[3])
    expected = -logsigmoid(answers).sum(1) @ progress / progress.sum()
    torch.testing.assert_close(vision_language_sigmoid_term(*leaves, pairs, progress).loss, expected)
    both = info_nce_of(logits, positives, valid=valid) + info_nce_of(logits.T, positives.T, valid=valid.T)
    torch.testing.assert_close(word_patch_term(vision @ language.T, scale, pairs, groups_of(pairs)).loss, both / 2)
    keys, mask = vision.roll(1, 0), ~invalid(slice(None))
    targets = soft_targets(torch.cdist(encoded, encoded).square() / 6, 0.3, mask)
    both = sum(
        soft_info_nce(a, b, scale, targets, valid=mask, weights=progress) for a, b in ((vision, keys), (keys, vision))
    )
    term = soft_term(vision, keys, scale, encoded, 0.3, invalid, progress)
    torch.testing.assert_close(term.loss, both / 2)
    torch.testing.assert_close(
        term.floor, -(targets * targets.clamp_min(1e-30).log()).sum(1) @ progress / progress.sum()
    )


def test_word_patch_compares_within_groups_of_images_only(monkeypatch):
    leaves, pairs, *_ = batch()
    similarity, scale = leaves[0] @ leaves[1].T, leaves[2]
    monkeypatch.setattr("vla.losses.alignment.GROUP", 4)
    groups = groups_of(pairs)
    assert [group.images for group in groups] == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert groups[2].texts.tolist() == [2, 3]  # the last image is asked text 3, whose goal text 2 is of too
    expected, texts = 0, sum(len(group.texts) for group in groups)
    for group in groups:
        logits = scale * similarity[group.images][:, group.texts]
        positives, valid = pairs.positives(group.images)[:, group.texts], pairs.decided(group.images)[:, group.texts]
        expected += len(logits) / 9 * info_nce_of(logits, positives, valid=valid)
        expected += len(group.texts) / texts * info_nce_of(logits.T, positives.T, valid=valid.T)
    compared = torch.zeros(9, max(len(group.texts) for group in groups), dtype=torch.float64)
    for group in groups:
        compared[group.images, : len(group.texts)] = similarity[group.images][:, group.texts]
    torch.testing.assert_close(word_patch_term(compared, scale, pairs, groups).loss, expected / 2)


def test_a_minimal_pair_is_a_negative_of_its_scene_alone(monkeypatch):
    """Two scenes of two images; the first has drawn a text that may be right in the second."""
    rows, texts = torch.arange(4), torch.tensor([0, 0, 1, 1])
    asked = {"frame_of_row": rows, "text_of_row": texts, "goal_id": texts, "scene_id": rows // 2}
    paired = pairing(**asked, frames=4, texts=3, pair_of_row=torch.tensor([2, -1, -1, -1]))
    (group,) = groups_of(paired)
    assert (group.texts.tolist(), group.asked) == ([0, 1, 2], 2)
    assert paired.decided(slice(None))[:, 2].tolist() == [True, True, False, False]
    assert paired.decided(slice(None))[:, :2].all()
    similarity = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    word_patch_term(similarity, torch.ones(()), paired, [group]).loss.backward()
    assert (similarity.grad[:2, 2] > 0).all()  # pushed away
    assert (similarity.grad[2:, 2] == 0).all()


def test_images_of_several_goals_and_texts_of_several_images_can_reach_the_floor_of_zero():
    frames, texts = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 1])  # a picture of both goals, one of each alone
    pairs = pairing(frames, texts, texts, torch.full((4,), -1), 3, 2)
    directions = torch.eye(2)
    vision, language = directions[torch.tensor([0, 0, 1])], directions
    term = vision_language_term(vision, language, torch.tensor(100.0), pairs, torch.ones(3))
    assert term.loss < 1e-6
    assert term.floor == 0


def test_without_pairs_every_text_of_a_group_is_asked():
    *_, pairs, _, _, _ = batch()
    assert all(group.asked == len(group.texts) for group in groups_of(pairs))


@pytest.mark.parametrize("multiple", [1, 4, 7, 128])
def test_late_interaction_is_what_its_definition_says_word_by_word(monkeypatch, multiple):
    monkeypatch.setattr("vla.losses.alignment.WORDS", multiple)  # 7 are there
    generator = torch.Generator().manual_seed(5)
    patches = normalize(torch.randn(3, 4, 6, generator=generator, dtype=torch.float64), dim=-1)
    words = normalize(torch.randn(2, 5, 6, generator=generator, dtype=torch.float64), dim=-1)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for image in range(3):
        for text, length in enumerate((5, 2)):  # words behind these are padding
            for word in words[text, :length]:
                cosines = torch.stack([word @ patch for patch in patches[image]])
                shares = (20 * cosines).exp() / (20 * cosines).exp().sum()
                expected[image, text] += (shares * cosines).sum() / length
    torch.testing.assert_close(late_interaction(patches, words, mask), expected)


def test_the_gradient_of_the_best_cosines_is_the_numerical_one(monkeypatch):
    monkeypatch.setattr("vla.losses.alignment.COSINES", 40)  # two images at a time
    generator = torch.Generator().manual_seed(6)
    words, patches = (torch.randn(*shape, 3, generator=generator, dtype=torch.float64) for shape in ((5,), (7, 4)))
    assert torch.autograd.gradcheck(SoftBest.apply, (words.requires_grad_(), patches.requires_grad_()))


def test_late_interaction_of_some_of_the_images_is_that_of_their_groups(monkeypatch):
    *_, pairs, _, _, _ = batch()
    generator = torch.Generator().manual_seed(5)
    patches = normalize(torch.randn(9, 4, 6, generator=generator, dtype=torch.float64), dim=-1)
    words = normalize(torch.randn(5, 3, 6, generator=generator, dtype=torch.float64), dim=-1)
    mask = torch.arange(3) < torch.tensor([[3], [2], [3], [1], [2]])
    monkeypatch.setattr("vla.losses.alignment.GROUP", 4)
    groups = groups_of(pairs)
    width = max(len(group.texts) for group in groups)
    whole = grouped_late_interaction(patches, words, mask, groups, width)
    for group in groups:
        expected = late_interaction(patches[group.images], words, mask)[:, group.texts]
        torch.testing.assert_close(whole[group.images, : len(group.texts)], expected)
    some = [
        group for group in (group.within(slice(3, 7)) for group in groups) if group.images.start < group.images.stop
    ]
    assert [group.images for group in some] == [slice(0, 1), slice(1, 4)]
    torch.testing.assert_close(grouped_late_interaction(patches[3:7], words, mask, some, width), whole[3:7])


def test_late_interaction_in_blocks_computed_anew_has_the_same_value_and_gradients(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    patches = normalize(torch.randn(7, 4, 6, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
    words = normalize(torch.randn(3, 5, 6, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    weights = torch.randn(7, 3, generator=generator, dtype=torch.float64)

    def value_and_gradients():
        similarity = late_interaction(patches, words, mask)
        return similarity, *torch.autograd.grad((weights * similarity).sum(), (patches, words))

    whole = value_and_gradients()
    monkeypatch.setattr("vla.losses.alignment.COSINES", 100)
    monkeypatch.setattr("vla.losses.alignment.SLOPES", 600)  # of one image
    monkeypatch.setattr("vla.losses.alignment.KEPT_COSINES", 0)
    for got, expected in zip(value_and_gradients(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_an_episode_of_no_known_scene_is_one_by_itself():
    ids = torch.tensor([0, 1, 2, 3])
    health = batch_health(ids, ids, torch.tensor([5, 5, -1, -1]), torch.tensor([0, 1, 2, 3]), torch.zeros(4))
    assert health["distinct_scenes"] == 3


def test_a_chunk_at_a_rest_that_is_not_zero_is_idle():
    rest = torch.tensor([0.0, -1.0])
    chunk = torch.stack([rest.expand(3, 2), torch.zeros(3, 2)])
    assert idle_chunks(chunk, torch.zeros(2, 3, dtype=torch.bool), rest).tolist() == [True, False]
