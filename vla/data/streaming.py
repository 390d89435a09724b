"""Pictures decoded whenever they are asked for, for data whose decoded pictures do not fit on the disk."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pyarrow as pa

from vla.data.decoding import decode_picture, is_video, open_video, read_pictures, resize, row_groups, videos_of
from vla.data.episodes import Episodes
from vla.types import UserError

KEPT_BYTES = 1 << 30  # of encoded pictures, in memory
SEEK_BEYOND = 8  # frames; up to so many are decoded in passing, and as many as seeking has cost
FEW = 32  # pictures of one part that a thread decodes alone


class StreamedFrames:
    """A camera's pictures, indexed by row like the frame store and equal to it; decoded at every reading.

    Threads may share one; readings wait for each other, and each decodes in `workers` threads.

    Raises:
        UserError: a picture that is read cannot be decoded.
    """

    def __init__(self, episodes: Episodes, image_size: int, workers: int = 2) -> None:
        self.source = VideoFiles(episodes) if is_video(episodes) else RowGroups(episodes)
        self.shape = (len(self.source.part_of_row), image_size, image_size, 3)
        self._lock = threading.Lock()
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8 of (n,) rows."""
        pictures = np.empty((len(rows), *self.shape[1:]), np.uint8)

        def read(job: tuple[int, np.ndarray]) -> None:
            part, places = job
            for place, picture in zip(places, self.source.read(part, rows[places]), strict=True):
                pictures[place] = resize(picture, self.shape[1])

        with self._lock:
            list(self._pool.map(read, self._jobs(rows)))
        return pictures

    def _jobs(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Parts of the source with the places of (n,) rows that are in them; neighbouring rows together."""
        order = np.argsort(rows, kind="stable")
        parts = self.source.part_of_row[rows[order]]
        for part in np.unique(parts):
            places = order[parts == part]
            for share in np.array_split(places, min(self._workers, -(-len(places) // FEW))):
                yield int(part), share


class RowGroups:
    """Pictures in parquet files; the row groups that were read last stay in memory, encoded."""

    def __init__(self, episodes: Episodes) -> None:
        self.camera = episodes.camera
        self.groups = row_groups(episodes.root)
        sizes = [group.rows for group in self.groups]
        self.part_of_row = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._kept: OrderedDict[int, pa.StructArray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, part: int, rows: np.ndarray) -> list[np.ndarray]:
        """The pictures of (n,) rows of a row group, as large as they are."""
        group, column = self.groups[part], self._column(part)
        offsets = (rows - group.first).tolist()
        return [decode_picture(column[offset].as_py(), self.camera, group, offset) for offset in offsets]

    def _column(self, part: int) -> pa.StructArray:
        with self._lock:
            if part in self._kept:
                self._kept.move_to_end(part)
                return self._kept[part]
        column = read_pictures(self.groups[part], self.camera).combine_chunks()
        with self._lock:
            self._kept[part] = column
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return column


class VideoFiles:
    """Pictures in video files of a constant frame rate, found by seeking."""

    def __init__(self, episodes: Episodes) -> None:
        self.files, self.part_of_row, self.number_of_row = videos_of(episodes)

    def read(self, part: int, rows: np.ndarray) -> list[np.ndarray]:
        """The pictures of (n,) rows of a file, as large as they are."""
        numbers = self.number_of_row[rows]
        with open_video(self.files[part]) as container:
            decoded = self._decode(container, np.unique(numbers).tolist())
        return [decoded[number] for number in numbers]

    def _decode(self, container: av.container.InputContainer, numbers: list[int]) -> dict[int, np.ndarray]:
        """Frames by their number in the file, ascending."""
        stream = container.streams.video[0]
        begin, duration = stream.start_time or 0, 1 / (stream.average_rate * stream.time_base)  # of a frame
        decoded: dict[int, np.ndarray] = {}
        at, reach = -1, -1  # the frame that was decoded last; how far ahead seeking does not pay
        for number in numbers:
            sought = number - at > reach
            if sought:
                container.seek(begin + round(number * duration), stream=stream)
                frames, at = container.decode(stream), -1
            while at < number:
                frame = next(frames, None)
                if frame is None:
                    break
                at = round((frame.pts - begin) / duration)
                if sought:
                    reach, sought = max(reach, SEEK_BEYOND, number - at), False
            if at != number:
                raise UserError(
                    f"{container.name}: frame {number} is missing; the video is truncated, or of a varying frame rate"
                )
            decoded[number] = frame.to_ndarray(format="rgb24")
        return decoded
