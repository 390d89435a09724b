"""The run folder: resolved configuration, versions, metrics, TensorBoard events."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from vla.config_io import changed, filled, read_yaml, save_yaml, to_dict
from vla.files import write_whole
from vla.locks import lock_folder
from vla.precision import chosen_precision
from vla.training.checkpoint import latest_checkpoint
from vla.types import UserError
from vla.versions import command_line, write_versions

# Changing these does not change what a run computes; `chunk` changes nothing but rounding and what dropout draws.
FREE_FIELDS = (
    "chunk",
    "resume",
    "threads",
    "log_every",
    "save_every",
    "output",
    "workers",
    "cache",
    "stream",
    "eval_every",
    "rollouts_every",
    "rollouts",
)


class RunFolder:
    """`outputs/STAGE/NAME/` of one training run, which is finished when it holds `end`; of many processes one `writes`.

    Raises:
        UserError: the folder holds a run and `resume` is off, the run was begun with another configuration, or another
            process is at it.
    """

    def __init__(self, folder: Path, config: Any, *, end: str, resume: bool, writes: bool = True) -> None:
        self.folder, self.end, self.writes = folder, folder / end, writes
        # A run that ended before its first step may be started anew.
        begun = (folder / "metrics.jsonl").is_file() or latest_checkpoint(folder) is not None
        if begun and not resume:
            raise UserError(
                f"{folder}: holds a run already; add --resume=true to continue it, or choose another --output"
            )
        self._metrics = folder / "metrics.jsonl"
        self._tensorboard: SummaryWriter | None = None
        if not writes:  # what all must have in common is compared among them; the file is that of the one who writes
            return
        if begun:
            self._refuse_other_config(config)
        self._lock = lock_folder(folder)
        save_yaml(config, folder / "config.yaml")
        if not self.end.exists():
            write_versions(folder / "versions.json")
        with (folder / "log.txt").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {command_line()}\n")

    def log(self, step: int, metrics: dict[str, float | str | list[str]]) -> None:
        """Append one line; numbers go to TensorBoard too."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for key, value in metrics.items():
            if not isinstance(value, (str, list)):
                self._tensorboard.add_scalar(key, value, step)

    def logged(self, key: str) -> dict[int, Any]:
        """What was logged under a key, by step; nothing where another process writes."""
        if not self.writes:
            return {}
        lines = [json.loads(line) for line in self._metrics.read_text().splitlines()] if self._metrics.is_file() else []
        return {line["step"]: line[key] for line in lines if key in line}

    def truncate(self, step: int) -> None:
        """Drop metrics after `step`, which a resumed run writes again."""
        if self.writes and self._metrics.is_file():
            lines = self._metrics.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_whole(self._metrics, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _refuse_other_config(self, config: Any) -> None:
        if latest_checkpoint(self.folder) is None and not self.end.exists():  # nothing to go on from: begins anew
            return
        if not (self.folder / "config.yaml").is_file():  # checkpoints alone were copied from another machine
            return
        old = read_yaml(self.folder / "config.yaml")
        old = filled(old, to_dict(type(config)()))  # fields that an older version did not know had their defaults
        found = [told for k, told in changed(old, to_dict(config)).items() if k.split(".")[-1] not in FREE_FIELDS]
        if found:
            does = "is finished, and was" if self.end.exists() else "cannot resume what was"
            raise UserError(f"{self.folder}: {does} begun with {'; '.join(found)}; choose another --output")


def begun_precision(folder: Path, wanted: str, end: str) -> str:
    """Either "no" or "bf16": of "auto", that of the run in `folder` if it has a checkpoint or its `end`, else what suits this machine."""
    path = folder / "config.yaml"  # not there where checkpoints alone were copied from another machine
    there = latest_checkpoint(folder) is not None or (folder / end).exists()
    if wanted == "auto" and there and path.is_file():
        wanted = read_yaml(path)["precision"]
    return chosen_precision(wanted)


def _step_of(line: str) -> int:
    """The step of a metrics line; a line torn by a crash counts as later than all."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize


def mean_metrics(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means over some steps; a metric that a step lacks is averaged over those that have it."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    return {name: float(np.mean([metrics[name] for metrics in window if name in metrics])) for name in names}
