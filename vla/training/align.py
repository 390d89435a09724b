"""Stage one: align the vision and language encoders on vision-language-action triplets.

`train_align` is the whole loop, top to bottom. A step is: sample triplets, embed them, cosine similarities, losses,
back-propagation, update. Batches depend on (seed, step) alone, so a resumed run repeats the uninterrupted one exactly.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vla.config import AlignConfig
from vla.data.augmentation import word_hider
from vla.eval.alignment import Embedded, measure_alignment
from vla.eval.alignment_report import write_alignment_report
from vla.eval.alignment_views import save_views, views_of
from vla.files import write_json
from vla.losses.rowwise import Term, spans
from vla.models.alignment import AlignmentModel
from vla.training.align_data import AlignData, make_batch, open_data
from vla.training.align_export import export_between, export_encoder
from vla.training.align_setup import check_alignment, switched_on
from vla.training.align_state import AlignTrained, begin, checkpoint, restore
from vla.training.align_step import forward_backward
from vla.training.checkpoint import how_to_replay, save_nonfinite
from vla.training.device_batch import on_device
from vla.training.memory import keep_few_kernels
from vla.training.optim import schedule, warmup_steps
from vla.training.prefetch import prefetch
from vla.training.pretrained import HeldOut, along_the_way
from vla.training.processes import (
    Processes,
    check_same_progress,
    in_step,
    in_turn,
    make_accelerator,
    refusal,
    together,
)
from vla.training.ranges import ranges_of
from vla.training.run import RunFolder, begun_precision, mean_metrics
from vla.types import TripletBatch
from vla.versions import versions

END = "report.html"  # what a run writes last
STUCK = "at_chance"  # what metrics.jsonl calls terms that teach nothing
ALIKE = ("image_size", "camera", "holdout")  # what both stages have to be told of the data
PICTURES_AT_ONCE = 256  # that are augmented to be saved
SETTLED = 100  # steps after the warm-up by which every term should have left its chance level


def train_align(config: AlignConfig) -> Path:
    """Run stage one and return the folder of the aligned encoder.

    Raises:
        UserError: unusable data, encoder or run folder, or a loss that is not finite.
    """
    check_alignment(config)
    torch.set_num_threads(config.threads)
    if config.chunk:
        keep_few_kernels()
    config = replace(config, precision=begun_precision(Path(config.output), config.precision, END))
    accelerator = make_accelerator(config.precision)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if accelerator.gradient_accumulation_steps > 1:
        raise refusal(
            "gradient accumulation would leave out the negatives between the small batches; use --chunk=N, which needs as "
            "little memory and is exact"
        )
    torch.manual_seed(config.seed)
    writes = accelerator.is_main_process
    run = in_turn(
        accelerator,
        lambda: RunFolder(Path(config.output), config, end=END, resume=config.resume, writes=writes),
        mine_first=writes,
    )
    check_same_progress(processes, run.folder, run.end.is_file(), accelerator.device)
    if run.end.is_file():
        if writes:
            write_alignment_report(run.folder)
        accelerator.print(f"{run.folder}: finished already; drew its report.html again")
        return run.folder / "clip"

    data = open_data(config, accelerator, processes)
    trained = begin(config, data, accelerator, processes)
    model, optimizer = trained.model, trained.optimizer
    # Whether resumed or not, as machines may have been told differently: where nothing is to be resumed there is no checkpoint.
    first, before = in_turn(accelerator, lambda: restore(run, trained, data), mine_first=writes)
    processes.share(model)
    accelerator.print(describe(config, data, model, first))

    alarms, window = Alarms(config, run), []
    # Of a run that was stopped while it exported, the last measures are there already.
    measured_last = first == config.steps and config.steps in run.logged("validation/modality_gap")
    model.train()
    started = asked = time.perf_counter()

    def elapsed() -> float:
        """Seconds of all steps so far, those before a resumption too."""
        return before + time.perf_counter() - started

    bar = tqdm(total=config.steps, initial=first, desc="align", unit="step", mininterval=1.0, disable=not writes)
    batches = prefetch(partial(make_batch, config, data, processes), first, config.steps)
    for step, batch, _ in in_step(accelerator, batches):
        begun = time.perf_counter()
        optimizer.set_factor(schedule(step, config.steps, config.optimizer.warmup))
        torch.manual_seed(seed_of(config.seed, step, processes.rank))
        hide = word_hider(config.data, config.seed, step)
        loss, terms, health = forward_backward(
            model,
            on_device(batch, *trained.texts, accelerator.device, hide),
            data.rest,
            config.loss,
            gap=config.batch.gap,
            chunk=config.chunk,
            autocast=accelerator.autocast,
            processes=processes,
        )
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        if not torch.isfinite(loss + grad_norm):
            stop_on_nonfinite(accelerator, run, step, batch, terms)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scales()

        seconds = time.perf_counter() - asked  # with what all processes waited for the slowest one's batch
        rates = {
            "triplets_per_s": len(batch.frame_of_row) / seconds,
            "data_wait": (begun - asked + batch.frames.seconds) / seconds,
        }
        window.append(step_metrics(terms, health, loss, grad_norm, model) | rates)
        bar.update()
        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        logged = None
        if done % config.log_every == 0 or saves:  # a resumed run starts with an empty window, too
            logged = mean_metrics(window) | {"lr": optimizer.param_groups[-1]["lr"]}
            bar.set_postfix(loss=f"{logged['loss']:.3f}", rate=f"{logged['triplets_per_s']:.0f}/s")
            window.clear()
            if stuck := alarms.newly_stuck(done, logged):
                logged |= {STUCK: stuck}
                if writes:
                    bar.write(alarm(done, stuck))
        write = partial(write_step, run, config, trained, data, done, batch, logged, elapsed, saves)
        together(accelerator, write if writes else lambda: None)  # in every step: machines may save at others
        asked = time.perf_counter()
    bar.close()

    end = partial(finish, run, config, trained, data, processes, elapsed, measured_last)
    together(accelerator, end if writes else lambda: None)
    encoder = run.folder / "clip"
    accelerator.print(f"aligned encoder: {encoder}\nreport: {run.end}\nnext: {next_command(config, encoder)}")
    return encoder


def next_command(config: AlignConfig, encoder: Path) -> str:
    """Stage two on the same data, split and seen alike: a frozen encoder and some thousand demonstrations."""
    usual, data = AlignConfig(), config.data
    flags = {f"data.{name}": getattr(data, name) for name in ALIKE if getattr(data, name) != getattr(usual.data, name)}
    flags |= {"seed": config.seed} if config.seed != usual.seed else {}
    told = "".join(f" --{name}={value}" for name, value in flags.items())
    output = f"--aligned_pooler=true --steps=1500 --ema=0.995 --output=outputs/policy/{encoder.parent.name}"
    return f"python scripts/train_policy.py --data.root={data.root} --encoder={encoder}{told} {output}"


def step_metrics(
    terms: dict[str, Term], health: dict[str, Tensor], loss: Tensor, grad_norm: Tensor, model: AlignmentModel
) -> dict[str, float]:
    """What one step logs: each loss with its chance level and its excess over the floor, scales, norms, health."""
    metrics = {"loss": float(loss.detach()), "grad_norm": float(grad_norm)}
    for name, term in terms.items():
        metrics[f"{name}/loss"] = float(term.loss.detach())
        metrics[f"{name}/chance"] = float(term.chance)
        metrics[f"{name}/excess"] = float(term.loss.detach() - term.floor)
        metrics[f"{name}/scale"] = float(model.scale(name).detach())
    return metrics | {key: float(value) for key, value in health.items()}


def write_step(
    run: RunFolder,
    config: AlignConfig,
    trained: AlignTrained,
    data: AlignData,
    done: int,
    batch: TripletBatch,
    logged: dict[str, float | list[str]] | None,
    elapsed: Callable[[], float],
    saves: bool,
) -> None:
    """What is due after a step: its log, measures, a snapshot and, last, a checkpoint, behind which a resumed run starts."""
    if logged:
        run.log(done, logged | {"samples": digest(batch)})
    if config.eval_every and done % config.eval_every == 0 and done < config.steps:
        measured, _ = measure(trained, data)
        run.log(done, {f"validation/{key}": value for key, value in measured.items()})
    if done in config.snapshots:
        export_encoder(run.folder / "snapshots" / str(done), trained.model, trained.tokenizer, data.source.stats)
    if saves:
        checkpoint(run, done, trained, data, elapsed())


def finish(
    run: RunFolder,
    config: AlignConfig,
    trained: AlignTrained,
    data: AlignData,
    processes: Processes,
    elapsed: Callable[[], float],
    measured_last: bool,
) -> None:
    """Measure and export what was trained and, along the way from a pretrained start, what lies between; the report comes last."""
    measured, held_out = measure(trained, data)
    save_views(run.folder / "views.safetensors", views_of(held_out, data.episodes.texts))
    if not measured_last:
        run.log(config.steps, {f"validation/{key}": value for key, value in measured.items()})
    seconds, way, start = elapsed(), [], trained.start
    if start is not None:
        clip, held_out_data = trained.model.exported_clip(), {"new": HeldOut(data.source, data.validation)} | data.old
        shares = sorted({0.0, *config.wise_ft, 1.0})
        way = along_the_way(start.weights, clip, trained.tokenizer, shares, held_out_data)
        for share in config.wise_ft:
            export_between(
                run.folder / "wise_ft" / f"{share:g}",
                share,
                config.tower.pretrained,
                start.weights,
                clip,
                trained.model.beside_clip(),
                trained.tokenizer,
                ranges_of(data.source.stats),
            )
    export_encoder(run.folder, trained.model, trained.tokenizer, data.source.stats)
    record = {
        "loss": asdict(config.loss),
        "precision": config.precision,
        "shuffle": config.shuffle,
        "data": {
            "root": config.data.root,
            "fingerprint": data.episodes.fingerprint,
            "episodes": len(data.episodes.goal_id),
        },
        "steps": config.steps,
        "processes": processes.count,
        "seconds": round(seconds, 1),
        "metrics": measured,
        "way": way,
        "warnings": [alarm(step, terms) for step, terms in run.logged(STUCK).items()],
        "versions": versions(),
    }
    write_json(run.folder / "alignment.json", record)
    write_alignment_report(run.folder)
    run.close()


def measure(trained: AlignTrained, data: AlignData) -> tuple[dict[str, float], Embedded]:
    """Alignment measures on the held-out episodes, and their features."""
    model = trained.model
    model.eval()
    measured = measure_alignment(model, data.source, data.instructed, data.validation, *trained.texts)
    model.train()
    return measured


def digest(batch: TripletBatch) -> str:
    """A fingerprint of the sampled rows and the augmented pixels, so that a resumed run can be compared."""
    ids = np.stack([batch.episode_id, batch.timestep]).tobytes()
    return hashlib.sha256(ids + batch.frames[::17][:, ::7, ::7].tobytes()).hexdigest()[:16]


def seed_of(seed: int, step: int, rank: int) -> int:
    """What a process seeds torch with before a step, so that dropout depends on nothing before it and differs between processes."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def stop_on_nonfinite(
    accelerator: Accelerator, run: RunFolder, step: int, batch: TripletBatch, terms: dict[str, Term]
) -> None:
    """Save the batch that broke the loss, then stop; all processes come here, and none stops before the batch is saved."""
    bad = [name for name, term in terms.items() if not torch.isfinite(term.loss)] or ["gradient"]

    def save() -> None:
        frames = np.empty((len(batch.frames), *batch.frames[:1].shape[1:]), np.uint8)
        for part in spans(len(frames), PICTURES_AT_ONCE):  # a copy of all would be a second large one
            frames[part] = batch.frames[part]
        save_nonfinite(run.folder, step, vars(batch) | {"frames": frames})

    together(accelerator, save if run.writes else lambda: None)
    raise refusal(f"loss is not finite at step {step} ({', '.join(bad)}); {how_to_replay(run.folder, step)}")


