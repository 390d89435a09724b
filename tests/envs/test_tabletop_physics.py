import numpy as np
import pytest

from envs import make_env
from envs.tabletop.physics import CARRY_RANGE, CONTROL_DT, MAX_SPEED, World, outline, settled
from envs.tabletop.scene import OBJECT_RADIUS, SHAPES, TABLE_HALF, Scene, Thing
from envs.tabletop.tasks import OVERLAP, Progress, TaskGoal

FAR = Thing("green", "circle", 0.18, 0.18)


def world_with(*objects, gripper=(0.0, 0.0)):
    return World(Scene(tuple(objects), (), gripper))


def travel(world, velocity, close, steps):
    for _ in range(steps):
        world.step(np.array(velocity, float), close)


def test_full_speed_moves_the_gripper_by_speed_times_time():
    world = world_with(FAR)
    travel(world, (MAX_SPEED, 0.0), close=False, steps=4)
    np.testing.assert_allclose(world.gripper_position, [4 * CONTROL_DT * MAX_SPEED, 0.0], atol=1e-9)


def test_open_gripper_passes_over_objects_without_moving_them():
    world = world_with(Thing("red", "square", 0.0, 0.0), gripper=(-0.1, 0.0))
    travel(world, (0.2, 0.0), close=False, steps=10)
    np.testing.assert_allclose(world.position(0), 0.0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_gripper_pushes_by_contact(shape):
    world = world_with(Thing("red", shape, 0.0, 0.0), gripper=(-0.08, 0.0))
    travel(world, (0.0, 0.0), close=True, steps=1)
    travel(world, (0.15, 0.0), close=True, steps=10)
    assert world.position(0)[0] > 0.06


def test_pushed_circle_stays_in_front_of_the_gripper_without_being_entered():
    world = world_with(Thing("red", "circle", 0.0, 0.0), gripper=(-0.08, 0.0))
    travel(world, (0.15, 0.0), close=True, steps=10)
    gap = world.position(0)[0] - world.gripper_position[0]
    assert gap == pytest.approx(0.92 * OBJECT_RADIUS + 0.018, abs=0.003)


def test_closing_over_an_object_grasps_it_and_opening_releases_it():
    world = world_with(Thing("red", "star", 0.01, 0.0))
    travel(world, (0.0, 0.2), close=True, steps=4)
    np.testing.assert_allclose(world.position(0), [0.01, 0.08], atol=1e-6)
    travel(world, (0.0, 0.2), close=False, steps=4)
    np.testing.assert_allclose(world.position(0), [0.01, 0.08], atol=1e-6)


def test_closing_beside_an_object_does_not_grasp_it():
    world = world_with(Thing("red", "star", 0.06, 0.0))
    travel(world, (0.0, 0.0), close=True, steps=1)
    assert world.held is None


def test_carried_object_passes_over_others():
    world = world_with(Thing("red", "star", 0.0, 0.0), Thing("blue", "square", 0.08, 0.0))
    travel(world, (0.2, 0.0), close=True, steps=9)
    np.testing.assert_allclose(world.position(1), [0.08, 0.0], atol=1e-9)


def test_an_object_carried_to_the_edge_is_put_down_on_the_table():
    world = world_with(Thing("red", "star", 0.015, 0.0), gripper=(0.0, 0.0))
    travel(world, (MAX_SPEED, 0.0), close=True, steps=12)
    travel(world, (0.0, 0.0), close=False, steps=5)
    assert world.position(0)[0] == pytest.approx(CARRY_RANGE, abs=2e-3)


def test_random_actions_never_bring_an_object_off_the_table():
    env = make_env("tabletop", end_on_success=False)
    env.render_observations = False
    for seed in range(15):
        env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(12):
            action = rng.uniform(-1.5, 1.5, 3).clip(-1, 1)
            for _ in range(8):
                env.step(action)
                assert max(np.abs(env.world.position(i)).max() for i in range(len(env.world.bodies))) < TABLE_HALF


def test_objects_rest_until_they_are_touched():
    env = make_env("tabletop", end_on_success=False)
    env.render_observations = False
    for seed in range(40):
        env.reset(seed=seed)
        before = [env.world.position(i) for i in range(len(env.world.bodies))]
        for _ in range(10):
            env.step(np.array([0, 0, -1], np.float32))
        after = [env.world.position(i) for i in range(len(env.world.bodies))]
        np.testing.assert_allclose(before, after, atol=5e-4)


def test_settling_moves_overlapping_objects_apart():
    scene = Scene((Thing("red", "square", 0.0, 0.0), Thing("blue", "square", 0.04, 0.0)), (), (0.1, 0.1))
    assert World(scene).overlap(0) == pytest.approx(0.008, abs=1e-3)
    assert World(settled(scene)).overlap(0) < 1e-3


def test_settling_returns_a_scene_without_overlap_as_it_is():
    scene = Scene((Thing("red", "square", 0.0, 0.0), FAR), (), (0.1, 0.1))
    assert settled(scene) is scene


def test_an_object_on_top_of_another_is_not_next_to_it():
    scene = Scene((Thing("red", "square", -0.1, 0.0), Thing("blue", "square", 0.03, 0.0)), (), (-0.1, 0.0))
    world = World(scene)
    progress = Progress(scene, world)
    travel(world, (0.25, 0.0), close=True, steps=4)
    world.step(np.zeros(2), close=False)
    assert world.overlap(0) > OVERLAP
    assert progress.achieved(world, (TaskGoal("next_to", 0, other=1),)) == [False]


def test_carrying_an_object_does_not_count_as_pushing_it():
    scene = Scene((Thing("red", "square", 0.0, 0.0), FAR), (), (0.0, 0.0))
    world = World(scene)
    progress = Progress(scene, world)
    for close in [True] * 5 + [False] * 2:
        world.step(np.array([-0.2, 0.0]), close)
        progress.update(world)
    assert progress.achieved(world, (TaskGoal("push", 0, direction="left"),)) == [False]


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_between_four_and_eight_centimetres_wide(shape):
    width = np.ptp(outline(shape), axis=0)
    assert np.all((width > 0.04) & (width < 0.08))
