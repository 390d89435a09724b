"""Stage one: align the vision and language encoders on vision-language-action triplets.

`train_align` is the whole loop, top to bottom. A step is: sample triplets, embed them, cosine similarities, losses,
back-propagation, update. Batches depend on (seed, step) alone, so a resumed run repeats the uninterrupted one exactly.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from vla.config import AlignConfig, BatchConfig, LossConfig, TowerConfig
from vla.data.augmentation import augmenter, word_hider
from vla.data.batches import Normalizers, TripletSource, training_batch
from vla.data.episodes import Episodes, rows_of
from vla.data.frames import open_pictures
from vla.data.minimal_pairs import MinimalPairs
from vla.data.mixture import open_mixture
from vla.data.normalization import compute_norm_stats, normalize_quantile
from vla.data.sampler import GoalSampler, MixedSampler, shares
from vla.eval.alignment import Embedded, measure_alignment
from vla.eval.alignment_report import write_alignment_report
from vla.eval.alignment_views import save_views, views_of
from vla.losses.rowwise import Term
from vla.models.alignment import PAIRS, TRANSITIONS, AlignmentModel
from vla.models.clip import Encoder, build_clip, load_clip, resize_positions, save_clip, tokenize
from vla.models.finetuning import add_lora, interpolated
from vla.models.precision import begun_precision
from vla.training.align_step import forward_backward
from vla.training.checkpoint import (
    how_to_replay,
    latest_checkpoint,
    load_checkpoint,
    restore_rng,
    rng_tensors,
    save_checkpoint,
)
from vla.training.device_batch import on_device
from vla.training.memory import keep_few_kernels
from vla.training.optim import Optimizers, make_optimizers, schedule
from vla.training.prefetch import prefetch
from vla.training.pretrained import HeldOut, along_the_way, check_start, old_split, rate_groups, take_up
from vla.training.processes import (
    Processes,
    check_same_data,
    check_same_progress,
    check_same_settings,
    make_accelerator,
)
from vla.training.run import RunFolder, mean_metrics
from vla.types import TripletBatch, UserError
from vla.versions import versions

STUCK = "at_chance"  # what metrics.jsonl calls terms that teach nothing
SETTLED = 100  # steps after the warm-up by which every term should have left its chance level


def train_align(config: AlignConfig) -> Path:
    """Run stage one and return the folder of the aligned encoder.

    Raises:
        UserError: unusable data, encoder or run folder, or a loss that is not finite.
    """
    check_start(config)
    check_terms(config)
    torch.set_num_threads(config.threads)
    if config.chunk:
        keep_few_kernels()
    config = replace(config, precision=begun_precision(Path(config.output), config.precision))
    accelerator = make_accelerator(config.precision)
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    if accelerator.gradient_accumulation_steps > 1:
        raise UserError(
            "gradient accumulation would leave out the negatives between the small batches; use --chunk=N, which needs as "
            "little memory and is exact"
        )
    torch.manual_seed(config.seed)
    with accelerator.main_process_first():
        run = RunFolder(Path(config.output), config, resume=config.resume, writes=accelerator.is_main_process)
    if config.resume:
        check_same_progress(processes, run.folder, accelerator.device)
    if (run.folder / "report.html").is_file():
        if accelerator.is_main_process:
            write_alignment_report(run.folder)
        say(accelerator, f"{run.folder}: finished already; drew its report.html again")
        return run.folder / "clip"

    with accelerator.local_main_process_first():
        mixture = open_mixture(config.data, config.more, config.seed)
        old = old_data(config)
    episodes, validation = mixture.episodes, mixture.validation
    check_same_data(processes, episodes, accelerator.device)
    shared = (config.batch, config.loss, config.optimizer, config.steps, config.seed, config.precision, config.shuffle)
    check_same_settings(processes, repr(shared), accelerator.device)
    train = np.concatenate(mixture.train)
    told = mixture.train[0][episodes.goal_id[mixture.train[0]] >= 0]  # what probes are fitted on
    rows = rows_of(episodes, train)
    source = TripletSource(episodes, mixture.frames, make_stats(episodes, rows), config.horizon)
    sampler = make_sampler(config.batch, config.seed, episodes, mixture.train, mixture.weights)
    pairs = minimal_pairs(config.loss, episodes, train, partial(say, accelerator))
    relabel = shuffled_labels(episodes.goal_id, config.seed) if config.shuffle in ("language", "all") else None

    clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts)
    start = {name: weight.clone() for name, weight in clip.state_dict().items()} if config.tower.pretrained else None
    model = make_model(config, clip, episodes)
    if config.tower.pretrained:
        take_up(model, config.tower.pretrained, pair_temperatures(config.loss), partial(say, accelerator))
    if config.tower.lora_rank:
        add_lora(model.clip, config.tower.lora_rank, vision=not config.tower.locked)
    if config.tower.locked:
        model.clip.vision_model.requires_grad_(False)
    optimizer = make_optimizers(rate_groups(model, config), config.optimizer.weight_decay)
    model.to(accelerator.device)
    input_ids, attention_mask = (t.to(accelerator.device) for t in tokenize(tokenizer, episodes.texts))
    rest = torch.from_numpy(normalize_quantile(np.nanmedian(episodes.action[rows], axis=0), source.stats.action))

    first, before = restore(run, model, optimizer) if config.resume else (0, 0.0)
    processes.share(model)
    say(accelerator, describe(config, episodes, train, validation, model, sampler, first))

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

    window: list[dict[str, float]] = []
    warned = [term for terms in run.logged(STUCK).values() for term in terms]
    started = time.perf_counter()
    bar = tqdm(total=config.steps, initial=first, desc="align", unit="step", mininterval=1.0, disable=not run.writes)
    for step, batch, waited in prefetch(make_batch, first, config.steps):
        begun = time.perf_counter()
        optimizer.set_factor(schedule(step, config.steps, config.optimizer.warmup))
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
            stop_on_nonfinite(run, step, batch, terms)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scales()

        seconds = time.perf_counter() - begun
        window.append(
            step_metrics(terms, health, loss, grad_norm, model)
            | {
                "triplets_per_s": len(batch.frame_of_row) / (seconds + waited),
                "data_wait": waited / (seconds + waited),
            }
        )
        bar.update()
        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        if done % config.log_every == 0 or saves:  # a resumed run starts with an empty window, too
            metrics = mean_metrics(window)
            metrics["lr"] = optimizer.param_groups[-1]["lr"]
            settled = done >= config.optimizer.warmup + SETTLED
            stuck = [term for term in at_chance(metrics) if term not in warned] if settled else []
            warned += stuck
            run.log(done, metrics | {"samples": digest(batch)} | ({STUCK: stuck} if stuck else {}))
            if stuck and run.writes:
                bar.write(alarm(done, stuck))
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", rate=f"{metrics['triplets_per_s']:.0f}/s")
            window.clear()
        if run.writes and config.eval_every and done % config.eval_every == 0 and done < config.steps:
            measured, _ = measure(model, source, told, validation, input_ids, attention_mask)
            run.log(done, {f"validation/{key}": value for key, value in measured.items()})
        if run.writes and saves:
            elapsed = before + time.perf_counter() - started
            checkpoint(run, done, model, optimizer, elapsed)
        if run.writes and done in config.snapshots:
            export_encoder(run.folder / "snapshots" / str(done), model, tokenizer)
    bar.close()

    if run.writes:
        measured, held_out = measure(model, source, told, validation, input_ids, attention_mask)
        save_views(run.folder / "views.safetensors", views_of(held_out, episodes.texts))
        run.log(config.steps, {f"validation/{key}": value for key, value in measured.items()})
        seconds = before + time.perf_counter() - started
        way = []
        if start is not None:
            data = {"new": HeldOut(source, validation)} | old
            trained = model.exported_clip()
            way = along_the_way(start, trained, tokenizer, config.wise_ft, data)
            for share in config.wise_ft:
                encoder = interpolated(start, trained, share)
                export_encoder(run.folder / "wise_ft" / f"{share:g}", model, tokenizer, encoder)
        warnings = [alarm(step, terms) for step, terms in run.logged(STUCK).items()]
        export(run.folder, config, episodes, model, tokenizer, measured, seconds, processes, way, warnings)
        write_alignment_report(run.folder)
        run.close()
    accelerator.wait_for_everyone()
    encoder = run.folder / "clip"
    say(accelerator, f"aligned encoder: {encoder}\nreport: {run.folder / 'report.html'}")
    return encoder


def check_terms(config: AlignConfig) -> None:
    """Refuse transition terms whose batches hold no transition, and temperatures that are none."""
    pair_temperatures(config.loss)
    batch = config.batch
    if config.loss.transition_action + config.loss.transition_language and (
        batch.frames < 2 or batch.gap > config.horizon
    ):
        raise UserError(
            "config error: loss.transition_action and loss.transition_language need two frames of an episode in a batch, at most "
            f"`horizon` apart; got batch.frames {batch.frames}, batch.gap {batch.gap}, horizon {config.horizon}"
        )


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


def pair_temperatures(loss: LossConfig) -> dict[str, tuple[float, bool]]:
    """What `loss.temperatures` says: the initial temperature of a pair, and whether it is learned.

    Raises:
        UserError: no such pair, or a value that is no temperature.
    """
    found: dict[str, tuple[float, bool]] = {}
    for text in loss.temperatures:
        pair, _, value = text.partition("=")
        number = value.removeprefix("fixed:")
        if pair not in (*PAIRS, *TRANSITIONS):
            raise UserError(
                f"config error: loss.temperatures: {text!r} names no pair; they are {', '.join((*PAIRS, *TRANSITIONS))}"
            )
        try:
            start = float(number)
        except ValueError:
            start = 0.0
        if not 0.01 <= start < float("inf"):
            raise UserError(
                f"config error: loss.temperatures: {text!r} is not {pair}=VALUE or {pair}=fixed:VALUE with a value of at least 0.01"
            )
        found[pair] = start, loss.learn_temperature and number == value
    return found


def minimal_pairs(
    loss: LossConfig, episodes: Episodes, train: np.ndarray, tell: Callable[[str], None]
) -> MinimalPairs | None:
    """The minimal pairs of (e,) training episodes, if they are asked for; `tell` is told how many episodes have one.

    Raises:
        UserError: no episode has one.
    """
    if not (loss.minimal_pairs and loss.word_patch):
        return None
    pairs = MinimalPairs(episodes, train)
    ids = (episodes.text_id[train], episodes.goal_id[train], episodes.scene_id[train])
    share = float((pairs.draw(*ids, np.random.default_rng(0)) >= 0).mean())
    if not share:
        raise UserError(
            f"config error: loss.minimal_pairs: in no instruction of {episodes.root} can one word be exchanged so that it names what its "
            "scene lacks (scene_id and target_position tell); leave it out"
        )
    tell(f"minimal pairs: for {100 * share:.0f} % of the episodes")
    return pairs


def make_source(config: AlignConfig, episodes: Episodes, rows: np.ndarray) -> TripletSource:
    """Triplets of a data set, normalised by the statistics of its (r,) training rows."""
    frames = open_pictures(episodes, config.data)
    return TripletSource(episodes, frames, make_stats(episodes, rows), config.horizon)


def make_stats(episodes: Episodes, rows: np.ndarray) -> Normalizers:
    """Statistics of the actions and states that (r,) rows have."""
    known = [values[rows][np.isfinite(values[rows]).all(1)] for values in (episodes.action, episodes.state)]
    return Normalizers(*map(compute_norm_stats, known))


def make_sampler(
    batch: BatchConfig, seed: int, episodes: Episodes, parts: list[np.ndarray], weights: list[float]
) -> MixedSampler:
    """The batches' rows: each data set, whose training episodes are one of `parts`, gives goals by its weight."""
    samplers = []
    for number, (positions, goals) in enumerate(zip(parts, shares(batch.goals, weights), strict=True)):
        own = asdict(batch) | {"goals": goals, "seed": seed + (number << 20)}
        samplers.append(GoalSampler(episodes.start, episodes.goal_id, episodes.scene_id, positions, **own))
    return MixedSampler(samplers)


