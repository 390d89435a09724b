"""Doctor on data sets: what they lack, and whether their environment still is the same."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from envs.tabletop.env import TabletopEnv
from tests.conftest import without
from vla.config import DoctorConfig
from vla.doctor import doctor
from vla.types import ACTION_KEY, STATE_KEY, UserError


def absent(name: str) -> type:
    """What `env_class` does if an environment is not installed."""
    raise ValueError(f"env {name!r} is not installed")


def lines_of(root, capsys) -> str:
    doctor(DoctorConfig(data=str(root)))
    return capsys.readouterr().out


def test_a_whole_data_set_has_no_note(data_root, capsys):
    assert f"ok    data           {data_root}: 24 episodes" in lines_of(data_root, capsys)


def test_actions_in_units_too_large_for_them_are_noted(data_root, tmp_path, capsys):
    metres = shutil.copytree(data_root, tmp_path / "metres", ignore=shutil.ignore_patterns(".concord"))
    (metres / "meta" / "concord.json").unlink()  # with it, the episodes would be recorded again
    (path,) = metres.glob("data/*/*.parquet")
    table = pq.read_table(path)
    actions = [[0.002 * action[0], *action[1:]] for action in table[ACTION_KEY].to_pylist()]
    column = pa.array(actions, table[ACTION_KEY].type)
    pq.write_table(table.set_column(table.column_names.index(ACTION_KEY), ACTION_KEY, column), path)
    assert "action 0: from q01 to q99 less than 0.01, so hardly learned" in lines_of(metres, capsys)
    assert "hardly learned" not in lines_of(data_root, capsys)


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


def test_collected_episodes_come_out_the_same_again(data_root, capsys):
    assert "ok    replay         3 episodes recorded again: pictures within 0 of 255, states and actions within 0" in (
        lines_of(data_root, capsys)
    )


def test_a_simulator_that_moves_otherwise_is_noticed(data_root, monkeypatch, capsys):
    monkeypatch.setattr("envs.tabletop.env.MAX_SPEED", 0.1)
    with pytest.raises(UserError, match="doctor: replay need attention"):
        lines_of(data_root, capsys)
    assert "episode 0 had " in capsys.readouterr().out


def test_a_simulator_that_draws_otherwise_is_noticed(data_root, darker, capsys):
    with pytest.raises(UserError, match="doctor: replay need attention"):
        lines_of(data_root, capsys)
    assert "in a picture and by 0 in states and actions" in capsys.readouterr().out


def test_instructions_that_read_otherwise_are_noted(data_root, monkeypatch, capsys):
    monkeypatch.setattr(TabletopEnv, "_wording", lambda env, goal: "please")
    out = lines_of(data_root, capsys)
    assert "note  replay" in out
    assert "the environment says 'please' now" in out


def test_data_of_an_environment_that_is_not_there_is_noted(data_root, monkeypatch, capsys):
    monkeypatch.setattr("vla.integrations.collect.env_class", absent)
    assert "note  replay         not possible here" in lines_of(data_root, capsys)


def test_data_of_others_is_not_recorded_again(data_root, tmp_path, capsys):
    copy = shutil.copytree(data_root, tmp_path / "data")
    (copy / "meta" / "concord.json").unlink()
    assert "replay" not in lines_of(copy, capsys)


def test_damage_is_no_note(data_root, tmp_path, capsys):
    captions = without(data_root, tmp_path / "captions", ACTION_KEY, STATE_KEY)
    (captions / "meta" / "stats.json").unlink()
    with pytest.raises(UserError, match="doctor: data need attention"):
        doctor(DoctorConfig(data=str(captions)))
    assert "missing statistics" in capsys.readouterr().out
