"""The frame store is decoded once, and again when it is damaged."""

import errno
import fcntl
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from vla.data.augmentation import Augmenter
from vla.data.episodes import data_files, read_episodes
from vla.data.frames import open_frames
from vla.data.normalization import compute_norm_stats, normalize_quantile
from vla.types import IMAGE_KEY, UserError


def test_a_second_opening_decodes_nothing(data_root, tmp_path):
    episodes = read_episodes(data_root)
    first = open_frames(episodes, 32, str(tmp_path), workers=1)
    stamp = next(tmp_path.glob("*.npy")).stat().st_mtime_ns
    second = open_frames(episodes, 32, str(tmp_path), workers=1)
    assert next(tmp_path.glob("*.npy")).stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(first, second)


def test_a_truncated_store_is_built_again(data_root, tmp_path):
    episodes = read_episodes(data_root)
    whole = np.array(open_frames(episodes, 32, str(tmp_path), workers=1))
    path = next(tmp_path.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(open_frames(episodes, 32, str(tmp_path), workers=1), whole)


def test_any_number_of_processes_builds_the_same_store(data_root, tmp_path):
    episodes = read_episodes(data_root)
    one = open_frames(episodes, 32, str(tmp_path / "one"), workers=1)
    np.testing.assert_array_equal(open_frames(episodes, 32, str(tmp_path / "two"), workers=2), one)


def test_a_picture_that_is_none_is_named(data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    path = data_files(root)[0]
    table = pq.read_table(path)
    pictures = table[IMAGE_KEY].to_pylist()
    pictures[4]["bytes"] = b"nothing"
    column = pq.read_schema(path).field(IMAGE_KEY).type
    import pyarrow as pa

    pq.write_table(table.set_column(table.column_names.index(IMAGE_KEY), IMAGE_KEY, pa.array(pictures, column)), path)
    with pytest.raises(UserError, match=r"observation\.image of row 4 in row group 0 is not a picture"):
        open_frames(read_episodes(root), 32, workers=1)
    assert not list((root / ".concord").glob("*.npy"))


def test_pictures_that_are_damaged_in_the_file_are_named(data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    path = data_files(root)[0]
    footer = pq.read_metadata(path).row_group(0)
    (column,) = (c for c in map(footer.column, range(footer.num_columns)) if c.path_in_schema.endswith("bytes"))
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)  # the footer is whole
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"observation\.image of row group 0 cannot be read .*; copy it anew"):
        open_frames(read_episodes(root), 32, workers=1)


def test_pictures_of_another_type_are_named(data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    path = data_files(root)[0]
    table = pq.read_table(path)
    plain = [picture["bytes"] for picture in table[IMAGE_KEY].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index(IMAGE_KEY), IMAGE_KEY, [plain]), path)
    with pytest.raises(UserError, match=r"observation\.image of row 0 in row group 0 is not a picture"):
        open_frames(read_episodes(root), 32, workers=1)


def test_a_cache_that_cannot_be_made_says_where_to_put_it(data_root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/cache: cannot be written into .*; name another folder with --data\.cache"
    ):
        open_frames(read_episodes(data_root), 32, str(tmp_path / "file" / "cache"), workers=1)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_the_frame_store_takes_its_space_before_pictures_are_written(data_root, tmp_path, monkeypatch):
    def full(descriptor, first, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk full while building the frame store"):
        open_frames(read_episodes(data_root), 48, str(tmp_path / "cache"), workers=1)
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_one_line(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0})())
    with pytest.raises(UserError, match=r"disk full while building the frame store; set data\.cache to another folder"):
        open_frames(read_episodes(data_root), 32, str(tmp_path), workers=1)


def test_a_constant_dimension_stays_finite():
    stats = compute_norm_stats(np.full((50, 2), 3.0))
    assert np.abs(normalize_quantile(np.array([3.0, 3.001]), stats)).max() < 1


def test_a_rare_command_stays_reachable():
    commands = np.where(np.arange(1000) < 3, 1.0, -1.0)[:, None]
    stats = compute_norm_stats(commands)
    np.testing.assert_allclose(normalize_quantile(np.array([[1.0], [-1.0]]), stats), [[1.0], [-1.0]], atol=1e-6)


