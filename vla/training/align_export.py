"""What stage one leaves: the encoder folder, the rest of the model, alignment.json."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vla.config import AlignConfig
from vla.data.mixture import open_mixture
from vla.data.normalization import Normalizers
from vla.files import whole_folder, write_json
from vla.models.alignment import AlignmentModel
from vla.models.clip import Encoder
from vla.models.clip_files import load_clip, save_clip
from vla.models.finetuning import between, interpolated
from vla.training.align_setup import held_out_data, make_encoders
from vla.training.checkpoint import latest_checkpoint, load_tensors
from vla.training.pretrained import ALIGNMENT, along_the_way, begun_with, start_digest
from vla.training.ranges import header_of, ranges_of
from vla.types import UserError


def export_share(config: AlignConfig, share: float) -> None:
    """Export the encoder at a share of the way from the pretrained start of a finished run to its end, to wise_ft/SHARE (WiSE-FT).

    measures.json beside it says what it knows of the new data and, where `forgetting` names one, of the old.

    Raises:
        UserError: the start is another one now.
    """
    folder = Path(config.output)
    start, words = make_encoders(config.tower, config.data.image_size, ())
    last = latest_checkpoint(folder)
    began = json.loads((last / "state.json").read_text()).get("start") if last else None
    if began not in (None, start_digest(start, words)):
        raise UserError(
            f"{config.tower.pretrained}: has changed since {folder} began from it; restore it, or choose another --output"
        )
    trained, tokenizer = load_clip(folder / "clip")
    target = folder / "wise_ft" / f"{share:g}"
    weights = start.state_dict()
    data = held_out_data(config, open_mixture(config.data, config.more, config.seed))
    (measured,) = along_the_way(weights, trained, tokenizer, (share,), data)
    write_json(target / "measures.json", measured)
    others, header = load_tensors(folder / ALIGNMENT), header_of(folder / ALIGNMENT)
    export_between(target, share, config.tower.pretrained, weights, trained, others, tokenizer, header)


def export_between(
    folder: Path,
    share: float,
    source: str,
    start: Mapping[str, Tensor],
    trained: Encoder,
    others: Mapping[str, Tensor],
    tokenizer,
    header: dict[str, str],
) -> None:
    """Write clip/ and alignment.safetensors at a share of the way from a start, whose weights are `start`, to the trained ones.

    Of `others`, what was trained beside the encoder, the scales and what the start at `source` did not bring stay as trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder, between(begun_with(source, others), others, share), header)
    write_clip(folder / "clip", interpolated(start, trained, share), tokenizer)


def export_encoder(folder: Path, model: AlignmentModel, tokenizer, stats: Normalizers) -> None:
    """Write clip/ after alignment.safetensors, the rest of the model, with its ranges in the header; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder, model.beside_clip(), ranges_of(stats))
    write_clip(folder / "clip", model.exported_clip(), tokenizer)


def write_beside(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write alignment.safetensors, which appears whole or not at all."""
    partial_file = folder / f"{ALIGNMENT}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial_file, metadata=metadata)
    partial_file.replace(folder / ALIGNMENT)


def write_clip(folder: Path, clip: Encoder, tokenizer) -> None:
    """Write an encoder folder that appears whole or not at all."""
    with whole_folder(folder) as partial:
        save_clip(partial, clip, tokenizer)
