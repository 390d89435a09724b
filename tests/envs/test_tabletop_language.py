import re

import pytest

from envs import make_env
from envs.tabletop import language
from envs.tabletop.scene import COLORS, SHAPES


def texts(split, level=1, seeds=80):
    env = make_env("tabletop", split=split, level=level)
    found = set()
    for seed in range(seeds):
        env.reset(seed=seed)
        found |= {goal.instruction for goal in env.goals()}
    return found


def words(sentences):
    return {word for sentence in sentences for word in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", sentence))}


def all_templates(table):
    return [template for templates in table.values() for template in templates]


TRAINING_WORDS = words(all_templates(language.TRAIN)) | words(language.NOUN_PHRASES) | {*COLORS, *SHAPES}
TRAINING_WORDS |= {*language.DIRECTION_WORDS.values(), *language.SIDES.values()}


def test_training_vocabulary_is_small():
    assert words(texts("train")) <= TRAINING_WORDS
    assert len(TRAINING_WORDS) < 150


def test_every_task_has_several_training_wordings_and_held_out_ones():
    for task in make_env("tabletop").TASKS:
        assert len(language.TRAIN[task]) >= 6
        assert len(language.PARAPHRASE[task]) >= 3
        assert len(language.SYNONYM_VERBS[task]) >= 3


@pytest.mark.parametrize("level", [1, 2])
def test_paraphrases_are_new_sentences_of_known_words(level):
    assert words(texts("paraphrase", level)) <= TRAINING_WORDS
    assert not texts("paraphrase", level) & texts("train")


def test_the_first_paraphrase_level_changes_the_verb_part_and_the_second_the_object():
    def verbs(sentences):
        return {sentence.split(" the ")[0] for sentence in sentences}

    assert verbs(texts("paraphrase", 2)) <= verbs(texts("train"))
    assert verbs(texts("paraphrase", 1)) - verbs(texts("train"))
    objects = {phrase.format(c=c, s=s) for phrase in language.NOUN_PHRASES for c in COLORS for s in SHAPES}
    assert all(any(phrase in text for phrase in objects) for text in texts("paraphrase", 1))
    assert not any(phrase in text for text in texts("paraphrase", 2) for phrase in objects)


@pytest.mark.parametrize("level", [1, 2])
def test_every_synonym_instruction_has_a_word_that_training_lacks(level):
    assert all(words([text]) - TRAINING_WORDS for text in texts("synonym", level))


def test_first_synonym_level_changes_only_the_verb_part():
    known = {*COLORS, *SHAPES}
    assert all(words([text]) & known for text in texts("synonym", 1))
    nouns = [n for table in (language.SYNONYM_COLORS, language.SYNONYM_SHAPES) for row in table.values() for n in row]
    assert not words(texts("synonym", 1)) & words(nouns)


def test_second_synonym_level_keeps_the_training_verbs():
    assert not words(texts("synonym", 2)) & (words(all_templates(language.SYNONYM_VERBS)) - TRAINING_WORDS)


def test_wording_is_fixed_by_seed_and_goal():
    first, second = make_env("tabletop"), make_env("tabletop")
    first.reset(seed=3)
    goals = first.goals()
    for goal in goals:
        _, info = second.reset(seed=3, options={"goal": goal.goal_id})
        assert info["instruction"] == goal.instruction


def test_the_same_goal_is_worded_in_many_ways():
    env = make_env("tabletop")
    wordings = {}
    for seed in range(150):
        env.reset(seed=seed)
        for goal in env.goals():
            wordings.setdefault(goal.goal_id, set()).add(goal.instruction)
    assert max(map(len, wordings.values())) >= 8
