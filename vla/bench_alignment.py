"""The step of stage one beside open_clip's, and its memory at a large batch. Each measurement is a process of its own.

    python -m vla.bench_alignment '{"what": "step", "root": "outputs/bench/data", "rows": 192, "chunk": 0, "steps": 5, "threads": 2}'

prints one JSON object. The peer gets the same towers, pictures and rows, in the same precision, and open_clip's model and loss.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import distributed

from vla.config import AlignConfig, BatchConfig, DataConfig
from vla.data.augmentation import augmenter
from vla.data.batches import TripletSource, training_batch
from vla.data.episodes import read_episodes, rows_of
from vla.data.frames import open_pictures
from vla.data.sampler import MixedSampler
from vla.models.clip import pixel_values, tokenize
from vla.precision import multiplies_bf16
from vla.training.align_setup import make_encoders, make_model, make_sampler, make_source, resting_action
from vla.training.align_step import forward_backward
from vla.training.device_batch import on_device
from vla.training.memory import keep_few_kernels
from vla.training.optim import make_optimizers
from vla.training.processes import Processes
from vla.types import TripletBatch

CONTEXT = 77  # tokens that open_clip pads every text to
CHUNK = 128  # pictures at a time
LARGE_FRAMES = 8  # of each episode in a large batch
PROCESSES = (1, 2, 4)
TURNS = 3  # of our step and open_clip's, and of a plain and a cached one; a machine's speed varies
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Measurement:
    """What one process measures: `what` is "step", "peer" (texts of CONTEXT tokens) or "peer_trimmed".

    A step may be shared by `count` processes, which meet at the file `meet`; `rank` is this one's.
    """

    what: str
    root: str
    rows: int
    chunk: int
    steps: int
    threads: int
    count: int = 1
    rank: int = 0
    meet: str = ""


def precision() -> str:
    """Of both sides: bf16 where the processor, on which all of this runs, multiplies it."""
    return "bf16" if multiplies_bf16(torch.device("cpu")) else "no"


def autocast() -> torch.autocast:
    """Both sides' context of the towers."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16")


