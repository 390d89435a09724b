"""Stage two on a real small data set: what it refuses, the token cache, rollouts during training."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from envs.metaworld.gl import RenderingError
from tests.conftest import logged, without
from vla.cli import given, run
from vla.config import PolicyTrainConfig
from vla.config_io import load_config, save_yaml
from vla.data.episodes import Episodes, read_episodes, split_episodes, task_of_episode
from vla.data.frames import open_frames
from vla.data.mixture import Mixture, open_mixture
from vla.models.clip_files import load_clip
from vla.policies.concord import ConcordPolicy
from vla.policies.loading import load_chunk_policy
from vla.training import policy, words
from vla.training.policy import rollout_specs, train_policy
from vla.training.policy_data import cloned_episodes
from vla.training.unused import unused_options
from vla.types import ACTION_KEY, STATE_KEY, UserError


def test_more_executed_than_predicted_is_refused_before_anything_is_written(policy_config, tmp_path):
    config = replace(policy_config, head=replace(policy_config.head, n_action_steps=99), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"head\.n_action_steps must be at most head\.horizon, got 99 and 16"):
        train_policy(config)
    assert not (tmp_path / "run").exists()


def test_a_text_tower_that_is_not_tuned_encodes_its_texts_once(policy_config, tmp_path, monkeypatch):
    counted, encode = [], words.text_features
    monkeypatch.setattr(words, "text_features", lambda *given: counted.append(given) or encode(*given))
    run = {"tune": True, "tuned_part": "vision", "steps": 3, "eval_every": 0, "output": str(tmp_path / "run")}
    train_policy(replace(policy_config, **run))
    assert len(counted) == 1


def test_gradient_accumulation_is_refused(policy_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(UserError, match="does not accumulate gradients; set --batch_size"):
        train_policy(replace(policy_config, output=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("flag", "needs"),
    [
        ("--encoder_lr_scale=0.3", "tune=true"),
        ("--tuned_part=vision", "tune=true"),
        ("--loss.temperature=0.1", "auxiliary above 0"),
        ("--batch.goals=8", "auxiliary above 0"),
        ("--tower.width=64", "encoder=random"),
        ("--pooler_lr_scale=0", "aligned_pooler=true"),
        ("--head.flow_steps=4", "head.kind=flow"),
        ("--head.token_noise=0.1 --tune=true", "tune=false"),
        ("--optimizer.layer_decay=0.5", "stage one"),
        ("--aligned_pooler=true --encoder=random", "a trained encoder"),
        ("--encoder=somewhere --start=policy", "a new policy"),
        ("--data.pasted_shapes=0.5 --cached_shifts=1", "tune=true or another cached_shifts"),
        ("--cached_shifts=4 --tune=true", "tune=false"),
        ("--rollouts=9", "rollouts_every above 0"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(policy_config, tmp_path, capsys, flag, needs):
    command = [f"--encoder={policy_config.encoder}", f"--output={tmp_path}/run", *flag.split()]
    assert run("policy", command) == 2
    name = flag.removeprefix("--").partition("=")[0]
    assert f"{name} changes nothing without {needs}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--tune=true", "--encoder_lr_scale=0.3", "--tuned_part=vision", "--auxiliary=0.3", "--batch.goals=8"],
        ["--encoder=random", "--tower.width=64", "--head.token_noise=0.1"],
        ["--aligned_pooler=true", "--pooler_lr_scale=0", "--head.kind=flow", "--head.flow_steps=4"],
    ],
)
def test_an_option_that_something_uses_is_not(flags):
    assert unused_options(load_config(PolicyTrainConfig, flags), given(flags)) == {}


def test_a_runs_own_configuration_is_taken_whatever_it_holds(policy_config, tmp_path):
    config = replace(policy_config, tuned_part="vision", encoder_lr_scale=1.0, steps=1, output=str(tmp_path / "run"))
    save_yaml(config, tmp_path / "config.yaml")
    assert run("policy", ["--config_path", str(tmp_path / "config.yaml")]) == 0


def test_success_is_measured_during_training_if_asked_for(policy_config, tmp_path):
    config = replace(policy_config, rollouts_every=2, rollouts=2, steps=2, output=str(tmp_path / "run"))
    train_policy(config)
    lines = logged(tmp_path / "run")
    (measured,) = [line for line in lines if "rollouts/success" in line]
    assert measured["rollouts/low"] <= measured["rollouts/success"] <= measured["rollouts/high"]


def test_rollouts_that_nothing_can_draw_are_refused_before_training(policy_config, tmp_path, monkeypatch):
    def cannot_draw(*_, **__):
        raise RenderingError("no OpenGL library found")

    monkeypatch.setattr("vla.eval.rollouts.make_env", cannot_draw)
    with pytest.raises(UserError, match="config error: rollouts_every: no OpenGL library found; or leave it out"):
        train_policy(replace(policy_config, rollouts_every=2, output=str(tmp_path / "run")))


def test_rollouts_are_drawn_as_the_demonstrations_were(policy_config):
    episodes = read_episodes(policy_config.data.root)
    config = replace(policy_config, data=replace(policy_config.data, image_size=36), rollouts=1)
    assert [spec.image_size for spec in rollout_specs(config, episodes)] == [48]


def test_rollouts_change_nothing_that_training_draws(policy_config, tmp_path):
    """With dropout of the state, which draws in every step."""
    config = replace(policy_config, head=replace(policy_config.head, state_dropout=0.5), rollouts=1, steps=2)
    with_rollouts, without = (
        load_file(train_policy(replace(config, rollouts_every=n, output=str(tmp_path / str(n)))) / "model.safetensors")
        for n in (1, 0)
    )
    assert all(with_rollouts[name].equal(without[name]) for name in without)


def test_two_runs_on_one_encoder_share_its_token_cache(policy_config, tmp_path):
    data = replace(policy_config.data, cache=str(tmp_path / "cache"))
    open_frames(read_episodes(data.root), data.image_size, data.cache, workers=1)
    configs = [replace(policy_config, data=data, seed=s, steps=1, output=str(tmp_path / str(s))) for s in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(train_policy, configs))
    assert len(list((tmp_path / "cache").glob("tokens_*.npy"))) == 1
    assert all((folder / "model.safetensors").is_file() for folder in folders)
    own = replace(data, cache=str(tmp_path / "own"))
    for config in configs:
        train_policy(replace(config, data=own, output=f"{config.output}_alone"))
    shared, alone = (
        [np.load(next((tmp_path / name).glob(f"{kind}_*.npy"))) for kind in ("tokens", "computed")]
        for name in ("cache", "own")
    )
    np.testing.assert_array_equal(shared[1], alone[1])
    np.testing.assert_allclose(shared[0][shared[1]], alone[0][alone[1]], atol=5e-3)


def test_an_untrained_encoder_is_a_baseline(policy_config, tmp_path):
    tower = replace(policy_config.tower, width=32, heads=2, layers=1)
    config = replace(policy_config, encoder="random", tower=tower, steps=1, output=str(tmp_path / "run"))
    assert (train_policy(config) / "model.safetensors").is_file()


@pytest.mark.parametrize(("scale", "stays"), [(0.0, True), (1.0, False)])
def test_an_aligned_pooler_stays_as_it_is_at_rate_zero(policy_config, tmp_path, scale, stays):
    changes = {
        "aligned_pooler": True,
        "pooler_lr_scale": scale,
        "steps": 3,
        "ema": 0.0,
        "output": str(tmp_path / "run"),
    }
    policy = ConcordPolicy.from_pretrained(train_policy(replace(policy_config, **changes)))
    aligned = load_file(Path(policy_config.encoder).parent / "alignment.safetensors")
    same = [weight.equal(aligned[f"pooler.{name}"]) for name, weight in policy.network.pooler.named_parameters()]
    assert all(same) == stays


def test_a_link_to_an_encoder_has_the_pooler_beside_what_it_links_to(policy_config, tmp_path):
    link = tmp_path / "clip"
    link.symlink_to(Path(policy_config.encoder).resolve())
    config = replace(policy_config, encoder=str(link), aligned_pooler=True, steps=1, output=str(tmp_path / "run"))
    assert (train_policy(config) / "model.safetensors").is_file()


def test_the_pooler_of_another_version_is_refused(policy_config, tmp_path):
    encoder = Path(policy_config.encoder)
    shutil.copytree(encoder, tmp_path / "clip")
    beside = load_file(encoder.parent / "alignment.safetensors")
    beside["pooler.seeds"] = beside.pop("pooler.queries")
    save_file(beside, tmp_path / "alignment.safetensors")
    changes = {"encoder": str(tmp_path / "clip"), "aligned_pooler": True, "output": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"its pooler does not fit; .* and the same version of concord"):
        train_policy(replace(policy_config, **changes))


def test_a_pooler_that_starts_untrained_learns_at_the_heads_rate(policy_config, tmp_path):
    losses = []
    for scale in (0.0, 1.0):
        run = tmp_path / str(scale)
        train_policy(replace(policy_config, pooler_lr_scale=scale, steps=3, log_every=1, output=str(run)))
        lines = logged(run)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("vision", {"vision_model", "visual_projection"}),
        ("last_block", {"vision_model"}),
        ("all", {"vision_model", "visual_projection", "text_model", "text_projection"}),
    ],
)
def test_only_the_named_part_of_the_encoder_is_tuned(policy_config, tmp_path, part, changed):
    config = replace(policy_config, tune=True, tuned_part=part, steps=2, ema=0.0, output=str(tmp_path / "run"))
    tuned = ConcordPolicy.from_pretrained(train_policy(config)).clip.state_dict()
    before = load_clip(config.encoder)[0].state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], tuned[name])} == changed


def test_an_encoder_that_is_tuned_at_rate_zero_stays_as_it_is(policy_config, tmp_path):
    config = replace(policy_config, tune=True, encoder_lr_scale=0.0, steps=2, ema=0.0, output=str(tmp_path / "run"))
    policy = ConcordPolicy.from_pretrained(train_policy(config))
    before = load_clip(config.encoder)[0].state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in policy.clip.state_dict().items())


def test_what_is_exported_are_the_averages(policy_config, tmp_path):
    config = replace(policy_config, steps=3, save_every=3, ema=0.9, eval_every=0, output=str(tmp_path / "run"))
    exported = load_file(train_policy(config) / "model.safetensors")
    last = tmp_path / "run" / "checkpoints" / "step_000003"
    averaged, learned = (load_file(last / f"{name}.safetensors") for name in ("averaged", "model"))
    assert all(exported[name].equal(averaged[name]) for name in averaged)
    assert any(not exported[name].equal(learned[name]) for name in averaged)


def test_validation_is_the_error_of_all_held_out_rows_whatever_the_batch_size(policy_config, tmp_path):
    """Some rows are near the end of an episode, so that much of their chunks is padding."""

    def validated(batch_size: int) -> dict[str, float]:
        run = {"steps": 1, "batch_size": batch_size, "ema": 0.0, "output": str(tmp_path / str(batch_size))}
        config = replace(policy_config, optimizer=replace(policy_config.optimizer, lr=1e-20), **run)
        train_policy(config)
        lines = logged(tmp_path / str(batch_size))
        (line,) = [line for line in lines if "validation/l1" in line]
        return line

    few, many = validated(3), validated(64)
    assert few["validation/l1"] == pytest.approx(many["validation/l1"], rel=1e-5)
    assert few["validation/l1_of_median"] == many["validation/l1_of_median"]


def test_cloning_learns(policy_config, tmp_path):
    train_policy(replace(policy_config, steps=60, eval_every=0, save_every=60, output=str(tmp_path / "run")))
    lines = logged(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_failures_are_cloned_if_asked_for(policy_config):
    everything = read_episodes(policy_config.data.root)
    failed = replace(everything, success=np.zeros(len(everything.success), bool))
    config = replace(policy_config, failures=True)
    episodes, _, _ = cloned_episodes(config, mixture_of(config, failed))
    assert len(episodes.success) == len(everything.success)


@pytest.mark.parametrize("hide", ["language", "vision"])
def test_a_control_is_blind_to_what_is_hidden_from_it_and_to_nothing_else(policy_config, tmp_path, hide):
    config = replace(policy_config, hide=hide, output=str(tmp_path / "run"))
    policy = load_chunk_policy(train_policy(config))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 48, 48, 3), dtype=np.uint8)
    state = np.zeros((2, 4), np.float32)

    def actions(image: int, text: str) -> np.ndarray:
        return policy.act(images[image : image + 1], state[:1], [text])

    told_other = np.array_equal(actions(0, "reach the red star"), actions(0, "push the blue cross up"))
    shown_other = np.array_equal(actions(0, "reach the red star"), actions(1, "reach the red star"))
    assert (told_other, shown_other) == (hide == "language", hide == "vision")


def mixture_of(config: PolicyTrainConfig, episodes: Episodes) -> Mixture:
    return replace(open_mixture(config.data, (), config.seed), episodes=episodes)


def test_failures_are_left_out_after_scenes_are_held_out(policy_config):
    everything = read_episodes(policy_config.data.root)
    failed = everything.scene_id == everything.scene_id.min()
    failed[::5] = True
    everything = replace(everything, success=~failed)
    train, validation = split_episodes(everything, policy_config.data.holdout, policy_config.seed)
    episodes, (cloned,), held_out = cloned_episodes(policy_config, mixture_of(policy_config, everything))
    assert set(episodes.episode_index[cloned]) == set(everything.episode_index[train]) - set(np.flatnonzero(failed))
    assert set(episodes.episode_index[held_out]) == set(everything.episode_index[validation]) - set(
        np.flatnonzero(failed)
    )


def test_held_out_failures_alone_are_refused(policy_config):
    everything = read_episodes(policy_config.data.root)
    _, validation = split_episodes(everything, policy_config.data.holdout, policy_config.seed)
    success = np.ones(len(everything.success), bool)
    success[validation] = False
    with pytest.raises(UserError, match=r"change --data\.holdout"):
        cloned_episodes(policy_config, mixture_of(policy_config, replace(everything, success=success)))


def test_further_data_sets_are_cloned_by_their_weights(policy_config, tmp_path, monkeypatch):
    """Rows of both in every batch, those of the second three times as many, whole; the first one's are limited."""
    root = policy_config.data.root
    other = shutil.copytree(root, tmp_path / "other", ignore=shutil.ignore_patterns(".concord"))
    drawn = []
    monkeypatch.setattr(policy, "digest", lambda batch: drawn.append(batch.rows) or "")
    config = replace(policy_config, data=replace(policy_config.data, episodes_per_task=1), more=(f"{other}=3",))
    train_policy(replace(config, steps=2, batch_size=16, log_every=1, output=str(tmp_path / "run")))
    everything = read_episodes(root)
    own = len(everything.frame_row)
    assert [(rows < own).sum() for rows in drawn] == [4, 4]
    assert max(rows.max() for rows in drawn) >= own
    tasks = task_of_episode(everything)
    few = everything.episode_of_row[np.concatenate([rows[rows < own] for rows in drawn])]
    assert all(len(set(few[tasks[few] == task])) <= 1 for task in tasks)


