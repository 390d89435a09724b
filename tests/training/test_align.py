"""Stage one on a real small data set: controls, restarts, what a finished run does."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import logged, without
from vla.cli import given, run
from vla.config import AlignConfig, LossConfig, TowerConfig
from vla.config_io import load_config
from vla.data.episodes import read_episodes, split_episodes
from vla.eval import alignment
from vla.eval.alignment_report import write_alignment_report
from vla.training import align
from vla.training.align import at_chance, next_command, train_align
from vla.training.align_setup import pair_temperatures, shuffled_labels
from vla.training.optim import schedule
from vla.training.unused import unused_options
from vla.types import SCENE_KEY, UserError


def test_every_control_permutes_its_part_and_no_other(align_config, tmp_path):
    def first_losses(shuffle: str) -> dict[str, float]:
        config = replace(align_config, shuffle=shuffle, steps=1, eval_every=0, output=str(tmp_path / shuffle))
        folder = train_align(config).parent
        assert json.loads((folder / "alignment.json").read_text())["shuffle"] == shuffle
        return logged(folder)[0]

    plain, language, action, both = (first_losses(shuffle) for shuffle in ("none", "language", "action", "all"))
    assert plain["samples"] == language["samples"] == action["samples"] == both["samples"]
    words, actions = "vision_language/loss", "context_action/loss"
    assert action[words] == plain[words]
    assert action[actions] != plain[actions]
    assert language[words] != plain[words]
    assert both[words] == language[words]
    assert both[actions] not in (plain[actions], language[actions], action[actions])


def test_a_term_of_weight_zero_is_off(align_config, tmp_path):
    loss = replace(align_config.loss, state=0.0, word_patch=0.0)
    config = replace(align_config, loss=loss, steps=1, output=str(tmp_path / "run"))
    train_align(config)
    line = logged(tmp_path / "run")[0]
    assert "context_action/loss" in line
    assert "state/loss" not in line
    assert "word_patch/loss" not in line


def test_a_pair_has_the_temperature_that_names_it_and_the_others_the_common_one():
    loss = LossConfig(temperature=0.1, temperatures=("state=0.2", "word_patch=fixed:0.05"))
    assert pair_temperatures(loss) == {"state": (0.2, True), "word_patch": (0.05, False)}
    assert pair_temperatures(replace(loss, learn_temperature=False))["state"] == (0.2, False)


def test_fixed_temperatures_stay_while_others_are_learned(align_config, tmp_path):
    loss = replace(align_config.loss, temperatures=("state=0.2", "word_patch=fixed:0.05"))
    train_align(replace(align_config, loss=loss, steps=3, eval_every=0, output=str(tmp_path / "run")))
    lines = logged(tmp_path / "run")
    first, last = lines[0], lines[2]
    assert first["word_patch/scale"] == last["word_patch/scale"] == pytest.approx(20)
    assert first["state/scale"] == pytest.approx(5, rel=0.02)
    assert first["state/scale"] != last["state/scale"]
    assert first["context_action/scale"] == pytest.approx(1 / 0.07, rel=0.02)


@pytest.mark.parametrize("text", ["stat=0.1", "state=warm", "state=0.001", "state", "state=fixed:inf"])
def test_what_is_no_temperature_of_a_pair_is_refused(align_config, tmp_path, text):
    loss = replace(align_config.loss, temperatures=(text,))
    with pytest.raises(UserError, match=rf"^config error: loss\.temperatures: '{text}'") as caught:
        train_align(replace(align_config, loss=loss, output=str(tmp_path / "run")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snapshots": (1, 99)}, "snapshots: 99 is not a step of 1 to"),
        (
            {"loss": LossConfig(context_action=0, word_patch=0, vision_language=0, state=0)},
            "loss: the weight of every term is 0",
        ),
        ({"tower": TowerConfig(patch_size=7)}, "tower.patch_size 7 does not divide data.image_size"),
    ],
    ids=["snapshots", "loss", "sizes"],
)
def test_what_cannot_train_is_refused_before_anything_is_written(align_config, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"config error: {message}"):
        train_align(replace(align_config, output=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_embedding_in_pieces_trains_alike(align_config, tmp_path):
    def losses(chunk: int) -> list[float]:
        output = tmp_path / f"chunk_{chunk}"
        train_align(replace(align_config, chunk=chunk, log_every=1, output=str(output)))
        lines = logged(output)
        return [line["loss"] for line in lines if "loss" in line]

    pieces, whole = losses(3), losses(0)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-4)
    assert pieces == pytest.approx(whole, rel=0.05)  # AdamW makes steps of rounding errors where gradients vanish


def test_a_run_that_found_no_data_may_be_started_again(align_config, tmp_path):
    output = str(tmp_path / "run")
    with pytest.raises(UserError, match=r"collect\.py"):
        train_align(replace(align_config, data=replace(align_config.data, root="nowhere"), output=output))
    assert train_align(replace(align_config, steps=1, output=output)).is_dir()


def test_a_run_is_not_overwritten_and_a_finished_one_is_left_alone(align_config, tmp_path):
    config = replace(align_config, steps=1, output=str(tmp_path / "run"))
    clip = train_align(config)
    with pytest.raises(UserError, match="--resume=true"):
        train_align(config)
    before = (clip / "model.safetensors").stat().st_mtime_ns
    assert train_align(replace(config, resume=True)) == clip
    assert (clip / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_whose_checkpoints_were_deleted_keeps_its_configuration(align_config, tmp_path):
    config = replace(align_config, steps=1, output=str(tmp_path / "run"))
    folder = train_align(config).parent
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="is finished, and was begun with seed=0, not 9; choose another --output"):
        train_align(replace(config, resume=True, seed=9))
    assert (folder / "config.yaml").read_bytes() == before
    assert train_align(replace(config, resume=True)) == folder / "clip"


def test_the_report_of_a_finished_run_can_be_drawn_again(align_config, tmp_path):
    config = replace(align_config, steps=1, output=str(tmp_path / "run"))
    report = train_align(config).parent / "report.html"
    before = report.read_text()
    report.write_text("an older one")
    train_align(replace(config, resume=True))
    assert report.read_text().count("<svg") == before.count("<svg")
    assert "Scales of the cosines: context_action" in report.read_text()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(align_config, tmp_path):
    broken = replace(align_config.optimizer, lr=1e30, warmup=0)
    config = replace(align_config, optimizer=broken, steps=20, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"not finite at step .* the same command with .* repeats it from"):
        train_align(config)
    (path,) = (tmp_path / "run").glob("nonfinite_step_*.safetensors")
    kept = load_file(path)
    rows = align_config.batch.goals * align_config.batch.episodes * align_config.batch.frames
    assert kept["frames"].dtype == torch.uint8
    assert len(kept["frames"]) == int(kept["frame_of_row"].max()) + 1
    assert kept["action_chunk"].shape[:2] == (len(kept["text_id"]), align_config.horizon)
    assert 0 < len(kept["text_id"]) <= rows


def test_an_update_after_which_nothing_is_finite_is_told_when_it_is_measured(align_config, tmp_path):
    broken = replace(align_config.optimizer, lr=1e30, warmup=0)
    config = replace(align_config, optimizer=broken, steps=1, output=str(tmp_path / "run"))
    with pytest.raises(UserError, match="not finite, the encoder has diverged; train it anew"):
        train_align(config)


def test_a_term_that_stays_at_its_chance_level_is_named():
    metrics = {"a/loss": 4.59, "a/chance": 4.6, "a/excess": 4.59, "b/loss": 4.0, "b/chance": 4.6, "b/excess": 3.0}
    assert at_chance(metrics) == ["a"]


def test_a_term_that_has_nothing_to_tell_apart_is_named():
    assert at_chance({"a/loss": 0.0, "a/chance": 0.0, "a/excess": 0.0}) == ["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimal_pairs": True, "word_patch": 0.0}, r"loss\.minimal_pairs changes the term loss\.word_patch"),
        ({"state_within_goal": True, "state": 0.0}, r"loss\.state_within_goal changes the term loss\.state"),
        ({"vision_language_kind": "sigmoid", "vision_language": 0.0}, r"loss\.vision_language_kind changes"),
    ],
)
def test_an_option_of_a_term_that_is_off_is_refused(align_config, tmp_path, changes, message):
    loss = replace(align_config.loss, **changes)
    with pytest.raises(UserError, match=message):
        train_align(replace(align_config, loss=loss, output=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        (["--loss.temperatures=transition_action=0.1"], "loss.temperatures changes nothing without all of the terms"),
        (["--loss.action_beta=0.1", "--loss.context_action=0"], "loss.action_beta changes nothing without a term of"),
        (["--loss.state_beta=0.1"], "loss.state_beta changes nothing without loss.state above 0"),
        (["--optimizer.pretrained_lr=1e-4"], "optimizer.pretrained_lr changes nothing without tower.pretrained"),
        (["--tower.width=64", "--tower.pretrained=x"], "tower.width changes nothing without untrained towers"),
        (
            ["--tower.vocab_size=600", "--tower.vocabulary=x"],
            "tower.vocab_size changes nothing without a vocabulary of",
        ),
    ],
)
def test_flags_that_would_change_nothing_are_refused(tmp_path, capsys, flags, needs):
    assert run("align", [*flags, f"--output={tmp_path}/run"]) == 2
    assert needs in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss.action_beta=0.1", "--loss.context_action=0", "--loss.transition_action=0.5"],
        ["--loss.state_beta=0.1", "--loss.state=0.25"],
        ["--loss.temperatures=state=0.1", "--loss.state=0.25"],
        ["--optimizer.pretrained_lr=1e-4", "--tower.pretrained=somewhere"],
        ["--tower.width=64", "--tower.vocab_size=600"],
        ["--loss.temperature=0.2", "--tower.pretrained=somewhere"],
    ],
)
def test_flags_that_something_uses_are_not(flags):
    assert unused_options(load_config(AlignConfig, flags), given(flags)) == {}


def test_a_temperature_that_the_start_overrules_is_refused_unless_it_is_fixed(encoder, tmp_path, capsys):
    flags = [f"--tower.pretrained={encoder}", "--loss.temperature=0.2"]
    assert run("align", [*flags, f"--output={tmp_path}/run"]) == 2
    assert "loss.temperature changes nothing without a start that has no scales" in capsys.readouterr().err
    flags += ["--loss.learn_temperature=false"]
    assert unused_options(load_config(AlignConfig, flags), given(flags)) == {}


@pytest.fixture
def stuck(align_config, tmp_path, monkeypatch) -> AlignConfig:
    """A run that cannot learn."""
    monkeypatch.setattr("vla.training.align.SETTLED", 0)
    optimizer = replace(align_config.optimizer, lr=1e-9, warmup=0)
    run = {"steps": 2, "log_every": 1, "save_every": 1, "eval_every": 0, "output": str(tmp_path / "run")}
    return replace(align_config, optimizer=optimizer, **run)


def test_what_does_not_learn_raises_the_alarm_once_everywhere(stuck, capsys):
    folder = train_align(stuck).parent
    out = capsys.readouterr()
    assert (out.out + out.err).count("still at its chance level") == 1
    named = [line.get("at_chance") for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert named[0]
    assert not any(named[1:])
    (warning,) = json.loads((folder / "alignment.json").read_text())["warnings"]
    assert warning.startswith(f"step 1: {', '.join(named[0])} still at its chance level")
    assert "Warning: step 1:" in (folder / "report.html").read_text()


def test_a_term_that_no_batch_has_rows_for_raises_the_alarm(stuck):
    loss = replace(stuck.loss, state=0.25, state_within_goal=True)
    batch = replace(stuck.batch, episodes=1, frames=1)
    train_align(replace(stuck, loss=loss, batch=batch))
    first = logged(Path(stuck.output))[0]
    assert "state/loss" not in first
    assert "state (no batch has rows for it)" in first["at_chance"]


def test_a_short_run_has_settled_as_its_warm_up_is_short(stuck, monkeypatch):
    monkeypatch.setattr("vla.training.align.SETTLED", 1)
    optimizer = replace(stuck.optimizer, warmup=200)  # of 5 steps, 1
    folder = train_align(replace(stuck, steps=5, optimizer=optimizer)).parent
    (warning,) = json.loads((folder / "alignment.json").read_text())["warnings"]
    assert warning.startswith("step 2:")


def test_a_resumed_run_does_not_raise_the_same_alarm_again(stuck, monkeypatch):
    save = align.checkpoint

    def stops(run, step, *rest):
        save(run, step, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        train_align(stuck)
    monkeypatch.setattr(align, "checkpoint", save)
    folder = train_align(replace(stuck, resume=True)).parent
    assert len(json.loads((folder / "alignment.json").read_text())["warnings"]) == 1


def test_a_run_learns_and_has_no_warnings(align_config, tmp_path, monkeypatch):
    """The main term alone, which leaves its chance level within few steps of so small a run."""
    monkeypatch.setattr("vla.training.align.SETTLED", 30)
    run = {"steps": 60, "log_every": 20, "eval_every": 0, "save_every": 60, "output": str(tmp_path / "run")}
    optimizer = replace(align_config.optimizer, lr=3e-3, warmup=5)
    loss = replace(align_config.loss, word_patch=0.0, vision_language=0.0, state=0.0)
    folder = train_align(replace(align_config, optimizer=optimizer, loss=loss, **run)).parent
    assert json.loads((folder / "alignment.json").read_text())["warnings"] == []
    first, *_, last = [line for line in logged(folder) if "loss" in line]
    assert last["context_action/excess"] < 0.7 * first["context_action/excess"]


def test_stage_two_is_told_what_it_has_to_share(align_config):
    data = replace(align_config.data, camera="observation.image")
    command = next_command(replace(align_config, data=data, seed=3), Path("run/clip"))
    assert command.endswith(
        " --encoder=run/clip --data.image_size=48 --data.camera=observation.image --data.holdout=0.3 --seed=3"
        " --aligned_pooler=true --steps=1500 --ema=0.995 --output=outputs/policy/run"
    )


def test_a_run_counts_its_instructions(encoder):
    line = logged(encoder.parent)[0]
    assert line["distinct_instructions"] >= line["distinct_goals"] > 1


def test_a_locked_vision_tower_stays_as_it_was_and_the_rest_learns(align_config, encoder, tmp_path):
    tower = replace(align_config.tower, pretrained=str(encoder), locked=True)
    clip = train_align(replace(align_config, tower=tower, output=str(tmp_path / "run")))
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, clip))
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert not {key for key in changed if key.startswith("vision_model.")}
    assert "visual_projection.weight" in changed
    assert any(key.startswith("text_model.") for key in changed)


def test_gradient_accumulation_is_refused_with_the_reason(align_config, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"
    )  # `accelerate launch --gradient_accumulation_steps=2`
    with pytest.raises(UserError, match="negatives between the small batches; use --chunk"):
        train_align(replace(align_config, output=str(tmp_path / "run")))


def test_pieces_keep_few_compiled_kernels(align_config, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")  # so that what comes is undone afterwards
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    train_align(replace(align_config, steps=1, output=str(tmp_path / "whole")))
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
    train_align(replace(align_config, steps=1, chunk=2, output=str(tmp_path / "pieces")))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "100"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    train_align(replace(align_config, steps=1, chunk=2, output=str(tmp_path / "own")))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_shuffled_instructions_stay_among_the_episodes_that_have_one():
    goal_id = np.array([3, -1, 4, 5, -1, 6, 7, 8])
    labels = shuffled_labels(goal_id, 0)
    assert sorted(labels) == list(range(8))
    assert (labels != np.arange(8)).any()
    assert labels[[1, 4]].tolist() == [1, 4]


def test_a_term_that_some_batches_lack_is_drawn_where_it_is(align_config, tmp_path):
    config = replace(align_config, steps=2, log_every=1, output=str(tmp_path / "run"))
    folder = train_align(config).parent
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    last = max(number for number, line in enumerate(lines) if "state/loss" in line)
    lines[last] = {key: value for key, value in lines[last].items() if not key.startswith("state/")}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "scene &lt;-&gt; state" in write_alignment_report(folder).read_text()


def test_data_without_scenes_is_told_that_it_brings_no_hard_negatives(align_config, data_root, tmp_path, capsys):
    said = "batch.same_scene brings no hard negatives"
    config = replace(align_config, steps=1, output=str(tmp_path / "with"))
    train_align(config)
    assert said not in capsys.readouterr().out
    root = without(data_root, tmp_path / "data", SCENE_KEY)
    train_align(replace(config, data=replace(config.data, root=str(root)), output=str(tmp_path / "run")))
    assert said in capsys.readouterr().out


def test_the_rate_of_a_run_follows_the_schedule(encoder, align_config):
    lines = map(json.loads, (encoder.parent / "metrics.jsonl").read_text().splitlines())
    optimizer, steps = align_config.optimizer, align_config.steps
    expected = [optimizer.lr * schedule(step, steps, optimizer.warmup) for step in range(steps)]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx(expected)


def test_measures_are_of_held_out_episodes_and_probes_fitted_on_others(align_config, tmp_path, monkeypatch):
    found, probes = [], alignment.probe_measures
    monkeypatch.setattr(alignment, "probe_measures", lambda *given: found.append(given) or probes(*given))
    train_align(replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run")))
    _, expected = split_episodes(read_episodes(align_config.data.root), align_config.data.holdout, align_config.seed)
    ((seen, held_out, _),) = found
    assert set(held_out.batch.episode_id.tolist()) == set(expected.tolist())
    assert not set(seen.batch.episode_id.tolist()) & set(expected.tolist())
