"""The contrastive losses against what theory says exactly."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from vla.losses.contrastive import (
    collision_rate,
    entropy,
    info_nce,
    info_nce_chance,
    sigmoid_chance,
    sigmoid_loss,
    soft_info_nce,
    soft_targets,
)


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


SCALE = torch.tensor(1 / 0.07, dtype=torch.float64)


def test_with_one_positive_it_is_the_cross_entropy_of_the_diagonal():
    queries, keys = unit(6, 8), unit(6, 8, seed=1)
    expected = torch.nn.functional.cross_entropy(SCALE * queries @ keys.T, torch.arange(6))
    torch.testing.assert_close(info_nce(queries, keys, SCALE, torch.eye(6, dtype=torch.bool)), expected)


def test_chance_level_is_log_of_the_number_of_keys():
    same = unit(1, 4).expand(5, 4)
    loss = info_nce(same, same, SCALE, torch.eye(5, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(5))


def test_chance_level_with_several_positives_is_the_mean_log_of_keys_over_positives():
    positives = torch.tensor([[True, True, False, False], [False, False, True, False]])
    same = unit(1, 4).expand(4, 4)
    expected = (math.log(4 / 2) + math.log(4)) / 2
    assert info_nce(same[:2], same, SCALE, positives).item() == pytest.approx(expected)
    assert info_nce_chance(positives).item() == pytest.approx(expected)


def test_the_probability_of_several_positives_is_summed_inside_the_logarithm():
    queries, keys = unit(1, 3), unit(3, 3, seed=2)
    p = (SCALE * queries @ keys.T).softmax(1)[0]
    loss = info_nce(queries, keys, SCALE, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(loss, -(p[0] + p[2]).log())


def test_a_pair_that_is_not_valid_is_as_if_its_key_were_absent():
    queries, keys = unit(1, 3), unit(4, 3, seed=2)
    positives = torch.tensor([[True, False, False, False]])
    valid = torch.tensor([[True, True, False, True]])
    masked = info_nce(queries, keys, SCALE, positives, valid=valid)
    removed = info_nce(queries, keys[[0, 1, 3]], SCALE, positives[:, [0, 1, 3]])
    torch.testing.assert_close(masked, removed)


def test_a_pair_that_is_not_valid_gets_no_gradient():
    keys = unit(3, 4, seed=3).requires_grad_()
    valid = torch.tensor([[True, True, False]])
    info_nce(unit(1, 4), keys, SCALE, torch.tensor([[True, False, False]]), valid=valid).backward()
    assert keys.grad[2].abs().max() == 0
    assert keys.grad[1].abs().max() > 0


def test_weights_are_normalised_in_the_mean():
    queries, keys = unit(3, 4), unit(3, 4, seed=1)
    eye = torch.eye(3, dtype=torch.bool)
    weighted = info_nce(queries, keys, SCALE, eye, weights=torch.tensor([2.0, 0.0, 0.0]).double())
    torch.testing.assert_close(weighted, info_nce(queries[:1], keys, SCALE, eye[:1]))


def test_duplicate_texts_do_not_push_the_temperature_as_diagonal_targets_do():
    """Ten rows of two instructions with perfect features: the right loss is already at its optimum."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)[torch.arange(10) % 2]
    ids = torch.arange(10) % 2
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    info_nce(features, features, scale, ids[:, None] == ids[None]).backward()
    assert scale.grad.abs() < 1e-6


def test_half_precision_inputs_are_computed_in_float32():
    queries, keys = unit(8, 16, dtype=torch.float32), unit(8, 16, seed=1, dtype=torch.float32)
    eye = torch.eye(8, dtype=torch.bool)
    low = info_nce(queries.bfloat16(), keys.bfloat16(), torch.tensor(100.0), eye)
    exact = info_nce(queries.bfloat16().float(), keys.bfloat16().float(), torch.tensor(100.0), eye)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact)


