"""Both stages, killed by SIGKILL at any moment and resumed, repeat the uninterrupted run exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import logged
from vla.config import LossConfig
from vla.config_io import save_yaml
from vla.models.clip import tokenize
from vla.policies.loading import load_chunk_policy
from vla.training import align
from vla.training.align import train_align
from vla.training.policy import train_policy
from vla.types import UserError
from vla.versions import write_versions

ROOT = Path(__file__).resolve().parent.parent.parent
TIMES = ("triplets_per_s", "data_wait", "samples_per_s", "seconds")


def metrics(folder: Path) -> list[dict]:
    lines = logged(folder)
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def run_and_kill(script: str, config, folder: Path, at_step: int) -> None:
    """Start a training and kill it as soon as it has logged `at_step`."""
    path = folder.parent / f"{folder.name}.yaml"
    save_yaml(config, path)
    command = [sys.executable, str(ROOT / "scripts" / script), "--config_path", str(path)]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and f'"step": {at_step},' in log.read_text():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    assert (folder / "checkpoints").exists() or at_step < config.save_every


@pytest.mark.parametrize("at_step", [1, 3])
def test_stage_one_resumes_exactly(align_config, tmp_path, at_step):
    config = replace(align_config, steps=8, chunk=5, eval_every=0, save_every=2, output=str(tmp_path / "whole"))
    train_align(config)
    broken = replace(config, output=str(tmp_path / "broken"))
    run_and_kill("train_align.py", broken, tmp_path / "broken", at_step)
    train_align(replace(broken, resume=True))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "clip" / "model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def with_dropout(encoder, tmp_path) -> Path:
    """A start whose attention drops weights in training."""
    copy = shutil.copytree(encoder, tmp_path / "start" / "clip")
    config = json.loads((copy / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["attention_dropout"] = 0.3
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("what", ["more", "stream_and_word_dropout", "minimal_pairs", "other_terms", "dropout", "lora"])
def test_stage_one_resumes_exactly_whatever_is_switched_on(
    align_config, alike, with_dropout, tmp_path, monkeypatch, what
):
    data, loss = align_config.data, align_config.loss
    terms = {"transition_action": 0.5, "transition_language": 0.5, "state_within_goal": True}
    changes = {
        "more": {"more": (str(alike),)},
        "stream_and_word_dropout": {"data": replace(data, stream=True, word_dropout=0.3)},
        "minimal_pairs": {"data": replace(data, root=str(alike)), "loss": replace(loss, minimal_pairs=True)},
        "other_terms": {"loss": replace(loss, vision_language_kind="sigmoid", **terms)},
        "dropout": {"tower": replace(align_config.tower, pretrained=str(with_dropout))},
        "lora": {"tower": replace(align_config.tower, pretrained=str(with_dropout), lora_rank=2)},
    }
    config = replace(align_config, steps=4, eval_every=0, save_every=1, output=str(tmp_path / "whole"), **changes[what])
    train_align(config)
    broken, save = replace(config, output=str(tmp_path / "broken")), align.checkpoint

    def stops(run, step, *rest):
        save(run, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(align, "checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        train_align(broken)
    monkeypatch.setattr(align, "checkpoint", save)
    train_align(replace(broken, resume=True))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "clip" / "model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_pretrained_start_drops_weights_from_the_first_step_on(align_config, with_dropout, tmp_path):
    def first_loss(start: Path, number: int) -> float:
        tower = replace(align_config.tower, pretrained=str(start))
        run = replace(align_config, tower=tower, steps=1, eval_every=0, output=str(tmp_path / f"run{number}"))
        train_align(run)
        return metrics(tmp_path / f"run{number}")[0]["loss"]

    dropped = first_loss(with_dropout, 0)
    config = with_dropout / "config.json"
    config.write_text(config.read_text().replace("0.3", "0.0"))
    assert dropped != first_loss(with_dropout, 1)


def touch_statistics(data: Path) -> None:
    statistics = data / "meta" / "stats.json"
    statistics.write_text(statistics.read_text() + "\n")


def reword(data: Path) -> None:
    tasks = data / "meta" / "tasks.parquet"
    table = pd.read_parquet(tasks)
    table.index = table.index.str.replace("the", "that")
    table.to_parquet(tasks)


@pytest.mark.parametrize("stage", ["one", "two"])
@pytest.mark.parametrize(("change", "what"), [(touch_statistics, "data"), (reword, "instructions or goals")])
def test_other_data_under_the_same_name_is_refused(
    align_config, policy_config, data_root, tmp_path, stage, change, what
):
    config, train = (align_config, train_align) if stage == "one" else (policy_config, train_policy)
    copy = shutil.copytree(data_root, tmp_path / "data")
    run = {"data": replace(config.data, root=str(copy)), "save_every": 1, "output": str(tmp_path / "run")}
    train(replace(config, steps=1, eval_every=0, **run))
    for finished in ("report.html", "policy"):
        path = tmp_path / "run" / finished
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    change(copy)
    with pytest.raises(UserError, match=rf"step_000001: was trained on other {what} than .*data holds now"):
        train(replace(config, steps=1, eval_every=0, resume=True, **run))


def test_other_training_episodes_of_the_same_data_are_refused(align_config, data_root, tmp_path):
    copy = shutil.copytree(data_root, tmp_path / "data")
    data = replace(align_config.data, root=str(copy), episodes_per_task=2)
    config = replace(align_config, data=data, steps=1, save_every=1, eval_every=0, output=str(tmp_path / "run"))
    train_align(config)
    (tmp_path / "run" / "report.html").unlink()
    made = json.loads((copy / "meta" / "concord.json").read_text())
    made["task_of_goal"] = dict.fromkeys(made["task_of_goal"], "all")
    (copy / "meta" / "concord.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"step_000001: was trained on other episodes of .*data than are chosen now"):
        train_align(replace(config, resume=True))


def test_fingerprints_of_batches_tell_steps_and_seeds_apart(align_config, tmp_path):
    seen = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        train_align(replace(align_config, steps=2, log_every=1, eval_every=0, seed=seed, output=str(folder)))
        seen += [line["samples"] for line in metrics(folder) if "samples" in line]
    assert len(set(seen)) == 4


def test_an_encoder_that_changed_meanwhile_is_refused(policy_config, tmp_path):
    path = Path(shutil.copytree(Path(policy_config.encoder).parent, tmp_path / "align")) / "clip"
    config = replace(policy_config, encoder=str(path), steps=1, save_every=1, output=str(tmp_path / "run"))
    train_policy(config)
    weights = load_file(path / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, path / "model.safetensors", {"format": "pt"})
    again = replace(config, resume=True)
    with pytest.raises(UserError, match=r"was trained on an encoder that .*clip no longer holds"):
        train_policy(again)
    shutil.rmtree(tmp_path / "run" / "policy")
    with pytest.raises(UserError, match="step_000001: was trained on an encoder that has changed since"):
        train_policy(again)


def test_other_token_ids_for_the_same_instructions_are_refused(align_config, tmp_path, monkeypatch):
    config = replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run"))
    train_align(config)
    (tmp_path / "run" / "report.html").unlink()  # what says that a run has finished

    def otherwise(tokenizer, texts):
        input_ids, mask = tokenize(tokenizer, texts)
        return input_ids.flip(0), mask

    monkeypatch.setattr("vla.training.align_state.tokenize", otherwise)
    with pytest.raises(UserError, match=r"step_000001: the instructions were other token ids"):
        train_align(replace(config, resume=True))


def test_a_run_stopped_while_it_exports_logs_its_last_measures_once(align_config, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    config = replace(align_config, steps=2, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(align, "export_encoder", killed)
        with pytest.raises(KeyboardInterrupt):
            train_align(config)
    train_align(replace(config, resume=True))
    last = [line for line in metrics(tmp_path / "run") if "validation/modality_gap" in line and line["step"] == 2]
    assert len(last) == 1


def test_checkpoints_alone_are_a_run_that_has_begun(align_config, tmp_path):
    config = replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run"))
    folder = train_align(config).parent
    for name in ("metrics.jsonl", "report.html"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"holds a run already; add --resume=true"):
        train_align(config)
    with pytest.raises(UserError, match=r"cannot resume what was begun with batch\.goals="):
        train_align(replace(config, batch=replace(config.batch, goals=7), resume=True))


def test_a_snapshot_is_there_before_a_checkpoint_says_that_its_step_is_done(align_config, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(align, "export_encoder", killed)
    config = replace(align_config, steps=2, save_every=1, snapshots=(1,), output=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        train_align(config)
    monkeypatch.undo()
    train_align(replace(config, resume=True))
    assert (tmp_path / "run" / "snapshots" / "1" / "clip" / "model.safetensors").is_file()


def test_a_policy_whose_export_is_interrupted_is_not_finished(policy_config, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    config = replace(policy_config, steps=2, eval_every=0, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("vla.training.policy_export.write_golden", killed)
        with pytest.raises(KeyboardInterrupt):
            train_policy(config)
    assert not (tmp_path / "run" / "policy").exists()
    load_chunk_policy(train_policy(replace(config, resume=True)))


@pytest.mark.parametrize(
    "what", ["frozen", "tuned", "auxiliary", "flow_and_noise", "more", "stream_and_word_dropout", "start"]
)
def test_stage_two_resumes_exactly(policy_config, policy_folder, alike, tmp_path, capsys, what):
    data, head = policy_config.data, policy_config.head
    changes = {
        "frozen": {},
        "tuned": {"tune": True},
        "auxiliary": {"tune": True, "auxiliary": 0.5, "loss": LossConfig(queries=2, pooler_width=32)},
        "flow_and_noise": {"head": replace(head, kind="flow", token_noise=0.1, state_dropout=0.5)},
        "more": {"more": (f"{alike}=0.5",)},
        "stream_and_word_dropout": {"data": replace(data, stream=True, word_dropout=0.3), "cached_shifts": 0},
        "start": {"start": str(policy_folder)},
    }[what]
    config = replace(policy_config, steps=8, eval_every=4, save_every=2, output=str(tmp_path / "whole"), **changes)
    train_policy(config)
    broken = replace(config, output=str(tmp_path / "broken"))
    run_and_kill("train_policy.py", broken, tmp_path / "broken", 5)
    train_policy(replace(broken, resume=True))
    assert "resumed at step 4" in capsys.readouterr().out
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def launch(config, folder: Path, kill_at: int | None = None) -> None:
    """Stage one on two processes, through accelerate's launcher; all of it is killed when step `kill_at` is logged."""
    path = folder.parent / f"{folder.name}.yaml"
    save_yaml(config, path)
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command += [str(ROOT / "scripts" / "train_align.py"), "--config_path", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if kill_at is not None and log.is_file() and f'"step": {kill_at},' in log.read_text():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.001)
    assert process.wait() == (0 if kill_at is None else -signal.SIGKILL)
    if kill_at is None:
        assert json.loads((folder / "alignment.json").read_text())["processes"] == 2


