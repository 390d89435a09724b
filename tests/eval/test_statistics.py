import numpy as np
import pytest

from vla.eval.retrieval import rank_me, recall_at_k, recall_at_k_chance
from vla.eval.statistics import paired_p_value, summarise, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(10, 10, 0.72, 1.0), (40, 50, 0.67, 0.89), (400, 500, 0.76, 0.83)]
)
def test_wilsons_interval_equals_published_values(successes, n, low, high):
    assert np.round(wilson(successes, n), 2) == pytest.approx((low, high))


def test_nothing_observed_says_nothing():
    assert summarise([]) == {"success_rate": None, "interval": [0.0, 1.0], "n": 0}


def test_equal_policies_do_not_differ():
    assert paired_p_value([True, False] * 10, [True, False] * 10) == 1.0


def test_mcnemar_counts_the_pairs_that_disagree():
    first = [True] * 10 + [False] * 20
    assert paired_p_value(first, [False] * 30) == pytest.approx(2 * 0.5**10)


def test_recall_counts_any_of_several_right_answers():
    similarity = np.array([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9]])
    positives = np.array([[False, True, True], [True, False, False]])
    assert recall_at_k(similarity, positives, 1) == 0.0
    assert recall_at_k(similarity, positives, 2) == 0.5
    assert recall_at_k(similarity, positives, 3) == 1.0


def test_the_chance_level_is_what_random_similarities_reach():
    rng = np.random.default_rng(0)
    positives = rng.random((400, 30)) < 0.1
    positives[:, 0] = True
    measured = np.mean([recall_at_k(rng.random((400, 30)), positives, 5) for _ in range(20)])
    assert measured == pytest.approx(recall_at_k_chance(positives, 5), abs=0.01)


def test_the_diagonal_would_hide_a_perfect_model_and_several_positives_do_not():
    goals = np.repeat(np.arange(10), 50)
    embeds = np.eye(10)[goals]
    same = goals[:, None] == goals[None, :]
    assert recall_at_k(embeds @ embeds.T, same, 1) == 1.0
    assert (
        recall_at_k(embeds @ embeds.T + 1e-9 * np.random.default_rng(0).random((500, 500)), np.eye(500, dtype=bool), 1)
        < 0.06
    )


def test_rank_me_counts_the_directions_in_use():
    rng = np.random.default_rng(0)
    assert rank_me(rng.normal(size=(2000, 8))) == pytest.approx(8, abs=0.1)
    assert rank_me(np.outer(rng.normal(size=100), np.ones(8))) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("n", [3, 6, 100])
def test_an_interval_contains_its_estimate_at_both_ends(n):
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1