def make_model(config: AlignConfig, clip: CLIPModel, episodes: Episodes) -> AlignmentModel:
    """The encoders with everything else that stage one trains, untrained."""
    return AlignmentModel(
        clip,
        horizon=config.horizon,
        action_dim=episodes.action.shape[1],
        state_dim=episodes.state.shape[1],
        pooler_width=config.loss.pooler_width,
        queries=config.loss.queries,
        temperature=config.loss.temperature,
        learn_temperature=config.loss.learn_temperature,
        temperatures=pair_temperatures(config.loss),
        sigmoid=config.loss.vision_language_kind == "sigmoid",
        transitions=config.loss.transition_action + config.loss.transition_language > 0,
    )


def make_encoders(tower: TowerConfig, image_size: int, texts: tuple[str, ...]):
    """Encoders with fresh weights, or pretrained ones adapted to the image size; returns (CLIPModel, tokenizer)."""
    if tower.pretrained is None:
        sizes = {key: value for key, value in asdict(tower).items() if key not in ("pretrained", "locked", "lora_rank")}
        return build_clip(texts, image_size=image_size, **sizes)
    clip, tokenizer = load_clip(tower.pretrained)
    return resize_positions(clip, image_size), tokenizer


def old_data(config: AlignConfig) -> dict[str, HeldOut]:
    """The held-out episodes of the data set that forgetting is measured on, if there is one.

    Where the start's own run is there, they are those that it held out, and `old_goals` are those of them whose goals the start
    is known never to have trained on, if they are several.
    """
    if config.forgetting is None:
        return {}
    data, seed, known = old_split(config)
    mixture = open_mixture(data, (), seed)
    episodes, (train,), validation = mixture.episodes, mixture.train, mixture.validation
    source = TripletSource(episodes, mixture.frames, make_stats(episodes, rows_of(episodes, train)), config.horizon)
    old = {"old": HeldOut(source, validation)}
    new_goals = validation[~np.isin(episodes.goal_id[validation], episodes.goal_id[train])]
    if known and len(np.unique(episodes.goal_id[new_goals])) > 1:
        old["old_goals"] = HeldOut(source, new_goals)
    return old


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