class Alarms:
    """Which terms teach nothing once every term should have left its chance level; each is named once in a run."""

    def __init__(self, config: AlignConfig, run: RunFolder) -> None:
        self.terms = switched_on(config.loss)
        self.settled = warmup_steps(config.steps, config.optimizer.warmup) + SETTLED
        self.seen = {name for name in self.terms if run.logged(f"{name}/loss")}
        self.named = [term for terms in run.logged(STUCK).values() for term in terms]

    def newly_stuck(self, done: int, metrics: dict[str, float]) -> list[str]:
        """The terms to name after `done` steps: those at their chance level, and those that no batch has had rows for."""
        self.seen |= {name for name in self.terms if f"{name}/loss" in metrics}
        if done < self.settled:
            return []
        absent = [f"{name} (no batch has rows for it)" for name in self.terms if name not in self.seen]
        stuck = [term for term in (*at_chance(metrics), *absent) if term not in self.named]
        self.named += stuck
        return stuck


def at_chance(metrics: dict[str, float]) -> list[str]:
    """The terms whose loss has come less than a fiftieth of the way from its chance level down to its floor."""
    names = [key.removesuffix("/chance") for key in metrics if key.endswith("/chance")]

    def stays(name: str) -> bool:
        loss, chance, excess = (metrics[f"{name}/{key}"] for key in ("loss", "chance", "excess"))
        return loss >= chance - 0.02 * (chance - (loss - excess))

    return [name for name in names if stays(name)]


