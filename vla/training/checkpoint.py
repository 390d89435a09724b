"""Checkpoints that a crash or a full disk cannot ruin: safetensors and JSON, written aside, fsynced, renamed, marked."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.data.episodes import Episodes
from vla.files import fsync, is_disk_full
from vla.types import UserError

MARKER = "COMPLETE"


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `run_dir/checkpoints/step_NNNNNN`, then point `last` at it, then prune all but the newest `keep`.

    Args:
        run_dir: the run folder.
        step: updates done.
        tensors: named groups of tensors, one safetensors file each.
        state: anything JSON can hold.
    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step_{step:06d}", folder / f".step_{step:06d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            save_file(
                {key: t.detach().cpu().contiguous().clone() for key, t in group.items()},
                temporary / f"{name}.safetensors",
            )
        (temporary / "state.json").write_text(json.dumps(state | {"groups": sorted(tensors)}, indent=1))
        for path in temporary.iterdir():
            fsync(path)
        (temporary / MARKER).write_text(f"{step}\n")
        fsync(temporary / MARKER)
        fsync(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error):
            raise UserError(f"{folder}: disk full at step {step}; free some space, then add --resume=true") from error
        raise
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    fsync(folder)
    point_last(folder, final.name)
    for old in complete_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def point_last(folder: Path, name: str) -> None:
    """Make the link `last` name a checkpoint, atomically."""
    link = folder / ".last.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    last = folder / "last"
    if last.is_dir() and not last.is_symlink():  # copied from another machine by a program that follows links
        shutil.rmtree(last)
    os.replace(link, last)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [p.parent for p in (run_dir / "checkpoints").glob(f"step_*/{MARKER}")]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The updates that were done at a checkpoint."""
    return int(path.name.removeprefix("step_"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run, if any."""
    found = complete_checkpoints(run_dir)
    return found[-1] if found else None


def nonfinite_batch(run: Path, step: int) -> Path:
    """Where the batch that broke the loss at a step is written."""
    return run / f"nonfinite_step_{step:06d}.safetensors"


def save_nonfinite(run: Path, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the batch that broke the loss at a step."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    save_file(tensors, nonfinite_batch(run, step))


def how_to_replay(run: Path, step: int) -> str:
    """Where that batch is, what repeats the step, as batches depend on seed and step alone, and what may help."""
    last = latest_checkpoint(run)
    how = f"--resume=true repeats it from {last.name}" if last else "another --output repeats it from the start"
    return (
        f"the batch is in {nonfinite_batch(run, step)}, and the same command with {how}; try a lower --optimizer.lr, or --precision=no "
        "where it was bf16, with another --output"
    )


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by group, and the state.

    Raises:
        UserError: a file is absent or damaged; it is named.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {name: load_file(path / f"{name}.safetensors") for name in state.pop("groups")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); delete it to resume from the one before") from error
    return tensors, state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        UserError: it is damaged, as a copy is that was interrupted.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); copy it anew, or train again") from error


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around putting a checkpoint's tensors into place: they fit unless another version of this project wrote it.

    Raises:
        UserError: they do not.
    """
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        what = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{path}: does not fit ({what}); go on with the version that wrote it (versions.json; earlier ones are in its `commits` and `before`), or choose another --output"
        ) from error


def check_trained_on(path: Path, state: dict[str, Any], episodes: Episodes) -> None:
    """Refuse to go on from a checkpoint with other data than it was trained on; one of an older version does not say which.

    Raises:
        UserError: names both fingerprints.
    """
    now = {"data": episodes.fingerprint, "labels": episodes.labels()}
    for key, what in (("data", "data"), ("labels", "instructions or goals")):
        before = state.get(key, now[key])
        if before != now[key]:
            raise UserError(
                f"{path}: was trained on other {what} than {episodes.root} holds now (fingerprints {before} and {now[key]}); "
                "restore that data, or choose another --output"
            )


def rng_tensors() -> dict[str, Tensor]:
    """States of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def own_random_numbers() -> AbstractContextManager:
    """What is done within draws from torch's generators as if it had them for itself."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Inverse of `rng_tensors`."""
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:  # else the machine has more GPUs now
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