def test_a_further_data_set_without_actions_is_refused(policy_config, tmp_path):
    pictures = without(policy_config.data.root, tmp_path / "pictures", ACTION_KEY, STATE_KEY)
    with pytest.raises(UserError, match="pictures: lacks actions or states; only stage one can use it"):
        train_policy(replace(policy_config, more=(str(pictures),), output=str(tmp_path / "run")))


def test_a_single_unknown_action_of_a_further_data_set_is_refused(policy_config, tmp_path):
    other = shutil.copytree(policy_config.data.root, tmp_path / "other", ignore=shutil.ignore_patterns(".concord"))
    mixture = open_mixture(policy_config.data, (str(other),), 0)
    action = mixture.episodes.action.copy()
    action[-1] = np.nan
    with pytest.raises(UserError, match="lacks actions or states; only stage one can use it"):
        cloned_episodes(
            replace(policy_config, more=("elsewhere",)),
            replace(mixture, episodes=replace(mixture.episodes, action=action)),
        )


def test_a_run_of_an_older_version_goes_on(policy_config, tmp_path):
    config = replace(policy_config, steps=2, save_every=1, output=str(tmp_path / "run"))
    shutil.rmtree(train_policy(config))
    path = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(path.read_text())
    del older["start"], older["data"]["stream"]
    path.write_text(yaml.safe_dump(older))
    assert train_policy(replace(config, resume=True)).is_dir()


