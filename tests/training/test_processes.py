"""Two real processes that take each other for other machines: no shared run folder, other weights, other data."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from tests.conftest import ROOT
from vla.config import AlignConfig
from vla.config_io import save_yaml
from vla.training.align import train_align
from vla.training.align_setup import shared_settings
from vla.training.checkpoint import point_last
from vla.training.processes import ALONE, Processes, make_accelerator

HERE = Path(__file__).resolve()


def two_machines(*commands: list[str]) -> list[subprocess.CompletedProcess]:
    """Run one command on each of two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    everywhere = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    everywhere |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    members = [
        subprocess.Popen(
            command,
            env=os.environ | everywhere | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    printed = [member.communicate(timeout=300) for member in members]
    return [
        subprocess.CompletedProcess(member.args, member.returncode, *text)
        for member, text in zip(members, printed, strict=True)
    ]


def stage_one(
    config: AlignConfig, *folders: Path, other: AlignConfig | None = None
) -> list[subprocess.CompletedProcess]:
    """Stage one on two machines, each with a run folder of its own; the second may have a configuration of its own, too."""
    commands = []
    for rank, (folder, own) in enumerate(zip(folders, (config, other or config), strict=True)):
        path = folder.parent / f"machine_{rank}.yaml"
        save_yaml(replace(own, output=str(folder)), path)
        commands.append([sys.executable, str(ROOT / "scripts" / "train_align.py"), "--config_path", str(path)])
    return two_machines(*commands)


@pytest.fixture(scope="module")
def interrupted(align_config, tmp_path_factory) -> AlignConfig:
    """A run that was stopped after two of its four steps."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    config = replace(align_config, steps=4, save_every=2, eval_every=0, output=str(folder))
    train_align(config)
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    point_last(folder / "checkpoints", "step_000002")
    return replace(config, resume=True)


def test_a_machine_that_does_not_see_the_checkpoint_stops_all_with_both_steps(interrupted, tmp_path):
    for done in stage_one(interrupted, shutil.copytree(interrupted.output, tmp_path / "a"), tmp_path / "b"):
        assert done.returncode == 2
        assert "process 0 is at step 2, process 1 at step 0; all must see the same run" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_machine_that_is_finished_and_one_that_is_not_stop_both(interrupted, tmp_path):
    first = shutil.copytree(interrupted.output, tmp_path / "a")
    (first / "report.html").touch()
    second = shutil.copytree(interrupted.output, tmp_path / "b")
    for done in stage_one(interrupted, first, second):
        assert done.returncode == 2
        assert "process 0 is at the end, process 1 at step 2" in done.stderr


def test_a_mistake_stops_all_alike(interrupted, tmp_path):
    first = shutil.copytree(interrupted.output, tmp_path / "a")
    members = stage_one(replace(interrupted, resume=False), first, tmp_path / "b")
    for done, message in zip(
        members, ("holds a run already", "process 0 has stopped; its message says why"), strict=True
    ):
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_machine_that_was_not_told_to_resume_stops_both(interrupted, tmp_path):
    first = shutil.copytree(interrupted.output, tmp_path / "a")
    other = replace(interrupted, resume=False)
    for done in stage_one(interrupted, first, tmp_path / "b", other=other):
        assert done.returncode == 2
        assert "process 0 is at step 2, process 1 at step 0" in done.stderr


def test_machines_of_which_one_was_told_to_resume_begin_together_where_nothing_is_saved_yet(align_config, tmp_path):
    config = replace(align_config, steps=1, resume=True)
    done = stage_one(config, tmp_path / "a", tmp_path / "b", other=replace(config, resume=False))
    assert [member.returncode for member in done] == [0, 0], done[0].stderr + done[1].stderr


def test_a_checkpoint_of_another_run_at_the_same_step_stops_both(interrupted, tmp_path):
    first, second = (shutil.copytree(interrupted.output, tmp_path / name) for name in ("a", "b"))
    path = second / "checkpoints" / "step_000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1e6}))
    for done in stage_one(interrupted, first, second):
        assert done.returncode == 2
        assert "step_000002: process 1 has this checkpoint of another run than process 0" in done.stderr


def test_a_damaged_checkpoint_on_one_machine_stops_both_without_a_traceback(interrupted, tmp_path):
    first, second = (shutil.copytree(interrupted.output, tmp_path / name) for name in ("a", "b"))
    (damaged,) = second.glob("checkpoints/step_000002/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    for done, message in zip(
        stage_one(interrupted, first, second), ("process 1 has stopped", "step_000002: damaged checkpoint"), strict=True
    ):
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_line_torn_by_a_crash_and_copied_to_another_machine_does_no_harm(interrupted, tmp_path):
    first, second = (shutil.copytree(interrupted.output, tmp_path / name) for name in ("a", "b"))
    for folder in (first, second):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "los')
    done = stage_one(interrupted, first, second)
    assert [member.returncode for member in done] == [0, 0], done[0].stderr + done[1].stderr


def test_another_vocabulary_on_another_machine_is_refused(align_config, encoder, tmp_path):
    here, there = (Path(shutil.copytree(encoder, tmp_path / name / "clip")) for name in ("here", "there"))
    words = json.loads((there / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    (one, i), (other, j) = list(vocabulary.items())[-2:]
    vocabulary[one], vocabulary[other] = j, i
    (there / "tokenizer.json").write_text(json.dumps(words))
    configs = [
        replace(align_config, tower=replace(align_config.tower, pretrained=str(start))) for start in (here, there)
    ]
    for done in stage_one(configs[0], tmp_path / "a", tmp_path / "b", other=configs[1]):
        assert done.returncode == 2
        assert "process 1 has an encoder of other words or sizes than process 0" in done.stderr


def test_with_the_checkpoints_copied_a_run_without_a_shared_folder_goes_on(interrupted, tmp_path):
    first, second = shutil.copytree(interrupted.output, tmp_path / "a"), tmp_path / "b"
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    done = stage_one(interrupted, first, second)
    assert [member.returncode for member in done] == [0, 0], done[0].stderr + done[1].stderr
    assert (first / "report.html").is_file()
    assert sorted(path.name for path in second.iterdir()) == ["checkpoints"]


def test_a_run_goes_on_where_one_machine_has_its_data_elsewhere_less_memory_and_saves_at_other_steps(
    interrupted, data_root, tmp_path
):
    first, second = (shutil.copytree(interrupted.output, tmp_path / name) for name in ("a", "b"))
    copy = shutil.copytree(data_root, tmp_path / "data")
    other = replace(interrupted, chunk=2, save_every=3, data=replace(interrupted.data, root=str(copy)))
    done = stage_one(interrupted, first, second, other=other)
    assert [member.returncode for member in done] == [0, 0], done[0].stderr + done[1].stderr
    assert json.loads((first / "alignment.json").read_text())["processes"] == 2


def test_a_loss_that_is_not_finite_stops_all_once_the_batch_is_saved(align_config, tmp_path):
    optimizer = replace(align_config.optimizer, lr=1e30, clip_norm=1e9)
    save_yaml(replace(align_config, steps=50, optimizer=optimizer, output=str(tmp_path / "run")), tmp_path / "run.yaml")
    slow = "import sys, time, vla.training.checkpoint as a; from pathlib import Path; from vla.cli import run; save = a.save_file; "
    slow += "a.save_file = lambda *given: (time.sleep(5), save(*given)); status = run('align', sys.argv[1:]); "
    slow += f"print(status, len(list(Path({str(tmp_path / 'run')!r}).glob('nonfinite_step_*.safetensors'))))"
    command = [sys.executable, "-c", slow, "--config_path", str(tmp_path / "run.yaml")]
    for member in two_machines(command, command):
        assert member.stdout.strip().splitlines()[-1] == "2 1", member.stderr  # it was there when the process stopped
        assert "loss is not finite at step" in member.stderr
        assert "Traceback" not in member.stderr
    (saved,) = (tmp_path / "run").glob("nonfinite_step_*.safetensors")
    assert "frames" in load_file(saved)


@pytest.mark.parametrize(
    ("rank", "breaks"),
    [
        (0, "align_state.save_checkpoint"),
        (1, "align_data.make_source"),
        (1, "align_data.training_batch"),
        (0, "align.save_views"),
    ],
    ids=["checkpoint", "first pictures", "batch", "report"],
)
def test_an_error_on_one_machine_stops_both_without_a_traceback(align_config, tmp_path, rank, breaks):
    save_yaml(replace(align_config, steps=2, output=str(tmp_path / "run")), tmp_path / "run.yaml")
    broken = f"""
import os, sys, vla.training.align
from vla.cli import run
def full(*_, **__):
    raise OSError(28, "No space left on device", "/mnt/full")
if os.environ["RANK"] == "{rank}":
    vla.training.{breaks} = full
sys.exit(run("align", sys.argv[1:]))
"""
    members = two_machines(*[[sys.executable, "-c", broken, "--config_path", str(tmp_path / "run.yaml")]] * 2)
    assert [member.returncode for member in members] == [2, 2]
    assert "/mnt/full: disk full; free some space" in members[rank].stderr
    assert f"process {rank} has stopped; its message says why" in members[1 - rank].stderr
    assert not any("Traceback" in member.stderr for member in members)


def test_the_result_is_printed_once(align_config, tmp_path):
    run = replace(align_config, steps=1, output=str(tmp_path / "run"))
    save_yaml(run, tmp_path / "run.yaml")
    command = [sys.executable, str(ROOT / "scripts" / "train_align.py"), "--config_path", str(tmp_path / "run.yaml")]
    first, second = two_machines([*command, "--json"], [*command, "--json"])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout)["processes"] == 2
    assert second.stdout == ""


def test_other_data_on_another_machine_is_refused(align_config, data_root, tmp_path):
    copy = shutil.copytree(data_root, tmp_path / "data")
    statistics = copy / "meta" / "stats.json"
    statistics.write_text(statistics.read_text() + "\n")
    other = replace(align_config, data=replace(align_config.data, root=str(copy)))
    for done in stage_one(align_config, tmp_path / "a", tmp_path / "b", other=other):
        assert done.returncode == 2
        assert "process 1 has other data than process 0" in done.stderr


def test_other_training_episodes_on_another_machine_are_refused(align_config, data_root, tmp_path):
    copy = shutil.copytree(data_root, tmp_path / "data")
    made = json.loads((copy / "meta" / "concord.json").read_text())
    made["task_of_goal"] = dict.fromkeys(made["task_of_goal"], "all")
    (copy / "meta" / "concord.json").write_text(json.dumps(made))
    data = replace(align_config.data, episodes_per_task=2)
    here = replace(align_config, data=data)
    for done in stage_one(
        here, tmp_path / "a", tmp_path / "b", other=replace(here, data=replace(data, root=str(copy)))
    ):
        assert done.returncode == 2
        assert "process 1 has other data than process 0" in done.stderr


def test_other_settings_on_another_machine_are_refused(align_config, tmp_path):
    other = replace(align_config, data=replace(align_config.data, word_dropout=0.3))
    for done in stage_one(align_config, tmp_path / "a", tmp_path / "b", other=other):
        assert done.returncode == 2
        assert "process 1 has other settings than process 0" in done.stderr


def test_settings_that_may_differ_between_machines_are_not_compared(align_config):
    local = replace(
        align_config, output="elsewhere", threads=7, chunk=3, data=replace(align_config.data, root="/mnt/data")
    )
    assert shared_settings(local) == shared_settings(align_config)
    started, elsewhere = (
        replace(align_config, tower=replace(align_config.tower, pretrained=path))
        for path in ("here/clip", "there/clip")
    )
    assert shared_settings(started) == shared_settings(elsewhere) != shared_settings(align_config)
    assert shared_settings(replace(align_config, more=("a=2",))) != shared_settings(replace(align_config, more=("a",)))


def test_every_process_starts_from_the_weights_of_the_first():
    done = two_machines(*[[sys.executable, str(HERE), "weights"]] * 2)
    assert [member.stdout.strip() for member in done] == ["same: True"] * 2, done[1].stderr


def test_processes_wait_for_each_other_for_a_day():
    done = two_machines(*[[sys.executable, str(HERE), "patience"]] * 2)
    assert [member.stdout.strip() for member in done] == ["1 day, 0:00:00"] * 2, done[1].stderr


def test_one_process_keeps_its_weights():
    module = torch.nn.Linear(2, 2)
    before = module.weight.data_ptr(), module.weight.detach().clone()
    ALONE.share(module)
    assert module.weight.data_ptr() == before[0]
    assert torch.equal(module.weight, before[1])


def member(what: str) -> None:
    """What one of two processes does in a test; prints what it found."""
    accelerator = make_accelerator("no")
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if what == "patience":
        print(distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout)
    else:
        torch.manual_seed(processes.rank)
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        module[1].num_batches_tracked += processes.rank
        processes.share(module)
        torch.manual_seed(0)
        expected = torch.nn.Linear(3, 2)
        shared = torch.equal(module[0].weight, expected.weight) and torch.equal(module[0].bias, expected.bias)
        print(f"same: {shared and int(module[1].num_batches_tracked) == 0}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    member(sys.argv[1])
