import numpy as np
import pytest

from envs import make_env
from envs.tabletop.scene import GRIPPER_START, PLACE_RANGE
from envs.tabletop.splits import HELD_OUT_PAIRS, held_out_triple

SEEDS = range(40)
VIEW_SPLITS = ("light", "texture", "camera")


def resets(split, level=1, seeds=SEEDS):
    env = make_env("tabletop", split=split, level=level)
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        yield env, observation


def test_only_documented_levels_exist():
    levels = make_env("tabletop").splits()
    assert set(levels) == {
        *("train", "paraphrase", "synonym", "combination", "distractors", "light", "texture", "camera", "position")
    }
    assert all(levels[name] == (1, 2, 3) for name in (*VIEW_SPLITS, "distractors", "position"))
    assert levels["synonym"] == levels["combination"] == (1, 2)


def test_training_never_asks_for_a_held_out_combination():
    for env, _ in resets("train", seeds=range(150)):
        for goal in env._goals:
            target = env.scene.objects[goal.target]
            named = [target] + ([env.scene.objects[goal.other]] if goal.other is not None else [])
            assert not any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in named)
            assert not held_out_triple(goal.task, target.color, target.shape)


def test_training_scenes_show_held_out_pairs_as_other_objects():
    assert any((o.color, o.shape) in HELD_OUT_PAIRS for env, _ in resets("train") for o in env.scene.objects)


def test_combination_one_asks_only_for_held_out_triples_of_pairs_that_training_names():
    for env, _ in resets("combination", 1):
        for goal in env._goals:
            target = env.scene.objects[goal.target]
            assert held_out_triple(goal.task, target.color, target.shape)
            assert (target.color, target.shape) not in HELD_OUT_PAIRS


def test_combination_two_always_names_a_held_out_pair():
    for env, _ in resets("combination", 2):
        for goal in env._goals:
            indices = [goal.target] + ([goal.other] if goal.other is not None else [])
            assert any((env.scene.objects[i].color, env.scene.objects[i].shape) in HELD_OUT_PAIRS for i in indices)


@pytest.mark.parametrize("split", VIEW_SPLITS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_view_splits_change_the_picture_and_nothing_else(split, level):
    for (train, before), (other, after) in zip(
        resets("train", seeds=range(8)), resets(split, level, seeds=range(8)), strict=True
    ):
        assert train.scene == other.scene
        assert (train.goal_id, train.task_description) == (other.goal_id, other.task_description)
        assert not np.array_equal(before["pixels"], after["pixels"])


@pytest.mark.parametrize("split", VIEW_SPLITS)
def test_higher_levels_change_the_picture_more(split):
    change = []
    for level in (1, 2, 3):
        pairs = zip(resets("train", seeds=range(20)), resets(split, level, seeds=range(20)), strict=True)
        change.append(np.mean([np.abs(a["pixels"].astype(int) - b["pixels"]).mean() for (_, a), (_, b) in pairs]))
    assert change == sorted(change)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_distractors_are_added_to_the_training_scene(level):
    for (train, _), (other, _) in zip(resets("train"), resets("distractors", level), strict=True):
        assert train.scene.objects == other.scene.objects
        assert 1 <= len(other.scene.distractors) <= 2 * level
        assert len(other.goals()) >= 4


@pytest.mark.parametrize("level", [1, 2, 3])
def test_position_brings_an_object_and_the_gripper_out_of_the_training_range(level):
    for env, _ in resets("position", level):
        assert max(max(abs(o.x), abs(o.y)) for o in env.scene.objects) > PLACE_RANGE + 0.005
        assert max(map(abs, env.scene.gripper)) > GRIPPER_START
        assert len(env.goals()) >= 4


def test_training_objects_and_gripper_are_within_the_training_range():
    for env, _ in resets("train", seeds=range(150)):
        assert max(max(abs(o.x), abs(o.y)) for o in env.scene.objects) <= PLACE_RANGE + 0.005
        assert max(map(abs, env.scene.gripper)) <= GRIPPER_START


def test_perturbed_scenes_keep_the_default_goal_where_it_stays_possible():
    for split in ("distractors", "position"):
        for (train, _), (other, _) in zip(resets("train"), resets(split, 2), strict=True):
            possible = train.goal_id in {goal.goal_id for goal in other.goals()}
            assert (other.goal_id == train.goal_id) or not possible
