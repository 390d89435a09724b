"""Stage two: behaviour cloning of an action head on the aligned representation, frozen or fine-tuned.

`train_policy` is the whole loop, top to bottom. Batches depend on (seed, step) alone. With a frozen encoder the loop
reads cached patch tokens and never runs the vision tower, unless it is told to keep no cache.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vla.config import PolicyTrainConfig
from vla.data.augmentation import augmenter
from vla.data.episodes import Episodes, limit_per_task, rows_of, select
from vla.data.mixture import Mixture, open_mixture, root_and_weight
from vla.data.normalization import Normalizers, NormStats, compute_norm_stats, normalize_quantile
from vla.data.sampler import shares
from vla.data.triplets import gather_chunks
from vla.eval.statistics import wilson
from vla.losses.cloning import masked_l1
from vla.models.clip import load_clip, patch_tokens, pixel_values, resize_positions
from vla.policies.concord import ConcordPolicy
from vla.training.auxiliary import Auxiliary, started_encoder
from vla.training.checkpoint import (
    check_trained_on,
    how_to_replay,
    latest_checkpoint,
    load_checkpoint,
    restore_rng,
    restoring,
    rng_tensors,
    save_checkpoint,
)
from vla.training.optim import Optimizers, make_optimizers, schedule
from vla.training.prefetch import prefetch
from vla.training.processes import make_accelerator
from vla.training.run import RunFolder, begun_precision, mean_metrics
from vla.training.start import make_policy, policy_stats, starts_trained
from vla.training.tokens import open_tokens, weights_digest
from vla.training.words import Words
from vla.types import ACTION_KEY, STATE_KEY, TripletBatch, UserError
from vla.versions import versions

VALIDATED = 4096  # held-out rows that are measured, at most


@dataclass(frozen=True)
class CloningBatch:
    """One step's samples. `inputs` is (b, n, w) fp16 tokens of the cache, or (b, H, W, 3) uint8 frames."""

    rows: np.ndarray
    inputs: np.ndarray
    state: np.ndarray  # (b, s) normalised
    text_id: np.ndarray  # (b,)
    action_chunk: np.ndarray  # (b, h, a) normalised
    action_is_pad: np.ndarray  # (b, h)
    triplets: TripletBatch | None = None  # of the auxiliary loss


