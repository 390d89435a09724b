"""Instructions that differ in one word and are wrong of a scene."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from vla.data.episodes import read_episodes
from vla.data.minimal_pairs import MinimalPairs, one_word_apart
from vla.training.align import train_align
from vla.types import UserError

TEXTS = (
    "push the red star",
    "push the blue star",
    "push the red cross",
    "grab the red star",
    "push the green star now",
)


def test_texts_that_differ_in_one_word_are_found_with_that_word():
    apart = one_word_apart(TEXTS)
    assert sorted(apart[0]) == [(1, "blue"), (2, "cross"), (3, "grab")]
    assert apart[1] == [(0, "red")]
    assert apart[4] == []


@pytest.fixture(scope="module")
def episodes(data_root):
    """Two scenes: red star and blue cross asked in the first, blue star in the second."""
    few = read_episodes(data_root)
    texts = ("push the red star", "push the blue cross", "push the blue star", "push the red cross")
    ids = {"text_id": np.array([0, 1, 2, 3]), "goal_id": np.array([0, 1, 2, 3]), "scene_id": np.array([0, 0, 1, 2])}
    return replace(few, texts=texts, **ids)


def drawn(pairs: MinimalPairs, text: int, goal: int, scene: int) -> set[int]:
    """What fifty draws give."""
    ids = (np.full(50, value) for value in (text, goal, scene))
    return set(pairs.draw(*ids, np.random.default_rng(0)).tolist())


def test_a_pair_exchanges_a_word_for_another_of_the_scene_and_is_no_goal_of_it(episodes):
    pairs = MinimalPairs(episodes, np.arange(4))
    assert drawn(pairs, 0, 0, 0) == {2, 3}  # the blue star, the red cross
    assert drawn(pairs, 2, 2, 1) == {-1}  # no red in its scene
    assert drawn(pairs, 0, 0, -1) == {-1}
    assert drawn(pairs, 0, -1, 0) == {-1}


def test_what_is_asked_in_the_scene_or_of_the_row_is_no_pair(episodes):
    everything = MinimalPairs(replace(episodes, scene_id=np.zeros(4, int)), np.arange(4))
    assert all(drawn(everything, text, text, 0) == {-1} for text in range(4))
    assert drawn(MinimalPairs(episodes, np.arange(4)), 0, 2, 0) == {3}


def test_texts_of_held_out_episodes_are_no_pairs(episodes):
    assert drawn(MinimalPairs(episodes, np.array([0, 1, 2])), 0, 0, 0) == {2}


@pytest.fixture(scope="module")
def alike(data_root, tmp_path_factory) -> Path:
    """The small data set with instructions that often differ in one word."""
    copy = tmp_path_factory.mktemp("alike") / "set"
    shutil.copytree(data_root, copy, ignore=shutil.ignore_patterns(".concord"))
    path = copy / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    name = "task" if "task" in table.column_names else "__index_level_0__"
    phrases = [f"push the {color} {shape}" for color, shape in product("abcde", "vwxyz")]
    phrases = [phrases[7 * i % 25] for i in range(len(table))]  # a scene's differ in both words
    pq.write_table(table.set_column(table.column_names.index(name), name, [phrases]), path)
    return copy


def test_stage_one_trains_with_them(align_config, alike, tmp_path):
    losses = []
    for number, chosen in enumerate((False, True)):
        loss, data = replace(align_config.loss, minimal_pairs=chosen), replace(align_config.data, root=str(alike))
        run = tmp_path / str(number)
        train_align(replace(align_config, data=data, loss=loss, steps=1, log_every=1, output=str(run)))
        losses.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert losses[1]["word_patch/chance"] > losses[0]["word_patch/chance"]
    assert losses[1]["vision_language/chance"] == losses[0]["vision_language/chance"]


def test_data_without_any_pair_is_refused(align_config, tmp_path):
    config = replace(align_config, loss=replace(align_config.loss, minimal_pairs=True), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"loss\.minimal_pairs: no instruction of .* leave it out"):
        train_align(config)
