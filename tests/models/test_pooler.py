import pytest
import torch

from vla.losses.cloning import masked_mse
from vla.models.action_heads import make_head
from vla.models.pooler import TextConditionedPooler


@pytest.fixture
def pooler():
    torch.manual_seed(0)
    return TextConditionedPooler(32, 24, n_patches=16, width=32, queries=3).eval()


def inputs(words: int = 5):
    torch.manual_seed(1)
    mask = torch.ones(2, words, dtype=torch.bool)
    return torch.randn(2, 16, 32), torch.randn(2, words, 24), mask, 0.1 * torch.randn(2, words, 16)


def test_another_text_gives_another_result(pooler):
    tokens, words, mask, similarity = inputs()
    assert not torch.allclose(
        pooler(tokens, words, mask, similarity), pooler(tokens, words.flip(1) + 1, mask, similarity)
    )


def test_padding_words_change_nothing(pooler):
    tokens, words, mask, similarity = inputs()
    longer = torch.nn.functional.pad(words, (0, 0, 0, 3), value=9.0)
    longer_mask = torch.nn.functional.pad(mask, (0, 3))
    longer_similarity = torch.nn.functional.pad(similarity, (0, 0, 0, 3), value=9.0)
    torch.testing.assert_close(
        pooler(tokens, longer, longer_mask, longer_similarity), pooler(tokens, words, mask, similarity)
    )


def test_it_looks_where_patches_resemble_the_words(pooler):
    tokens, words, mask, similarity = inputs()
    similarity = torch.zeros_like(similarity)
    similarity[:, :, 6] = 1.0
    _, attention = pooler(tokens, words, mask, similarity, need_weights=True)
    assert (attention.mean(1).argmax(-1) == 6).all()


def test_where_something_is_survives_pooling(pooler):
    tokens, words, mask, similarity = inputs()
    moved = pooler(tokens.roll(1, 1), words, mask, similarity.roll(1, 2))
    assert not torch.allclose(moved, pooler(tokens, words, mask, similarity), atol=1e-3)


def test_attention_is_a_distribution_over_patches(pooler):
    _, attention = pooler(*inputs(), need_weights=True)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["l1", "flow"])
def test_a_head_learns_a_function_of_its_features(kind):
    torch.manual_seed(0)
    head = make_head(kind, 32, horizon=4, action_dim=2, flow_steps=8)
    features = torch.randn(64, 32)
    target = torch.tanh(features[:, :8]).unflatten(-1, (4, 2))
    pad = torch.zeros(64, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(features, target, pad).backward()
        optimizer.step()
    assert (head.predict(features) - target).abs().mean() < 0.15


def padded_chunks():
    """A chunk, one with other padded actions, and the padding."""
    chunk = torch.randn(3, 4, 2)
    other = chunk.clone()
    other[:, 2:] = 100.0
    return chunk, other, torch.tensor([[False, False, True, True]]).expand(3, 4)


def test_padded_timesteps_do_not_count():
    head = make_head("l1", 8, horizon=4, action_dim=2, flow_steps=4)
    chunk, other, pad = padded_chunks()
    features = torch.randn(3, 8)
    assert head.loss(features, chunk, pad) == head.loss(features, other, pad)


def test_errors_of_padded_timesteps_do_not_count_for_the_flow():
    chunk, other, pad = padded_chunks()
    assert masked_mse(torch.zeros_like(chunk), chunk, pad) == masked_mse(torch.zeros_like(chunk), other, pad)
    head = make_head("flow", 8, horizon=4, action_dim=2, flow_steps=4)
    head._velocity = lambda features, noised, time: torch.zeros_like(noised)  # padded inputs reach the network
    features, losses = torch.randn(3, 8), []
    for actions in (chunk, other):
        torch.manual_seed(0)
        losses.append(head.loss(features, actions, pad))
    assert losses[0] == losses[1]
