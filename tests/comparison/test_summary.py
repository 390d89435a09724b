"""Groups of episodes: what counts as one observation, and correlations of few encoders."""

import json

import numpy as np
import pytest

from vla.comparison.report import (
    answers,
    comparison_report,
    level_sections,
    measures_table,
    success_table,
    usual_number,
)
from vla.comparison.summary import contrasts, estimate, fisher_interval, mcnemar_p_values, read_outcomes


def outcomes(success: np.ndarray) -> dict:
    """Episodes of (levels, scenes) as those of a split; the scenes are of two tasks in turn."""
    levels, scenes = success.shape
    return {
        ("light", level, f"task{scene % 2}", scene): bool(success[level, scene])
        for level in range(levels)
        for scene in range(scenes)
    }


def test_intervals_of_many_levels_of_one_scene_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        difficulty, level = rng.normal(size=(1, 1, 30)), rng.normal(size=(3, 12, 30))
        success = rng.random((3, 12, 30)) < 1 / (1 + np.exp(-(2.0 * difficulty + 0.3 * level)))
        interval = estimate([outcomes(run) for run in success])
        held.append(interval.low <= 0.5 <= interval.high)
    assert np.mean(held) >= 0.92


def test_more_levels_of_the_same_scenes_are_not_more_observations():
    success = np.random.default_rng(0).random((1, 30)) < 0.5
    once, twelve_times = (estimate([outcomes(np.repeat(success, n, axis=0))]) for n in (1, 12))
    assert (once.low, once.high) == (twelve_times.low, twelve_times.high)
    assert twelve_times.episodes == 30


def test_a_scene_whose_task_a_perturbation_changes_is_still_one():
    success = np.random.default_rng(0).random(30) < 0.5
    plain = {("light", 1, "push", seed): bool(success[seed]) for seed in range(30)}
    changed = {("light", 2, "place" if seed < 5 else "push", seed): bool(success[seed]) for seed in range(30)}
    once, twice = estimate([plain]), estimate([plain | changed])
    assert (twice.low, twice.high, twice.episodes) == (once.low, once.high, 30)


def test_levels_of_held_out_combinations_show_scenes_of_their_own():
    success = np.random.default_rng(0).random((3, 30)) < 0.5
    rows = {("combination", level, "push", seed): bool(success[level, seed]) for level in (1, 2) for seed in range(30)}
    assert estimate([rows]).episodes == 60


def test_mcnemar_is_of_each_seed_and_silent_about_scenes_shown_twice():
    rng = np.random.default_rng(0)
    runs = [outcomes(rng.random((1, 40)) < rate) for rate in (0.9, 0.9, 0.1, 0.1)]
    assert [p < 0.01 for p in mcnemar_p_values(runs[:2], runs[2:])] == [True, True]
    levels = outcomes(rng.random((2, 40)) < 0.5)
    assert mcnemar_p_values([levels], [levels]) is None


def test_every_split_that_changes_no_words_and_combinations_counts_as_perturbed(tmp_path):
    splits = ("train", "paraphrase", "synonym", "combination", "light", "a new one")
    episodes = [{"kind": "success", "split": s, "level": 1, "task": "push", "seed": 0, "success": True} for s in splits]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"episodes": episodes}))
    outcomes = read_outcomes(path)
    assert {split for split, *_ in outcomes["perturbed"]} == {"light", "a new one"}
    assert {split for split, *_ in outcomes["plain"]} == {"train"}


def test_a_perfect_correlation_of_few_encoders_is_not_certain():
    low, high = fisher_interval(1.0, 5)
    assert low < 0.5
    assert high == 1.0


def test_an_interval_of_a_correlation_holds_it_and_narrows():
    few, many = fisher_interval(0.6, 6), fisher_interval(0.6, 60)
    assert few[0] < many[0] < 0.6 < many[1] < few[1]


def contrast(group: str, demonstrations: int, value: float, holm_p: float) -> dict:
    interval = {"value": value, "low": value - 0.05, "high": value + 0.05, "p_value": holm_p / 2, "holm_p": holm_p}
    names = {"first": "aligned", "second": "other", "says": "", "group": group, "demonstrations": demonstrations}
    return names | interval | {"seeds": 3, "episodes": 100, "mcnemar_p": None}


def test_answers_are_of_the_most_demonstrations_plain_episodes_first():
    rows = [contrast("perturbed", 0, 0.2, 0.001), contrast("plain", 5, 0.3, 0.001), contrast("plain", 0, 0.1, 0.001)]
    sentences = answers({"contrasts": rows, "success": []})
    assert [("plain" in s, "perturbed" in s) for s in sentences] == [(True, False), (False, True)]
    assert sentences[0].startswith("aligned beats other by 10 points [5, 15]")


def test_a_difference_that_only_fewer_demonstrations_have_is_answered_too():
    rows = [contrast("plain", 5, 0.3, 0.001), contrast("plain", 0, 0.1, 0.001) | {"second": "scratch"}]
    first, second = answers({"contrasts": rows, "success": []})
    assert "aligned beats other by 30 points" in first
    assert "aligned beats scratch by 10 points" in second


@pytest.mark.parametrize(("numbers", "usual"), [([5, 5, 0], 5), ([5, 0, 5, 0], 0), ([25, 5, None], 25), ([None], None)])
def test_the_usual_number_is_that_of_most_rows_and_of_equals_the_largest(numbers, usual):
    assert usual_number([{"arm": "scratch", "demonstrations": number} for number in numbers]) == usual