def train_policy(config: PolicyTrainConfig) -> Path:
    """Run stage two and return the policy folder.

    Raises:
        UserError: unusable data, encoder or run folder, or a loss that is not finite.
    """
    torch.set_num_threads(config.threads)
    config = replace(config, precision=begun_precision(Path(config.output), config.precision))
    accelerator = make_accelerator(config.precision)
    if accelerator.num_processes > 1:
        raise UserError("stage two runs in one process here; for several, `lerobot-train --policy.type=concord`")
    check_head(config)
    torch.manual_seed(config.seed)
    run = RunFolder(Path(config.output), config, resume=config.resume)
    if (run.folder / "policy").is_dir():
        check_finished_on(config, run.folder / "policy")
        accelerator.print(f"{run.folder}: finished already")
        return run.folder / "policy"

    mixture = open_mixture(replace(config.data, episodes_per_task=None), config.more, config.seed, told=False)
    if config.rollouts_every and "env" not in (mixture.episodes.extra or {}):
        raise UserError(f"{config.data.root}: names no environment (meta/concord.json); leave out --rollouts_every")
    frames = mixture.frames
    episodes, parts, validation = cloned_episodes(config, mixture)
    train = np.concatenate(parts)
    rows, validation_rows = rows_of(episodes, train), spread(rows_of(episodes, validation), VALIDATED)
    rows_of_part = [rows_of(episodes, part) for part in parts]
    samples = shares(config.batch_size, mixture.weights)

    def draw(step: int) -> tuple[np.ndarray, np.random.Generator]:
        """The (b,) rows of a step, and what gives its other random numbers."""
        rng = np.random.default_rng([config.seed, step, 2])
        drawn = [part[rng.integers(len(part), size=n)] for part, n in zip(rows_of_part, samples, strict=True)]
        return np.concatenate(drawn), rng

    policy = make_policy(config, episodes)
    encoder_digest = weights_digest(policy.clip)
    policy.to(accelerator.device)
    stats = (
        policy_stats(Path(config.start))
        if config.start
        else {
            STATE_KEY: compute_norm_stats(episodes.state[rows]),
            ACTION_KEY: compute_norm_stats(episodes.action[rows]),
        }
    )
    normalizers = Normalizers(stats[ACTION_KEY], stats[STATE_KEY])
    auxiliary = None
    if config.auxiliary:
        auxiliary = Auxiliary(config, episodes, parts, mixture.weights, frames, normalizers, policy)
    encoder_lr = config.optimizer.lr * config.encoder_lr_scale
    pooler_lr = config.optimizer.lr * (config.pooler_lr_scale if starts_trained(config) else 1.0)
    groups = [(policy.network.pooler, pooler_lr), (policy.network, config.optimizer.lr), (policy.clip, encoder_lr)]
    groups += [(auxiliary.model, config.optimizer.lr)] if auxiliary else []
    optimizer = make_optimizers(groups, config.optimizer.weight_decay, config.precision)
    policy, *members = accelerator.prepare(policy, *optimizer.members)
    optimizer = Optimizers(tuple(members))
    unwrapped: ConcordPolicy = accelerator.unwrap_model(policy)
    tokens = None
    if not config.tune and config.cached_shifts:
        tokens = open_tokens(
            unwrapped.clip,
            episodes,
            frames,
            needed_tokens(config, len(episodes.frame_row), draw, validation_rows),
            augmenter=augmenter(config.data),
            folder=Path(config.data.cache) if config.data.cache else episodes.root / ".concord",
            accelerator=accelerator,
        )
    words = Words(unwrapped, episodes.texts, dropout=config.data.word_dropout, frozen=not config.tune)
    averaged = {name: p.detach().clone() for name, p in trained_parameters(unwrapped).items()}
    others = auxiliary.own_parameters() if auxiliary else {}
    first, before = (
        restore(run, unwrapped, optimizer, averaged, others, episodes, encoder_digest) if config.resume else (0, 0.0)
    )
    accelerator.print(describe(config, episodes, train, validation, unwrapped, first))

    def make_batch(step: int) -> CloningBatch:
        batch = gather(config, episodes, frames, tokens, stats, *draw(step))
        return replace(batch, triplets=auxiliary.make_batch(step)) if auxiliary else batch

    window: list[dict[str, float]] = []
    unwrapped.train()
    bar = tqdm(total=config.steps, initial=first, desc="policy", unit="step", mininterval=1.0)
    started = time.perf_counter()
    for step, batch, waited in prefetch(make_batch, first, config.steps):
        begun = time.perf_counter()
        optimizer.set_factor(schedule(step, config.steps, config.optimizer.warmup))
        with accelerator.autocast():
            rng = np.random.default_rng([config.seed, step, 5])
            features = embed(unwrapped, batch, words, rng, config.head.token_noise)
        loss = cloning_loss(unwrapped, features.float(), batch, accelerator)
        accelerator.backward(loss)
        terms = auxiliary.add_gradients(step, batch.triplets, accelerator.autocast) if auxiliary else {}
        parameters = [*unwrapped.parameters(), *others.values()]
        grad_norm = accelerator.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        if not torch.isfinite(loss + grad_norm):
            stop_on_nonfinite(run.folder, step, batch)
        optimizer.step()
        optimizer.zero_grad()
        if auxiliary:
            auxiliary.model.clamp_scales()
        update_average(averaged, trained_parameters(unwrapped), min(config.ema, (step + 1) / (step + 10)))

        seconds = time.perf_counter() - begun + waited
        window.append(
            {
                "loss": loss.item(),
                "grad_norm": float(grad_norm),
                "samples_per_s": config.batch_size / seconds,
                "data_wait": waited / seconds,
            }
            | terms
        )
        bar.update()
        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        if done % config.log_every == 0 or saves:  # a resumed run starts with an empty window, too
            metrics = mean_metrics(window)
            metrics["lr"] = max(group["lr"] for group in optimizer.param_groups)
            run.log(done, metrics | {"samples": digest(batch)})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}")
            window.clear()
        if (config.eval_every and done % config.eval_every == 0) or done == config.steps:
            with averaged_weights(unwrapped, averaged):
                run.log(done, validate(config, unwrapped, episodes, frames, tokens, words, stats, validation_rows))
        if config.rollouts_every and done % config.rollouts_every == 0:
            with averaged_weights(unwrapped, averaged):
                folder = export(run.folder / "rollouts" / "policy", config, unwrapped, stats, episodes, encoder_digest)
            random = rng_tensors()
            run.log(done, rollouts(config, episodes, folder))
            restore_rng(random)  # training goes on as if nobody had looked
        if saves:
            elapsed = before + time.perf_counter() - started
            checkpoint(run, done, unwrapped, optimizer, averaged, others, episodes, encoder_digest, elapsed)
    bar.close()

    run.log(config.steps, {"seconds": before + time.perf_counter() - started})
    with averaged_weights(unwrapped, averaged):
        folder = export(run.folder / "policy", config, unwrapped, stats, episodes, encoder_digest)
    run.close()
    simulated = "env" in (episodes.extra or {})
    accelerator.print(f"policy: {folder}" + simulated * f"\nnext: python scripts/evaluate.py --policy={folder}")
    return folder


