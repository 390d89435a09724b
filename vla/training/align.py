"""Stage one: align the vision and language encoders on vision-language-action triplets.

`train_align` is the whole loop, top to bottom. A step is: sample triplets, embed them, cosine similarities, losses,
back-propagation, update. Batches depend on (seed, step) alone, so a resumed run repeats the uninterrupted one exactly.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from vla.config import AlignConfig
from vla.data.augmentation import augmenter, word_hider
from vla.data.batches import TripletSource, training_batch
from vla.data.episodes import Episodes, rows_of
from vla.data.mixture import open_mixture
from vla.data.sampler import MixedSampler
from vla.eval.alignment import Embedded, measure_alignment
from vla.eval.alignment_report import write_alignment_report
from vla.eval.alignment_views import save_views, views_of
from vla.losses.rowwise import Term
from vla.models.alignment import AlignmentModel
from vla.models.clip import note_of_cut, tokenize
from vla.models.finetuning import add_lora
from vla.training.align_export import export, export_between, export_encoder
from vla.training.align_setup import (
    check_alignment,
    make_encoders,
    make_model,
    make_sampler,
    make_source,
    minimal_pairs,
    old_data,
    pair_temperatures,
    resting_action,
    shared_settings,
    shuffled_labels,
    switched_on,
)
from vla.training.align_step import forward_backward
from vla.training.checkpoint import (
    check_trained_on,
    how_to_replay,
    latest_checkpoint,
    load_checkpoint,
    restoring,
    save_checkpoint,
)
from vla.training.device_batch import on_device
from vla.training.memory import keep_few_kernels
from vla.training.optim import Optimizers, make_optimizers, schedule, warmup_steps
from vla.training.prefetch import prefetch
from vla.training.pretrained import HeldOut, along_the_way, beside, from_stage_one, rate_groups, start_digest, take_up
from vla.training.processes import (
    Processes,
    check_same_data,
    check_same_encoders,
    check_same_progress,
    check_same_settings,
    in_step,
    in_turn,
    make_accelerator,
    refusal,
    together,
)
from vla.training.ranges import other_ranges, ranges_of
from vla.training.run import RunFolder, begun_precision, mean_metrics
from vla.types import TripletBatch, UserError

END = "report.html"  # what a run writes last
STUCK = "at_chance"  # what metrics.jsonl calls terms that teach nothing
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
        if accelerator.is_main_process:
            write_alignment_report(run.folder)
        accelerator.print(f"{run.folder}: finished already; drew its report.html again")
        return run.folder / "clip"

    mixture, old = in_turn(
        accelerator,
        lambda: (open_mixture(config.data, config.more, config.seed), old_data(config)),
        mine_first=accelerator.is_local_main_process,
    )
    episodes, validation = mixture.episodes, mixture.validation
    check_same_data(processes, episodes, accelerator.device)
    check_same_settings(processes, shared_settings(config), accelerator.device)
    train = np.concatenate(mixture.train)
    told = mixture.train[0][episodes.goal_id[mixture.train[0]] >= 0]  # what probes are fitted on
    if not len(told):
        raise refusal(f"{config.data.root}: no training episode has an instruction; lower --data.holdout")
    rows = rows_of(episodes, train)
    # It reads pictures, which may be damaged on one machine alone.
    source = together(accelerator, lambda: make_source(episodes, mixture.frames, rows, config.horizon))
    sampler = make_sampler(config.batch, config.seed, episodes, mixture.train, mixture.weights)
    pairs = minimal_pairs(config.loss, episodes, train, accelerator.print)
    relabel = shuffled_labels(episodes.goal_id, config.seed) if config.shuffle in ("language", "all") else None

    resumed = config.resume and latest_checkpoint(run.folder) is not None
    model, tokenizer, start = in_turn(
        accelerator,
        lambda: begin_model(config, episodes, resumed, accelerator.print),
        mine_first=accelerator.is_local_main_process,
    )
    if (
        start
        and from_stage_one(config.tower.pretrained)
        and (note := other_ranges(beside(config.tower.pretrained), source.stats))
    ):
        accelerator.print(note)
    optimizer = make_optimizers(rate_groups(model, config), config.optimizer.weight_decay, config.precision)
    model.to(accelerator.device)
    input_ids, attention_mask = tokenize(tokenizer, episodes.texts)
    words_digest = hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()[:16]
    check_same_encoders(processes, words_digest, model, accelerator.device)
    if note := note_of_cut(tokenizer, episodes.texts):
        accelerator.print(note)
    rest = resting_action(episodes, rows, source.stats.action)

    began = {"start": start.digest if start else None, "words": words_digest}  # what a resumed run must find as it was
    first, before = (0, 0.0)
    if config.resume:
        first, before = in_turn(accelerator, lambda: restore(run, model, optimizer, episodes, began), mine_first=writes)
    processes.share(model)
    accelerator.print(describe(config, episodes, train, validation, model, sampler, first))

    def make_batch(step: int) -> TripletBatch:
        batch = training_batch(
            source,
            sampler,
            step,
            augmenter=augmenter(config.data),
            text_of_episode=relabel,
            shuffle_actions=config.shuffle in ("action", "all"),
            pairs=pairs,
        )
        if not config.chunk:
            batch.frames.load(processes.shares(len(batch.frames))[processes.rank])
        return batch

    def keep(done: int, batch: TripletBatch, metrics: dict[str, float | list[str]] | None, saves: bool) -> None:
        if not run.writes:
            return
        if metrics:
            run.log(done, metrics | {"samples": digest(batch)})
        if config.eval_every and done % config.eval_every == 0 and done < config.steps:
            measured, _ = measure(model, source, told, validation, input_ids, attention_mask)
            run.log(done, {f"validation/{key}": value for key, value in measured.items()})
        if done in config.snapshots:  # before the checkpoint, behind which a resumed run starts
            export_encoder(run.folder / "snapshots" / str(done), model, tokenizer, source.stats)
        if saves:
            elapsed = before + time.perf_counter() - started
            checkpoint(run, done, model, optimizer, episodes, began, elapsed)

    window: list[dict[str, float]] = []
    seen = {name for name in switched_on(config.loss) if run.logged(f"{name}/loss")}
    # Of a run that was stopped while it exported, the last measures are there already.
    measured_last = first == config.steps and config.steps in run.logged("validation/modality_gap")
    warned = [term for terms in run.logged(STUCK).values() for term in terms]
    model.train()
    started = asked = time.perf_counter()
    bar = tqdm(total=config.steps, initial=first, desc="align", unit="step", mininterval=1.0, disable=not run.writes)
    for step, batch, _ in in_step(accelerator, prefetch(make_batch, first, config.steps)):
        begun = time.perf_counter()
        optimizer.set_factor(schedule(step, config.steps, config.optimizer.warmup))
        torch.manual_seed(seed_of(config.seed, step, processes.rank))
        loss, terms, health = forward_backward(
            model,
            on_device(batch, input_ids, attention_mask, accelerator.device, word_hider(config.data, config.seed, step)),
            rest,
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
        window.append(
            step_metrics(terms, health, loss, grad_norm, model)
            | {
                "triplets_per_s": len(batch.frame_of_row) / seconds,
                "data_wait": (begun - asked + batch.frames.seconds) / seconds,
            }
        )
        bar.update()
        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        logged = None
        if done % config.log_every == 0 or saves:  # a resumed run starts with an empty window, too
            metrics = mean_metrics(window)
            metrics["lr"] = optimizer.param_groups[-1]["lr"]
            settled = done >= warmup_steps(config.steps, config.optimizer.warmup) + SETTLED
            seen |= {name for name in switched_on(config.loss) if f"{name}/loss" in metrics}
            absent = [f"{name} (no batch has rows for it)" for name in switched_on(config.loss) if name not in seen]
            found = [*at_chance(metrics), *absent] if settled else []
            stuck = [term for term in found if term not in warned]
            warned += stuck
            logged = metrics | ({STUCK: stuck} if stuck else {})
            if run.writes and stuck:
                bar.write(alarm(done, stuck))
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", rate=f"{metrics['triplets_per_s']:.0f}/s")
            window.clear()
        together(accelerator, partial(keep, done, batch, logged, saves))  # in every step: machines may save at others
        asked = time.perf_counter()
    bar.close()

    def finish() -> None:
        measured, held_out = measure(model, source, told, validation, input_ids, attention_mask)
        save_views(run.folder / "views.safetensors", views_of(held_out, episodes.texts))
        if not measured_last:
            run.log(config.steps, {f"validation/{key}": value for key, value in measured.items()})
        seconds = before + time.perf_counter() - started
        way = []
        if start is not None:
            data = {"new": HeldOut(source, validation)} | old
            trained = model.exported_clip()
            way = along_the_way(start.weights, trained, tokenizer, sorted({0.0, *config.wise_ft, 1.0}), data)
            for share in config.wise_ft:
                export_between(
                    run.folder / "wise_ft" / f"{share:g}",
                    share,
                    config.tower.pretrained,
                    start.weights,
                    trained,
                    model.beside_clip(),
                    tokenizer,
                    ranges_of(source.stats),
                )
        warnings = [alarm(step, terms) for step, terms in run.logged(STUCK).items()]
        export(
            run.folder, config, episodes, model, tokenizer, measured, seconds, processes, way, warnings, source.stats
        )
        write_alignment_report(run.folder)
        run.close()

    together(accelerator, finish if run.writes else lambda: None)
    encoder = run.folder / "clip"
    accelerator.print(f"aligned encoder: {encoder}\nreport: {run.folder / 'report.html'}")
    return encoder


@dataclass(frozen=True)
class Start:
    """The encoder that a run with `tower.pretrained` begins from."""

    weights: dict[str, Tensor]
    digest: str


def begin_model(
    config: AlignConfig, episodes: Episodes, resumed: bool, tell: Callable[[str], None]
) -> tuple[AlignmentModel, PreTrainedTokenizerBase, Start | None]:
    """What stage one trains, its tokenizer, and the pretrained start, if there is one; those of a `resumed` run await its checkpoint.

    Raises:
        UserError: no such start, or one that does not fit.
    """
    clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts, resumed)
    start = None
    if config.tower.pretrained:
        weights = {name: weight.clone() for name, weight in clip.state_dict().items()}
        start = Start(weights, start_digest(clip, tokenizer))
    model = make_model(config, clip, episodes)
    if config.tower.pretrained:
        take_up(model, config.tower.pretrained, pair_temperatures(config.loss), tell)
    if config.tower.lora_rank:
        add_lora(model.clip, config.tower.lora_rank, vision=not config.tower.locked)
    if config.tower.locked:
        model.clip.vision_model.requires_grad_(False)
    return model, tokenizer, start


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


def measure(
    model: AlignmentModel,
    source: TripletSource,
    train: np.ndarray,
    validation: np.ndarray,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> tuple[dict[str, float], Embedded]:
    """Alignment measures on the held-out episodes, and their features."""
    model.eval()
    measured = measure_alignment(model, source, train, validation, input_ids, attention_mask)
    model.train()
    return measured


def digest(batch: TripletBatch) -> str:
    """A fingerprint of the sampled rows and the augmented pixels, so that a resumed run can be compared."""
    ids = np.stack([batch.episode_id, batch.timestep]).tobytes()
    return hashlib.sha256(ids + batch.frames[::17][:, ::7, ::7].tobytes()).hexdigest()[:16]


def seed_of(seed: int, step: int, rank: int) -> int:
    """What a process seeds torch with before a step, so that dropout depends on nothing before it and differs between processes."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def checkpoint(
    run: RunFolder,
    step: int,
    model: AlignmentModel,
    optimizer: Optimizers,
    episodes: Episodes,
    began: dict[str, str | None],
    seconds: float,
) -> None:
    """Everything that step + 1 depends on, what tells data, start and tokenized words apart and the seconds spent so far; random states follow from the step."""
    tensors, meta = optimizer.tensors()
    state = {"step": step, "optimizer": meta, "seconds": seconds} | began
    state |= {"data": episodes.fingerprint, "labels": episodes.labels()}
    save_checkpoint(run.folder, step, {"model": model.state_dict(), "optimizer": tensors}, state)


