"""Streamed pictures are those of the frame store and of LeRobot, from images and from videos."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from tests.conftest import logged
from vla.config import DataConfig, DoctorConfig
from vla.data import streaming
from vla.data.episodes import data_files, fingerprint, read_episodes
from vla.data.frames import open_frames, open_pictures
from vla.data.streaming import StreamedFrames
from vla.doctor import doctor
from vla.training.align import train_align
from vla.training.policy import train_policy
from vla.types import IMAGE_KEY, IMAGES_PREFIX, UserError

WRIST = f"{IMAGES_PREFIX}wrist"


@pytest.fixture(scope="module")
def video_root(tmp_path_factory):
    """A data set of three episodes that LeRobot wrote as one video."""
    root = tmp_path_factory.mktemp("video") / "data"
    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    picture = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector, IMAGE_KEY: picture}
    dataset = LeRobotDataset.create("local/video", fps=10, features=features, root=root, use_videos=True)
    for episode, length in enumerate((23, 9, 31)):
        for t in range(length):
            image = np.full((64, 64, 3), 40 * episode, np.uint8)
            image[4 + t : 16 + t, 20:40] = (255, 8 * t, 60)
            values = np.full(2, t, np.float32)
            dataset.add_frame({"observation.state": values, "action": values, IMAGE_KEY: image, "task": "go"})
        dataset.save_episode()
    dataset.finalize()
    # As root, SVT-AV1 takes the highest real-time priority for the thread that calls it, and whatever that starts starves others.
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return root


@pytest.fixture(params=["images", "video"])
def episodes(request):
    return read_episodes(request.getfixturevalue("data_root" if request.param == "images" else "video_root"))


@pytest.fixture
def two_cameras(data_root, tmp_path):
    """A data set whose second camera has the first one's pictures in reverse order."""
    root = shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][WRIST] = info["features"][IMAGE_KEY]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (path,) = data_files(root)
    table = pq.read_table(path)
    pq.write_table(table.append_column(WRIST, table[IMAGE_KEY].take(list(reversed(range(len(table)))))), path)
    return root


@pytest.mark.parametrize("stream", [True, False])
def test_pictures_are_those_of_the_camera_that_is_named(two_cameras, stream):
    with pytest.raises(UserError, match=r"name one of its cameras, observation\.image, observation\.images\.wrist"):
        read_episodes(two_cameras)
    rows, data = np.arange(7), DataConfig(image_size=32, stream=stream, workers=1)
    first, second = (open_pictures(read_episodes(two_cameras, camera), data) for camera in (IMAGE_KEY, WRIST))
    assert (first[rows] != second[rows]).any()
    np.testing.assert_array_equal(second[rows], first[len(first) - 1 - rows])


def test_any_rows_in_any_order_are_those_of_the_store(episodes, tmp_path):
    store, stream = open_frames(episodes, 32, str(tmp_path), workers=1), StreamedFrames(episodes, 32)
    assert stream.shape == store.shape
    rows = np.random.default_rng(0).integers(len(store), size=200)  # some twice
    np.testing.assert_array_equal(stream[rows], store[rows])


@pytest.fixture
def long_gop(video_root, tmp_path):
    """The data set of videos, encoded anew with a key frame in forty."""
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    (path,) = root.glob("videos/*/*/*.mp4")
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.gop_size = 64, 64, 40
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return root


def test_far_key_frames_change_nothing(long_gop, tmp_path):
    episodes = read_episodes(long_gop)
    store, stream = open_frames(episodes, 32, str(tmp_path), workers=1), StreamedFrames(episodes, 32)
    for seed in range(5):
        rows = np.random.default_rng(seed).integers(len(store), size=6)
        np.testing.assert_array_equal(stream[rows], store[rows])


@pytest.mark.parametrize("way", ["stored", "streamed"])
def test_a_video_that_ends_early_is_named(long_gop, way):
    (path,) = long_gop.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(path)
    name = f"videos/{IMAGE_KEY}/from_timestamp"
    late = pa.array([time + 1.0 for time in table[name].to_pylist()], table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), name, late), path)
    episodes = read_episodes(long_gop)
    with pytest.raises(UserError, match=r"file-000\.mp4: .*missing; the video is truncated"):
        open_frames(episodes, 32) if way == "stored" else StreamedFrames(episodes, 32)[np.arange(len(episodes.state))]


