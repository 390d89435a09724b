"""Instructions that differ in one word and are wrong of a scene."""

from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import logged
from vla.data.episodes import read_episodes
from vla.data.minimal_pairs import MinimalPairs, object_words, one_word_apart
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
    apart = one_word_apart(TEXTS, lambda text, word: True)
    assert sorted(apart[0]) == [(1, "blue"), (2, "cross"), (3, "grab")]
    assert apart[1] == [(0, "red")]
    assert apart[4] == []


def test_of_thousands_that_differ_in_one_word_only_those_that_are_wanted_are_kept():
    texts = tuple(f"a photo of a {number}" for number in range(20_000))
    apart = one_word_apart(texts, lambda text, word: word in ("3", "7"))
    assert apart[3] == [(7, "7")]
    assert all(found == [(3, "3"), (7, "7")] for found in apart[8:])


RED, BLUE = (0.0, 0.1), (0.2, 0.0)  # where the objects are
EPISODES = (  # scene, instruction, where its object is; the goal is the instruction
    (0, "push the red star", RED),
    (0, "push the blue cross", BLUE),
    (1, "push the blue star", BLUE),
    (2, "push the red cross", RED),
    (3, "push the red star", RED),
    (3, "grab the red star", RED),
    (3, "push the blue cross", BLUE),
    (3, "grab the blue cross", BLUE),
    (4, "push the red star", RED),
    (4, "grab the blue cross", BLUE),
    (5, "push the red star", RED),
    (5, "put the blue cross near the blue star", BLUE),
)


@pytest.fixture(scope="module")
def episodes(data_root):
    """Episodes of one row each."""
    scene, said, place = zip(*EPISODES, strict=True)
    texts, text = np.unique(said, return_inverse=True)
    return replace(
        read_episodes(data_root),
        texts=tuple(texts.tolist()),
        text_id=text,
        goal_id=text,
        scene_id=np.array(scene),
        start=np.arange(len(EPISODES) + 1),
        target=np.array(place, np.float32),
    )


EVERY = np.arange(len(EPISODES))


def drawn(episodes, text: str, scene: int, train=EVERY, goal: str | None = None) -> set[str]:
    """What fifty draws for a text give; its goal is of the same name if none is given, none if it is empty."""
    number = {name: index for index, name in enumerate(episodes.texts)}
    wanted = -1 if goal == "" else number[goal or text]
    ids = (np.full(50, value) for value in (number[text], wanted, scene))
    found = MinimalPairs(episodes, train).draw(*ids, np.random.default_rng(0))
    return {episodes.texts[index] for index in found if index >= 0}


def test_words_of_objects_are_those_that_go_with_them(episodes):
    assert object_words(episodes, EVERY) == {"red", "blue", "star", "cross"}


def test_without_positions_of_objects_no_word_is_known_to_name_one(episodes):
    assert object_words(replace(episodes, target=None), EVERY) == set()
    assert object_words(replace(episodes, target=np.full_like(episodes.target, np.nan)), EVERY) == set()


def test_a_pair_exchanges_a_word_for_another_of_the_scene(episodes):
    assert drawn(episodes, "push the red star", 0) == {"push the blue star", "push the red cross"}
    assert drawn(episodes, "push the blue star", 1) == set()  # nothing red in its scene


def test_a_row_without_a_scene_or_a_goal_has_no_pair(episodes):
    assert drawn(episodes, "push the red star", -1) == set()
    assert drawn(episodes, "push the red star", 0, goal="") == set()


def test_a_verb_is_not_exchanged(episodes):
    assert drawn(episodes, "push the red star", 4) == {"push the blue star", "push the red cross"}


def test_a_text_that_names_an_object_of_the_scene_is_no_pair(episodes):
    assert drawn(episodes, "push the red star", 5) == {"push the red cross"}  # somebody spoke of a blue star


def test_what_is_asked_in_the_scene_or_of_the_row_is_no_pair(episodes):
    together = replace(episodes, scene_id=np.where(episodes.scene_id < 3, 0, episodes.scene_id))
    assert drawn(together, "push the red star", 0) == set()
    assert drawn(episodes, "push the red star", 0, goal="push the blue star") == {"push the red cross"}


def test_texts_of_held_out_episodes_are_no_pairs(episodes):
    assert drawn(episodes, "push the red star", 0, train=np.delete(EVERY, 3)) == {"push the blue star"}


def test_stage_one_trains_with_them(align_config, alike, tmp_path):
    losses = []
    for number, chosen in enumerate((False, True)):
        loss, data = replace(align_config.loss, minimal_pairs=chosen), replace(align_config.data, root=str(alike))
        run = tmp_path / str(number)
        train_align(replace(align_config, data=data, loss=loss, steps=1, log_every=1, output=str(run)))
        losses.append(logged(run)[0])
    assert losses[1]["word_patch/chance"] > losses[0]["word_patch/chance"]
    assert losses[1]["vision_language/chance"] == losses[0]["vision_language/chance"]


def test_data_without_any_pair_is_refused(align_config, tmp_path):
    config = replace(align_config, loss=replace(align_config.loss, minimal_pairs=True), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"loss\.minimal_pairs: in no instruction of .* leave it out"):
        train_align(config)
