import numpy as np
import pytest

from vla.eval.retrieval import rank_me, recall_at_k, recall_at_k_chance, uniformity
from vla.eval.statistics import (
    crossed_interval,
    episodes_needed,
    holm,
    paired_p_value,
    power,
    summarise,
    visible_difference,
    wilson,
)


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
    assert rank_me(1 + 1e-6 * rng.normal(size=(2000, 8))) == pytest.approx(1, abs=0.01)  # one point and noise


@pytest.mark.parametrize("n", [3, 6, 100])
def test_an_interval_contains_its_estimate_at_both_ends(n):
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1


def test_wilsons_coverage_averaged_over_rates_is_nominal():
    rng = np.random.default_rng(0)
    rates = rng.random(4000)
    intervals = np.array([wilson(int(k), 50) for k in rng.binomial(50, rates)])
    covered = (intervals[:, 0] <= rates) & (rates <= intervals[:, 1])
    assert covered.mean() == pytest.approx(0.95, abs=0.01)


def simulated_coverage(seeds: int, seed_std: float, base: float, trials: int = 1500) -> float:
    """How often the interval holds the true rate: logits with effects of training seeds, of episodes, and of both."""
    rng = np.random.default_rng([seeds, int(10 * seed_std), int(10 * base)])
    task = np.repeat(np.arange(6), 15)

    def logits(shape: tuple[int, int, int]) -> np.ndarray:
        n, s, e = shape
        of_seed, of_episode = rng.normal(size=(n, s, 1)), rng.normal(size=(n, 1, e))
        return base + seed_std * of_seed + 1.5 * of_episode + 0.5 * rng.normal(size=shape)

    truth = float((1 / (1 + np.exp(-logits((100_000, 1, 1))))).mean())
    outcomes = rng.random((trials, seeds, 90)) < 1 / (1 + np.exp(-logits((trials, seeds, 90))))
    estimates = [crossed_interval(o, task) for o in outcomes]
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize(("seed_std", "base"), [(0.0, 0.0), (0.2, 1.5), (0.5, 0.0), (0.5, 1.5), (1.0, 0.0)])
def test_crossed_intervals_cover_at_least_nominal_minus_three_points(seeds, seed_std, base):
    assert simulated_coverage(seeds, seed_std, base) >= 0.92


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_std", [0.0, 0.3, 0.8])
def test_arms_that_do_not_differ_are_told_apart_as_seldom_as_the_level_says_far_into_the_tail(seeds, seed_std):
    rng = np.random.default_rng([seeds, int(10 * seed_std)])
    trials, episodes = 3000, 100
    of_episode = 1.5 * rng.normal(size=(trials, 1, episodes))

    def outcomes() -> np.ndarray:
        of_seed = seed_std * rng.normal(size=(trials, seeds, 1))
        of_both = 0.5 * rng.normal(size=(trials, seeds, episodes))
        return rng.random((trials, seeds, episodes)) < 1 / (1 + np.exp(-(of_seed + of_episode + of_both)))

    differences = outcomes().astype(float) - outcomes()
    p_values = np.array([crossed_interval(d, np.zeros(episodes)).p_value for d in differences])
    for level in (0.05, 0.01, 0.002):
        allowed = level + 3 * (level / trials) ** 0.5
        assert (p_values < level).mean() <= allowed


def test_a_crossed_interval_is_wider_than_wilsons_when_training_seeds_differ():
    rng = np.random.default_rng(0)
    outcomes = rng.random((3, 100)) < np.array([[0.5], [0.7], [0.9]])
    estimate = crossed_interval(outcomes, np.zeros(100))
    low, high = wilson(int(outcomes.sum()), 300)
    assert estimate.high - estimate.low > 2 * (high - low)


def test_equal_arms_do_not_differ_and_one_sided_arms_do():
    rng = np.random.default_rng(0)
    first = rng.random((3, 200)) < 0.8
    assert crossed_interval(first.astype(float) - first, np.zeros(200)).p_value == 1.0
    second = rng.random((3, 200)) < 0.5
    assert crossed_interval(first.astype(float) - second, np.zeros(200)).low > 0


def test_tasks_are_fixed_so_their_difference_does_not_widen_the_interval():
    task = np.repeat([0, 1], 100)
    estimate = crossed_interval(np.stack([task == 1] * 3), task)
    assert (estimate.low, estimate.high) == pytest.approx((0.485, 0.515))


def test_no_failure_at_all_is_not_certainty():
    assert crossed_interval(np.ones((3, 100)), np.zeros(100)).low == pytest.approx(0.97)


def test_holm_corrects_for_the_number_of_arms():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_power_is_the_level_where_nothing_differs_and_grows_with_episodes_and_seeds():
    assert power(0.7, 0.7, seeds=3, episodes=60) < 0.08
    few = power(0.7, 0.5, seeds=3, episodes=60)
    assert few < power(0.7, 0.5, seeds=3, episodes=200)
    assert few < power(0.7, 0.5, seeds=6, episodes=60)


def test_with_one_seed_power_is_that_of_the_textbook():
    assert power(0.7, 0.5, seeds=1, episodes=93) == pytest.approx(0.8, abs=0.06)


def test_the_visible_difference_is_the_smallest_that_the_episodes_suffice_for():
    difference = visible_difference(3, 100)
    assert power(0.7, 0.7 - difference, seeds=3, episodes=100) >= 0.8
    assert power(0.7, 0.71 - difference, seeds=3, episodes=100) < 0.8


def test_episodes_that_are_needed_suffice():
    assert power(0.7, 0.5, seeds=3, episodes=episodes_needed(0.2, 3)) >= 0.8


def test_nothing_is_seen_in_a_handful_of_episodes():
    assert visible_difference(3, 2) == 1.0


def test_uniformity_is_zero_for_one_point_and_the_potential_of_the_distance_for_two():
    assert uniformity(np.ones((5, 1))) == 0
    assert uniformity(np.eye(2)) == pytest.approx(-4)  # squared distance 2
