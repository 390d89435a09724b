"""The reader against LeRobot's own, and what the validator finds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from vla.data.episodes import (
    data_files,
    goals_of_texts,
    limit_per_task,
    named_goals,
    read_episodes,
    rows_of,
    select,
    split_episodes,
    task_of_episode,
)
from vla.data.frames import open_frames
from vla.data.triplets import gather_chunks
from vla.data.validation import validate
from vla.types import (
    ACTION_KEY,
    GOAL_KEY,
    IMAGE_KEY,
    SCENE_KEY,
    SEED_KEY,
    STATE_KEY,
    SUCCESS_KEY,
    TARGET_KEY,
    UserError,
)


@pytest.fixture
def copy(data_root, tmp_path):
    """A copy of the data set that a test may damage."""
    return shutil.copytree(data_root, tmp_path / "data", ignore=shutil.ignore_patterns(".concord"))


def rewrite(root, change) -> None:
    path = data_files(root)[0]
    pq.write_table(change(pq.read_table(path)), path)


def test_every_row_equals_what_lerobot_reads(data_root):
    ours = read_episodes(data_root)
    frames = open_frames(ours, 48)
    theirs = LeRobotDataset("local/debug", root=data_root)
    assert len(theirs) == len(ours.state)
    for row in range(len(theirs)):
        item = theirs[row]
        np.testing.assert_array_equal(item[STATE_KEY].numpy(), ours.state[row])
        np.testing.assert_array_equal(item[ACTION_KEY].numpy(), ours.action[row])
        picture = (item[IMAGE_KEY].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(picture, ours.gather_frames(frames, np.array([row]))[0])
        episode = ours.episode_of_row[row]
        assert item["task"] == ours.texts[ours.text_id[episode]]
        assert item["episode_index"] == ours.episode_index[episode]
        assert item["frame_index"] == ours.timestep[row]


def test_chunks_equal_lerobots_delta_timestamps(data_root):
    ours = read_episodes(data_root)
    theirs = LeRobotDataset("local/debug", root=data_root, delta_timestamps={ACTION_KEY: [t / 10 for t in range(16)]})
    for row in np.linspace(0, len(theirs) - 1, 40).astype(int):
        chunk, pad = gather_chunks(ours, np.array([row]), 16)
        np.testing.assert_array_equal(theirs[int(row)][ACTION_KEY].numpy(), chunk[0])
        np.testing.assert_array_equal(theirs[int(row)][f"{ACTION_KEY}_is_pad"].numpy(), pad[0])


def test_a_scene_is_demonstrated_towards_several_goals(data_root):
    episodes = read_episodes(data_root)
    for scene in np.unique(episodes.scene_id):
        assert len(np.unique(episodes.goal_id[episodes.scene_id == scene])) == 4


def test_without_our_columns_goals_come_from_the_task_strings(copy):
    names = [GOAL_KEY, SCENE_KEY, SEED_KEY, SUCCESS_KEY, TARGET_KEY]
    rewrite(copy, lambda table: table.drop_columns(names))
    info = json.loads((copy / "meta" / "info.json").read_text())
    info["features"] = {k: v for k, v in info["features"].items() if k not in names}
    (copy / "meta" / "info.json").write_text(json.dumps(info))
    (copy / "meta" / "concord.json").unlink()
    episodes = read_episodes(copy)
    assert episodes.goals == episodes.texts
    assert (episodes.goal_id == episodes.text_id).all()
    assert (episodes.scene_id == -1).all()
    assert episodes.success.all()


def test_scenes_are_never_on_both_sides_of_the_split(data_root):
    episodes = read_episodes(data_root)
    train, validation = split_episodes(episodes, 0.4, seed=0)
    assert not set(episodes.scene_id[train]) & set(episodes.scene_id[validation])
    assert sorted([*train, *validation]) == list(range(len(episodes.goal_id)))


def test_at_most_so_many_episodes_of_a_task_are_kept(data_root):
    episodes = read_episodes(data_root)
    everything = np.arange(len(episodes.goal_id))
    kept = limit_per_task(episodes, everything, 2, seed=0)
    tasks, counts = np.unique(task_of_episode(episodes)[kept], return_counts=True)
    assert set(tasks) == set(task_of_episode(episodes))
    assert counts.max() == 2
    assert set(limit_per_task(episodes, everything, 1, seed=0)) < set(kept)


def test_without_named_tasks_every_goal_is_one(data_root):
    episodes = replace(read_episodes(data_root), collected={})
    assert task_of_episode(episodes).tolist() == [episodes.goals[g] for g in episodes.goal_id]


def test_selected_episodes_keep_their_rows(data_root):
    episodes = read_episodes(data_root)
    chosen = np.array([5, 2])
    part = select(episodes, chosen)
    np.testing.assert_array_equal(part.action, episodes.action[rows_of(episodes, chosen)])
    np.testing.assert_array_equal(part.frame_row, episodes.frame_row[rows_of(episodes, chosen)])


def nan_in_state(table: pa.Table) -> pa.Table:
    values = table[STATE_KEY].to_pylist()
    values[3][1] = float("nan")
    return table.set_column(table.column_names.index(STATE_KEY), STATE_KEY, pa.array(values, table[STATE_KEY].type))


def short_action(table: pa.Table) -> pa.Table:
    values = [row[:2] for row in table[ACTION_KEY].to_pylist()]
    column = pa.array(values, pa.list_(pa.float32()))
    return table.set_column(table.column_names.index(ACTION_KEY), ACTION_KEY, column)


def unknown_task(table: pa.Table) -> pa.Table:
    column = pa.array(np.full(len(table), 999), pa.int64())
    return table.set_column(table.column_names.index("task_index"), "task_index", column)


def second_row(name: str, value: int | None):
    """Writes a value into one column of the second row."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[1] = value
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return change