def check_finished_on(config: PolicyTrainConfig, policy: Path) -> None:
    """Refuse to take a finished policy for one on the encoder that is there now, where that can be told.

    Raises:
        UserError: it was trained on other weights.
    """
    path = policy / "concord.json"
    before = json.loads(path.read_text()).get("encoder_weights") if path.is_file() else None
    if before is None or config.start or not Path(config.encoder).is_dir():
        return
    clip, _ = load_clip(config.encoder)
    if weights_digest(resize_positions(clip, config.data.image_size)) != before:
        raise UserError(
            f"{policy}: was trained on an encoder that {config.encoder} no longer holds; choose another --output, or delete it to train anew"
        )


def check_head(config: PolicyTrainConfig) -> None:
    """Refuse a head that executes more than it predicts.

    Raises:
        UserError: names both fields.
    """
    if config.head.n_action_steps > config.head.horizon:
        raise UserError(
            f"config error: head.n_action_steps must be at most head.horizon, got {config.head.n_action_steps} "
            f"and {config.head.horizon}"
        )


def cloned_episodes(config: PolicyTrainConfig, mixture: Mixture) -> tuple[Episodes, list[np.ndarray], np.ndarray]:
    """The episodes to clone, and the positions among them of each data set's training episodes and of the held-out ones.

    Scenes are held out before failures are left out, so that stage one, which trains on failures as well, holds out the same.

    Raises:
        UserError: a data set without a success to train on, none held out, or one without actions or states.
    """
    everything = mixture.episodes
    cloned = np.flatnonzero(everything.success | config.failures)
    (*parts, validation) = (np.flatnonzero(np.isin(cloned, part)) for part in (*mixture.train, mixture.validation))
    roots = [config.data.root, *(root_and_weight(text)[0] for text in config.more)]
    for root, part in zip(roots, parts, strict=True):
        if not len(part):
            raise UserError(f"{root}: no training episode succeeded; clone failures with --failures=true")
    if not len(validation):
        raise UserError(f"{config.data.root}: no held-out episode succeeded; change --data.holdout")
    episodes = select(everything, cloned)
    for root, part in zip(roots[1:], parts[1:], strict=True):
        rows = rows_of(episodes, part)
        if not (np.isfinite(episodes.action[rows]).all() and np.isfinite(episodes.state[rows]).all()):
            raise UserError(f"{root}: lacks actions or states; only stage one can use it")
    parts[0] = limit_per_task(episodes, parts[0], config.data.episodes_per_task, config.seed)
    return episodes, parts, validation


def needed_tokens(
    config: PolicyTrainConfig,
    count: int,
    draw: Callable[[int], tuple[np.ndarray, np.random.Generator]],
    validation_rows: np.ndarray,
) -> np.ndarray:
    """(copies, count) bool: which copies of which of `count` rows the steps `draw`, or the validation reads."""
    needed = np.zeros((config.cached_shifts, count), bool)
    needed[0, validation_rows] = True
    for step in range(config.steps):
        rows, rng = draw(step)
        needed[draw_copies(rng, config.cached_shifts, len(rows)), rows] = True
    return needed


def draw_copies(rng: np.random.Generator, copies: int, count: int) -> np.ndarray:
    """(count,) which copy of the token cache each sample of a step reads; the first numbers after its rows."""
    return rng.integers(copies, size=count)


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]


def gather(
    config: PolicyTrainConfig,
    episodes: Episodes,
    frames: np.ndarray,
    tokens: np.ndarray | None,
    stats: dict[str, NormStats],
    rows: np.ndarray,
    rng: np.random.Generator | None,
) -> CloningBatch:
    """Samples of (b,) rows; without `rng` nothing is augmented."""
    chunk, pad = gather_chunks(episodes, rows, config.head.horizon)
    if tokens is not None:
        copies = np.zeros(len(rows), int) if rng is None else draw_copies(rng, len(tokens), len(rows))
        inputs = tokens[copies, rows]
    else:
        inputs = episodes.gather_frames(frames, rows)
        if rng is not None:
            inputs = augmenter(config.data)(inputs, rng)
    return CloningBatch(
        rows=rows,
        inputs=inputs,
        state=normalize_quantile(episodes.state[rows], stats[STATE_KEY]),
        text_id=episodes.text_id[episodes.episode_of_row[rows]],
        action_chunk=normalize_quantile(chunk, stats[ACTION_KEY]),
        action_is_pad=pad,
    )


