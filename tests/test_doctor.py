"""Doctor on data sets that lack something stage one can do without."""

import pytest

from tests.conftest import without
from vla.config import DoctorConfig
from vla.doctor import doctor
from vla.types import ACTION_KEY, STATE_KEY, UserError


def lines_of(root, capsys) -> str:
    doctor(DoctorConfig(data=str(root)))
    return capsys.readouterr().out


def test_a_whole_data_set_has_no_note(data_root, capsys):
    assert f"ok    data           {data_root}: 24 episodes" in lines_of(data_root, capsys)


def test_pictures_and_captions_are_noted_with_what_they_feed(data_root, tmp_path, capsys):
    captions = without(data_root, tmp_path / "captions", ACTION_KEY, STATE_KEY)
    out = lines_of(captions, capsys)
    assert f"note  data           {captions}: 24 episodes" in out
    assert "no actions and no states: for --more of stage one only, where it feeds vision_language, word_patch" in out


def test_play_is_noted_with_what_it_feeds(data_root, tmp_path, capsys):
    out = lines_of(without(data_root, tmp_path / "play", words=False), capsys)
    assert (
        "no instructions: for --more of stage one only, where it feeds context_action, transition_action, state" in out
    )


def test_damage_is_no_note(data_root, tmp_path, capsys):
    captions = without(data_root, tmp_path / "captions", ACTION_KEY, STATE_KEY)
    (captions / "meta" / "stats.json").unlink()
    with pytest.raises(UserError, match="doctor: data need attention"):
        doctor(DoctorConfig(data=str(captions)))
    assert "missing statistics" in capsys.readouterr().out
