"""The token cache of a frozen encoder: what is in it, and what becomes of it when a run is killed or the disk is full."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from tests.conftest import logged
from vla.config import PolicyTrainConfig
from vla.data.augmentation import Augmenter
from vla.data.episodes import Episodes, read_episodes
from vla.data.frames import open_frames
from vla.models.clip_files import load_clip
from vla.training import tokens
from vla.training.policy import train_policy
from vla.training.tokens import open_tokens
from vla.types import UserError


@pytest.fixture(scope="module")
def parts(policy_config, tmp_path_factory) -> tuple:
    """A frozen encoder, episodes and their pictures."""
    episodes = read_episodes(policy_config.data.root)
    frames = open_frames(episodes, policy_config.data.image_size, str(tmp_path_factory.mktemp("frames")), workers=1)
    return load_clip(policy_config.encoder)[0], episodes, frames


def opened(parts: tuple, needed: np.ndarray, folder: Path) -> np.ndarray:
    return open_tokens(*parts, needed, augmenter=Augmenter(4, 0.2), folder=folder, accelerator=Accelerator(cpu=True))


def of_rows(episodes: Episodes, copies: int, *chosen: tuple[int, int]) -> np.ndarray:
    needed = np.zeros((copies, len(episodes.frame_row)), bool)
    for copy, row in chosen:
        needed[copy, row] = True
    return needed


def encoded_pictures(monkeypatch) -> list[int]:
    """How many pictures each call of the encoder has from now on."""
    counts, encode = [], tokens.patch_tokens
    monkeypatch.setattr(tokens, "patch_tokens", lambda clip, x: counts.append(len(x)) or encode(clip, x))
    return counts


def losses(config: PolicyTrainConfig) -> list[float]:
    train_policy(config)
    lines = logged(Path(config.output))
    return [line[name] for line in lines for name in ("loss", "validation/l1") if name in line]


def test_training_through_the_cache_is_training_on_the_encoders_tokens(policy_config, tmp_path):
    plain = replace(policy_config.data, shift_px=0, color_jitter=0.0, cache=str(tmp_path / "cache"))
    config = replace(policy_config, data=plain, steps=4, log_every=1)
    with_cache = losses(replace(config, cached_shifts=1, output=str(tmp_path / "with")))
    without = losses(replace(config, cached_shifts=0, output=str(tmp_path / "without")))
    assert len(with_cache) == 6  # four steps, validation twice
    assert with_cache == pytest.approx(without, rel=2e-3)  # the cache is float16


def test_only_pictures_that_the_steps_draw_are_encoded(policy_config, tmp_path, monkeypatch):
    counts = encoded_pictures(monkeypatch)
    config = replace(policy_config, steps=1, batch_size=2, cached_shifts=3, output=str(tmp_path / "run"))
    held_out = 0.3
    train_policy(replace(config, data=replace(config.data, holdout=held_out, cache=str(tmp_path / "cache"))))
    everything = 3 * len(read_episodes(policy_config.data.root).frame_row)
    assert 2 < sum(counts) < everything / 3


def test_a_run_that_draws_more_pictures_adds_them(parts, tmp_path, monkeypatch):
    counts = encoded_pictures(monkeypatch)
    before = opened(parts, of_rows(parts[1], 2, (0, 3), (1, 3)), tmp_path)[:, 3].copy()
    after = opened(parts, of_rows(parts[1], 2, (1, 3), (1, 5)), tmp_path)
    assert counts == [2, 1]
    assert np.array_equal(after[:, 3], before)
    assert after[1, 5].any()


def test_an_augmented_copy_depends_on_its_row_alone(parts, tmp_path):
    together = opened(parts, of_rows(parts[1], 2, (1, 3), (1, 5), (0, 5)), tmp_path / "a")
    alone = opened(parts, of_rows(parts[1], 2, (1, 5)), tmp_path / "b")
    np.testing.assert_allclose(together[1, 5].astype(float), alone[1, 5].astype(float), atol=5e-3)
    assert not np.allclose(together[1, 5].astype(float), together[0, 5].astype(float), atol=5e-3)


def test_a_killed_computation_goes_on_where_it_stopped(parts, tmp_path, monkeypatch):
    needed = np.ones((1, len(parts[1].frame_row)), bool)
    monkeypatch.setattr(tokens, "BATCH", 1)
    whole = opened(parts, needed, tmp_path / "whole")
    encode, counts = tokens.patch_tokens, []

    def killed(clip, pictures):
        counts.append(len(pictures))
        if len(counts) == 50:
            raise InterruptedError
        return encode(clip, pictures)

    monkeypatch.setattr(tokens, "patch_tokens", killed)
    with pytest.raises(InterruptedError):
        opened(parts, needed, tmp_path / "killed")
    again = opened(parts, needed, tmp_path / "killed")
    assert len(counts) == 50 + needed.size - 40  # marked after every 40th
    assert np.array_equal(again, whole)


def test_deleted_tokens_are_not_taken_for_computed(parts, tmp_path, monkeypatch):
    needed = of_rows(parts[1], 1, (0, 3))
    opened(parts, needed, tmp_path)
    next(tmp_path.glob("tokens_*.npy")).unlink()

    def killed(clip, pictures):
        raise InterruptedError

    with monkeypatch.context() as broken:
        broken.setattr(tokens, "patch_tokens", killed)
        with pytest.raises(InterruptedError):
            opened(parts, needed, tmp_path)
    assert opened(parts, needed, tmp_path)[0, 3].any()


def test_a_full_disk_says_what_to_do(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0})())
    with pytest.raises(UserError, match=r"disk full; free some space, .* lower cached_shifts, 0 keeps none"):
        opened(parts, of_rows(parts[1], 1, (0, 0)), tmp_path)


def test_a_disk_that_fills_up_meanwhile_says_what_to_do_and_nothing_is_taken_for_computed(parts, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    needed = of_rows(parts[1], 1, (0, 0))
    with monkeypatch.context() as broken:
        broken.setattr(tokens.os, "fsync", full)
        with pytest.raises(UserError, match=r"disk full; free some space, .* lower cached_shifts, 0 keeps none"):
            opened(parts, needed, tmp_path)
    assert not list(tmp_path.glob("computed_*"))
    assert opened(parts, needed, tmp_path)[0, 0].any()


def test_tokens_are_not_written_through_mapped_memory(parts, tmp_path, monkeypatch):
    """There a full disk kills the process."""
    opened_as, open_memmap = [], np.lib.format.open_memmap

    def spied(path, mode="r+", **rest):
        opened_as.append(mode)
        return open_memmap(path, mode=mode, **rest)

    monkeypatch.setattr(np.lib.format, "open_memmap", spied)
    opened(parts, of_rows(parts[1], 1, (0, 0)), tmp_path)
    assert "r+" not in opened_as
