"""Files and folders appear whole or not at all, and damaged ones are named."""

from pathlib import Path

import pytest

from vla.files import read_json, whole_folder, write_json, write_whole
from vla.types import UserError


def test_a_folder_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def write(until: str) -> None:
        with whole_folder(folder) as partial:
            partial.mkdir()
            (partial / "weights").write_text("new")
            assert (folder / "weights").read_text() == "old"
            if until == "broken":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("broken")
    assert (folder / "weights").read_text() == "old"
    write("whole")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(handle):
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vla.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]
    write_whole(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("content", [b'{"a": 1', b"[1]", b'{"a": "\xff"}', b""])
def test_a_damaged_file_is_named(tmp_path, content):
    path: Path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record\.json: damaged \(.+\); restore it, or make anew what it belongs to"):
        read_json(path)


def test_what_is_written_is_read_and_what_is_absent_is_empty(tmp_path):
    write_json(tmp_path / "deep" / "record.json", {"a": 1})
    assert read_json(tmp_path / "deep" / "record.json") == {"a": 1}
    assert read_json(tmp_path / "absent.json") == {}
