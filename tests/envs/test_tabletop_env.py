import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import ENVIRONMENTS, make_env


def frame_and_state(env, seed, **options):
    observation, _ = env.reset(seed=seed, options=options)
    return observation["pixels"].copy(), observation["agent_pos"].copy()


def test_gymnasium_accepts_the_environment():
    check_env(make_env("tabletop"), skip_render_check=True)


def test_registered_id_makes_the_environment():
    with gym.make(ENVIRONMENTS["tabletop"].gym_id, render_mode=None) as env:
        assert type(env.unwrapped) is type(make_env("tabletop"))


def test_unknown_environment_error_lists_the_names():
    with pytest.raises(ValueError, match="metaworld, tabletop"):
        make_env("kitchen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("juggle",)}, "juggle.*reach"),
        ({"split": "fog"}, "fog.*train"),
        ({"split": "light", "level": 4}, r"\(1, 2, 3\)"),
        ({"render_mode": "human"}, "rgb_array"),
    ],
)
def test_wrong_constructor_argument_is_named_with_its_alternatives(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_env("tabletop", **arguments)


def test_goal_of_another_scene_is_refused():
    with pytest.raises(ValueError, match="not valid in scene 3"):
        make_env("tabletop").reset(seed=3, options={"goal": "pick/pink/hexagon"})


def test_every_goal_of_a_scene_starts_from_the_same_picture_and_state():
    env = make_env("tabletop")
    pixels, state = frame_and_state(env, 7)
    for goal in env.goals():
        other_pixels, other_state = frame_and_state(env, 7, goal=goal.goal_id)
        assert env.goal_id == goal.goal_id
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(state, other_state)


def test_same_seed_and_actions_give_identical_frames_in_another_instance():
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float32)
    runs = []
    for history in (0, 5):
        env = make_env("tabletop", end_on_success=False)
        for seed in range(history):
            env.reset(seed=100 + seed)
        env.reset(seed=11)
        runs.append(np.stack([env.step(action)[0]["pixels"] for action in actions]))
    np.testing.assert_array_equal(*runs)


def test_every_scene_has_four_goals_and_none_holds_at_the_start():
    env = make_env("tabletop")
    for seed in range(60):
        _, info = env.reset(seed=seed)
        assert len({goal.goal_id for goal in env.goals()}) >= 4
        assert info["achieved"] == ()


def test_goal_ids_within_a_scene_are_unique():
    env = make_env("tabletop")
    for seed in range(60):
        env.reset(seed=seed)
        ids = [goal.goal_id for goal in env.goals()]
        assert len(ids) == len(set(ids))


def test_every_scene_has_objects_that_share_a_colour_and_objects_that_share_a_shape():
    env = make_env("tabletop")
    for seed in range(60):
        env.reset(seed=seed)
        objects = env.scene.objects
        assert len({o.color for o in objects}) < len(objects)
        assert len({o.shape for o in objects}) < len(objects)
        assert len({(o.color, o.shape) for o in objects}) == len(objects)


@pytest.mark.parametrize("task", make_env("tabletop").TASKS)
def test_each_task_alone_gives_scenes_with_only_its_goals(task):
    env = make_env("tabletop", tasks=(task,))
    for seed in range(5):
        env.reset(seed=seed)
        assert {goal.task for goal in env.goals()} == {task}


def test_task_option_chooses_a_goal_of_that_task():
    env = make_env("tabletop")
    env.reset(seed=4, options={"task": "pick"})
    assert env.task == "pick"


def test_instruction_option_replaces_only_the_text():
    env = make_env("tabletop")
    env.reset(seed=4)
    goal = env.goal_id
    _, info = env.reset(seed=4, options={"instruction": ""})
    assert (info["instruction"], info["goal_id"]) == ("", goal)


def test_step_returns_the_last_picture_when_nobody_looks():
    env = make_env("tabletop")
    observation, _ = env.reset(seed=1)
    before = observation["pixels"].copy()
    env.render_observations = False
    observation, *_ = env.step(np.array([1, 1, -1], np.float32))
    np.testing.assert_array_equal(observation["pixels"], before)
    assert not np.array_equal(env.observe()["pixels"], before)


def test_earlier_observations_are_not_overwritten_by_later_ones():
    env = make_env("tabletop")
    first, _ = env.reset(seed=1)
    copy = first["pixels"].copy()
    for _ in range(5):
        env.step(np.array([1, 1, -1], np.float32))
    np.testing.assert_array_equal(first["pixels"], copy)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_pictures_have_the_size_asked_for(size):
    observation, _ = make_env("tabletop", image_size=size).reset(seed=0)
    assert observation["pixels"].shape == (size, size, 3)


def test_an_episode_that_never_succeeds_is_truncated_at_the_horizon():
    env = make_env("tabletop")
    env.reset(seed=2, options={"task": "place"})
    ends = [env.step(np.array([0, 0, -1], np.float32))[2:4] for _ in range(env._max_episode_steps)]
    assert ends[-1] == (False, True)
    assert set(ends[:-1]) == {(False, False)}


def test_another_goal_may_be_pursued_from_where_things_are():
    env = make_env("tabletop", image_size=32)
    env.reset(seed=3)
    env.step(np.ones(3))
    before, other = env.world.gripper_position.copy(), next(g for g in env.goals() if g.goal_id != env.goal_id)
    env.pursue(other.goal_id)
    assert (env.goal_id, env.task, env.task_description) == (other.goal_id, other.task, other.instruction)
    assert (env.world.gripper_position == before).all()
    with pytest.raises(ValueError, match="'fly' is not valid in scene 3"):
        env.pursue("fly")