class Counted:
    """The exchanges among processes, and the bytes that this one has put in."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.rank, self.count = processes, processes.rank, processes.count
        self.bytes = 0

    def shares(self, total: int) -> list[slice]:
        return self.processes.shares(total)

    def gather(self, own: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        self.bytes += own.nbytes
        return self.processes.gather(own, lengths)

    def add(self, tensors: list[torch.Tensor]) -> None:
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        self.processes.add(tensors)

    def add_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        self.processes.add_gradients(parameters)
        self.bytes += sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def alignment_speed(root: Path, threads: int, steps: int, small: int, large: int) -> dict[str, Any]:
    """Rows a second of both steps, and seconds and memory of cached ones; what is compared is measured in turn.

    Args:
        root: tabletop data set.
        threads: CPU threads.
        steps: that the speeds are averaged over.
        small, large: rows of the batches whose memory is compared.
    """

    def measured(what: str, rows: int, chunk: int, steps: int) -> dict[str, float]:
        return in_a_process(Measurement(what, str(root), rows, chunk, steps, threads))

    rows = BatchConfig().goals * BatchConfig().frames
    compared = {
        "step": partial(measured, "step", rows, 0, steps),
        "open_clip": partial(measured, "peer", rows, 0, steps),
        "open_clip, trimmed": partial(measured, "peer_trimmed", rows, 0, steps),
        "plain": partial(measured, "step", small, 0, 2),
        "cached": partial(measured, "step", small, CHUNK, 2),
    }
    turns = [{name: measure() for name, measure in compared.items()} for _ in range(TURNS)]
    result = {
        "rows": rows,
        "threads": threads,
        "chunk": CHUNK,
        "turns": TURNS,
        **{name: best([turn[name] for turn in turns]) for name in compared},
        "large": measured("step", large, CHUNK, 1),
        "processes": {
            str(count): in_processes(Measurement("step", str(root), small, 0, 2, max(1, threads // count), count))
            for count in PROCESSES
        },
    }
    return result | {"in_words": in_words(result)}


def best(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    """The fastest of equal measurements, as other work on the machine only slows them, with the most memory that any needed."""
    return min(turns, key=lambda turn: turn["seconds"]) | {"peak_mib": max(turn["peak_mib"] for turn in turns)}


def in_words(result: dict[str, Any]) -> list[str]:
    """What the figures say."""
    ours, peer, trimmed = (result[name]["rows_per_s"] for name in ("step", "open_clip", "open_clip, trimmed"))
    plain, cached, large = result["plain"], result["cached"], result["large"]
    return [
        f"stage one, {result['threads']} threads, a step of {result['rows']} rows: {ours:,.0f} rows/s; open_clip with the same towers {peer:,.0f} rows/s at {CONTEXT} "
        f"tokens ({ours / peer:.1f} times), {trimmed:,.0f} at the texts' own length ({ours / trimmed:.1f} times), each the fastest of {result['turns']} turns",
        f"{plain['rows']} rows at once {plain['seconds']:.1f} s, {result['chunk']} pictures at a time {cached['seconds']:.1f} s "
        f"({100 * (cached['seconds'] / plain['seconds'] - 1):.0f} % more)",
        f"{large['rows']} rows, {result['chunk']} pictures at a time: {large['peak_mib']:,.0f} MiB of anonymous memory at most, "
        f"{large['peak_mib'] - cached['peak_mib']:,.0f} more than {cached['rows']} rows",
        f"{plain['rows']} rows on {', '.join(result['processes'])} processes: "
        + "; ".join(
            f"{one['rows_per_s']:,.0f} rows/s, {one['peak_mib']:,.0f} MiB each, {one['exchanged_mib']:.0f} MiB put in by each"
            for one in result["processes"].values()
        ),
    ]


def in_a_process(measurement: Measurement) -> dict[str, float]:
    """Run one measurement; its memory is that of a fresh process."""
    return json.loads(run_together([command_of(measurement)])[0].splitlines()[-1])


def in_processes(measurement: Measurement) -> dict[str, float]:
    """Run a step on several processes; what the first one measures, and the most memory that any needs."""
    with TemporaryDirectory() as folder:
        members = [replace(measurement, rank=rank, meet=f"{folder}/meet") for rank in range(measurement.count)]
        measured = [json.loads(out.splitlines()[-1]) for out in run_together([command_of(m) for m in members])]
    return measured[0] | {"peak_mib": max(one["peak_mib"] for one in measured)}


def command_of(measurement: Measurement) -> list[str]:
    """What runs a measurement by itself."""
    return [sys.executable, "-m", "vla.bench_alignment", json.dumps(vars(measurement))]


def run_together(commands: Sequence[list[str]]) -> list[str]:
    """What commands that wait for each other print; as soon as one fails the others are stopped.

    Raises:
        RuntimeError: one of them fails.
    """
    with ExitStack() as files:
        outs, errors = ([files.enter_context(TemporaryFile("w+")) for _ in commands] for _ in range(2))
        running: list[subprocess.Popen] = []
        codes: list[int | None] = [None]
        try:
            for command, out, error in zip(commands, outs, errors, strict=True):
                running.append(subprocess.Popen(command, stdout=out, stderr=error))
            while None in codes and not any(codes):
                time.sleep(0.05)
                codes = [process.poll() for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        for file in (*outs, *errors):
            file.seek(0)
        for code, command, error in zip(codes, commands, errors, strict=True):
            if code:  # negative: the signal that ended it
                said = (error.read().strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{command[-1]} failed with status {code}: {said}")
        return [out.read() for out in outs]


def measure(m: Measurement) -> dict[str, float]:
    """Rows a second, seconds and MiB put into exchanges of a step, after one to warm up, and the peak of anonymous memory (MiB)."""
    torch.set_num_threads(m.threads)
    if m.chunk:
        keep_few_kernels()
    if m.count > 1:
        distributed.init_process_group("gloo", init_method=f"file://{m.meet}", rank=m.rank, world_size=m.count)
    processes = Counted(Processes(m.rank, m.count))
    torch.manual_seed(0)
    batch = BatchConfig()
    if m.rows > batch.goals * batch.frames:  # a large one takes more of each episode, so that a small data set fills it
        batch = replace(batch, frames=LARGE_FRAMES, gap=1)
    batch = replace(batch, goals=m.rows // batch.frames)
    episodes = read_episodes(m.root)
    everything = np.arange(len(episodes.goal_id))

    def sampled(batch: BatchConfig) -> MixedSampler:
        return make_sampler(batch, 0, episodes, [everything], [1.0])

    sampler = sampled(batch)
    if (drawn := len(sampler.rows(0))) > m.rows:  # goals came up in several scenes
        goals = max(1, batch.goals * m.rows // (2 * drawn))
        while len((sampler := sampled(replace(batch, goals=goals))).rows(0)) < m.rows:
            goals += max(1, goals // 50)
    config = AlignConfig(data=DataConfig(root=m.root), batch=batch, threads=m.threads)
    frames = open_pictures(episodes, config.data)
    source = make_source(episodes, frames, rows_of(episodes, everything), config.horizon)
    seconds, rows = [], []
    with PeakMemory() as peak:
        draw = partial(training_batch, source, sampler, augmenter=augmenter(config.data))
        batches = [draw(step=number) for number in range(m.steps + 1)]
        step = (
            our_step(config, source, m.chunk, processes)
            if m.what == "step"
            else peer_step(config, source, batches, m.what)
        )
        for batch in batches:
            if not m.chunk:
                batch.frames.load(processes.shares(len(batch.frames))[m.rank])
            started = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - started)
            rows.append(len(batch.frame_of_row))
    return {
        "rows_per_s": sum(rows[1:]) / sum(seconds[1:]),
        "rows": rows[-1],
        "seconds": sum(seconds[1:]) / m.steps,
        "peak_mib": peak.mib,
        "exchanged_mib": processes.bytes / (m.steps + 1) / 2**20 if m.count > 1 else 0.0,
    }


def our_step(config: AlignConfig, source: TripletSource, chunk: int, processes: Counted):
    """The whole step of stage one, all default terms."""
    episodes = source.episodes
    clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts)
    model = make_model(config, clip, episodes)
    optimizer = make_optimizers([(model, LEARNING_RATE)], config.optimizer.weight_decay, precision())
    ids, mask = tokenize(tokenizer, episodes.texts)
    rest = resting_action(episodes, np.arange(len(episodes.action)), source.stats.action)

    def step(batch: TripletBatch) -> None:
        forward_backward(
            model,
            on_device(batch, ids, mask, torch.device("cpu")),
            rest,
            config.loss,
            gap=config.batch.gap,
            chunk=chunk,
            autocast=autocast,
            processes=processes,
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scales()

    return step


def peer_step(config: AlignConfig, source: TripletSource, batches: list[TripletBatch], what: str):
    """The step of open_clip's training loop: both towers on every row, its loss, AdamW, the scale clamped.

    Its texts have one length for all batches: CONTEXT, or if trimmed that of the longest text in these batches.
    """
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    tower, episodes = config.tower, source.episodes
    _, tokenizer = make_encoders(tower, config.data.image_size, episodes.texts)
    ids, mask = tokenize(tokenizer, episodes.texts)
    used = torch.from_numpy(np.unique(np.concatenate([batch.text_id for batch in batches])))
    length = int(mask[used].sum(1).max()) if what == "peer_trimmed" else CONTEXT
    ids = torch.nn.functional.pad(ids, (0, max(0, length - ids.shape[1])))[:, :length]
    vision = CLIPVisionCfg(
        layers=tower.layers,
        width=tower.width,
        head_width=tower.width // tower.heads,
        patch_size=tower.patch_size,
        image_size=config.data.image_size,
    )
    text = CLIPTextCfg(
        context_length=length,
        vocab_size=len(tokenizer),
        width=tower.text_width,
        heads=tower.text_heads,
        layers=tower.text_layers,
    )
    model = CLIP(tower.embed_dim, vision, text)
    loss_of = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)

    def step(batch: TripletBatch) -> None:
        pixels = pixel_values(torch.from_numpy(batch.frames[0 : len(batch.frames)][batch.frame_of_row]))
        texts = ids[torch.from_numpy(batch.text_id)]
        with autocast():
            loss = loss_of(*model(pixels, texts))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))

    return step


class PeakMemory:
    """The highest anonymous memory of this process while the block runs, in MiB."""

    def __enter__(self) -> "PeakMemory":
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.mib = max(self.mib, int(anonymous.split()[1]) / 1024)


if __name__ == "__main__":
    print(json.dumps(measure(Measurement(**json.loads(sys.argv[1])))))
