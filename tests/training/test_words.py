"""The words that both stages read, and those that word dropout hides."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla.data.augmentation import hide_words
from vla.policies.concord import ConcordPolicy
from vla.training.align import train_align
from vla.training.policy import train_policy
from vla.training.words import Words

TEXTS = ("push the red circle to the left", "grab the star", "hold it")


@pytest.fixture(scope="module")
def policy(policy_folder) -> ConcordPolicy:
    return ConcordPolicy.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    return torch.tensor([[1] * 12, [1] * 7 + [0] * 5]).repeat(200, 1)


def test_a_share_of_the_words_is_hidden_but_never_the_first_or_the_last_token(mask):
    hidden = hide_words(mask, 0.3, np.random.default_rng(0))
    assert hidden[:, 0].all()
    assert hidden[::2, 11].all()
    assert hidden[1::2, 6].all()
    assert not hidden[1::2, 7:].any()
    assert hidden[::2, 1:11].float().mean() == pytest.approx(0.7, abs=0.05)


def test_nothing_is_hidden_without_a_share(mask):
    assert hide_words(mask, 0.0, np.random.default_rng(0)).equal(mask)


@pytest.mark.parametrize("frozen", [True, False])
def test_plain_words_are_those_of_the_policy(policy, frozen):
    policy.eval()
    rows = [2, 0, 1, 0]
    with torch.no_grad():
        expected, expected_mask = policy.words([TEXTS[i] for i in rows])
        words, kept = Words(policy, TEXTS, dropout=0.5, frozen=frozen).of(np.array(rows), None)
    assert kept.bool().equal(expected_mask)
    assert torch.allclose(words[expected_mask], expected[expected_mask], atol=1e-5)


def test_words_of_a_tuned_tower_are_computed_in_multiples(policy):
    sizes = []
    hook = policy.clip.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    words, _ = Words(policy, TEXTS, dropout=0.0, frozen=False).of(np.array([2, 0, 0]), None)
    hook.remove()
    assert (len(words), sizes) == (3, [16])


@pytest.mark.parametrize("frozen", [True, False])
def test_training_hides_words_and_the_others_know_nothing_of_them(policy, frozen):
    policy.eval()
    words = Words(policy, TEXTS, dropout=0.5, frozen=frozen)
    with torch.no_grad():
        seen, kept = words.of(np.zeros(64, int), np.random.default_rng(0))
        shown = words.mask[0].bool()
        assert 0 < kept[:, shown].float().mean() < 0.8
        # The same visible words, whatever the hidden ones are.
        other_ids = torch.where(kept[0].bool(), words.ids[0], words.ids[0].roll(1))
        features = policy.clip.text_model(input_ids=other_ids[None], attention_mask=kept[:1]).last_hidden_state
    visible = kept[0].bool()
    assert torch.allclose(features[0, visible], seen[0, visible], atol=1e-5)


def test_each_sample_draws_anew(policy):
    _, kept = Words(policy, TEXTS, dropout=0.5, frozen=True).of(np.zeros(64, int), np.random.default_rng(0))
    assert 1 < len(kept.unique(dim=0)) <= 4


def test_both_stages_train_with_hidden_words(align_config, policy_config, tmp_path):
    losses = []
    for share in (0.0, 0.5):
        data = replace(align_config.data, word_dropout=share)
        clip = train_align(replace(align_config, data=data, steps=2, log_every=1, output=str(tmp_path / f"a{share}")))
        assert clip.is_dir()
        output = tmp_path / f"p{share}"
        train_policy(replace(policy_config, data=replace(policy_config.data, word_dropout=share), output=str(output)))
        losses.append([first_loss(tmp_path / f"a{share}"), first_loss(output)])
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_the_auxiliary_terms_hide_words_too(policy_config, tmp_path):
    losses = []
    for share in (0.0, 0.5):
        run = tmp_path / str(share)
        data = replace(policy_config.data, word_dropout=share)
        changes = {"data": data, "tune": True, "auxiliary": 0.5, "steps": 1, "log_every": 1, "output": str(run)}
        head = policy_config.head
        loss = replace(policy_config.loss, queries=head.queries, pooler_width=head.width)
        train_policy(replace(policy_config, loss=loss, **changes))
        losses.append(first_loss(run, "auxiliary/word_patch"))
    assert losses[0] != losses[1]


def first_loss(run: Path, name: str = "loss") -> float:
    """The first training loss that a run logged."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return next(line[name] for line in lines if name in line)
