"""Processes that share a batch give the gradients of one that has it whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from tests.conftest import ROOT
from tests.training.small_batch import MAIN, SIGMOID, TRANSITIONS, WITHIN_GOAL, step
from vla.config import LossConfig
from vla.training.processes import Processes

CASES = {  # chunk, loss, and which batch
    "whole": (0, MAIN, {}),
    "pieces": (1, MAIN, {}),
    "sigmoid": (0, SIGMOID, {}),
    "transitions": (1, TRANSITIONS, {}),
    "within_goal": (1, WITHIN_GOAL, {}),
    "minimal_pairs": (1, MAIN, {"paired": True}),
    "groups": (1, MAIN, {"paired": True, "group": 2}),
    "partly": (0, LossConfig(transition_action=0.5, transition_language=0.5, state=0.25), {"partly": True}),
}


def one_of_many(rank: int, count: int, folder: Path) -> None:
    """A process: leaves what it computed in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    for name, (chunk, loss, which) in CASES.items():
        total, terms, found = step(chunk, loss, processes=Processes(rank, count), **which)
        save_file(found | terms | {"total": total}, folder / f"{name}_{rank}.safetensors")
    own = torch.full((1 + rank,), float(rank), dtype=torch.bfloat16)
    whole = Processes(rank, count).gather(own, list(range(1, count + 1)))
    save_file({"whole": whole}, folder / f"bfloat16_{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])  # of 7 images and 3 texts: uneven shares, and one without a text
def many(request, tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of some processes computed, by case."""
    count, folder = request.param, tmp_path_factory.mktemp("many")
    command = [sys.executable, __file__, str(count), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    members = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(count)]
    assert [member.wait(300) for member in members] == [0] * count
    names = [*CASES, "bfloat16"]
    return [{name: load_file(folder / f"{name}_{rank}.safetensors") for name in names} for rank in range(count)]


@pytest.mark.parametrize("case", CASES)
def test_processes_give_every_gradient_of_one(many, case):
    _, loss, which = CASES[case]
    total, terms, expected = step(0, loss, **which)
    for rank, computed in enumerate(many):
        torch.testing.assert_close(computed[case]["total"], total, rtol=1e-12, atol=0)
        for name, value in terms.items():
            torch.testing.assert_close(computed[case][name], value, rtol=1e-6, atol=1e-12)
        got = {name: tensor for name, tensor in computed[case].items() if name not in {*terms, "total"}}
        assert set(got) == set(expected)
        for key, gradient in expected.items():
            error = (got[key] - gradient).norm() / gradient.norm().clamp_min(1e-8)
            assert error < 1e-5, f"process {rank}, {key}: {error:.1e}"


def test_ragged_shares_in_reduced_precision_cross_processes(many):
    expected = [float(rank) for rank in range(len(many)) for _ in range(rank + 1)]
    assert all(computed["bfloat16"]["whole"].tolist() == expected for computed in many)


if __name__ == "__main__":
    one_of_many(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
