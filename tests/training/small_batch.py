"""A small batch and model on which the step of stage one is tested; `run` takes one step's gradients."""

from contextlib import nullcontext
from unittest.mock import patch

import torch

from tests.conftest import small_alignment_model
from vla.config import LossConfig
from vla.losses.alignment import GROUP
from vla.models.alignment import AlignmentModel
from vla.models.clip import tokenize
from vla.training.align_step import forward_backward
from vla.training.device_batch import DeviceBatch
from vla.training.processes import ALONE, Processes

TEXTS = ("push the red star left", "pick up the green cross", "take the green cross")
PAIR = "push the red cross left"  # a minimal pair of the first, which nobody asks
GOALS = torch.tensor([0, 1, 1])

MAIN = LossConfig(state=0.25)
SIGMOID = LossConfig(vision_language_kind="sigmoid", state=0.25)
TRANSITIONS = LossConfig(transition_action=0.5, transition_language=0.5)
WITHIN_GOAL = LossConfig(state=0.25, state_within_goal=True)


def make_model(
    dropout: float = 0.0, texts: tuple[str, ...] = TEXTS
) -> tuple[AlignmentModel, tuple[torch.Tensor, torch.Tensor]]:
    model, tokenizer = small_alignment_model(TEXTS, layers=2, sigmoid=True, transitions=True)
    if dropout:
        for name in ("visual_projection", "text_projection"):
            setattr(model.clip, name, torch.nn.Sequential(getattr(model.clip, name), torch.nn.Dropout(dropout)))
    return model.double().train(), tokenize(tokenizer, texts)


def make_batch(ids: torch.Tensor, mask: torch.Tensor, partly: bool = False) -> DeviceBatch:
    """11 rows on 7 images: a ragged last piece, images of several rows, idle and padded chunks, scenes of one goal and of both.

    If `partly`, the last three images have no instruction, and others no action or no state. If `ids` has a text more than
    `TEXTS`, it is a minimal pair of the first.
    """
    torch.manual_seed(1)
    frame_of_row = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6])
    text_of_row = torch.tensor([0, 2, 1, 2, 2, 1, 0, 1, 0, 0, 1])
    rows, frames = len(frame_of_row), 7
    chunks = torch.rand(rows, 4, 3, dtype=torch.float64) * 2 - 1
    chunks[4] = 0.0
    pad = torch.zeros(rows, 4, dtype=torch.bool)
    pad[2, 2:] = True
    pixels = torch.randn(frames, 3, 24, 24, dtype=torch.float64)
    state = torch.rand(frames, 2, dtype=torch.float64)
    goal_id = GOALS[text_of_row]
    scene_id = torch.tensor([0, 0, 0, 1, 2, 1, 3])[frame_of_row]
    if partly:
        goal_id = torch.where(frame_of_row >= 4, -1, goal_id)
        pad[6] = True
        state[1] = torch.nan
    return DeviceBatch(
        pixels=lambda images: pixels[images],
        frame_of_row=frame_of_row,
        shown=torch.searchsorted(frame_of_row, torch.arange(frames)),
        input_ids=ids,
        attention_mask=mask,
        text_of_row=text_of_row,
        pair_of_row=torch.where((text_of_row == 0) & (len(ids) > len(TEXTS)), len(TEXTS), -1),
        action_chunk=chunks,
        action_is_pad=pad,
        still=torch.arange(rows) == 7,
        state=state,
        ids={
            "goal_id": goal_id,
            "scene_id": scene_id,
            "episode_id": text_of_row + 4 * scene_id,
            "timestep": frame_of_row + (frame_of_row >= 2),
            "progress": torch.linspace(0.1, 1, rows, dtype=torch.float64),
        },
        asked_in=torch.tensor([[3, int(GOALS[2])], [9, int(GOALS[0])]]),  # by episodes that are not in this batch
    )


def gradients(model: AlignmentModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(chunk: int, loss: LossConfig, **which) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of a step; `which` are arguments of `step`."""
    total, _, found = step(chunk, loss, **which)
    return total, found


def step(
    chunk: int,
    loss: LossConfig,
    dropout: float = 0.0,
    processes: Processes = ALONE,
    partly: bool = False,
    paired: bool = False,
    group: int = GROUP,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss, every term's values and the gradients; `group` images are compared with each other's texts word by word."""
    model, (ids, mask) = make_model(dropout, (*TEXTS, PAIR) if paired else TEXTS)
    batch = make_batch(ids, mask, partly)
    torch.manual_seed(5)
    with patch("vla.losses.alignment.GROUP", group):
        total, terms, _ = forward_backward(
            model, batch, torch.zeros(3), loss, gap=2, chunk=chunk, autocast=nullcontext, processes=processes
        )
    values = {f"{name}/{key}": value.clone() for name, term in terms.items() for key, value in vars(term).items()}
    return total.detach(), values, gradients(model)
