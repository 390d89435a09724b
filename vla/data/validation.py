"""Checks of a LeRobotDataset v3 root, each problem in one line that names the file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.files import read_json
from vla.types import (
    ACTION_KEY,
    GOAL_KEY,
    SCENE_KEY,
    SEED_KEY,
    STATE_KEY,
    SUCCESS_KEY,
    TARGET_KEY,
    UserError,
    first_line,
)

NUMERIC = (STATE_KEY, ACTION_KEY)
CONSTANT = (GOAL_KEY, SCENE_KEY, SEED_KEY, SUCCESS_KEY)  # within an episode
OPTIONAL = (*CONSTANT, TARGET_KEY)
INDICES = ("episode_index", "frame_index", "task_index")


def validate(root: Path | str, *, partial: bool = False) -> list[str]:
    """All problems of the data set at `root`, none if it is sound; one line each. If `partial`, it may lack actions and states."""
    root = Path(root)
    info_path = root / "meta" / "info.json"
    if not info_path.is_file():
        return [f"{root}: not a LeRobotDataset (no meta/info.json); run `python scripts/collect.py` to make one"]
    try:
        info = read_json(info_path)
        read_json(root / "meta" / "concord.json")
    except UserError as error:
        return [str(error)]
    if info.get("codebase_version") != "v3.0":
        return [
            f"{info_path}: codebase_version is {info.get('codebase_version')}, must be v3.0; "
            "LeRobot converts older ones: python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id=USER/NAME --root={root} --push-to-hub=false"
        ]
    missing = [key for key in ("features", "fps", "total_frames", "total_episodes") if key not in info]
    if missing:
        return [f"{info_path}: no {missing[0]!r}"]
    features = info.get("features", {})
    problems = [f"{info_path}: no feature {key!r}" for key in NUMERIC if key not in features and not partial]
    if not (root / "meta" / "stats.json").is_file():
        problems.append(f"{root / 'meta' / 'stats.json'}: missing statistics; the data set was not finalized")
    return problems or problems_of_tables(root, info)


def problems_of_tables(root: Path, info: dict) -> list[str]:
    """Problems of the parquet files: unreadable, wrong sizes, not finite, counts that disagree, episodes that are not sound."""
    data_files = sorted(root.glob("data/*/*.parquet"))
    if not data_files:
        return [f"{root / 'data'}: no parquet files"]
    problems: list[str] = []
    tables = []
    numeric = [key for key in NUMERIC if key in info["features"]]
    for path in data_files:
        table, problem = read_columns(path, [*numeric, *INDICES], OPTIONAL)
        if problem:
            problems.append(problem)
        else:
            tables.append(table)
            problems += problems_of_rows(path, table, info["features"])
            problems += absent_columns(path, info["features"])
    tasks, problem = read_columns(root / "meta" / "tasks.parquet", ["task_index"])
    if problem:
        problems.append(problem)
    if problems:
        return problems
    try:
        rows = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        return [f"{root / 'data'}: files whose columns differ in type ({first_line(error)}); write them alike"]
    if len(rows) != info["total_frames"]:
        problems.append(f"{root}: meta/info.json says {info['total_frames']} frames, data/ has {len(rows)}")
    episodes = len(np.unique(rows["episode_index"].to_numpy()))
    if episodes != info["total_episodes"]:
        problems.append(f"{root}: meta/info.json says {info['total_episodes']} episodes, data/ has {episodes}")
    without = ~np.isin(rows["task_index"].to_numpy(), tasks["task_index"].to_numpy())
    if without.any():
        episode = int(rows["episode_index"].to_numpy()[without][0])
        problems.append(f"{root}: episode {episode} has no task in meta/tasks.parquet")
    return problems + problems_of_episodes(root, rows)


def problems_of_episodes(root: Path, table: pa.Table) -> list[str]:
    """Episodes whose frames are not 0, 1, 2 and so on, and the first in which a column that has to be constant is not."""
    episode, frame = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
    order = np.lexsort((frame, episode))
    episode, frame = episode[order], frame[order]
    _, first, position = np.unique(episode, return_index=True, return_inverse=True)
    start = first[position]  # (r,) the first row of each row's episode
    problems = []
    wrong = np.flatnonzero(frame != np.arange(len(frame)) - start)
    if len(wrong):
        row = wrong[0]
        problems.append(
            f"{root}: episode {episode[row]} has frame_index {frame[row]} where {row - start[row]} is expected; rows are missing or there twice"
        )
    for key in (key for key in CONSTANT if key in table.column_names):
        values = table[key].to_numpy()[order]
        changed = np.flatnonzero(values != values[start])
        if len(changed):
            problems.append(
                f"{root}: {key} changes within episode {episode[changed[0]]}; write one value to all rows of an episode"
            )
    return problems


def absent_columns(path: Path, features: dict) -> list[str]:
    """Pictures and columns of this project that are declared and not there."""
    there = pq.read_schema(path).names
    wanted = [key for key, feature in features.items() if feature["dtype"] == "image" or key in OPTIONAL]
    return [f"{path}: no column {key!r}, which meta/info.json declares" for key in wanted if key not in there]


def problems_of_rows(path: Path, table: pa.Table, features: dict) -> list[str]:
    """Rows whose vectors have another size than declared, or are not finite, or that have no index or id."""
    problems = [
        f"{path}: {key} is empty in {table[key].null_count} rows"
        for key in (*INDICES, *CONSTANT)
        if key in table.column_names and table[key].null_count
    ]
    numbers = [key for key in (*INDICES, *CONSTANT) if key in table.column_names]
    for key, kind in ((key, table[key].type) for key in numbers):
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            problems.append(f"{path}: {key} is {kind}, must be an integer in every row")
    shape = features.get(TARGET_KEY, {}).get("shape", [2])
    if TARGET_KEY in table.column_names and list(shape) != [2]:
        problems.append(f"{path}: {TARGET_KEY} has shape {shape}, must be [2]: x and y in m")
    vectors = [key for key in NUMERIC if key in features] + [TARGET_KEY] * (
        TARGET_KEY in features and TARGET_KEY in table.column_names
    )
    for key in vectors:
        column = table[key].combine_chunks()
        size = int(np.prod(features[key]["shape"]))
        values = column.flatten() if pa.types.is_nested(column.type) else column
        if len(values) != size * len(table):
            problems.append(f"{path}: {key} does not have {size} values in every row, as meta/info.json declares")
            continue
        if key == TARGET_KEY:  # not finite where it is not known
            continue
        finite = np.isfinite(values.to_numpy(zero_copy_only=False).reshape(len(table), size)).all(1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            episode, frame = table["episode_index"][row].as_py(), table["frame_index"][row].as_py()
            problems.append(f"{path}: {key} is not finite in episode {episode}, frame {frame}")
    return problems


def read_columns(path: Path, columns: list[str], optional: tuple[str, ...] = ()) -> tuple[pa.Table | None, str | None]:
    """A table of the columns and of the optional ones that are there, or the one-line problem that prevents reading it."""
    try:
        there = pq.read_schema(path).names
        return pq.read_table(path, columns=[*columns, *(key for key in optional if key in there)]), None
    except FileNotFoundError:
        return None, f"{path}: missing"
    except (pa.ArrowInvalid, OSError) as error:
        what = first_line(error)
        if "footer" in what or "magic bytes" in what:
            what = "no parquet footer: the file is truncated, or the writer was not finalized"
        return None, f"{path}: {what}"
    except (pa.ArrowKeyError, KeyError) as error:
        return None, f"{path}: {error}"
