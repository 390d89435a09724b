"""What stage one trains: encoders, what is trained beside them and its optimizer, as they begin, in checkpoints and out of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vla.config import AlignConfig
from vla.data.episodes import Episodes
from vla.models.alignment import AlignmentModel
from vla.models.clip import note_of_cut, tokenize
from vla.models.finetuning import add_lora
from vla.training.align_data import AlignData
from vla.training.align_setup import make_encoders, make_model, pair_temperatures
from vla.training.checkpoint import check_trained_on, latest_checkpoint, load_checkpoint, restoring, save_checkpoint
from vla.training.optim import Optimizers, make_optimizers
from vla.training.pretrained import beside, from_stage_one, rate_groups, start_digest, take_up
from vla.training.processes import Processes, check_same_encoders, in_turn
from vla.training.ranges import other_ranges
from vla.training.run import RunFolder
from vla.types import UserError


@dataclass(frozen=True)
class Start:
    """The encoder that a run with `tower.pretrained` begins from."""

    weights: dict[str, Tensor]
    digest: str


@dataclass(frozen=True)
class AlignTrained:
    """What stage one trains, and with what; `began` is what a resumed run must find as it was."""

    model: AlignmentModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: Optimizers
    start: Start | None
    texts: tuple[Tensor, Tensor]  # (u, l) input ids and attention mask of all texts of the data
    began: dict[str, str | None]


def begin(config: AlignConfig, data: AlignData, accelerator: Accelerator, processes: Processes) -> AlignTrained:
    """Everything that is trained, as it is before the first step or, of a resumed run, before its checkpoint is read.

    Raises:
        UserError: no such start, one that does not fit, or another encoder on another process.
    """
    resumed = config.resume and latest_checkpoint(Path(config.output)) is not None
    model, tokenizer, start = in_turn(
        accelerator,
        lambda: begin_model(config, data.episodes, resumed, accelerator.print),
        mine_first=accelerator.is_local_main_process,
    )
    source = config.tower.pretrained
    if start and from_stage_one(source) and (note := other_ranges(beside(source), data.source.stats)):
        accelerator.print(note)
    optimizer = make_optimizers(rate_groups(model, config), config.optimizer.weight_decay, config.precision)
    model.to(accelerator.device)
    texts = tokenize(tokenizer, data.episodes.texts)
    words = hashlib.sha256(texts[0].numpy().tobytes()).hexdigest()[:16]
    check_same_encoders(processes, words, model, accelerator.device)
    if note := note_of_cut(tokenizer, data.episodes.texts):
        accelerator.print(note)
    began = {"start": start.digest if start else None, "words": words, "chosen": data.chosen}
    return AlignTrained(model, tokenizer, optimizer, start, texts, began)


def begin_model(
    config: AlignConfig, episodes: Episodes, resumed: bool, tell: Callable[[str], None]
) -> tuple[AlignmentModel, PreTrainedTokenizerBase, Start | None]:
    """What stage one trains, its tokenizer, and the pretrained start, if there is one; those of a `resumed` run await its checkpoint.

    Raises:
        UserError: no such start, or one that does not fit.
    """
    clip, tokenizer = make_encoders(config.tower, config.data.image_size, episodes.texts, resumed)
    start = None
    if config.tower.pretrained:
        weights = {name: weight.clone() for name, weight in clip.state_dict().items()}
        start = Start(weights, start_digest(clip, tokenizer))
    model = make_model(config, clip, episodes)
    if config.tower.pretrained:
        take_up(model, config.tower.pretrained, pair_temperatures(config.loss), tell)
    if config.tower.lora_rank:
        add_lora(model.clip, config.tower.lora_rank, vision=not config.tower.locked)
    if config.tower.locked:
        model.clip.vision_model.requires_grad_(False)
    return model, tokenizer, start


def checkpoint(run: RunFolder, step: int, trained: AlignTrained, data: AlignData, seconds: float) -> None:
    """Everything that step + 1 depends on, what tells data, start and tokenized words apart and the seconds spent so far; random states follow from the step."""
    tensors, meta = trained.optimizer.tensors()
    state = {"step": step, "optimizer": meta, "seconds": seconds} | trained.began
    state |= {"data": data.episodes.fingerprint, "labels": data.episodes.labels()}
    save_checkpoint(run.folder, step, {"model": trained.model.state_dict(), "optimizer": tensors}, state)


def restore(run: RunFolder, trained: AlignTrained, data: AlignData) -> tuple[int, float]:
    """Load the last checkpoint of the run, if any; returns the number of steps done and the seconds they took.

    Raises:
        UserError: a damaged checkpoint, or one of other data, another pretrained start, tokenizer or version.
    """
    path = latest_checkpoint(run.folder)
    if path is None:
        run.truncate(0)
        return 0, 0.0
    tensors, state = load_checkpoint(path)
    check_trained_on(path, state, data.episodes)
    # A checkpoint of an older version does not say what it began with.
    changed = [name for name, value in trained.began.items() if state.get(name, value) != value]
    if "start" in changed:
        raise UserError(
            f"{path}: began from another encoder than tower.pretrained holds now; restore that, or choose another --output"
        )
    if "words" in changed:
        raise UserError(
            f"{path}: the instructions were other token ids when it was written: tower.vocabulary, or the tokenizers package, has changed; "
            "restore that, or choose another --output"
        )
    if "chosen" in changed:
        raise UserError(
            f"{path}: was trained on other episodes of {data.episodes.root} than are chosen now; have its meta/concord.json as it was, or "
            "choose another --output"
        )
    with restoring(path):
        trained.model.load_state_dict(tensors["model"], strict=True)
        trained.optimizer.restore(tensors["optimizer"], state["optimizer"])
    run.truncate(state["step"])
    return state["step"], state["seconds"]
