"""Stage one's terms beside the cloning loss of stage two, on the encoder that is fine-tuned and the policy's pooler."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from vla.config import AlignConfig, PolicyTrainConfig
from vla.data.augmentation import augmenter, word_hider
from vla.data.batches import TripletSource, training_batch
from vla.data.episodes import Episodes, rows_of
from vla.data.normalization import Normalizers
from vla.files import read_json
from vla.models.alignment import TERMS
from vla.models.clip import tokenize
from vla.policies.concord import ConcordPolicy
from vla.training.align_setup import (
    check_terms,
    make_model,
    make_sampler,
    minimal_pairs,
    pair_temperatures,
    resting_action,
)
from vla.training.align_step import forward_backward
from vla.training.device_batch import on_device
from vla.training.pretrained import beside, from_stage_one, take_up
from vla.training.ranges import other_ranges
from vla.types import TripletBatch, UserError


class Auxiliary:
    """Batches and losses of stage one, whose weight falls from `auxiliary` to nothing over the run."""

    def __init__(
        self,
        config: PolicyTrainConfig,
        episodes: Episodes,
        parts: list[np.ndarray],
        weights: list[float],
        frames: np.ndarray,
        stats: Normalizers,
        policy: ConcordPolicy,
    ) -> None:
        """Build on a policy; what stage one has beside its encoder goes on from the file beside it, if there is one.

        Args:
            parts, weights: training episodes of every data set, and what each weighs in a batch.

        Raises:
            UserError: a frozen encoder, or sizes that are not those of the policy's pooler.
        """
        if not config.tune:
            raise UserError("config error: auxiliary needs an encoder that is fine-tuned; add --tune=true")
        if config.hide != "none":
            raise UserError(f"config error: auxiliary shows what hide={config.hide} hides; use one of them")
        head, loss = config.head, config.loss
        if (loss.queries, loss.pooler_width) != (head.queries, head.width):
            raise UserError(
                f"config error: auxiliary needs loss.queries = head.queries and loss.pooler_width = head.width, got "
                f"{loss.queries} and {head.queries}, {loss.pooler_width} and {head.width}"
            )
        self.config = config
        align = AlignConfig(data=config.data, loss=loss, batch=config.batch, horizon=head.horizon)
        check_terms(align)
        train = np.concatenate(parts)
        self.pairs = minimal_pairs(loss, episodes, train, print)
        self.source = TripletSource(episodes, frames, stats, head.horizon)
        self.sampler = make_sampler(config.batch, config.seed, episodes, parts, weights)
        self.model = make_model(align, policy.clip, episodes)
        encoder = started_encoder(Path(config.start)) if config.start else config.encoder
        if encoder != "random" and from_stage_one(encoder):
            take_up(self.model, encoder, pair_temperatures(loss), print)
            if note := other_ranges(beside(encoder), stats):
                print(f"auxiliary: {note}")
        else:
            print(
                f"auxiliary: its action encoder and projections start untrained; encoder {encoder} has none beside it"
            )
        self.model.pooler = policy.network.pooler
        self.model.to(policy.image_mean.device)
        self.texts = tokenize(policy.tokenizer, episodes.texts)
        self.rest = resting_action(episodes, rows_of(episodes, train), stats.action).to(policy.image_mean.device)

    def own_parameters(self) -> dict[str, Tensor]:
        """What is trained and is not the policy's, by name."""
        named = self.model.named_parameters()
        return {n: p for n, p in named if p.requires_grad and not n.startswith(("clip.", "pooler."))}

    def make_batch(self, step: int) -> TripletBatch:
        """The triplets of a step, their pictures read."""
        batch = training_batch(self.source, self.sampler, step, augmenter=augmenter(self.config.data), pairs=self.pairs)
        batch.frames.load(slice(0, len(batch.frames)))
        return batch

    def add_gradients(
        self, step: int, batch: TripletBatch, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """Add the gradients of the weighted terms to those of the parameters; returns the terms, in nats."""
        weight = self.config.auxiliary * (1 - step / self.config.steps)
        loss = self.config.loss
        weighted = replace(loss, **{name: weight * getattr(loss, name) for name in TERMS})
        _, terms, _ = forward_backward(
            self.model,
            on_device(batch, *self.texts, self.rest.device, word_hider(self.config.data, self.config.seed, step)),
            self.rest,
            weighted,
            gap=self.config.batch.gap,
            chunk=0,
            autocast=autocast,
        )
        return {f"auxiliary/{name}": float(term.loss.detach()) for name, term in terms.items()}


def started_encoder(policy: Path) -> str:
    """The encoder that a policy was trained on, as its record says; "random" if it says nothing."""
    return read_json(policy / "concord.json").get("encoder", "random")