def test_the_loss_stays_float32_under_autocast():
    queries, keys = unit(8, 16, dtype=torch.float32), unit(8, 16, seed=1, dtype=torch.float32)
    eye = torch.eye(8, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(queries, keys, torch.tensor(14.0), eye)
    torch.testing.assert_close(inside, info_nce(queries, keys, torch.tensor(14.0), eye), rtol=0, atol=0)


def test_gradients_agree_with_finite_differences():
    queries, keys = unit(3, 4).requires_grad_(), unit(5, 4, seed=1).requires_grad_()
    positives = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, s: info_nce(q, k, s, positives), (queries, keys, scale))


def test_shape_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\) and keys \(3, 5\)"):
        info_nce(unit(3, 4), unit(3, 5), SCALE, torch.eye(3, dtype=torch.bool))


def test_a_row_without_a_positive_is_named():
    positives = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="row 1"):
        info_nce(unit(2, 4), unit(2, 4), SCALE, positives)


def test_one_hot_soft_targets_give_info_nce():
    queries, keys = unit(4, 8), unit(4, 8, seed=1)
    soft = soft_info_nce(queries, keys, SCALE, torch.eye(4))
    torch.testing.assert_close(soft, info_nce(queries, keys, SCALE, torch.eye(4, dtype=torch.bool)))


def test_the_floor_of_the_soft_loss_is_the_entropy_of_its_targets():
    distances = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    targets = soft_targets(distances, beta=1.0)
    # Similarities equal to -distance / scale reach the floor exactly.
    queries = torch.eye(2, dtype=torch.float64)
    loss = soft_info_nce(queries, queries, torch.tensor(1.0).double(), targets)
    assert loss.item() == pytest.approx(entropy(targets).item(), rel=1e-6)


def test_soft_loss_with_invalid_pairs_is_finite_and_so_is_its_gradient():
    queries = unit(3, 4).requires_grad_()
    valid = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    targets = soft_targets(torch.rand(3, 3), 0.1, valid)
    loss = soft_info_nce(queries, unit(3, 4, seed=1), SCALE, targets, valid=valid)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.grad).all()


def test_soft_targets_put_nothing_on_invalid_pairs():
    valid = torch.tensor([[True, False, True]])
    targets = soft_targets(torch.zeros(1, 3), 1.0, valid)
    assert targets.tolist() == [[0.5, 0.0, 0.5]]


def test_collision_rate_counts_rows_that_share_their_goal():
    assert collision_rate(torch.tensor([1, 1, 2, 3])).item() == 0.5


def test_the_sigmoid_loss_is_binary_cross_entropy_summed_over_the_keys():
    queries, keys, positives = unit(3, 8), unit(5, 8, seed=1), torch.rand(3, 5) < 0.4
    bias = torch.tensor(-2.0, dtype=torch.float64)
    logits = SCALE * queries @ keys.T + bias
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, positives.double(), reduction="none")
    torch.testing.assert_close(sigmoid_loss(queries, keys, SCALE, bias, positives), each.sum(1).mean())


def test_repeated_goals_can_all_be_right_for_the_sigmoid_loss_but_not_for_its_diagonal():
    vectors = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]  # the first two rows have one goal
    arguments = (vectors, vectors, torch.tensor(60.0), torch.tensor(-30.0))
    assert sigmoid_loss(*arguments, (vectors @ vectors.T).bool()) < 1e-9
    assert sigmoid_loss(*arguments, torch.eye(4, dtype=torch.bool)) > 10


def test_the_sigmoid_loss_of_a_constant_answer_is_its_chance_level():
    positives = torch.tensor([[True, False, False, False], [False, True, False, False]])
    vectors = torch.zeros(2, 3), torch.zeros(4, 3)
    bias = torch.tensor(1 / 3).log()  # a probability of 1 / 4
    torch.testing.assert_close(sigmoid_loss(*vectors, SCALE.float(), bias, positives), sigmoid_chance(positives))


def test_soft_targets_fall_with_the_distance_in_units_of_beta():
    expected = torch.tensor([[0.0, -2.0]]).softmax(1)
    torch.testing.assert_close(soft_targets(torch.tensor([[0.0, 0.1]]), 0.05), expected)