def shuffled_labels(goal_id: np.ndarray, seed: int) -> np.ndarray:
    """(e,) whose instruction each episode gets in the shuffled-language control; episodes without one (-1) stay without."""
    labels, told = np.arange(len(goal_id)), np.flatnonzero(goal_id >= 0)
    labels[told] = np.random.default_rng([seed, 7]).permutation(told)
    return labels


def digest(batch: TripletBatch) -> str:
    """A fingerprint of the sampled rows and the augmented pixels, so that a resumed run can be compared."""
    ids = np.stack([batch.episode_id, batch.timestep]).tobytes()
    return hashlib.sha256(ids + batch.frames[::17][:, ::7, ::7].tobytes()).hexdigest()[:16]


def checkpoint(run: RunFolder, step: int, model: AlignmentModel, optimizer: Optimizers, seconds: float) -> None:
    """Everything that step + 1 depends on, and the seconds spent so far."""
    tensors, meta = optimizer.tensors()
    save_checkpoint(
        run.folder,
        step,
        {"model": model.state_dict(), "optimizer": tensors, "rng": rng_tensors()},
        {"step": step, "optimizer": meta, "seconds": seconds},
    )


def restore(run: RunFolder, model: AlignmentModel, optimizer: Optimizers) -> tuple[int, float]:
    """Load the last checkpoint of the run, if any; returns the number of steps done and the seconds they took."""
    path = latest_checkpoint(run.folder)
    if path is None:
        run.truncate(0)
        return 0, 0.0
    tensors, state = load_checkpoint(path)
    model.load_state_dict(tensors["model"], strict=True)
    optimizer.restore(tensors["optimizer"], state["optimizer"])
    restore_rng(tensors["rng"])
    run.truncate(state["step"])
    return state["step"], state["seconds"]


