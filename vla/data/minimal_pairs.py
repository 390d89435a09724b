"""Minimal pairs: instructions that differ in one word, "the red star" and "the blue star"."""

from collections import defaultdict

import numpy as np

from vla.data.episodes import Episodes


class MinimalPairs:
    """For a text of a scene, another text of the data set with one word exchanged for another word of that scene.

    Such a text speaks of what the scene contains, but nobody demonstrated it there: who tells it from the right one has to bind
    words to one object. Only texts of training episodes occur.
    """

    def __init__(self, episodes: Episodes, train: np.ndarray) -> None:
        """`train`: positions of the training episodes."""
        used = set(episodes.text_id[train].tolist())
        self.others = [[other for other in found if other[0] in used] for found in one_word_apart(episodes.texts)]
        self.goals_of_text: dict[int, set[int]] = defaultdict(set)
        self.words: dict[int, set[str]] = defaultdict(set)  # by scene
        self.goals: dict[int, set[int]] = defaultdict(set)  # by scene
        for text, goal, scene in zip(episodes.text_id, episodes.goal_id, episodes.scene_id, strict=True):
            if goal >= 0:
                self.goals_of_text[int(text)].add(int(goal))
                self.words[int(scene)].update(episodes.texts[text].split())
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
            words, goals = self.words[scene], self.goals[scene] | {goal}
            fitting = [o for o, word in self.others[text] if word in words and not goals & self.goals_of_text[o]]
            if fitting:
                drawn[row] = fitting[int(rng.integers(len(fitting)))]
        return drawn


def one_word_apart(texts: tuple[str, ...]) -> list[list[tuple[int, str]]]:
    """For each text the others that differ in one word, and that word of theirs."""
    by_hole: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for index, text in enumerate(texts):
        words = text.split()
        for place, word in enumerate(words):
            by_hole[(*words[:place], "", *words[place + 1 :])].append((index, word))
    others: list[list[tuple[int, str]]] = [[] for _ in texts]
    for members in by_hole.values():
        for index, _ in members:
            others[index] += [member for member in members if member[0] != index]
    return others
