"""Checkpoints survive crashes, full disks and damage."""

import errno

import pytest
import torch
from safetensors import SafetensorError

import vla.training.checkpoint as checkpoint
from vla.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from vla.training.optim import make_optimizers
from vla.types import UserError


def save(folder, step):
    return save_checkpoint(folder, step, {"model": {"weight": torch.full((3,), float(step))}}, {"step": step})


def test_what_is_saved_is_loaded(tmp_path):
    tensors, state = load_checkpoint(save(tmp_path, 7))
    assert state == {"step": 7}
    assert torch.equal(tensors["model"]["weight"], torch.full((3,), 7.0))


def test_the_newest_two_are_kept_and_last_points_at_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_000002", "step_000003"]
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step_000003"


def test_a_checkpoint_without_its_mark_is_ignored(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / checkpoint.MARKER).unlink()
    assert latest_checkpoint(tmp_path).name == "step_000001"


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).name == "step_000001"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error):
    save(tmp_path, 1)

    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"disk full at step 2; free some space, then add --resume=true"):
        save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).name == "step_000001"
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_a_truncated_file_is_named(tmp_path):
    path = save(tmp_path, 1)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="step_000001: damaged checkpoint"):
        load_checkpoint(path)


def test_a_truncated_file_beside_an_encoder_is_named(tmp_path):
    path = save(tmp_path, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged \("):
        checkpoint.load_tensors(path)


def trained(seed: int):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 4)
    return model, make_optimizers([(model, 1e-2)], 0.05, "no")


def update(model, optimizer, step: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained(0)
    for step in range(3):
        update(model, optimizer, step)
    tensors, meta = optimizer.tensors()
    path = save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": meta})
    update(model, optimizer, 3)

    other, other_optimizer = trained(1)
    loaded, state = load_checkpoint(path)
    other.load_state_dict(loaded["model"])
    other_optimizer.restore(loaded["optimizer"], state["optimizer"])
    update(other, other_optimizer, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_numbers_go_on_where_they_were():
    tensors = {key: value.clone() for key, value in rng_tensors().items()}
    expected = torch.rand(5)
    restore_rng(tensors)
    assert torch.equal(torch.rand(5), expected)
