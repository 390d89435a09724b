"""A pretrained start of stage one: how much of what it knew stays, and how far on the way to leave it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vla.config import AlignConfig
from vla.data.batches import TripletSource
from vla.eval.alignment import encoder_measures
from vla.models.clip import Encoder, tokenize
from vla.models.finetuning import interpolated
from vla.types import UserError


@dataclass(frozen=True)
class HeldOut:
    """Episodes that an encoder is measured on, at `positions` of their data set."""

    source: TripletSource
    positions: np.ndarray

    def measures(self, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Retrieval and zero-shot accuracy of the encoder alone."""
        device = next(encoder.parameters()).device
        input_ids, mask = (t.to(device) for t in tokenize(tokenizer, self.source.episodes.texts))
        return encoder_measures(encoder, self.source, self.positions, input_ids, mask)


def check_start(config: AlignConfig) -> None:
    """Refuse what only a pretrained start has, and what it cannot have.

    Raises:
        UserError: a field that needs `tower.pretrained` or contradicts it, or a share beyond the way.
    """
    fields = {
        "tower.lora_rank": config.tower.lora_rank,
        "tower.locked": config.tower.locked,
        "wise_ft": config.wise_ft,
        "forgetting": config.forgetting,
    }
    needing = [name for name, value in fields.items() if value]
    if needing and config.tower.pretrained is None:
        raise UserError(f"config error: {needing[0]} needs a pretrained start; name one with --tower.pretrained=FOLDER")
    own = [name for name in ("vocabulary", "lexicon") if getattr(config.tower, name)]
    if own and config.tower.pretrained is not None:
        raise UserError(f"config error: tower.{own[0]}: tower.pretrained brings its own; leave one of the two out")
    beyond = [share for share in config.wise_ft if not 0 <= share <= 1]
    if beyond:
        raise UserError(f"config error: wise_ft {beyond[0]:g} is not between 0, the start, and 1, the trained encoder")


def along_the_way(
    start: Mapping[str, Tensor],
    model: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    shares: Sequence[float],
    data: Mapping[str, HeldOut],
) -> list[dict[str, float]]:
    """Measures `NAME/MEASURE` on every data set at `shares` of the way from the `start` weights, at 0 and at 1."""
    way = []
    for share in sorted({0.0, *shares, 1.0}):
        encoder = interpolated(start, model, share).eval()
        measured = {
            f"{name}/{key}": value
            for name, held_out in data.items()
            for key, value in held_out.measures(encoder, tokenizer).items()
        }
        way.append({"share": share} | measured)
    return way
