"""The words that stage two reads: those of a frozen text tower are encoded once, some of them hidden if asked for."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from vla.data.augmentation import hide_words
from vla.models.clip import TEXTS, in_multiples, text_features, tokenize
from vla.policies.concord import ConcordPolicy

VARIANTS = 4  # encodings of each text of a frozen tower beside the plain one, other words hidden in each
AT_ONCE = 1024  # texts that are encoded at a time


class Words:
    """Word tokens of a data set's texts, by their index."""

    def __init__(self, policy: ConcordPolicy, texts: tuple[str, ...], *, dropout: float, frozen: bool) -> None:
        """`dropout`: share of the words that training hides; `frozen`: the text tower does not change."""
        self.policy, self.dropout = policy, dropout
        self.ids, self.mask = (t.to(policy.image_mean.device) for t in tokenize(policy.tokenizer, texts))
        self.lengths = self.mask.sum(1)
        self.encoded: list[tuple[Tensor, Tensor]] = []  # features (u, l, w) and mask (u, l); the first hides nothing
        if frozen:
            policy.eval()
            for number in range(1 + VARIANTS * (dropout > 0)):
                mask = hide_words(self.mask, dropout, np.random.default_rng([number, 4])) if number else self.mask
                self.encoded.append((self._encode(mask), mask))

    @torch.no_grad()
    def _encode(self, mask: Tensor) -> Tensor:
        pieces = zip(self.ids.split(AT_ONCE), mask.split(AT_ONCE), strict=True)
        return torch.cat([text_features(self.policy.clip, *piece)[0] for piece in pieces])

    def of(self, text_id: np.ndarray, rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(b,) texts -> word tokens (b, l, w) and mask (b, l); without `rng` no word is hidden."""
        texts = torch.from_numpy(text_id).to(self.ids.device)
        length = int(self.lengths[texts].max())
        if self.encoded:
            variant = np.zeros(len(text_id), int)
            if rng is not None and len(self.encoded) > 1:
                variant = rng.integers(1, len(self.encoded), size=len(text_id))
            features = self.encoded[0][0].new_zeros(len(texts), length, self.encoded[0][0].shape[-1])
            masks = self.mask.new_zeros(len(texts), length)
            for number in np.unique(variant):
                rows = torch.from_numpy(np.flatnonzero(variant == number)).to(texts.device)
                words, mask = self.encoded[number]
                features[rows], masks[rows] = words[texts[rows], :length], mask[texts[rows], :length]
            return features, masks
        distinct, row = texts.unique(return_inverse=True)
        mask = self.mask[distinct, :length]
        if rng is not None:
            mask = hide_words(mask, self.dropout, rng)
        features, _ = in_multiples(TEXTS, partial(text_features, self.policy.clip), self.ids[distinct, :length], mask)
        return features[row], mask[row]