def test_stage_one_in_pieces_on_two_processes_killed_and_resumed_repeats_the_run_and_is_that_of_one_process(
    align_config, tmp_path
):
    run = {"steps": 6, "eval_every": 0, "save_every": 2, "precision": "no"}
    config = replace(align_config, **run, chunk=3, output=str(tmp_path / "two"))
    launch(config, tmp_path / "two")
    broken = replace(config, output=str(tmp_path / "broken"))
    launch(broken, tmp_path / "broken", kill_at=3)
    launch(replace(broken, resume=True), tmp_path / "broken")
    two, again = metrics(tmp_path / "two"), metrics(tmp_path / "broken")
    assert again == two
    alone = tmp_path / "one.yaml"
    save_yaml(replace(config, chunk=0, output=str(tmp_path / "one")), alone)
    command = [sys.executable, str(ROOT / "scripts" / "train_align.py"), "--config_path", str(alone)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    first, one = two[0], metrics(tmp_path / "one")[0]
    assert first["samples"] == one["samples"]
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_repeat_a_run_of_several_streamed_data_sets_with_dropout(
    align_config, alike, with_dropout, tmp_path
):
    config = replace(
        align_config,
        data=replace(align_config.data, stream=True, word_dropout=0.3),
        more=(f"{alike}=0.5",),
        tower=replace(align_config.tower, pretrained=str(with_dropout)),
        loss=replace(align_config.loss, transition_action=0.5, transition_language=0.5),
        steps=5,
        eval_every=0,
        save_every=2,
        precision="no",
        output=str(tmp_path / "two"),
    )
    launch(config, tmp_path / "two")
    broken = replace(config, output=str(tmp_path / "broken"))
    launch(broken, tmp_path / "broken", kill_at=3)
    launch(replace(broken, resume=True), tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "two")


def test_a_checkpoint_that_another_version_wrote_is_named(align_config, tmp_path):
    config = replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run"))
    train_align(config)
    (tmp_path / "run" / "report.html").unlink()  # what says that a run has finished
    path = tmp_path / "run" / "checkpoints" / "step_000001" / "state.json"
    state = json.loads(path.read_text())
    state["optimizer"][0]["param_groups"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"step_000001: does not fit \(.*\); go on with the version that wrote it"):
        train_align(replace(config, resume=True))


def test_versions_that_a_run_had_before_stay_written_down(tmp_path):
    path = tmp_path / "versions.json"
    write_versions(path)
    now = json.loads(path.read_text())
    path.write_text(json.dumps(now | {"torch": "1.0", "commits": ["abc"]}))
    write_versions(path)
    written = json.loads(path.read_text())
    assert [record["torch"] for record in written["before"]] == ["1.0"]
    assert (written["torch"], written["commits"][0]) == (now["torch"], "abc")


def test_a_finished_run_keeps_the_versions_that_it_was_made_with(align_config, tmp_path):
    config = replace(align_config, steps=1, eval_every=0, output=str(tmp_path / "run"))
    train_align(config)
    path = tmp_path / "run" / "versions.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    made_with = path.read_text()
    train_align(replace(config, resume=True))
    assert path.read_text() == made_with


def test_a_run_of_which_records_alone_are_left_begins_anew(align_config, tmp_path):
    """As that of an unfinished arm in a comparison whose records were unpacked elsewhere."""
    whole = replace(align_config, steps=2, eval_every=0, output=str(tmp_path / "whole"))
    train_align(whole)
    left = tmp_path / "left"
    left.mkdir()
    for name in ("metrics.jsonl", "versions.json"):
        shutil.copy(tmp_path / "whole" / name, left / name)
    train_align(replace(whole, output=str(left), resume=True))
    assert metrics(left) == metrics(tmp_path / "whole")
