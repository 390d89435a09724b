"""The optimiser and the learning-rate schedule that both stages share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla.models.clip import Encoder
from vla.training.muon import BatchedMuon


@dataclass(frozen=True)
class Optimizers:
    """Muon on the weights of linear layers (arXiv:2502.16982), AdamW on everything else, stepped as one."""

    members: tuple[torch.optim.Optimizer, ...]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def set_factor(self, factor: float) -> None:
        """Scale every group's peak learning rate."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def tensors(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The state as flat tensors `MEMBER.PARAMETER.NAME`, and the JSON rest of each member."""
        tensors: dict[str, Tensor] = {}
        rest = []
        for number, member in enumerate(self.members):
            state, scalars = member.state_dict(), {}
            for index, entry in state["state"].items():
                for name, value in entry.items():
                    (tensors if isinstance(value, Tensor) else scalars)[f"{number}.{index}.{name}"] = value
            rest.append({"param_groups": state["param_groups"], "scalars": scalars})
        return tensors, rest

    def restore(self, tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> None:
        """Inverse of `tensors`."""
        for number, (member, meta) in enumerate(zip(self.members, rest, strict=True)):
            state: dict[int, dict[str, Any]] = {}
            for key, value in {**tensors, **meta["scalars"]}.items():
                owner, index, name = key.split(".", 2)
                if int(owner) == number:
                    state.setdefault(int(index), {})[name] = value
            groups = [
                {
                    key: tuple(value) if isinstance(value, list) and key != "params" else value
                    for key, value in g.items()
                }
                for g in meta["param_groups"]
            ]
            member.load_state_dict({"state": state, "param_groups": groups})


def make_optimizers(groups: Iterable[tuple[nn.Module, float]], weight_decay: float, precision: str) -> Optimizers:
    """Optimisers over (module, peak learning rate) groups; weights of more than one dimension decay, vectors, scales and `nn.Embedding`s do not.

    A parameter belongs to the first group that lists it. Muon orthogonalises in bfloat16 if the `precision` is "bf16", in float32 if it is "no". Its updates have AdamW's size, so one rate serves both.
    """
    seen: set[int] = set()
    linear_groups, other_groups = [], []
    for module, lr in groups:
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        fresh = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in fresh)
        rates = {"lr": lr, "peak_lr": lr}
        matrices = [p for p in fresh if id(p) in linear]
        if matrices:
            linear_groups.append({"params": matrices, "weight_decay": weight_decay, **rates})
        others = [p for p in fresh if id(p) not in linear]
        for decay, members in (
            (weight_decay, [p for p in others if p.ndim > 1 and id(p) not in embeddings]),
            (0.0, [p for p in others if p.ndim <= 1 or id(p) in embeddings]),
        ):
            if members:
                other_groups.append({"params": members, "weight_decay": decay, **rates})
    members: list[torch.optim.Optimizer] = []
    if linear_groups:
        members.append(BatchedMuon(linear_groups, torch.bfloat16 if precision == "bf16" else torch.float32))
    if other_groups:
        members.append(torch.optim.AdamW(other_groups, betas=(0.9, 0.98), eps=1e-6))
    return Optimizers(tuple(members))


def layer_groups(clip: Encoder, lr: float, decay: float) -> list[tuple[nn.Module, float]]:
    """(module, peak learning rate) groups of both towers: `lr` for the last layer and what follows it, less below.

    Each layer below the last one has `decay` times the rate of the one above, the embeddings and their norm that of a layer below the
    first (arXiv:2106.08254), so that pretrained features survive.
    """
    groups: list[tuple[nn.Module, float]] = []
    for tower in (clip.vision_model, clip.text_model):
        tower = getattr(tower, "text_model", tower)  # CLIP's text tower is wrapped where it is loaded alone
        layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer  # DINOv2, ViT, BERT
        before = getattr(tower, "pre_layrnorm", None)  # CLIP's norm before the first layer, as transformers spells it
        below = [tower.embeddings] if before is None else [tower.embeddings, before]
        groups += [(module, lr * decay ** len(layers)) for module in below]
        groups += [(layer, lr * decay ** (len(layers) - 1 - depth)) for depth, layer in enumerate(layers)]
    return [*groups, (clip, lr)]


def warmup_steps(total: int, warmup: int) -> int:
    """How long the learning rate rises: `warmup` steps, or a fifth of a short run."""
    return min(warmup, max(1, total // 5))


def schedule(step: int, total: int, warmup: int, final: float = 0.01) -> float:
    """Factor on the peak learning rate at `step` (from 0): linear warm-up, then cosine to `final`."""
    warmup = warmup_steps(total, warmup)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
