"""What a batch becomes on its way to the device."""

import numpy as np
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


def test_rows_stay_whole_whatever_their_order(align_config):
    mixture = open_mixture(align_config.data, [], 0)
    episodes, every = mixture.episodes, rows_of(mixture.episodes, mixture.train[0])
    source = TripletSource(episodes, mixture.frames, make_stats(episodes, every), align_config.horizon)
    rows = every[episodes.timestep[every] > 0][::9]  # each its own picture
    mask = torch.ones(len(episodes.texts), 4, dtype=torch.int64)
    ordered, shuffled = (
        vars(on_device(source.gather(order), mask, mask, torch.device("cpu")))
        for order in (rows, np.random.default_rng(0).permutation(rows))
    )
    pictures = [batch.pop("pixels")(slice(0, len(rows))) for batch in (ordered, shuffled)]
    torch.testing.assert_close(*pictures)
    for name, expected in ordered.items():
        torch.testing.assert_close(shuffled[name], expected, equal_nan=True, msg=name)
