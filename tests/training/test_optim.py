"""Which parameters the optimisers change, how, and the schedule."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, Dinov2Config, ViTConfig

from tests.conftest import small_alignment_model
from vla.models.clip_files import with_vision_of
from vla.training.muon import BatchedMuon
from vla.training.optim import layer_groups, make_optimizers, schedule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))


def names(model, groups):
    of_id = {id(p): name for name, p in model.named_parameters()}
    return {of_id[id(p)] for group in groups for p in group["params"]}


def test_muon_has_the_linear_weights_and_adamw_the_rest():
    model = Net()
    muon, adamw = make_optimizers([(model, 1e-3)], 0.1, "no").members
    assert names(model, muon.param_groups) == {"linear.weight"}
    assert names(model, adamw.param_groups) == {"embedding.weight", "linear.bias", "scale"}


def test_vectors_scales_and_embeddings_do_not_decay():
    model = Net()
    groups = make_optimizers([(model, 1e-3)], 0.1, "no").param_groups
    assert names(model, [g for g in groups if g["weight_decay"] == 0]) == {"embedding.weight", "linear.bias", "scale"}


def test_a_parameter_belongs_to_the_first_group_that_lists_it():
    model = Net()
    optimizers = make_optimizers([(model.linear, 1e-4), (model, 1e-3)], 0.1, "no")
    slow = [g for g in optimizers.param_groups if g["peak_lr"] == 1e-4]
    assert names(model, slow) == {"linear.weight", "linear.bias"}
    assert sum(len(g["params"]) for g in optimizers.param_groups) == 4


def test_what_is_frozen_is_not_optimised():
    model = Net()
    model.linear.requires_grad_(False)
    optimizers = make_optimizers([(model, 1e-3)], 0.1, "no")
    assert names(model, optimizers.param_groups) == {"embedding.weight", "scale"}


def test_muon_moves_a_matrix_by_the_rate_whatever_the_size_of_the_gradient():
    moved = []
    for size in (1e-3, 1e3):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False)
        before = model.weight.detach().clone()
        optimizers = make_optimizers([(model, 1e-2)], 0.0, "no")
        (size * model(torch.randn(128, 64)).square().sum()).backward()
        optimizers.step()
        moved.append((model.weight - before).square().mean().sqrt().item())
    assert moved[0] == pytest.approx(moved[1], rel=0.02)
    assert moved[0] == pytest.approx(0.2 * 1e-2, rel=0.3)  # AdamW's usual step at this rate


def test_the_rate_warms_up_then_falls_to_a_hundredth():
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert factors[-1] < 0.012


def test_the_learning_rate_falls_from_layer_to_layer_below_the_last():
    clip = small_alignment_model(("a text",), layers=3)[0].clip
    groups = make_optimizers(layer_groups(clip, 1.0, 0.5), 0.1, "no").param_groups
    rate_of = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    vision = clip.vision_model
    rates = [rate_of[id(layer.mlp.fc1.weight)] for layer in vision.encoder.layers]
    assert rates == [0.25, 0.5, 1.0]
    assert rate_of[id(vision.embeddings.patch_embedding.weight)] == 0.125
    assert rate_of[id(vision.pre_layrnorm.weight)] == 0.125
    assert rate_of[id(clip.visual_projection.weight)] == 1.0
    assert set(rate_of) == {id(p) for p in clip.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [Dinov2Config, ViTConfig])
def test_the_layers_of_a_vision_transformer_of_others_have_their_own_rates(kind, tmp_path):
    sizes = {"image_size": 24, "patch_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(kind(**sizes)).save_pretrained(tmp_path)
    clip = with_vision_of(tmp_path, small_alignment_model(("a text",), layers=1)[0].clip, 24)
    groups = make_optimizers(layer_groups(clip, 1.0, 0.5), 0.1, "no").param_groups
    rate_of = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    rates = [{rate_of[id(p)] for p in layer.parameters()} for layer in clip.vision_model.encoder.layer]
    assert rates == [{0.5}, {1.0}]
    assert rate_of[id(clip.vision_model.embeddings.cls_token)] == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_on_many_matrices_at_once_does_what_torch_does_one_by_one(dtype, monkeypatch):
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # so that torch's computes in float32, too
    torch.manual_seed(0)
    shapes = [(8, 16), (16, 8), (8, 8), (8, 16)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = (
        BatchedMuon(ours, dtype, **options),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
    )
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        for optimizer in optimizers:
            optimizer.step()
    rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-4, "atol": 1e-3}
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **rounding)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_muon_leaves_what_has_no_gradient():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.eye(4)
    BatchedMuon(weights, torch.float32, lr=0.1).step()
    assert not weights[0].equal(torch.ones(4, 4))
    assert weights[1].equal(torch.ones(4, 4))
