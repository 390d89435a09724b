"""A pretrained start of stage one: how much of what it knew stays, and how far on the way to leave it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vla.config import AlignConfig, DataConfig
from vla.config_io import filled, read_yaml, to_dict
from vla.data.batches import TripletSource
from vla.data.mixture import camera_in, root_and_weight
from vla.eval.alignment import encoder_measures
from vla.models.alignment import MAX_LOGIT_SCALE, AlignmentModel
from vla.models.clip import Encoder, tokenize
from vla.models.clip_build import check_sizes
from vla.models.finetuning import interpolated
from vla.training.checkpoint import load_tensors
from vla.training.optim import layer_groups
from vla.training.tokens import weights_digest
from vla.types import UserError

ALIGNMENT = "alignment.safetensors"
LORA_RATE = 0.1  # of low-rank updates, as a share of the full learning rate


@dataclass(frozen=True)
class HeldOut:
    """Episodes that an encoder is measured on, at `positions` of their data set."""

    source: TripletSource
    positions: np.ndarray

    def measures(self, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Retrieval and zero-shot accuracy of the encoder alone."""
        return encoder_measures(encoder, self.source, self.positions, *tokenize(tokenizer, self.source.episodes.texts))


def check_start(config: AlignConfig) -> None:
    """Refuse what only a pretrained start has, and what it cannot have, and fresh towers of impossible sizes.

    Raises:
        UserError: a field that needs `tower.pretrained` or contradicts it, a size, or a share beyond the way.
    """
    if config.tower.pretrained is None:
        tower = config.tower
        check_sizes(
            config.data.image_size, tower.patch_size, tower.width, tower.heads, tower.text_width, tower.text_heads
        )
    fields = {
        "tower.lora_rank": config.tower.lora_rank,
        "tower.locked": config.tower.locked,
        "wise_ft": config.wise_ft,
        "forgetting": config.forgetting,
    }
    needing = [name for name, value in fields.items() if value]
    if needing and config.tower.pretrained is None:
        raise UserError(f"config error: {needing[0]} needs a pretrained start; name one with --tower.pretrained=FOLDER")
    own = [name for name in ("vocabulary", "lexicon") if getattr(config.tower, name)]
    if own and config.tower.pretrained is not None:
        raise UserError(f"config error: tower.{own[0]}: tower.pretrained brings its own; leave one of the two out")
    if config.tower.lora_rank and config.optimizer.layer_decay != 1:
        raise UserError(
            "config error: optimizer.layer_decay: tower.lora_rank leaves the layers' weights as they are; leave one of the two out"
        )
    beyond = [share for share in config.wise_ft if not 0 <= share <= 1]
    if beyond:
        raise UserError(f"config error: wise_ft {beyond[0]:g} is not between 0, the start, and 1, the trained encoder")


def rate_groups(model: AlignmentModel, config: AlignConfig) -> list[tuple[nn.Module, float]]:
    """(module, peak learning rate) groups of stage one: a pretrained encoder at its own rate, all else at the full one.

    Low-rank updates start from nothing, so they need more than the encoder's rate; at the full one they forget more than all weights at theirs.
    """
    clip, optimizer = model.clip, config.optimizer
    lr = optimizer.lr if config.tower.pretrained is None else optimizer.pretrained_lr
    if config.tower.lora_rank:
        towers = [(clip.visual_projection, lr), (clip.text_projection, lr), (clip, LORA_RATE * optimizer.lr)]
    else:
        towers = layer_groups(clip, lr, optimizer.layer_decay)
    return [*towers, (model, optimizer.lr)]


@torch.no_grad()
def take_up(model: AlignmentModel, source: str, configured: Iterable[str], tell: Callable[[str], None]) -> None:
    """Start in place what stage one trains beside an encoder from what lies beside the start, if stage one wrote that.

    A part, such as the pooler, is taken up if all its tensors fit by name and shape; `tell` is told which are not. A start
    with nothing beside it brings the scale of CLIP's own loss alone. Scales that are not learned, and those of `configured` pairs, stay
    as they are.
    """
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    fixed |= {f"logit_scales.{pair}" for pair in configured}
    path = beside(source)
    if not from_stage_one(source):
        scale = model.logit_scales["vision_language"]
        if "logit_scales.vision_language" not in fixed and model.logit_bias is None:  # CLIP's loss is the softmax
            scale.copy_(model.clip.logit_scale.clamp(0, MAX_LOGIT_SCALE))
        return
    own, saved = (
        {name: value for name, value in tensors.items() if name not in fixed}
        for tensors in (model.beside_clip(), load_tensors(path))
    )
    fit, unfit = fitting(saved, own)
    model.load_state_dict(fit, strict=False)
    if unfit:
        tell(f"{path}: not taken up, as it does not fit this run: {', '.join(sorted(unfit))}")


