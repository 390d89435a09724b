"""Closed-loop rollouts depend on the specification alone; grounding compares the same scene told differently."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from envs import make_env, make_expert
from envs.metaworld.language import INSTRUCTIONS
from vla.eval import rollouts
from vla.eval.episode import EpisodeSpec
from vla.eval.grounding import BLANK, SWAP, WRONG, grounding_specs, grounding_summary
from vla.eval.rollouts import rollout_workers, run_rollouts
from vla.policies.loading import load_chunk_policy
from vla.types import UserError

TASKS = ("reach", "push", "place")


class Still:
    """Does nothing."""

    def act(self, images, state, instructions):
        return np.zeros((len(images), 4, 3), np.float32)


class Reader:
    """Deterministic actions that depend on picture, state and text."""

    def act(self, images, state, instructions):
        mean = images.reshape(len(images), -1).mean(1) / 255
        length = np.array([len(text) for text in instructions])
        angle = 40 * mean + length + 3 * state[:, 0]
        move = np.stack([np.cos(angle), np.sin(angle), np.sign(np.sin(3 * angle))], -1)
        return np.repeat(move[:, None], 4, axis=1).astype(np.float32)


class Telepath:
    """Drives every episode with the scripted expert of an environment of its own: an upper bound that hears the text."""

    def __init__(self, specs):
        self.specs = specs
        self.envs = None

    def act(self, images, state, instructions):
        if self.envs is None:
            self.envs = []
            for spec in self.specs:
                env = make_env(spec.env, tasks=spec.tasks, end_on_success=False)
                options = {"task": spec.task} | ({"goal": spec.goal} if spec.goal else {})
                env.reset(seed=spec.seed, options=options)
                self.envs.append((env, make_expert(spec.env, env)))
        actions = []
        for env, expert in self.envs[: len(images)]:
            actions.append(expert.act())
            env.step(actions[-1])
        return np.stack(actions)[:, None]


class Leaver(Telepath):
    """Does as the expert for some timesteps, then drives away."""

    def __init__(self, specs, leaves_at: int):
        super().__init__(specs)
        self.leaves_at, self.steps = leaves_at, 0

    def act(self, images, state, instructions):
        self.steps += 1
        actions = super().act(images, state, instructions)
        return actions if self.steps <= self.leaves_at else np.sign(0.5 - state[:, None, [0, 1, 0]]).astype(np.float32)


class Counting:
    """Counts the looks of a policy."""

    def __init__(self, policy):
        self.policy, self.looks = policy, 0

    def act(self, images, state, instructions):
        self.looks += 1
        return self.policy.act(images, state, instructions)


def specs(count: int = 6) -> list[EpisodeSpec]:
    return [
        EpisodeSpec(env="tabletop", task=TASKS[i % 3], seed=900 + i, tasks=TASKS, image_size=48) for i in range(count)
    ]


def test_the_size_of_a_batch_changes_nothing():
    alone = run_rollouts(Reader(), specs(), batch_size=1)
    assert run_rollouts(Reader(), specs(), batch_size=4) == alone


def test_two_processes_do_what_one_does(policy_folder):
    make_policy = partial(load_chunk_policy, policy_folder)
    with rollout_workers(make_policy, 2) as workers:
        shared = run_rollouts(None, specs(), batch_size=3, workers=workers)
    assert shared == run_rollouts(make_policy(), specs(), batch_size=3)


def test_a_policy_that_workers_cannot_load_is_a_users_mistake(tmp_path, capfd):
    make_policy = partial(load_chunk_policy, tmp_path)
    with rollout_workers(make_policy, 2) as workers, pytest.raises(UserError, match="not a policy folder"):
        run_rollouts(None, specs(), batch_size=3, workers=workers)
    assert "Traceback" not in capfd.readouterr().err


def test_an_expert_succeeds_and_an_idle_policy_does_not():
    chosen = specs()
    assert all(r.success for r in run_rollouts(Telepath(chosen), chosen, batch_size=6))
    assert not any(r.success for r in run_rollouts(Still(), chosen, batch_size=6))


def test_episodes_run_to_their_horizon_so_that_the_final_timestep_is_known():
    record = run_rollouts(Still(), specs(1))[0]
    assert record.steps == make_env("tabletop")._max_episode_steps
    expert = Counting(Telepath(specs(1)))  # looks at every timestep
    reached = run_rollouts(expert, specs(1))[0]
    assert reached.steps < 40
    assert expert.looks == record.steps


def test_who_succeeds_and_leaves_has_no_success_at_the_final_timestep():
    stays = run_rollouts(Telepath(specs(1)), specs(1))[0]
    leaves = run_rollouts(Leaver(specs(1), stays.steps), specs(1))[0]
    assert (stays.success, stays.success_final) == (True, True)
    assert (leaves.success, leaves.success_final) == (True, False)


def test_episodes_that_end_at_success_end_there_and_have_the_same_outcome():
    chosen = specs(1)
    whole = run_rollouts(Telepath(chosen), chosen)[0]
    expert = Counting(Telepath(chosen))
    ended = run_rollouts(expert, [replace(chosen[0], end_on_success=True)])[0]
    assert ended.success
    assert whole.success
    assert ended.steps == whole.steps == expert.looks
    assert ended.success_final is None
    failed = run_rollouts(Still(), [replace(chosen[0], end_on_success=True)])[0]
    assert (failed.success, failed.success_final) == (False, False)


def test_an_interrupted_evaluation_goes_on_from_its_journal(tmp_path):
    journal = tmp_path / "episodes.jsonl"
    whole = run_rollouts(Reader(), specs(), batch_size=2, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    lines[0] = json.dumps(json.loads(lines[0]) | {"seconds": 1000.0}) + "\n"
    journal.write_text("".join(lines[:4]) + lines[4][:30])
    seen = []

    class Counting(Reader):
        def act(self, images, state, instructions):
            seen.append(len(images))
            return super().act(images, state, instructions)

    assert run_rollouts(Counting(), specs(), batch_size=2, journal=journal) == whole
    assert min(json.loads(line)["seconds"] for line in journal.read_text().splitlines()[5:]) >= 1000
    assert max(seen) == 2
    assert sum(seen) <= 2 * (100 // 4 + 1)


def test_a_journal_of_other_episodes_is_not_used(tmp_path):
    journal = tmp_path / "episodes.jsonl"
    run_rollouts(Still(), specs(2), journal=journal)
    other = [EpisodeSpec(env="tabletop", task="reach", seed=5, tasks=TASKS, image_size=48)]
    assert run_rollouts(Still(), other, journal=journal)[0].seed == 5


def test_a_filmed_episode_is_a_video(tmp_path):
    import imageio.v3 as iio

    record = run_rollouts(Reader(), specs(1), video_folder=tmp_path)[0]
    frames = iio.imread(tmp_path / record.video, plugin="pyav")
    assert len(frames) > 50
    assert frames[0].std() > 10


def test_a_swapped_episode_has_the_same_scene_and_another_object():
    base = specs()
    swapped = [s for s in grounding_specs(base) if s.kind == SWAP]
    assert len(swapped) == len(base)
    for own, other in zip(base, swapped, strict=True):
        env = make_env("tabletop", tasks=TASKS, image_size=48)
        before, _ = env.reset(seed=own.seed, options={"task": own.task})
        goal = env.goal_id
        after, info = env.reset(seed=other.seed, options={"task": other.task, "goal": other.goal})
        np.testing.assert_array_equal(before["pixels"], after["pixels"])
        assert info["goal_id"].split("/")[1:3] != goal.split("/")[1:3]


def test_blank_text_is_empty_and_wrong_text_is_of_another_scene():
    planned = grounding_specs(specs())
    assert all(s.instruction == "" for s in planned if s.kind == BLANK)
    assert all(s.instruction for s in planned if s.kind == WRONG)


def test_wrong_text_is_never_the_right_one_on_metaworld():
    tasks = ("reach-v3", "drawer-open-v3")
    base = [EpisodeSpec(env="metaworld", task=tasks[i % 2], seed=i, tasks=tasks, image_size=32) for i in range(4)]
    wrong = [s for s in grounding_specs(base) if s.kind == WRONG]
    assert len(wrong) == 4
    assert all(INSTRUCTIONS[s.goal] != s.instruction for s in wrong)


def test_without_another_instruction_there_is_no_wrong_text():
    base = [EpisodeSpec(env="metaworld", task="reach-v3", seed=i, tasks=("reach-v3",), image_size=32) for i in (0, 1)]
    assert not [s for s in grounding_specs(base) if s.kind == WRONG]


def test_an_expert_that_hears_the_swapped_goal_follows_it():
    base = specs()
    planned = grounding_specs(base)
    swapped = [s for s in planned if s.kind == SWAP]
    plain = run_rollouts(Telepath(base), base, batch_size=6)
    told = run_rollouts(Telepath(swapped), swapped, batch_size=6)
    summary = grounding_summary(told, plain)
    assert summary["swap"]["follows_new"]["success_rate"] == 1.0


def test_an_expert_that_ignores_the_swap_does_the_old():
    base = specs()
    swapped = [s for s in grounding_specs(base) if s.kind == SWAP]
    plain = run_rollouts(Telepath(base), base, batch_size=6)
    deaf = run_rollouts(Telepath(base), swapped, batch_size=6)
    summary = grounding_summary(deaf, plain)["swap"]
    assert summary["does_old"]["success_rate"] >= 0.8
    assert summary["follows_new"]["success_rate"] <= 0.2


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="juggle"):
        run_rollouts(Still(), [EpisodeSpec(env="tabletop", task="juggle", seed=0, tasks=("juggle",))])


def test_an_environment_goes_on_with_its_task_in_the_next_batch():
    """Meta-World would have to build another simulation."""
    tasks = ("button-press-topdown-v3", "drawer-open-v3")
    batch = [EpisodeSpec(env="metaworld", task=tasks[i % 2], seed=i, tasks=tasks, image_size=48) for i in range(6)]
    first = rollouts._environments_for(batch[:3])
    for env, spec in zip(first, batch[:3], strict=True):
        env.task = spec.task
    second = rollouts._environments_for(batch[3:])
    assert second[:2] == [first[1], first[0]]
    assert set(second) == set(first)
