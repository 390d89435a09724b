"""Stage one's terms beside the cloning loss."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import logged
from vla.config import BatchConfig, LossConfig
from vla.data.episodes import read_episodes
from vla.data.frames import open_frames
from vla.data.normalization import Normalizers, compute_norm_stats
from vla.training.auxiliary import Auxiliary
from vla.training.policy import train_policy
from vla.training.start import make_policy
from vla.types import UserError


@pytest.fixture
def config(policy_config, tmp_path):
    """A tuned policy with the auxiliary loss."""
    loss, batch = LossConfig(state=0.25, queries=2, pooler_width=32), BatchConfig(goals=8, frames=2, gap=2)
    config = replace(policy_config, tune=True, auxiliary=1.0, loss=loss, batch=batch, steps=30, log_every=5)
    return replace(config, encoder_lr_scale=1.0, output=str(tmp_path / "run"))


def test_the_terms_are_logged_and_fall(config):
    train_policy(config)
    lines = [line for line in logged(Path(config.output)) if "auxiliary/context_action" in line]
    for term in ("context_action", "word_patch", "vision_language", "state"):
        assert lines[-1][f"auxiliary/{term}"] < lines[0][f"auxiliary/{term}"], term


def test_their_weight_falls_to_nothing(config, monkeypatch):
    weights = []

    def spy(*arguments, **named):
        weights.append(arguments[3].context_action)
        return real(*arguments, **named)

    from vla.training import auxiliary

    real = auxiliary.forward_backward
    monkeypatch.setattr(auxiliary, "forward_backward", spy)
    train_policy(replace(config, auxiliary=0.5, steps=5))
    assert weights == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_the_pooler_is_the_policys_own_and_the_rest_goes_on_from_the_file(config, encoder):
    episodes = read_episodes(config.data.root)
    policy = make_policy(config, episodes)
    frames = open_frames(episodes, config.data.image_size)
    everything = np.arange(len(episodes.goal_id))
    stats = Normalizers(compute_norm_stats(episodes.action), compute_norm_stats(episodes.state))
    auxiliary = Auxiliary(config, episodes, [everything], [1.0], frames, stats, policy)
    assert auxiliary.model.pooler is policy.network.pooler
    assert auxiliary.model.clip is policy.clip
    saved = load_file(encoder.parent / "alignment.safetensors")
    for name, parameter in auxiliary.own_parameters().items():
        assert torch.equal(parameter, saved[name]), name

    parameters = dict(policy.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    auxiliary.add_gradients(0, auxiliary.make_batch(0), nullcontext)
    first = {name: p.grad.clone() for name, p in parameters.items()}
    auxiliary.add_gradients(0, auxiliary.make_batch(0), nullcontext)
    changed = {name for name, p in parameters.items() if not torch.equal(first[name], torch.ones_like(p))}
    assert any(name.startswith("network.pooler.") for name in changed)
    assert any(name.startswith("clip.vision_model.") for name in changed)
    for name in changed:  # twice the gradient on top of what was there
        torch.testing.assert_close(parameters[name].grad, 2 * first[name] - 1, rtol=1e-4, atol=1e-5)


def test_a_started_policy_brings_the_alignment_it_was_trained_on(config, tmp_path):
    """Not that of `encoder`, which a start makes meaningless."""
    first = train_policy(replace(config, steps=1, output=str(tmp_path / "first")))
    changed = replace(config, start=str(first), encoder="/nowhere/clip", steps=1, output=str(tmp_path / "second"))
    policy = train_policy(changed)
    assert json.loads((policy / "concord.json").read_text())["encoder"] == config.encoder
    episodes = read_episodes(config.data.root)
    everything, frames = np.arange(len(episodes.goal_id)), open_frames(episodes, config.data.image_size)
    stats = Normalizers(compute_norm_stats(episodes.action), compute_norm_stats(episodes.state))
    auxiliary = Auxiliary(changed, episodes, [everything], [1.0], frames, stats, make_policy(changed, episodes))
    saved = load_file(Path(config.encoder).parent / "alignment.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in auxiliary.own_parameters().items())


def test_terms_that_the_alignment_did_not_have_start_untrained(config):
    loss = replace(config.loss, transition_action=0.5)
    train_policy(replace(config, loss=loss, steps=1, log_every=1))
    assert "auxiliary/transition_action" in (Path(config.output) / "metrics.jsonl").read_text()


def test_a_control_that_hides_something_is_refused(config):
    with pytest.raises(UserError, match="auxiliary shows what hide=language hides"):
        train_policy(replace(config, hide="language"))


def test_a_frozen_encoder_is_refused(config):
    with pytest.raises(UserError, match="auxiliary needs an encoder that is fine-tuned; add --tune=true"):
        train_policy(replace(config, tune=False))


def test_a_pooler_of_another_size_is_refused(config):
    with pytest.raises(UserError, match=r"needs loss\.queries = head\.queries .* got 6 and 2"):
        train_policy(replace(config, loss=LossConfig()))


def test_what_does_not_fit_of_an_alignment_is_named_and_not_taken_up(config, encoder, tmp_path, capsys):
    copy = tmp_path / "encoder"
    copy.mkdir()
    (copy / "clip").symlink_to(encoder)
    weights = load_file(encoder.parent / "alignment.safetensors")
    name = next(name for name in weights if name.startswith("action_encoder.") and weights[name].ndim > 1)
    save_file(weights | {name: weights[name][:, :1].contiguous()}, copy / "alignment.safetensors")
    train_policy(replace(config, encoder=str(copy / "clip"), aligned_pooler=False, steps=1))
    assert "not taken up, as it does not fit this run: action_encoder" in capsys.readouterr().out