def alarm(step: int, terms: list[str]) -> str:
    """What is said of terms that are still at their chance level after a step, or that no batch has rows for."""
    return (
        f"step {step}: {', '.join(terms)} still at its chance level: it teaches nothing yet. Are the instructions "
        "those of the pictures, and do batches hold several goals (distinct_goals in metrics.jsonl)? A term without rows needs more "
        "batch.frames or batch.episodes, or data that has what it compares."
    )


def describe(config: AlignConfig, data: AlignData, model: AlignmentModel, first: int) -> str:
    """What the run is about to do, in a few lines."""
    goal_id = data.episodes.goal_id[data.train]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    goals = len(np.unique(goal_id[goal_id >= 0]))
    resumed = f", resumed at step {first}" if first else ""
    notes = "" if goals > 1 else "\nthere is one goal only: the language terms teach nothing"
    if config.batch.same_scene and not any(s.shared_scenes for s in data.sampler.samplers):
        notes += "\nno scene is known to have several goals (scene_id): batch.same_scene brings no hard negatives"
    triplets = len(data.sampler.rows(first))
    return (
        f"stage one: {len(data.train)} episodes ({len(data.validation)} held out), {goals} goals, "
        f"{len(data.episodes.texts)} instructions, {parameters:.1f} M parameters\n"
        f"{config.steps} steps of about {triplets:,} triplets, {config.steps * triplets:,} in all{resumed}; run folder {config.output}{notes}"
    )