def restore(
    run: RunFolder,
    model: AlignmentModel,
    optimizer: Optimizers,
    episodes: Episodes,
    began: dict[str, str | None],
) -> tuple[int, float]:
    """Load the last checkpoint of the run, if any; returns the number of steps done and the seconds they took.

    Raises:
        UserError: a damaged checkpoint, or one of other data, another pretrained start, tokenizer or version.
    """
    path = latest_checkpoint(run.folder)
    if path is None:
        run.truncate(0)
        return 0, 0.0
    tensors, state = load_checkpoint(path)
    check_trained_on(path, state, episodes)
    # A checkpoint of an older version does not say what it began with.
    changed = [name for name, value in began.items() if state.get(name, value) != value]
    if "start" in changed:
        raise UserError(
            f"{path}: began from another encoder than tower.pretrained holds now; restore that, or choose another --output"
        )
    if "words" in changed:
        raise UserError(
            f"{path}: the instructions were other token ids when it was written: tower.vocabulary, or the tokenizers package, has changed; "
            "restore that, or choose another --output"
        )
    with restoring(path):
        model.load_state_dict(tensors["model"], strict=True)
        optimizer.restore(tensors["optimizer"], state["optimizer"])
    run.truncate(state["step"])
    return state["step"], state["seconds"]


