"""What a batch becomes on its way to the device."""

import torch

from vla.data.batches import TripletSource
from vla.data.episodes import rows_of
from vla.data.mixture import open_mixture
from vla.training.align_setup import make_stats
from vla.training.device_batch import on_device


def test_texts_are_cut_to_a_multiple_of_four_tokens_and_to_no_less_than_the_longest(align_config):
    mixture = open_mixture(align_config.data, [], 0)
    rows = rows_of(mixture.episodes, mixture.train[0])
    source = TripletSource(mixture.episodes, mixture.frames, make_stats(mixture.episodes, rows), align_config.horizon)
    mask = (torch.arange(12) < 5).long().expand(len(mixture.episodes.texts), -1)
    batch = on_device(source.gather(rows[:3]), torch.ones_like(mask), mask, torch.device("cpu"))
    assert (batch.input_ids.shape[1], batch.attention_mask.shape[1]) == (8, 8)
    assert (batch.attention_mask.sum(1) == 5).all()
