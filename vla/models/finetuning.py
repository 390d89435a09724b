"""What keeps a pretrained encoder's knowledge: low-rank updates, and the way back to where it started."""

import copy
from collections.abc import Mapping

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vla.models.clip import Encoder

SCALE = 2  # of a low-rank update, whatever its rank


def add_lora(model: Encoder, rank: int, *, vision: bool = True) -> None:
    """Freeze the towers in place and give their linear layers trainable updates of a low rank (arXiv:2106.09685).

    The projections into the joint space stay trainable as they are. At the start nothing changes: the updates are zero.

    Args:
        vision: whether the vision tower gets updates, too; without, only the text tower does.
    """
    towers = ("vision_model", "text_model") if vision else ("text_model",)
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[0] in towers
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), model)
    for projection in (model.visual_projection, model.text_projection):
        projection.requires_grad_(True)


def merged(model: Encoder) -> Encoder:
    """A copy whose low-rank updates are part of its weights; the model itself if it has none."""
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        return model
    whole = copy.deepcopy(model)
    for name, module in list(whole.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, module.get_base_layer())
    del whole.peft_config
    return whole


def interpolated(start: Mapping[str, Tensor], model: Encoder, share: float) -> Encoder:
    """A copy at `share` of the way from the `start` weights to the model's own (WiSE-FT, arXiv:2109.01903)."""
    whole = copy.deepcopy(merged(model))
    whole.load_state_dict(between(start, whole.state_dict(), share), strict=True)
    return whole


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The `end` tensors, at `share` of the way from the `start` ones where there are such."""
    return {
        name: start[name].to(tensor.device).lerp(tensor, share) if name in start else tensor
        for name, tensor in end.items()
    }