def stop_on_nonfinite(
    accelerator: Accelerator, run: RunFolder, step: int, batch: TripletBatch, terms: dict[str, Term]
) -> None:
    """Save the batch that broke the loss, then stop; all processes come here, and none stops before the batch is saved."""
    bad = [name for name, term in terms.items() if not torch.isfinite(term.loss)] or ["gradient"]
    path = run.folder / f"nonfinite_step_{step:06d}.safetensors"

    def save() -> None:
        arrays = vars(batch) | {"frames": batch.frames[:]}
        save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}, path)

    together(accelerator, save if run.writes else lambda: None)
    raise refusal(
        f"loss is not finite at step {step} ({', '.join(bad)}); the batch is in {path}, and {how_to_replay(run.folder)}; "
        "try a lower --optimizer.lr, or --precision=no where it was bf16, with another --output"
    )


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
        "those of the pictures, and do batches hold several goals (distinct_goals in metrics.jsonl)?"
    )


def describe(
    config: AlignConfig,
    episodes: Episodes,
    train: np.ndarray,
    validation: np.ndarray,
    model: AlignmentModel,
    sampler: MixedSampler,
    first: int,
) -> str:
    """What the run is about to do, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    goals = len(np.unique(episodes.goal_id[train][episodes.goal_id[train] >= 0]))
    resumed = f", resumed at step {first}" if first else ""
    notes = "" if goals > 1 else "\nthere is one goal only: the language terms teach nothing"
    if config.batch.same_scene and not any(s.shared_scenes for s in sampler.samplers):
        notes += "\nno scene is known to have several goals (scene_id): batch.same_scene brings no hard negatives"
    triplets = len(sampler.rows(first))
    return (
        f"stage one: {len(train)} episodes ({len(validation)} held out), {goals} goals, "
        f"{len(episodes.texts)} instructions, {parameters:.1f} M parameters\n"
        f"{config.steps} steps of about {triplets:,} triplets, {config.steps * triplets:,} in all{resumed}; run folder {config.output}{notes}"
    )