def test_a_rare_command_stays_reachable_among_noise():
    commands = np.random.default_rng(0).normal(scale=0.01, size=(10_000, 1))
    commands[:8] = 1.0
    assert np.isclose(compute_norm_stats(commands).q99, 1.0)


def test_a_glitch_does_not_squeeze_the_rest():
    values = np.random.default_rng(0).uniform(-1, 1, (10_000, 1))
    values[17] = 1000.0
    stats = compute_norm_stats(values)
    assert 0.9 < stats.q99 < 1.1


def test_a_glitch_on_one_side_leaves_the_other_where_it_was():
    values = np.random.default_rng(0).normal(size=(20_000, 1))
    plain = compute_norm_stats(values)
    values[[17, 18]] = [[10_000.0], [-50.0]]
    stats = compute_norm_stats(values)
    np.testing.assert_allclose([stats.q01, stats.q99], [plain.q01, plain.q99], atol=0.05)


def test_a_bell_shape_is_cut_at_its_quantiles():
    values = np.random.default_rng(0).normal(size=(100_000, 1))
    stats = compute_norm_stats(values)
    np.testing.assert_allclose([stats.q01[0], stats.q99[0]], [-2.33, 2.33], atol=0.05)


def test_augmentation_shifts_by_at_most_the_given_pixels_and_never_flips():
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, 10:14, 4:6] = 255
    for seed in range(30):
        moved = Augmenter(3, 0.0)(picture, np.random.default_rng(seed))[0, :, :, 0]
        rows, columns = np.nonzero(moved)
        assert abs(rows.min() - 10) <= 3
        assert abs(columns.min() - 4) <= 3


def test_augmentation_shifts_by_every_number_of_pixels():
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, 10, 4] = 255
    moved = [Augmenter(3, 0.0)(picture, np.random.default_rng(seed))[0, :, :, 0] for seed in range(60)]
    places = np.array([np.argwhere(one)[0] - (10, 4) for one in moved])
    assert set(places[:, 0]) == set(places[:, 1]) == set(range(-3, 4))


def test_augmentation_changes_colours_and_moves_nothing_by_itself():
    frames = np.full((20, 8, 8, 3), 90, np.uint8)
    frames[:, :4] = 160
    changed = Augmenter(0, 0.2)(frames, np.random.default_rng(0))
    assert (changed[:, :4] == changed[:, :1, :1]).all()
    assert (changed[:, 4:] == changed[:, 4:5, :1]).all()
    assert len({picture[0, 0].tobytes() for picture in changed}) > 10
    assert np.ptp(changed[:, 0, 0].astype(int), axis=1).max() > 0  # channels by different gains


def test_augmentation_depends_on_its_generator_alone():
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    once, again = (Augmenter(4, 0.2, 0.5)(frames, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, frames)


def test_shapes_are_pasted_over_the_asked_share_of_the_pictures_and_leave_most_of_each():
    frames = np.full((400, 48, 48, 3), 200, np.uint8)
    changed = (Augmenter(0, 0.0, 0.5)(frames, np.random.default_rng(0)) != 200).any(-1)  # (b, H, W)
    assert 0.4 < changed.any((1, 2)).mean() < 0.6
    assert changed.mean((1, 2)).max() < 0.15
    assert (frames == 200).all()  # the pictures of the data set stay as they are


def test_what_a_killed_build_left_is_removed(data_root, tmp_path):
    episodes = read_episodes(data_root)
    open_frames(episodes, 32, str(tmp_path), workers=1)
    (store,) = tmp_path.glob("frames_*.npy")
    store.unlink()
    left, new, held = (store.with_suffix(f".elsewhere.{pid}.partial") for pid in (1, 2, 3))
    for path in (left, new, held):
        path.write_bytes(b"half")
    for path in (left, held):
        os.utime(path, (0, 0))
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_frames(episodes, 32, str(tmp_path), workers=1)
    assert [path.is_file() for path in (left, new, held, store)] == [False, True, True, True]