def test_snapshots_which_have_one_number_do_not_decide_the_usual_one():
    rows = [{"arm": arm, "demonstrations": n} for arm, n in (("scratch", 5), ("scratch", 0), ("aligned-frozen@1", 5))]
    assert usual_number(rows) == 0


@pytest.mark.parametrize(
    ("value", "holm_p", "says"),
    [
        (-0.12, 0.01, "loses to other by 12 points [7, 17]"),
        (0.02, 0.6, "do not differ beyond chance: +2 points [-3, 7]"),
        (0.08, 0.2, "do not differ beyond chance among several comparisons: +8 points [3, 13]"),
    ],
)
def test_an_answer_says_no_more_than_its_test(value, holm_p, says):
    assert says in answers({"contrasts": [contrast("plain", 0, value, holm_p)], "success": []})[0]


def test_against_scratch_fewer_demonstrations_are_compared_with_more():
    rng = np.random.default_rng(0)
    arms = [("aligned-tuned", 5, 0.6), ("aligned-tuned", 0, 0.9), ("scratch", 5, 0.1), ("scratch", 0, 0.5)]
    runs = {(name, count): [{"plain": outcomes(rng.random((1, 40)) < rate)}] * 2 for name, count, rate in arms}
    rows = contrasts(runs, (0, 5), [("aligned-tuned", "scratch", ""), ("aligned-tuned", "other", "")])
    found = {(row["demonstrations"], row["demonstrations_of_second"]): row["value"] for row in rows}
    assert set(found) == {(0, 0), (5, 5), (5, 0)}
    assert found[5, 0] < found[0, 0]
    report = comparison_report(
        {"contrasts": rows, "success": [], "arms": {}, "levels": [], "validity": [], "command": "", "protocol": {}}
    )
    assert "5 demonstrations of each task against all demonstrations" in report.answers[-1]


def test_against_scratch_the_next_larger_number_is_one_that_scratch_has():
    rng = np.random.default_rng(0)
    arms = [("aligned-tuned", 5, 0.6), ("aligned-frozen", 25, 0.6), ("scratch", 0, 0.5)]
    runs = {(name, count): [{"plain": outcomes(rng.random((1, 40)) < rate)}] * 2 for name, count, rate in arms}
    rows = contrasts(runs, (5, 25, 0), [("aligned-tuned", "scratch", "")])
    assert [(row["demonstrations"], row["demonstrations_of_second"]) for row in rows] == [(5, 0)]


def success(arm: str, demonstrations: int) -> dict:
    return {"arm": arm, "demonstrations": demonstrations, "value": 0.5, "low": 0.4, "high": 0.6, "minutes": 1.0}


def test_columns_are_the_numbers_of_demonstrations_the_fewest_first():
    table = success_table("plain", [success("scratch", 0), success("aligned-frozen", 5)])
    assert table.header[1:3] == ("5 demonstrations of each task", "all demonstrations")
    assert table.rows == (("scratch", "-", "50 % [40, 60]", "1"), ("aligned-frozen", "50 % [40, 60]", "-", "1"))


def test_arms_that_levels_leave_out_are_named():
    arms = (("aligned-frozen", 5), ("random-frozen", 5), ("scratch", 0))
    rows = [success(*arm) | {"split": split, "level": 1} for arm in arms for split in ("train", "light")]
    (section,) = level_sections(rows)
    assert (
        section.text == "With 5 demonstrations of each task; scratch, trained on other numbers, is in the tables above."
    )


def test_what_encoders_know_is_shown_by_training_seed_beside_chance():
    probe = [("aligned", 0, 0.8), ("aligned", 1, 0.79), ("random", 0, -0.02), ("random", 1, 0.1)]
    rows = [{"arm": a, "seed": s, "measure": "target_probe_r2", "value": v, "chance": None} for a, s, v in probe]
    rows += [{"arm": a, "seed": s, "measure": "zero_shot", "value": 0.9, "chance": 1 / 3} for a, s, _ in probe]
    table = measures_table(rows)
    assert table.header == ("encoder of", "target probe r2", "zero shot")
    assert table.rows == (
        ("aligned", "0.80, 0.79", "0.90, 0.90"),
        ("random", "-0.02, 0.10", "0.90, 0.90"),
        ("chance", "-", "0.33, 0.33"),
    )


def test_policies_alone_make_a_report():
    row = {"arm": "theirs", "demonstrations": None, "group": "plain", "value": 0.5, "low": 0.4, "high": 0.6}
    level = {
        "arm": "theirs",
        "demonstrations": None,
        "split": "light",
        "level": 1,
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
    }
    plain = level | {"split": "train", "level": 0}
    result = {
        "arms": {},
        "success": [row | {"minutes": None}],
        "levels": [plain, level],
        "contrasts": [],
        "validity": [],
    }
    report = comparison_report(result | {"command": "", "protocol": {}})
    assert report.answers == ("theirs succeeds in 50 % [40, 60] (as given).",)
    assert "Differences" not in [section.title for section in report.sections]
    assert any(section.text == "With policies as they are." for section in report.sections)


def test_what_was_transferred_is_said_first():
    config = {"transfer": ["reach", "pick"], "transfer_weight": 1.0}
    first, *_ = answers({"contrasts": [contrast("plain", 5, 0.3, 0.001)], "success": [], "config": config})
    assert "pretrained on all tasks but reach and pick; " in first
    assert "each of these beside all demonstrations of the others" in first
