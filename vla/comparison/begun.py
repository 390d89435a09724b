"""What the folder of a comparison or sweep was begun with, and that nothing else gets into it."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from vla.comparison.data import check_data_there
from vla.config import CompareConfig, SweepConfig
from vla.config_io import changed, filled, to_dict
from vla.files import read_json, write_json
from vla.locks import waiting_lock
from vla.precision import chosen_precision
from vla.training import run
from vla.training.pretrained import beside
from vla.types import UserError

BEFORE = {"transfer_weight": 0.0}  # what versions without the field did with transfer
GIVEN = ("encoders", "policies")  # NAME=FOLDER each; a name keeps its folder
GROWING = ("arms", "demonstrations", "seeds", "ablations", "output", *GIVEN)
# Changing these changes no result.
FREE_FIELDS = (*run.FREE_FIELDS, "dry_run", "batch_size", "device")


def check_same(folder: Path, config: CompareConfig | SweepConfig, *, keep: bool = True) -> None:
    """Refuse to mix the results of two configurations or of two data sets; arms, encoders, seeds, numbers and ablations may be added.

    Args:
        keep: write down what the folder was begun with.
    Raises:
        UserError: a field that changes results differs from what the folder, or a job in it, was begun with, a name had another folder or
            other weights in it, or the demonstrations have changed.
    """
    with waiting_lock(folder / "jobs" / "begun") if keep else nullcontext():
        path = folder / "begun.json"
        given = {field: dict(pair.partition("=")[::2] for pair in getattr(config, field, ())) for field in GIVEN}
        begun = without(read_json(path), FREE_FIELDS) or comparable(config) | given
        if found := changes(begun, config):
            raise UserError(f"{folder}: was begun with {'; '.join(found)}; choose another --output")
        for job in sorted(folder.glob("jobs/*/settings.json")):
            if found := changes(read_json(job), config):
                raise UserError(
                    f"{job.parent}: was run with {'; '.join(found)}; results of both are not one comparison"
                )
        for field, folders in given.items():
            before = begun.get(field, {})
            begun[field] = before | folders
            for name, given_folder in folders.items():
                if before.get(name, given_folder) != given_folder:
                    raise UserError(f"{folder}: {field}: {name!r} was {before[name]} before; choose another name")
                now = weights_of(Path(given_folder))
                if now and begun.setdefault("weights", {}).setdefault(f"{field}.{name}", now) != now:
                    raise UserError(
                        f"{folder}: {field}: the weights in {given_folder} have changed since {name!r} was first compared; choose another name"
                    )
        check_data_there(folder)
        if keep:
            write_json(path, begun)


def weights_of(folder: Path) -> str:
    """A digest of the weights in a model's folder and of the pooler beside it; empty where the weights are gone."""
    digest, paths = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for path in (*paths, beside(folder)) if paths else ():
        if path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if paths else ""


def changes(begun: dict, config: CompareConfig | SweepConfig) -> list[str]:
    """`align.steps=800, not 900`: every field that changes results and was another then.

    Fields that an older version did not know had their defaults.
    """
    wanted, usual = comparable(config), comparable(type(config)())
    made_with = filled(without(begun, FREE_FIELDS), usual | (BEFORE if begun.get("transfer") else {}))
    return list(changed(made_with, wanted).values())


def with_precision[C: (CompareConfig, SweepConfig)](folder: Path, config: C) -> C:
    """With one precision for every job: of "auto", the folder's if it was begun, else what suits this machine."""
    path = folder / "begun.json"
    begun = read_json(path)

    def of(stage: str) -> str:
        wanted = getattr(config, stage).precision
        return chosen_precision(begun.get(stage, {}).get("precision", wanted) if wanted == "auto" else wanted)

    align, policy = (replace(getattr(config, stage), precision=of(stage)) for stage in ("align", "policy"))
    return replace(config, align=align, policy=policy)


def comparable(config: CompareConfig | SweepConfig) -> dict:
    """What changes results, and may not change within a folder."""
    fields = {key: value for key, value in to_dict(config).items() if key not in GROWING}
    del fields["policy"]["tower"]  # used only with encoder=random, which no policy here has
    return json.loads(json.dumps(without(fields, FREE_FIELDS)))


def without(tree: dict, names: tuple[str, ...]) -> dict:
    """The mapping without some keys, at any depth; `policy.batch_size` stays, since training depends on it."""
    return {
        key: without(value, names) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key not in names or (key == "batch_size" and "steps" in tree)
    }


def records(folder: Path, name: str) -> dict[Path, dict]:
    """The JSON files of a name that trained encoders and policies left."""
    paths = (path for stage in ("align", "policy") for path in sorted(folder.glob(f"{stage}/**/{name}")))
    return {path: read_json(path) for path in paths}


def check_same_data(folder: Path) -> None:
    """Refuse to compare runs of one data set that saw different files of it, as runs of several machines may have.

    Raises:
        UserError: two fingerprints; names a run of each.
    """
    for name in ("alignment.json", "concord.json"):
        first: dict[str, tuple[str, Path]] = {}
        for path, record in records(folder, name).items():
            data = record["data"]
            seen, other = first.setdefault(data["root"], (data["fingerprint"], path))
            if seen != data["fingerprint"]:
                raise UserError(
                    f"{path}: was trained on another {data['root']} than {other} (fingerprints {data['fingerprint']} "
                    f"and {seen}); delete one of them and run again"
                )