def export(
    folder: Path,
    config: AlignConfig,
    episodes: Episodes,
    model: AlignmentModel,
    tokenizer,
    measured: dict[str, float],
    seconds: float,
    processes: Processes,
    way: list[dict[str, float]],
    warnings: list[str],
) -> None:
    """Write clip/, alignment.safetensors and alignment.json; each appears whole or not at all."""
    export_encoder(folder, model, tokenizer)
    record = {
        "loss": asdict(config.loss),
        "shuffle": config.shuffle,
        "data": {
            "root": config.data.root,
            "fingerprint": episodes.fingerprint,
            "episodes": len(episodes.goal_id),
        },
        "steps": config.steps,
        "processes": processes.count,
        "seconds": round(seconds, 1),
        "metrics": measured,
        "way": way,
        "warnings": warnings,
        "versions": versions(),
    }
    (folder / "alignment.json").write_text(json.dumps(record, indent=2) + "\n")


def export_share(config: AlignConfig, share: float) -> None:
    """Export the encoder at a share of the way from the pretrained start of a finished run to its end, to wise_ft/SHARE (WiSE-FT)."""
    folder = Path(config.output)
    start, _ = make_encoders(config.tower, config.data.image_size, ())
    trained, tokenizer = load_clip(folder / "clip")
    target = folder / "wise_ft" / f"{share:g}"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "alignment.safetensors", target / "alignment.safetensors")
    write_clip(target / "clip", interpolated(start.state_dict(), trained, share), tokenizer)


