"""Minimal pairs: instructions that differ in one word and mean another object, "the red star" and "the blue star"."""

from collections import defaultdict
from collections.abc import Callable
from itertools import permutations

import numpy as np

from vla.data.episodes import Episodes

SAME_PLACE = 1e-3  # m
LOOKED_AT = 50  # episodes of a scene, for which words name objects


class MinimalPairs:
    """For a text of a scene, another text of the data set in which one word is exchanged, so that it names what the scene lacks.

    The new word names an object (see `object_words`) and occurs in the scene's texts, but in none of them beside any other such
    word of the new text: there is a red star and something blue, but nobody spoke of a blue star. Nor did anybody demonstrate it there.
    Who tells it from the right one has to bind words to one object. An object that no text of the scene names may still be there.
    Only texts of training episodes occur.
    """

    def __init__(self, episodes: Episodes, train: np.ndarray) -> None:
        """`train`: positions of the training episodes."""
        self.texts = [frozenset(text.split()) for text in episodes.texts]
        self.naming = object_words(episodes, train)
        used = set(episodes.text_id[train].tolist())
        self.others = one_word_apart(episodes.texts, lambda text, word: text in used and word in self.naming)
        self.goals_of_text: dict[int, set[int]] = defaultdict(set)
        self.texts_of_scene: dict[int, set[int]] = defaultdict(set)
        self.goals: dict[int, set[int]] = defaultdict(set)  # by scene
        for text, goal, scene in zip(episodes.text_id, episodes.goal_id, episodes.scene_id, strict=True):
            if goal >= 0:
                self.goals_of_text[int(text)].add(int(goal))
                self.texts_of_scene[int(scene)].add(int(text))
                self.goals[int(scene)].add(int(goal))

    def draw(
        self, text_id: np.ndarray, goal_id: np.ndarray, scene_id: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """(b,) texts, their goals and scenes -> (b,) int64 a pair of each, -1 where there is none."""
        drawn = np.full(len(text_id), -1, np.int64)
        rows = zip(text_id.tolist(), goal_id.tolist(), scene_id.tolist(), strict=True)
        for row, (text, goal, scene) in enumerate(rows):
            if scene < 0 or goal < 0:
                continue
            goals = self.goals[scene] | {goal}
            fitting = [
                other
                for other, word in self.others[text]
                if not goals & self.goals_of_text[other] and self.names_what_lacks(other, word, scene)
            ]
            if fitting:
                drawn[row] = fitting[int(rng.integers(len(fitting)))]
        return drawn

    def names_what_lacks(self, text: int, word: str, scene: int) -> bool:
        """Whether a text names an object, by `word` and others, that no text of a scene names, although its words occur there."""
        beside = (self.texts[text] & self.naming) - {word}
        having = [self.texts[other] for other in self.texts_of_scene[scene] if word in self.texts[other]]
        return bool(having and beside) and not any(beside & words for words in having)


def object_words(episodes: Episodes, train: np.ndarray) -> set[str]:
    """Words that name objects: instructions of one scene share them if they are about the same object, and mostly not if not.

    Of the instructions of a scene's other goals, more than half of those with the same object have the word, and less than half of
    those with another object. So verbs, directions and articles are none. The object is where `target_position` says it is
    when the episode starts; without that column no word is known to name one.
    """
    if episodes.target is None:
        return set()
    asked = train[(episodes.goal_id[train] >= 0) & (episodes.scene_id[train] >= 0)]
    place = episodes.target[episodes.start[asked]]  # (n, 2)
    asked, place = asked[np.isfinite(place).all(1)], place[np.isfinite(place).all(1)]
    members: dict[int, list[int]] = defaultdict(list)
    for index, scene in enumerate(episodes.scene_id[asked].tolist()):
        members[scene].append(index)
    counts = defaultdict(lambda: np.zeros((2, 2), int))  # by word: (another object or the same, all or having the word)
    for scene in members.values():
        for one, other in permutations(scene[:LOOKED_AT], 2):
            if episodes.goal_id[asked[one]] == episodes.goal_id[asked[other]]:
                continue
            same = int(np.abs(place[one] - place[other]).max() < SAME_PLACE)
            words, others = (set(episodes.texts[episodes.text_id[asked[i]]].split()) for i in (one, other))
            for word in words:
                counts[word][same] += (1, word in others)
    return {
        word
        for word, ((elsewhere, unlike), (here, alike)) in counts.items()
        if 2 * alike > here and 2 * unlike < elsewhere
    }


def one_word_apart(texts: tuple[str, ...], wanted: Callable[[int, str], bool]) -> list[list[tuple[int, str]]]:
    """For each text the others that differ in one word, and that word of theirs, those that are `wanted`: all of many would be the square of them."""
    by_hole: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for index, text in enumerate(texts):
        words = text.split()
        for place, word in enumerate(words):
            by_hole[(*words[:place], "", *words[place + 1 :])].append((index, word))
    others: list[list[tuple[int, str]]] = [[] for _ in texts]
    for members in by_hole.values():
        chosen = [member for member in members if wanted(*member)]
        for index, _ in members:
            others[index] += [member for member in chosen if member[0] != index]
    return others