def test_videos_are_read_as_lerobot_reads_them(video_root, tmp_path):
    theirs = LeRobotDataset("local/video", root=video_root, video_backend="pyav")
    store = open_frames(read_episodes(video_root), 64, str(tmp_path))
    for row in (0, 22, 23, 40, len(store) - 1):
        picture = (theirs[row][IMAGE_KEY].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(store[row], picture)


def test_threads_may_share_a_stream(episodes):
    stream = StreamedFrames(episodes, 32)
    rows = [np.random.default_rng(seed).integers(len(stream), size=20) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(stream.__getitem__, rows))
    for chosen, pictures in zip(rows, together, strict=True):
        np.testing.assert_array_equal(pictures, stream[chosen])


def test_little_memory_changes_nothing_but_time(data_root, monkeypatch):
    episodes = read_episodes(data_root)
    rows = np.arange(0, len(episodes.state), 7)
    plenty = StreamedFrames(episodes, 32)[rows]
    monkeypatch.setattr(streaming, "KEPT_BYTES", 1)
    stream = StreamedFrames(episodes, 32)
    np.testing.assert_array_equal(stream[rows], plenty)
    assert len(stream.source._kept) == 1


@pytest.mark.parametrize(
    "cell",
    [{"bytes": b"nothing", "path": None}, {"bytes": b"", "path": None}, {"bytes": None, "path": "gone.png"}, None],
)
def test_a_picture_that_is_none_is_named(data_root, tmp_path, cell):
    root = shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    path = data_files(root)[0]
    table = pq.read_table(path)
    pictures = table[IMAGE_KEY].to_pylist()
    pictures[4] = cell
    column = pa.array(pictures, pq.read_schema(path).field(IMAGE_KEY).type)
    pq.write_table(table.set_column(table.column_names.index(IMAGE_KEY), IMAGE_KEY, column), path)
    stream = StreamedFrames(read_episodes(root), 32)
    assert stream[np.array([3])].shape == (1, 32, 32, 3)
    with pytest.raises(UserError, match=r"observation\.image of row 4 in row group 0 is not a picture"):
        stream[np.array([4])]


@pytest.mark.parametrize("way", ["stored", "streamed"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing video"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a video that can be decoded"),
    ],
    ids=["missing", "truncated"],
)
def test_a_damaged_video_is_named(video_root, tmp_path, way, damage, message):
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    (path,) = root.glob("videos/*/*/*.mp4")
    damage(path)
    episodes = read_episodes(root)
    with pytest.raises(UserError, match=rf"file-000\.mp4: {message}"):
        open_frames(episodes, 32) if way == "stored" else StreamedFrames(episodes, 32)[np.arange(3)]


def changed_parquet(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize("way", [open_frames, StreamedFrames])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 2), "meta/episodes does not list the episodes of 31 frames"),
        (
            lambda table: table.set_column(table.column_names.index("length"), "length", pa.array([23, 8, 31])),
            "episode 1 has 9 frames in data/ and 8 in meta/episodes",
        ),
    ],
    ids=["unlisted", "length"],
)
def test_episodes_that_are_not_listed_as_they_are_do_not_become_black(video_root, tmp_path, way, change, message):
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    (path,) = root.glob("meta/episodes/*/*.parquet")
    changed_parquet(path, change)
    with pytest.raises(UserError, match=message):
        way(read_episodes(root), 32)


@pytest.mark.parametrize("way", [open_frames, StreamedFrames])
def test_a_truncated_table_of_episodes_is_named(video_root, tmp_path, way):
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    (path,) = root.glob("meta/episodes/*/*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"meta/episodes/.*\.parquet: no parquet footer.*; copy it anew"):
        way(read_episodes(root), 32)


def test_rows_that_were_taken_out_leave_the_others_their_pictures(video_root, tmp_path):
    """As when steps without motion are dropped: frames are numbered anew, and timestamps tell where they were."""
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    whole = open_frames(read_episodes(video_root), 32, str(tmp_path / "whole"))
    kept = np.setdiff1d(np.arange(63), [1, 2, 30])
    (data,), (meta,) = root.glob("data/*/*.parquet"), root.glob("meta/episodes/*/*.parquet")

    def without(table: pa.Table) -> pa.Table:
        table = table.take(pa.array(kept))
        episode = table["episode_index"].to_numpy()
        frame = np.concatenate([np.arange((episode == number).sum()) for number in range(3)])
        return table.set_column(table.column_names.index("frame_index"), "frame_index", pa.array(frame))

    changed_parquet(data, without)
    changed_parquet(meta, lambda t: t.set_column(t.column_names.index("length"), "length", pa.array([21, 8, 31])))
    info = root / "meta" / "info.json"
    info.write_text(info.read_text().replace('"total_frames": 63', '"total_frames": 60'))
    np.testing.assert_array_equal(open_frames(read_episodes(root), 32, str(tmp_path / "store")), whole[kept])


def test_the_doctor_names_a_damaged_video(video_root, tmp_path, capsys):
    root = shutil.copytree(video_root, tmp_path / "data")
    doctor(DoctorConfig(data=str(root)))
    (path,) = root.glob("videos/*/*/*.mp4")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="data need attention"):
        doctor(DoctorConfig(data=str(root)))
    assert f"{path}: not a video that can be decoded" in capsys.readouterr().out


def test_stage_one_trains_on_a_stream_as_on_the_store(align_config, tmp_path):
    def losses(stream: bool) -> list[float]:
        data = replace(align_config.data, stream=stream, cache=str(tmp_path / "cache"))
        run = train_align(replace(align_config, data=data, log_every=1, output=str(tmp_path / str(stream)))).parent
        lines = logged(run)
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(stream=True) == losses(stream=False)


def test_a_frozen_encoder_needs_neither_store_nor_cache(policy_config, tmp_path):
    data = replace(policy_config.data, stream=True, cache=str(tmp_path / "cache"))
    config = replace(policy_config, data=data, cached_shifts=0, steps=2, output=str(tmp_path / "run"))
    assert (train_policy(config) / "model.safetensors").is_file()
    assert not (tmp_path / "cache").exists()


def test_another_video_is_another_data_set(video_root, tmp_path):
    root = shutil.copytree(video_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))
    assert fingerprint(root) == fingerprint(video_root)
    (path,) = root.glob("videos/*/*/*.mp4")
    path.write_bytes(path.read_bytes() + b"again")
    assert fingerprint(root) != fingerprint(video_root)