def embed(
    policy: ConcordPolicy, batch: CloningBatch, words: Words, rng: np.random.Generator | None, token_noise: float = 0.0
) -> Tensor:
    """(b, hidden) features of a batch.

    `rng` is for the words that training hides, none without it; `token_noise` is in units of the layer-normed tokens.
    """
    device, tuned = policy.image_mean.device, policy.config.tune
    inputs = torch.from_numpy(batch.inputs).to(device)
    pictures = inputs.dtype == torch.uint8  # else tokens of the cache
    tokens = patch_tokens(policy.clip, pixel_values(inputs)) if pictures else inputs.float()
    if token_noise and not tuned:
        tokens = tokens + token_noise * torch.randn_like(tokens)
    word_tokens, mask = words.of(batch.text_id, rng)
    with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
        similarity = policy.similarity(tokens, word_tokens)
    return policy.network.features(tokens, word_tokens, mask, similarity, torch.from_numpy(batch.state).to(device))


def cloning_loss(policy: ConcordPolicy, features: Tensor, batch: CloningBatch, accelerator: Accelerator) -> Tensor:
    """() loss of the head, in float32."""
    chunk = torch.from_numpy(batch.action_chunk).to(accelerator.device)
    pad = torch.from_numpy(batch.action_is_pad).to(accelerator.device)
    return policy.network.head.loss(features, chunk, pad)


@torch.no_grad()
def validate(config, policy, episodes, frames, tokens, words, stats, rows) -> dict[str, float]:
    """L1 of predicted chunks on held-out rows, beside the L1 of always predicting their median."""
    policy.eval()
    errors, chunks, pads = [], [], []
    for first in range(0, len(rows), config.batch_size):
        batch = gather(config, episodes, frames, tokens, stats, rows[first : first + config.batch_size], None)
        predicted = policy.network.head.predict(embed(policy, batch, words, None)).cpu()
        chunk, pad = torch.from_numpy(batch.action_chunk), torch.from_numpy(batch.action_is_pad)
        errors.append(masked_l1(predicted, chunk, pad).item() * len(batch.rows))
        chunks.append(chunk)
        pads.append(pad)
    chunk, pad = torch.cat(chunks), torch.cat(pads)
    median = chunk[~pad].median(0).values
    policy.train()
    return {
        "validation/l1": sum(errors) / len(rows),
        "validation/l1_of_median": masked_l1(median.expand_as(chunk), chunk, pad).item(),
    }


def rollouts(config: PolicyTrainConfig, episodes: Episodes, folder: Path) -> dict[str, float]:
    """Closed-loop success of the averaged weights on development seeds, apart from those of evaluations."""
    from vla.eval.rollouts import EpisodeSpec, run_rollouts
    from vla.policies.loading import load_chunk_policy

    extra = episodes.extra
    tasks = extra["tasks"]
    specs = [
        EpisodeSpec(
            env=extra["env"],
            task=tasks[i % len(tasks)],
            seed=500_000 + i,
            tasks=tuple(tasks),
            image_size=config.data.image_size,
            end_on_success=True,
        )
        for i in range(config.rollouts)
    ]
    records = run_rollouts(partial(load_chunk_policy, folder), specs, batch_size=len(specs))
    successes = sum(record.success for record in records)
    low, high = wilson(successes, len(records))
    return {"rollouts/success": successes / len(records), "rollouts/low": low, "rollouts/high": high}


