"""The policy folder: self-contained, strict, and deaf to nothing it is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.gaussian_actor.configuration_gaussian_actor import GaussianActorConfig
from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
from safetensors.torch import load_file, save_file

from vla.data.normalization import normalize_quantile
from vla.policies.concord import ConcordPolicy
from vla.policies.concord.modeling_concord import new_encoder
from vla.policies.concord.processor_concord import floored_stats
from vla.policies.loading import load_chunk_policy, refuse_foreign_code, refuse_memory
from vla.training.start import policy_stats
from vla.types import ACTION_KEY, IMAGE_KEY, STATE_KEY, TASK_KEY, UserError

TEXTS = ["push the red star to the left", "pick up the blue cross"]
ROOT = Path(__file__).resolve().parent.parent.parent
SEEN = (np.zeros((2, 48, 48, 3), np.uint8), np.full((2, 4), 0.3, np.float32), TEXTS)


@pytest.fixture
def copy(policy_folder, tmp_path):
    return shutil.copytree(policy_folder, tmp_path / "policy")


@pytest.fixture
def observation():
    torch.manual_seed(0)
    return {IMAGE_KEY: torch.rand(2, 3, 48, 48), STATE_KEY: torch.rand(2, 4), TASK_KEY: list(TEXTS)}


def test_lerobot_finds_the_class_by_the_type_in_the_folder(policy_folder):
    config = PreTrainedConfig.from_pretrained(policy_folder)
    assert config.type == "concord"
    assert get_policy_class(config.type) is ConcordPolicy


def test_a_moved_policy_needs_neither_the_encoder_nor_the_data(policy_folder, encoder, data_root, copy, tmp_path):
    expected = load_chunk_policy(policy_folder).act(*SEEN)
    hidden = []
    try:
        for path in (encoder, data_root):
            hidden.append((path, path.rename(tmp_path / path.name)))
        np.testing.assert_array_equal(load_chunk_policy(copy).act(*SEEN), expected)
    finally:
        for path, elsewhere in hidden:
            elsewhere.rename(path)


def test_encoder_and_policy_load_without_asking_a_network(policy_folder, encoder):
    """Not even where the hub may be asked."""
    program = (
        "import os, socket, sys; ended = lambda *_: os._exit(7); socket.getaddrinfo = socket.socket.connect = ended;"
        "from vla.models.clip_files import load_clip; from vla.policies.loading import load_chunk_policy;"
        "load_clip(sys.argv[1]); load_chunk_policy(sys.argv[2])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", program, str(encoder), str(policy_folder)]
    subprocess.run(command, check=True, timeout=120, env=environment | {"PYTHONPATH": str(ROOT)})


def test_saved_again_it_is_the_same(policy_folder, observation, tmp_path):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    policy.save_pretrained(tmp_path / "again")
    again = ConcordPolicy.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict_action_chunk(observation), policy.predict_action_chunk(observation))


def test_the_queue_hands_out_the_chunk_and_looks_again_when_empty(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    chunk = policy.predict_action_chunk(observation)
    policy.reset()
    for timestep in range(policy.config.n_action_steps):
        assert torch.equal(policy.select_action(observation), chunk[:, timestep])
    changed = observation | {STATE_KEY: observation[STATE_KEY] + 1}
    assert torch.equal(policy.select_action(changed), policy.predict_action_chunk(changed)[:, 0])


def test_another_instruction_gives_another_chunk(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    told = policy.predict_action_chunk(observation)
    swapped = policy.predict_action_chunk(observation | {TASK_KEY: TEXTS[::-1]})
    assert not torch.allclose(told, swapped)


def test_a_row_does_not_depend_on_the_rest_of_the_batch(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    both = policy.predict_action_chunk(observation)
    alone = policy.predict_action_chunk({k: v[:1] for k, v in observation.items()})
    torch.testing.assert_close(alone, both[:1], atol=1e-5, rtol=1e-4)


def test_forward_is_the_cloning_loss_without_padding(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    predicted = policy.predict_action_chunk(observation)
    chunk = torch.randn_like(predicted)
    pad = torch.arange(16).expand(2, -1) >= torch.tensor([[16], [3]])
    for padded in (0.0, 100.0):
        given = {ACTION_KEY: torch.where(pad[..., None], padded, chunk), f"{ACTION_KEY}_is_pad": pad}
        loss, _ = policy.forward(observation | given)
        torch.testing.assert_close(loss, (predicted - chunk).abs()[~pad].mean())


def test_forward_reaches_only_the_network_when_frozen(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder).train()
    loss, _ = policy.forward(observation | {ACTION_KEY: torch.zeros(2, 16, 3)})
    loss.backward()
    assert all(p.grad is None for p in policy.clip.parameters())
    assert all(p.grad is not None for p in policy.network.parameters() if p is not policy.network.no_state)


def test_a_batch_without_instruction_says_so(policy_folder, observation):
    observation.pop(TASK_KEY)
    with pytest.raises(ValueError, match="the batch lacks 'task'"):
        ConcordPolicy.from_pretrained(policy_folder).predict_action_chunk(observation)


def test_missing_weights_are_named(copy):
    weights = load_file(copy / "model.safetensors")
    weights.pop("network.enter.weight")
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"missing keys \['network\.enter\.weight'\], .*another version"):
        ConcordPolicy.from_pretrained(copy)


def test_a_policy_without_its_tokenizer_is_refused(copy):
    (copy / "clip" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"not a complete concord policy: no tokenizer in it"):
        ConcordPolicy.from_pretrained(copy)


def test_a_truncated_file_is_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete concord policy"):
        ConcordPolicy.from_pretrained(copy)


def test_its_processors_normalise_as_training_did(policy_folder):
    policy, stats = load_chunk_policy(policy_folder), policy_stats(policy_folder)
    images, state, texts = SEEN
    batch = policy._batch(images, state, texts)
    np.testing.assert_allclose(batch[STATE_KEY], normalize_quantile(state, stats.state), atol=1e-5)
    chunk = policy.policy.predict_action_chunk(batch)[:, : policy.n_action_steps]
    actions = policy.act(*SEEN)
    assert actions.shape == (2, policy.n_action_steps, 3)
    np.testing.assert_allclose(normalize_quantile(actions, stats.action), chunk, atol=1e-4)


def test_the_fine_tuned_policy_reads_and_trains_its_own_encoder(policy_folder, observation):
    config = PreTrainedConfig.from_pretrained(policy_folder)
    config.tune = True
    policy = ConcordPolicy.from_pretrained(policy_folder, config=config).train()
    loss, _ = policy.forward(observation | {ACTION_KEY: torch.zeros(2, 16, 3)})
    loss.backward()
    assert policy.clip.vision_model.embeddings.patch_embedding.weight.grad.abs().max() > 0
    assert len(policy.get_optim_params()) == 2


def test_remembered_words_do_not_outlive_a_move_or_other_weights(policy_folder):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    before, _ = policy.words(TEXTS)
    assert policy.double().words(TEXTS)[0].dtype == torch.float64
    policy.float()
    policy.words(TEXTS)
    other = {name: 2 * value if "text_model" in name else value for name, value in policy.state_dict().items()}
    policy.load_state_dict(other)
    assert not torch.equal(policy.words(TEXTS)[0], before)


def test_a_processor_step_that_names_a_class_of_its_own_is_not_run(copy, tmp_path):
    evil = {"class": "subprocess.Popen", "config": {"args": ["touch", str(tmp_path / "ran")]}}
    trusting = {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": str(tmp_path)}}
    for step, name in ((evil, r"subprocess\.Popen"), (trusting, "action_tokenizer_processor")):
        (copy / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": [step]}))
        for load in (load_chunk_policy, policy_stats):
            with pytest.raises(UserError, match=f"the step '{name}' runs code from elsewhere; it is not loaded"):
                load(copy)
    assert not (tmp_path / "ran").exists()


def test_a_policy_that_runs_code_of_a_repository_it_names_is_not_loaded(policy_folder):
    with pytest.raises(UserError, match="a gaussian_actor policy runs code of the repositories that it names"):
        refuse_foreign_code(policy_folder, GaussianActorConfig())


def test_a_damaged_processor_is_named_in_one_line(copy):
    for damaged in ('{"steps": ["normalizer_processor"]}', "{}", "[]", "{"):
        (copy / "policy_preprocessor.json").write_text(damaged)
        with pytest.raises(UserError, match=r"cannot load the policy|policy_preprocessor\.json: damaged"):
            load_chunk_policy(copy)


def test_a_folder_without_processors_is_told_in_one_line(copy):
    for name in ("policy_preprocessor.json", "policy_postprocessor.json", "concord.json"):
        (copy / name).unlink()
    with pytest.raises(UserError, match=r"policy: cannot load the policy: .+$"):
        load_chunk_policy(copy)


def test_attention_is_a_distribution_over_the_picture_that_follows_the_words(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder)
    looks = policy.attention(observation)
    assert looks.shape == (2, 4, 4)
    torch.testing.assert_close(looks.sum((1, 2)), torch.ones(2))
    assert not torch.equal(policy.attention(observation | {TASK_KEY: TEXTS[::-1]}), looks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ACTConfig(temporal_ensemble_coeff=0.01, n_action_steps=1), r"temporal_ensemble_coeff is 0\.01"),
        (VQBeTConfig(), "vqbet policy with n_obs_steps 5"),
    ],
    ids=["ensembled", "several observations"],
)
def test_a_policy_whose_chunk_depends_on_the_steps_before_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        refuse_memory(Path("policy"), config)
    refuse_memory(Path("policy"), ACTConfig())


def test_a_policy_that_queues_observations_is_refused(policy_folder, monkeypatch):
    """As LeRobot's diffusion, TD-MPC and MultiTaskDiT do, of one observation, too."""
    begin = ConcordPolicy.__init__

    def with_queue(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self._queues = {STATE_KEY: [], ACTION_KEY: []}

    monkeypatch.setattr(ConcordPolicy, "__init__", with_queue)
    with pytest.raises(UserError, match="queues observations"):
        load_chunk_policy(policy_folder)


@pytest.mark.parametrize("blind", ["language", "vision"])
def test_attention_is_of_what_the_policy_gets(policy_folder, observation, blind):
    config = PreTrainedConfig.from_pretrained(policy_folder)
    config.hide = blind
    policy = ConcordPolicy.from_pretrained(policy_folder, config=config)
    hidden = {TASK_KEY: TEXTS[::-1]} if blind == "language" else {IMAGE_KEY: observation[IMAGE_KEY].flip(0)}
    assert torch.equal(policy.attention(observation | hidden), policy.attention(observation))


def test_a_repository_is_asked_for_as_the_caller_says(policy_folder, monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **told: asked.update(told) or policy_folder)
    ConcordPolicy.from_pretrained("somebody/policy", local_files_only=True, revision="v2")
    assert asked == {"local_files_only": True, "revision": "v2"}


def test_an_encoder_that_is_adapted_to_another_size_is_told(encoder, policy_folder, capsys):
    config = PreTrainedConfig.from_pretrained(policy_folder)
    config.encoder, config.image_size = str(encoder), 96
    new_encoder(config, TEXTS)
    assert "trained on pictures of 48 px, adapted to 96; --policy.image_size=48 keeps them" in capsys.readouterr().out


def flag_stats() -> dict[str, dict[str, list[float]]]:
    """A state and an action whose first dimension is rarely 1 and else 0, and whose second never changes."""
    values = {
        "q01": [0.0, 5.0],
        "q99": [0.0, 5.0],
        "min": [0.0, 5.0],
        "max": [1.0, 5.0],
        "mean": [0.0, 5.0],
        "std": [0.1, 0.0],
    }
    return {STATE_KEY: dict(values), ACTION_KEY: dict(values)}


def test_ranges_that_are_too_small_are_widened_once():
    first = floored_stats(flag_stats())
    torch.testing.assert_close(first[STATE_KEY]["q01"], torch.tensor([0.0, 4.995]))
    torch.testing.assert_close(first[STATE_KEY]["q99"], torch.tensor([1.0, 5.005]))
    again = floored_stats(first)
    assert all(torch.equal(again[key][name], first[key][name]) for key in first for name in first[key])


def test_statistics_that_lerobot_hands_on_to_the_processors_are_widened_where_they_are(policy_folder):
    stats = flag_stats()
    ConcordPolicy.from_pretrained(policy_folder, dataset_stats=stats, dataset_meta=None)
    assert stats[ACTION_KEY]["q99"].tolist() == pytest.approx([1.0, 5.005])


def test_adapters_in_an_encoder_that_is_not_tuned_get_gradients(policy_folder, observation):
    policy = ConcordPolicy.from_pretrained(policy_folder).train()
    assert not policy.config.tune
    adapter = policy.clip.vision_model.encoder.layers[0].self_attn.q_proj.weight
    adapter.requires_grad_(True)
    shape = (2, policy.config.horizon, policy.config.action_feature.shape[0])
    policy(observation | {ACTION_KEY: torch.zeros(shape)})[0].backward()
    assert adapter.grad.norm() > 0