def named_scenes(table: pa.Table) -> pa.Table:
    column = pa.array([f"kitchen {scene}" for scene in table[SCENE_KEY].to_pylist()])
    return table.set_column(table.column_names.index(SCENE_KEY), SCENE_KEY, column)


def unknown_targets(table: pa.Table) -> pa.Table:
    values = [None if row % 2 else value for row, value in enumerate(table[TARGET_KEY].to_pylist())]
    return table.set_column(table.column_names.index(TARGET_KEY), TARGET_KEY, pa.array(values, pa.list_(pa.float32())))


def three_coordinates(root: Path) -> None:
    """With a height."""
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"][TARGET_KEY]["shape"] = [3]
    path.write_text(json.dumps(info))


def two_types(root: Path) -> None:
    """Half of the rows in a further file, whose success is a boolean."""
    (path,) = data_files(root)
    table = pq.read_table(path)
    half, column = len(table) // 2, table.column_names.index(SUCCESS_KEY)
    pq.write_table(table.slice(0, half), path)
    rest = table.slice(half)
    boolean = pa.array(rest[SUCCESS_KEY].to_numpy().astype(bool))
    pq.write_table(rest.set_column(column, SUCCESS_KEY, boolean), path.with_name("file-001.parquet"))


def edit_info(root, **changes) -> None:
    """Other values in meta/info.json; None takes the key out."""
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: rewrite(r, nan_in_state), r"observation\.state is not finite in episode 0, frame 3"),
        (lambda r: rewrite(r, short_action), r"action does not have 3 values in every row"),
        (lambda r: rewrite(r, unknown_task), r"episode 0 has no task in meta/tasks\.parquet"),
        (lambda r: rewrite(r, lambda t: t.slice(0, len(t) - 5)), r"meta/info\.json says \d+ frames, data/ has \d+"),
        (lambda r: rewrite(r, lambda t: t.drop_columns([ACTION_KEY])), r"file-000\.parquet.*action"),
        (
            lambda r: rewrite(r, lambda t: t.drop_columns([IMAGE_KEY])),
            r"file-000\.parquet: no column 'observation\.image'",
        ),
        (lambda r: rewrite(r, lambda t: t.drop_columns([GOAL_KEY])), r"file-000\.parquet: no column 'goal_id'"),
        (lambda r: data_files(r)[0].write_bytes(data_files(r)[0].read_bytes()[:-20]), r"no parquet footer"),
        (lambda r: rewrite(r, second_row("frame_index", 0)), r"episode 0 has frame_index 0 where 1 is expected"),
        (lambda r: rewrite(r, second_row("frame_index", 999)), r"episode 0 has frame_index 2 where 1 is expected"),
        (lambda r: rewrite(r, second_row(SUCCESS_KEY, 0)), r"success changes within episode 0"),
        (lambda r: rewrite(r, second_row(SCENE_KEY, None)), r"file-000\.parquet: scene_id is empty in 1 rows"),
        (lambda r: rewrite(r, named_scenes), r"scene_id is string, must be an integer in every row"),
        (lambda r: rewrite(r, unknown_targets), r"target_position does not have 2 values in every row"),
        (three_coordinates, r"target_position has shape \[3\], must be \[2\]: x and y in m"),
        (two_types, r"files whose columns differ in type"),
        (lambda r: (r / "meta" / "stats.json").unlink(), r"missing statistics"),
        (lambda r: (r / "meta" / "tasks.parquet").unlink(), r"tasks\.parquet: missing"),
        (lambda r: (r / "meta" / "tasks.parquet").write_bytes(b"PAR1"), r"tasks\.parquet: "),
        (lambda r: (r / "meta" / "info.json").write_text("{"), r"info\.json: damaged"),
        (lambda r: (r / "meta" / "info.json").write_text("[]"), r"info\.json: damaged \(not a JSON object\)"),
        (lambda r: (r / "meta" / "info.json").write_bytes(b'{"fps": "\xff"}'), r"info\.json: damaged"),
        (lambda r: (r / "meta" / "concord.json").write_text("[]"), r"concord\.json: damaged"),
        (lambda r: edit_info(r, codebase_version="v2.1"), r"codebase_version is v2\.1, must be v3\.0; .*convert"),
        (lambda r: edit_info(r, fps=None), r"info\.json: no 'fps'"),
        (lambda r: edit_info(r, total_episodes=99), r"says 99 episodes, data/ has \d+"),
        (lambda r: shutil.rmtree(r / "data"), r"data: no parquet files"),
        (lambda r: (r / "meta" / "info.json").unlink(), r"not a LeRobotDataset .*collect\.py"),
    ],
)
def test_damage_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message):
        read_episodes(copy)
    assert validate(copy)


