"""Where a data set's pictures are, and how one is decoded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vla.data.episodes import Episodes, data_files
from vla.data.validation import read_columns
from vla.types import UserError, first_line


def is_video(episodes: Episodes) -> bool:
    """Whether the camera's pictures are in video files, not in the parquet files."""
    return _info(episodes)["features"][episodes.camera]["dtype"] == "video"


@dataclass(frozen=True)
class RowGroup:
    """A part of a parquet file that is read at once."""

    file: Path
    number: int  # in the file
    first: int  # its first row's place in the data set
    rows: int


def row_groups(root: Path) -> list[RowGroup]:
    """All of a data set's rows, in order."""
    found, first = [], 0
    for file in data_files(root):
        footer = pq.read_metadata(file)
        for number in range(footer.num_row_groups):
            found.append(RowGroup(file, number, first, footer.row_group(number).num_rows))
            first += found[-1].rows
    return found


def read_pictures(group: RowGroup, camera: str) -> pa.ChunkedArray:
    """The cells of an image column, encoded.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return pq.ParquetFile(group.file).read_row_group(group.number, columns=[camera])[camera]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{group.file}: {camera} of row group {group.number} cannot be read ({first_line(error)}); copy it anew"
        ) from error


def decode_picture(picture: dict | None, camera: str, group: RowGroup, offset: int) -> np.ndarray:
    """(H, W, 3) uint8 of a cell of an image column, bytes or the path of a file.

    Raises:
        UserError: it is no picture; names the parquet file, row group and row.
    """
    cell = picture if isinstance(picture, dict) else {}
    encoded = cell.get("bytes") or b""
    if not encoded and cell.get("path"):
        path = group.file.parents[2] / cell["path"]
        encoded = path.read_bytes() if path.is_file() else b""
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
    if image is None:
        raise UserError(f"{group.file}: {camera} of row {offset} in row group {group.number} is not a picture")
    return image


def videos_of(episodes: Episodes) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """The camera's video files; for each row (r,) of the data set which of them it is in, and as which frame.

    A frame is found by its row's timestamp, as LeRobot does.

    Raises:
        UserError: meta/episodes does not list the episodes that data/ has, or other lengths.
    """
    info, prefix = _info(episodes), f"videos/{episodes.camera}/"
    names = ["episode_index", "length", f"{prefix}chunk_index", f"{prefix}file_index", f"{prefix}from_timestamp"]
    tables = sorted((episodes.root / "meta" / "episodes").glob("*/*.parquet"))
    position = {int(index): i for i, index in enumerate(episodes.episode_index)}
    stamps = [columns_of(path, ["timestamp"])["timestamp"] for path in data_files(episodes.root)]
    timestamp = np.concatenate([column.to_numpy() for column in stamps]).astype(np.float64)
    file_of_row, number_of_row = (np.full(len(episodes.frame_row), -1, np.int64) for _ in range(2))
    files: dict[Path, int] = {}
    for row in (row for table in tables for row in columns_of(table, names).to_pylist()):
        name = info["video_path"].format(
            video_key=episodes.camera, chunk_index=row[f"{prefix}chunk_index"], file_index=row[f"{prefix}file_index"]
        )
        index = row["episode_index"]
        rows = episodes.frame_row[slice(*episodes.start[position[index] :][:2])] if index in position else ()
        if len(rows) != row["length"]:
            raise UserError(
                f"{episodes.root}: episode {index} has {len(rows)} frames in data/ and {row['length']} in meta/episodes; copy both anew"
            )
        file_of_row[rows] = files.setdefault(episodes.root / name, len(files))
        number_of_row[rows] = np.rint((row[f"{prefix}from_timestamp"] + timestamp[rows]) * info["fps"])
    if len(unlisted := episodes.frame_row[file_of_row[episodes.frame_row] < 0]):
        raise UserError(
            f"{episodes.root}: meta/episodes does not list the episodes of {len(unlisted)} frames; copy it anew"
        )
    return list(files), file_of_row, number_of_row


def columns_of(path: Path, names: list[str]) -> pa.Table:
    """Columns of a parquet file.

    Raises:
        UserError: the file is damaged or lacks one.
    """
    table, problem = read_columns(path, names)
    if problem:
        raise UserError(f"{problem}; copy it anew")
    return table


@contextmanager
def open_video(file: Path) -> Iterator[av.container.InputContainer]:
    """A video file that is there and can be decoded.

    Raises:
        UserError: it is not; also what decoding raises within.
    """
    if not file.is_file():
        raise UserError(f"{file}: missing video")
    try:
        with av.open(str(file)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise UserError(f"{file}: not a video that can be decoded ({error.strerror})") from error


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) as `vla.models.clip` resizes what a policy sees; unchanged if it has that size."""
    if image.shape[:2] == (size, size):
        return image
    picture = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(picture, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _info(episodes: Episodes) -> dict:
    return json.loads((episodes.root / "meta" / "info.json").read_text())