def export_encoder(folder: Path, model: AlignmentModel, tokenizer, clip: Encoder | None = None) -> None:
    """Write clip/, which appears whole or not at all, after alignment.safetensors, the rest of the model.

    `clip` is written in place of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("clip.")}
    save_file(others, folder / "alignment.safetensors")
    write_clip(folder / "clip", clip or model.exported_clip(), tokenizer)


def write_clip(folder: Path, clip: Encoder, tokenizer) -> None:
    """Write an encoder folder that appears whole or not at all."""
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    save_clip(partial_folder, clip, tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)


def stop_on_nonfinite(run: RunFolder, step: int, batch: TripletBatch, terms: dict[str, Term]) -> None:
    """Save the batch that broke the loss, then stop."""
    bad = [name for name, term in terms.items() if not torch.isfinite(term.loss)] or ["gradient"]
    path = run.folder / f"nonfinite_step_{step:06d}.safetensors"
    if run.writes:
        arrays = vars(batch) | {"frames": batch.frames[:]}
        save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}, path)
    raise UserError(
        f"loss is not finite at step {step} ({', '.join(bad)}); the batch is in {path}, and {how_to_replay(run.folder)}; "
        "try a lower --optimizer.lr or --precision=no with another --output"
    )


def at_chance(metrics: dict[str, float]) -> list[str]:
    """The terms whose loss has come less than a fiftieth of the way from its chance level down to its floor."""
    names = [key.removesuffix("/chance") for key in metrics if key.endswith("/chance")]

    def stays(name: str) -> bool:
        loss, chance, excess = (metrics[f"{name}/{key}"] for key in ("loss", "chance", "excess"))
        return loss > chance - 0.02 * (chance - (loss - excess))

    return [name for name in names if stays(name)]


def alarm(step: int, terms: list[str]) -> str:
    """What is said of terms that are still at their chance level after a step."""
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
    alone = "" if goals > 1 else "\nthere is one goal only: the language terms teach nothing"
    return (
        f"stage one: {len(train)} episodes ({len(validation)} held out), {goals} goals, "
        f"{len(episodes.texts)} instructions, {parameters:.1f} M parameters\n"
        f"{config.steps} steps of about {len(sampler.rows(first))} triplets{resumed}; run folder {config.output}{alone}"
    )


def say(accelerator: Accelerator, text: str) -> None:
    """Print once, whatever the number of processes."""
    accelerator.print(text)