def fitting(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The saved tensors of the parts whose tensors all fit by name and shape, and the names of the other parts."""
    parts = {part_of(name) for name in saved}
    unfit = {
        part_of(name)
        for name in own.keys() | saved.keys()
        if part_of(name) in parts and (name not in own or name not in saved or own[name].shape != saved[name].shape)
    }
    return {name: value for name, value in saved.items() if part_of(name) not in unfit}, unfit


def begun_with(source: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run took up from beside its start, scales apart, of the tensors that it `trained` beside its encoder."""
    if not from_stage_one(source):
        return {}
    saved, own = (
        {name: value for name, value in tensors.items() if not part_of(name).startswith("logit_scales.")}
        for tensors in (load_tensors(beside(source)), trained)
    )
    return fitting(saved, own)[0]


def beside(source: str | Path) -> Path:
    """Where stage one writes what it trained beside an encoder; of a link what is beside it, else beside what it links to."""
    here = Path(source).absolute().parent / ALIGNMENT
    return here if here.is_file() else Path(source).resolve().parent / ALIGNMENT


def from_stage_one(source: str | None) -> bool:
    """Whether a start is one that stage one wrote, with the pooler, scales and all else beside it."""
    return source is not None and Path(source).is_dir() and beside(source).is_file()


def start_digest(clip: Encoder, tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the weights that a run starts from, and of the words that it reads."""
    return hashlib.sha256(f"{weights_digest(clip)}{sorted(tokenizer.get_vocab().items())}".encode()).hexdigest()


def part_of(name: str) -> str:
    """What a tensor beside the encoder belongs to: a module, or one pair's scale, which goes with its bias."""
    if name == "logit_bias":
        return "logit_scales.vision_language"
    return name if name.startswith("logit_scales.") else name.partition(".")[0]


def run_of(source: str) -> dict[str, Any] | None:
    """The configuration of the stage-one run that wrote an encoder folder; None if none did.

    Fields that an older version did not know have their defaults.
    """
    folder = Path(source).resolve().parent
    run = folder.parent.parent if folder.parent.name in ("wise_ft", "snapshots") else folder
    path = run / "config.yaml"
    return filled(read_yaml(path), to_dict(AlignConfig())) if from_stage_one(source) and path.is_file() else None


def old_split(config: AlignConfig) -> tuple[DataConfig, int, bool]:
    """The data set that forgetting is measured on, the seed that splits it, and whether all that the start saw is known.

    Held-out share, limit, seed and camera are those of the run that wrote the start, where there is one; else the new run's. What
    the start saw is known if that run began untrained and read this data set alone.

    Raises:
        UserError: the start was trained on the whole data set, or this run trains on what is held out of it.
    """
    if any(same_folder(root_and_weight(text)[0], config.forgetting) for text in config.more):
        raise UserError(
            f"config error: forgetting: `more` trains on all of {config.forgetting}, so nothing there is held out; name another, or leave it out"
        )
    root, data, seed, known = config.forgetting, replace(config.data, episodes_per_task=None), config.seed, False
    before = run_of(config.tower.pretrained)
    if before is not None:
        if any(same_folder(root_and_weight(text)[0], root) for text in before["more"]):
            raise UserError(
                f"config error: forgetting: {config.tower.pretrained} was trained on all of {root}, so nothing there is held out; "
                f"name {before['data']['root']}"
            )
        names = ("holdout", "episodes_per_task", "camera")
        data, seed = replace(data, **{name: before["data"][name] for name in names}), before["seed"]
        alone = not before["more"] and before["tower"]["pretrained"] is None
        known = alone and same_folder(before["data"]["root"], root)
    if same_folder(config.data.root, root) and (data.holdout, seed) != (config.data.holdout, config.seed):
        raise UserError(
            f"config error: forgetting: this run trains on what the start held out of {root}; take its split, --data.holdout={data.holdout:g} --seed={seed}"
        )
    return replace(data, root=root, camera=camera_in(root, data.camera)), seed, known


def same_folder(a: str, b: str) -> bool:
    return Path(a).resolve() == Path(b).resolve()


def along_the_way(
    start: Mapping[str, Tensor],
    model: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    shares: Iterable[float],
    data: Mapping[str, HeldOut],
) -> list[dict[str, float]]:
    """Measures `NAME/MEASURE` on every data set at each of `shares` of the way from the `start` weights to the trained ones."""
    way = []
    for share in shares:
        encoder = interpolated(start, model, share).eval()
        measured = {
            f"{name}/{key}": value
            for name, held_out in data.items()
            for key, value in held_out.measures(encoder, tokenizer).items()
        }
        way.append({"share": share} | measured)
    return way