def trained_parameters(policy: ConcordPolicy) -> dict[str, Tensor]:
    """What the optimiser changes, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def update_average(averaged: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """averaged <- decay * averaged + (1 - decay) * current."""
    torch._foreach_lerp_(list(averaged.values()), [current[name] for name in averaged], 1 - decay)


class averaged_weights:
    """Swap the averaged weights in, and out again."""

    def __init__(self, policy: ConcordPolicy, averaged: dict[str, Tensor]) -> None:
        self.parameters, self.averaged = trained_parameters(policy), averaged

    def __enter__(self) -> None:
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.averaged)

    def __exit__(self, *_: object) -> None:
        self._write(self.kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])


def checkpoint(
    run: RunFolder,
    step: int,
    policy: ConcordPolicy,
    optimizer: Optimizers,
    averaged: dict[str, Tensor],
    others: dict[str, Tensor],
    episodes: Episodes,
    encoder_digest: str,
    seconds: float,
) -> None:
    """Everything that step + 1 depends on; a frozen encoder is in its own folder and is not repeated, only its digest `encoder_digest`."""
    tensors, meta = optimizer.tensors()
    groups = {"model": trained_parameters(policy), "averaged": averaged, "optimizer": tensors, "rng": rng_tensors()}
    groups |= {"auxiliary": others} if others else {}
    state = {
        "step": step,
        "optimizer": meta,
        "data": episodes.fingerprint,
        "encoder": encoder_digest,
        "seconds": seconds,
    }
    save_checkpoint(run.folder, step, groups, state)


def restore(
    run: RunFolder,
    policy: ConcordPolicy,
    optimizer: Optimizers,
    averaged: dict[str, Tensor],
    others: dict[str, Tensor],
    episodes: Episodes,
    encoder_digest: str,
) -> tuple[int, float]:
    """Load the last checkpoint of the run, if any; returns the number of steps done and the seconds they took.

    Raises:
        UserError: a damaged checkpoint, or one of other data, another encoder or another version.
    """
    path = latest_checkpoint(run.folder)
    if path is None:
        run.truncate(0)
        return 0, 0.0
    tensors, state = load_checkpoint(path)
    check_trained_on(path, state, episodes)
    if state.get("encoder", encoder_digest) != encoder_digest:  # an older version does not say
        raise UserError(
            f"{path}: was trained on an encoder that has changed since; restore that, or choose another --output"
        )
    with torch.no_grad(), restoring(path):
        for name, p in trained_parameters(policy).items():
            p.copy_(tensors["model"][name])
            averaged[name].copy_(tensors["averaged"][name])
        for name, p in others.items():
            p.copy_(tensors["auxiliary"][name])
        optimizer.restore(tensors["optimizer"], state["optimizer"])
    restore_rng(tensors["rng"])
    run.truncate(state["step"])
    return state["step"], state["seconds"]


def export(
    folder: Path,
    config: PolicyTrainConfig,
    policy: ConcordPolicy,
    stats: dict[str, NormStats],
    episodes: Episodes,
    encoder_digest: str,
) -> Path:
    """Write a LeRobot policy folder with its processors; it appears whole or not at all."""
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    policy.save_pretrained(partial_folder)
    dataset_stats = {
        key: {name: torch.from_numpy(value) for name, value in values.as_dict().items()}
        for key, values in stats.items()
    }
    for processor in make_pre_post_processors(policy.config, dataset_stats=dataset_stats):
        processor.save_pretrained(partial_folder)
    extra = episodes.extra or {}
    record = {
        "env": extra.get("env"),
        "tasks": extra.get("tasks", []),
        "data": {"root": config.data.root, "fingerprint": episodes.fingerprint},
        "more": config.more,
        "encoder": started_encoder(Path(config.start)) if config.start else config.encoder,
        "encoder_weights": encoder_digest,
        "start": config.start,
        "tune": config.tune,
        "steps": config.steps,
        "seed": config.seed,
        "versions": versions(),
    }
    (partial_folder / "concord.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    return folder


def digest(batch: CloningBatch) -> str:
    """A fingerprint of the sampled rows, so that a resumed run can be compared."""
    return hashlib.sha256(batch.rows.tobytes()).hexdigest()[:16]


def stop_on_nonfinite(folder: Path, step: int, batch: CloningBatch) -> None:
    """Save the batch that broke the loss, then stop."""
    path = folder / f"nonfinite_step_{step:06d}.safetensors"
    arrays = {name: value for name, value in vars(batch).items() if name != "triplets"}
    if batch.triplets is not None:
        triplets = vars(batch.triplets) | {"frames": batch.triplets.frames[:]}
        arrays |= {f"triplets.{name}": value for name, value in triplets.items()}
    save_file({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}, path)
    raise UserError(
        f"loss is not finite at step {step}; the batch is in {path}, and {how_to_replay(folder)}; "
        "try a lower --optimizer.lr, or --precision=no where it was bf16, with another --output"
    )


def describe(config, episodes: Episodes, train, validation, policy: ConcordPolicy, first: int) -> str:
    """What the run is about to do, in a few lines."""
    trained = sum(p.numel() for p in trained_parameters(policy).values()) / 1e6
    every = sum(p.numel() for p in policy.parameters()) / 1e6
    how = "fine-tuned" if config.tune else "frozen" + ", through cached tokens" * bool(config.cached_shifts)
    resumed = f", resumed at step {first}" if first else ""
    return (
        f"stage two: {len(train)} episodes ({len(validation)} held out), {'policy' if config.start else 'encoder'} {config.start or config.encoder} {how}\n"
        f"{trained:.1f} of {every:.1f} M parameters trained, {config.steps} steps of {config.batch_size} samples{resumed}; "
        f"run folder {config.output}"
    )