def test_training_goes_on_from_a_policy_with_its_statistics(policy_config, policy_folder, tmp_path):
    changes = {"start": str(policy_folder), "encoder": "nowhere", "tune": True, "tuned_part": "vision", "seed": 7}
    config = replace(policy_config, **changes, steps=2, output=str(tmp_path / "run"))
    config.optimizer = replace(config.optimizer, lr=1e-20)  # exported as it began
    folder = train_policy(config)
    before, after = (load_file(path / "model.safetensors") for path in (policy_folder, folder))
    assert all(before[name].equal(after[name]) for name in before)
    stats = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    before, after = (load_file(path / stats) for path in (policy_folder, folder))
    assert all(before[name].equal(after[name]) for name in before)


def test_what_goes_on_learns(policy_config, policy_folder, tmp_path):
    config = replace(policy_config, start=str(policy_folder), steps=2, ema=0.0, output=str(tmp_path / "run"))
    before, after = (load_file(path / "model.safetensors") for path in (policy_folder, train_policy(config)))
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"network"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "nowhere"}, "start: nowhere: not a policy folder"),
        ({"hide": "language"}, "was trained with hide none, not language"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(policy_config, policy_folder, tmp_path, changes, message):
    config = replace(policy_config, **{"start": str(policy_folder)} | changes, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=message):
        train_policy(config)


def test_a_run_folder_given_as_the_start_is_told_its_policy(policy_config, policy_folder, tmp_path):
    shutil.copytree(policy_folder, tmp_path / "before" / "policy")
    config = replace(policy_config, start=str(tmp_path / "before"), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"start: .*before: not a policy folder; did you mean .*before/policy"):
        train_policy(config)


def test_options_of_a_trained_encoder_are_refused_with_an_untrained_one(policy_config, tmp_path):
    tower = replace(policy_config.tower, pretrained="somewhere")
    with pytest.raises(UserError, match="encoder=random is untrained, --encoder=FOLDER names a trained one"):
        train_policy(replace(policy_config, encoder="random", tower=tower, output=str(tmp_path / "run")))


def test_a_start_from_a_machine_with_a_gpu_is_gone_on_from_without_one(policy_config, policy_folder, tmp_path):
    start = shutil.copytree(policy_folder, tmp_path / "start")
    for name in ("config.json", "policy_preprocessor.json"):
        text = (start / name).read_text()
        assert '"device": "cpu"' in text
        (start / name).write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    train_policy(replace(policy_config, start=str(start), steps=1, output=str(tmp_path / "run")))


def test_a_start_without_statistics_is_refused(policy_config, policy_folder, tmp_path):
    start = shutil.copytree(policy_folder, tmp_path / "start")
    (start / "policy_preprocessor.json").unlink()
    config = replace(policy_config, start=str(start), steps=1, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"start: .*start: no statistics in it: "):
        train_policy(config)


def test_a_start_whose_statistics_changed_is_not_gone_on_from(policy_config, policy_folder, tmp_path):
    start = shutil.copytree(policy_folder, tmp_path / "start")
    config = replace(policy_config, start=str(start), steps=2, save_every=1, output=str(tmp_path / "run"))
    shutil.rmtree(train_policy(config))
    (path,) = start.glob("policy_preprocessor_*normalizer*.safetensors")
    stats = load_file(path)
    save_file({name: value + 1 for name, value in stats.items()}, path)
    with pytest.raises(UserError, match="was trained with other statistics of states and actions"):
        train_policy(replace(config, resume=True))
