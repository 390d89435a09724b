"""Stage two: behaviour cloning of an action head on the aligned representation, frozen or fine-tuned.

`train_policy` is the whole loop, top to bottom. Batches depend on (seed, step) alone. With a frozen encoder the loop
reads cached patch tokens and never runs the vision tower, unless it is told to keep no cache.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vla.config import PolicyTrainConfig
from vla.data.augmentation import augmenter
from vla.data.episodes import Episodes, rows_of, spread
from vla.data.mixture import open_mixture
from vla.data.sampler import shares
from vla.eval.episode import EpisodeSpec
from vla.eval.golden import drawn_at
from vla.eval.rollouts import check_drawing, run_rollouts
from vla.eval.statistics import wilson
from vla.losses.cloning import masked_l1
from vla.models.clip import patch_tokens, pixel_values
from vla.policies.concord import ConcordPolicy
from vla.policies.concord.modeling_concord import WEIGHTS
from vla.policies.loading import load_chunk_policy
from vla.training.align_setup import make_stats
from vla.training.auxiliary import Auxiliary
from vla.training.checkpoint import how_to_replay, own_random_numbers, save_nonfinite
from vla.training.optim import make_optimizers, schedule
from vla.training.policy_data import (
    Cloned,
    CloningBatch,
    Draw,
    cloned_episodes,
    digest,
    draw_rows,
    gather,
    needed_tokens,
)
from vla.training.policy_export import (
    Trained,
    averaged_weights,
    check_finished_on,
    checkpoint,
    export,
    restore,
    trained_parameters,
    update_average,
)
from vla.training.prefetch import prefetch
from vla.training.processes import make_accelerator
from vla.training.run import RunFolder, begun_precision, mean_metrics
from vla.training.start import make_policy, policy_stats, starts_trained
from vla.training.tokens import open_tokens, weights_digest
from vla.training.words import Words
from vla.types import UserError

END = f"policy/{WEIGHTS}"  # what a run writes last
VALIDATED = 4096  # held-out rows that are measured, at most


def train_policy(config: PolicyTrainConfig) -> Path:
    """Run stage two and return the policy folder.

    Raises:
        UserError: unusable data, encoder or run folder, or a loss that is not finite.
    """
    torch.set_num_threads(config.threads)
    config = replace(config, precision=begun_precision(Path(config.output), config.precision, END))
    accelerator = make_accelerator(config.precision)
    if accelerator.num_processes > 1:
        raise UserError("stage two runs in one process here; for several, `lerobot-train --policy.type=concord`")
    if accelerator.gradient_accumulation_steps > 1:
        raise UserError("stage two does not accumulate gradients; set --batch_size instead")
    check_head(config)
    torch.manual_seed(config.seed)
    run = RunFolder(Path(config.output), config, end=END, resume=config.resume)
    if run.end.is_file():
        check_finished_on(config, run.folder / "policy")
        accelerator.print(f"{run.folder}: finished already")
        return run.folder / "policy"

    mixture = open_mixture(replace(config.data, episodes_per_task=None), config.more, config.seed, told=False)
    if config.rollouts_every and "env" not in mixture.episodes.collected:
        raise UserError(f"{config.data.root}: names no environment (meta/concord.json); leave out --rollouts_every")
    if config.rollouts_every:
        check_drawing("rollouts_every", rollout_specs(config, mixture.episodes)[0])
    frames = mixture.frames
    episodes, parts, validation = cloned_episodes(config, mixture)
    train = np.concatenate(parts)
    rows, validation_rows = rows_of(episodes, train), spread(rows_of(episodes, validation), VALIDATED)
    samples = shares(config.batch_size, mixture.weights)
    draw = partial(draw_rows, config.seed, [rows_of(episodes, part) for part in parts], samples)
    policy = make_policy(config, episodes)
    encoder_digest = weights_digest(policy.clip)
    policy.to(accelerator.device)
    stats = policy_stats(Path(config.start)) if config.start else make_stats(episodes, rows)
    auxiliary = None
    if config.auxiliary:
        auxiliary = Auxiliary(config, episodes, parts, mixture.weights, frames, stats, policy)
    encoder_lr = config.optimizer.lr * config.encoder_lr_scale
    pooler_lr = config.optimizer.lr * (config.pooler_lr_scale if starts_trained(config) else 1.0)
    groups = [(policy.network.pooler, pooler_lr), (policy.network, config.optimizer.lr), (policy.clip, encoder_lr)]
    groups += [(auxiliary.model, config.optimizer.lr)] if auxiliary else []
    optimizer = make_optimizers(groups, config.optimizer.weight_decay, config.precision)
    tokens = None
    if not config.tune and config.cached_shifts:
        tokens = open_tokens(
            policy.clip,
            episodes,
            frames,
            needed_tokens(config, len(episodes.frame_row), draw, validation_rows),
            augmenter=augmenter(config.data),
            folder=Path(config.data.cache) if config.data.cache else episodes.root / ".concord",
            accelerator=accelerator,
        )
    cloned = Cloned(episodes, frames, stats, encoder_digest, tokens)
    reads_alike = not (config.tune and config.tuned_part == "all")
    words = Words(policy, episodes.texts, dropout=config.data.word_dropout, frozen=reads_alike)
    averaged = {name: p.detach().clone() for name, p in trained_parameters(policy).items()}
    others = auxiliary.own_parameters() if auxiliary else {}
    trained = Trained(policy, optimizer, averaged, others)
    first, before = restore(run, trained, cloned) if config.resume else (0, 0.0)
    accelerator.print(describe(config, episodes, train, validation, policy, first))

    window: list[dict[str, float]] = []
    policy.train()
    bar = tqdm(total=config.steps, initial=first, desc="policy", unit="step", mininterval=1.0)
    started = time.perf_counter()
    batches = prefetch(partial(make_batch, config, cloned, draw, auxiliary), first, config.steps)
    for step, batch, waited in batches:
        begun = time.perf_counter()
        optimizer.set_factor(schedule(step, config.steps, config.optimizer.warmup))
        with accelerator.autocast():
            rng = np.random.default_rng([config.seed, step, 5])
            features = embed(policy, batch, words, rng, config.head.token_noise)
        loss = cloning_loss(policy, features.float(), batch)
        loss.backward()
        terms = auxiliary.add_gradients(step, batch.triplets, accelerator.autocast) if auxiliary else {}
        parameters = [*policy.parameters(), *others.values()]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
        if not torch.isfinite(loss + grad_norm):
            stop_on_nonfinite(run.folder, step, batch)
        optimizer.step()
        optimizer.zero_grad()
        if auxiliary:
            auxiliary.model.clamp_scales()
        update_average(averaged, trained_parameters(policy), min(config.ema, (step + 1) / (step + 10)))

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
            with averaged_weights(policy, averaged):
                run.log(done, validate(config, policy, words, cloned, validation_rows))
        if config.rollouts_every and done % config.rollouts_every == 0:
            with averaged_weights(policy, averaged):
                folder = export(run.folder / "rollouts" / "policy", config, policy, cloned, parts[0])
            with own_random_numbers():  # training goes on as if nobody had looked
                run.log(done, rollouts(config, episodes, folder))
        if saves:
            elapsed = before + time.perf_counter() - started
            checkpoint(run, done, trained, cloned, elapsed)
    bar.close()

    run.log(config.steps, {"seconds": before + time.perf_counter() - started})
    with averaged_weights(policy, averaged):
        folder = export(run.folder / "policy", config, policy, cloned, parts[0])
    run.close()
    simulated = "env" in episodes.collected
    accelerator.print(f"policy: {folder}" + simulated * f"\nnext: python scripts/evaluate.py --policy={folder}")
    return folder


def make_batch(
    config: PolicyTrainConfig, cloned: Cloned, draw: Draw, auxiliary: Auxiliary | None, step: int
) -> CloningBatch:
    """The samples of a step, with the triplets of the auxiliary loss if there is one."""
    batch = gather(config, cloned, *draw(step))
    return replace(batch, triplets=auxiliary.make_batch(step)) if auxiliary else batch


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


def cloning_loss(policy: ConcordPolicy, features: Tensor, batch: CloningBatch) -> Tensor:
    """() loss of the head, in float32."""
    chunk = torch.from_numpy(batch.action_chunk).to(features.device)
    pad = torch.from_numpy(batch.action_is_pad).to(features.device)
    return policy.network.head.loss(features, chunk, pad)


@torch.no_grad()
def validate(
    config: PolicyTrainConfig, policy: ConcordPolicy, words: Words, cloned: Cloned, rows: np.ndarray
) -> dict[str, float]:
    """L1 of predicted chunks on held-out rows, beside the L1 of always predicting their median."""
    policy.eval()
    predictions, chunks, pads = [], [], []
    for first in range(0, len(rows), config.batch_size):
        batch = gather(config, cloned, rows[first : first + config.batch_size], None)
        predictions.append(policy.network.head.predict(embed(policy, batch, words, None)).cpu())
        chunks.append(torch.from_numpy(batch.action_chunk))
        pads.append(torch.from_numpy(batch.action_is_pad))
    chunk, pad = torch.cat(chunks), torch.cat(pads)
    median = chunk[~pad].median(0).values
    policy.train()
    return {
        "validation/l1": masked_l1(torch.cat(predictions), chunk, pad).item(),
        "validation/l1_of_median": masked_l1(median.expand_as(chunk), chunk, pad).item(),
    }


def rollouts(config: PolicyTrainConfig, episodes: Episodes, folder: Path) -> dict[str, float]:
    """Closed-loop success of the averaged weights on development seeds."""
    specs = rollout_specs(config, episodes)
    records = run_rollouts(load_chunk_policy(folder), specs, batch_size=min(32, len(specs)))
    successes = sum(record.success for record in records)
    low, high = wilson(successes, len(records))
    return {"rollouts/success": successes / len(records), "rollouts/low": low, "rollouts/high": high}


def rollout_specs(config: PolicyTrainConfig, episodes: Episodes) -> list[EpisodeSpec]:
    """Episodes of the data set's environment on development seeds, apart from those of evaluations."""
    tasks = episodes.collected["tasks"]
    return [
        EpisodeSpec(
            env=episodes.collected["env"],
            task=tasks[i % len(tasks)],
            seed=500_000 + i,
            tasks=tuple(tasks),
            image_size=drawn_at(episodes, config.data.image_size),
            end_on_success=True,
        )
        for i in range(config.rollouts)
    ]


def stop_on_nonfinite(folder: Path, step: int, batch: CloningBatch) -> None:
    """Save the batch that broke the loss, then stop."""
    arrays = {name: value for name, value in vars(batch).items() if name != "triplets"}
    if batch.triplets is not None:
        triplets = vars(batch.triplets) | {"frames": batch.triplets.frames[:]}
        arrays |= {f"triplets.{name}": value for name, value in triplets.items()}
    save_nonfinite(folder, step, arrays)
    raise UserError(f"loss is not finite at step {step}; {how_to_replay(folder, step)}")


def describe(
    config: PolicyTrainConfig,
    episodes: Episodes,
    train: np.ndarray,
    validation: np.ndarray,
    policy: ConcordPolicy,
    first: int,
) -> str:
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