def test_an_unknown_camera_lists_the_cameras(data_root):
    with pytest.raises(UserError, match=r"'observation\.images\.top' is not one of its cameras \(observation\.image\)"):
        read_episodes(data_root, "observation.images.top")


def test_texts_that_the_tokenizer_reads_alike_are_one_goal():
    texts = ["Pick up  the cube", "pick up the cube ", "pick up the caf\u00e9", "pick up the cafe\u0301"]
    goal_id, goals = goals_of_texts(texts, np.array([1, 0, 2, 3]))
    assert goal_id.tolist() == [0, 0, 1, 1]
    assert goals == (texts[0], texts[2])


def test_goals_without_names_may_be_numbers_of_any_size():
    goal_id, goals = named_goals(Path("data"), np.array([2**40, -1, 7, 2**40]), None)
    assert goal_id.tolist() == [1, -1, 0, 1]
    assert goals == ("7", str(2**40))


def test_a_goal_beyond_the_names_is_refused():
    with pytest.raises(UserError, match=r"data: goal_id 2 is beyond the 2 goals of meta/concord\.json"):
        named_goals(Path("data"), np.array([0, 2]), ["a", "b"])


def test_any_goal_below_0_is_none():
    goal_id, _ = named_goals(Path("data"), np.array([0, -7]), ["a", "b"])
    assert goal_id.tolist() == [0, -1]
