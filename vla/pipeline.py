"""The four stages one after the other, by the configurations of one name."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from vla.config import AlignConfig, CollectConfig, EvalConfig, PipelineConfig, PolicyTrainConfig
from vla.config_io import load_config
from vla.files import read_json, write_json
from vla.locks import FolderHeldError, lock_folder
from vla.precision import multiplies_bf16
from vla.types import UserError
from vla.versions import versions

SLOWER = "\nThis machine has no fast products in bfloat16, so new runs compute in float32: training takes up to four times as long as docs/results.md says."


@contextmanager
def only_waiting_helps() -> Iterator[None]:
    """Of a folder that is held do not say that another one could be named: the pipeline's have their names."""
    try:
        yield
    except FolderHeldError as error:
        raise FolderHeldError(str(error).replace(" or choose another --output", "")) from error


@only_waiting_helps()
def pipeline(config: PipelineConfig) -> Path:
    """Run collect, align, policy and evaluate and return the report; a stage that is finished says so and does nothing."""
    from vla.eval.evaluate import evaluate
    from vla.integrations.collect import collect
    from vla.training.align import train_align
    from vla.training.policy import train_policy
    from vla.workers import worker_context

    def of_stage(cls: type, stage: str):
        return load_config(cls, ["--config_path", f"configs/{stage}/{config.name}.yaml"])

    data = replace(of_stage(CollectConfig, "collect"), workers=config.threads)
    align = replace(of_stage(AlignConfig, "align"), threads=config.threads, resume=True)
    policy = replace(of_stage(PolicyTrainConfig, "policy"), threads=config.threads, resume=True)
    evaluation = replace(of_stage(EvalConfig, "eval"), workers=config.threads)
    if evaluation.output is None:
        raise UserError(f"configs/eval/{config.name}.yaml: names no output; the report of the pipeline goes there")
    folders = [Path(stage.output) for stage in (data, align, policy, evaluation)]
    if config.fresh:
        begin_anew(folders)

    print(opening(config, data, align, policy, evaluation))
    record = folders[-1] / "pipeline.json"
    seconds = read_json(record).get("seconds", {})

    def stage(number: int, name: str, run: Callable[[], object]) -> None:
        print(f"\n=== {number} of 4: {name} ===", flush=True)
        started = time.perf_counter()
        try:
            run()
        except FolderHeldError:
            raise
        except UserError as error:
            told = str(error).replace("add --resume=true", f"run {again(config)} again")
            raise UserError(told.replace("choose another --output", "start anew with --fresh=true")) from error
        finally:  # an interrupted stage took its time, too
            seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - started, 1)
            write_json(record, {"name": config.name, "seconds": seconds, "versions": versions()})

    stage(1, "collect", lambda: collect(data))
    stage(2, "align", lambda: train_align(align))
    stage(3, "policy", lambda: train_policy(policy))
    worker_context()  # imports in the background, while the policy is loaded here
    stage(4, "evaluate", lambda: evaluate(evaluation))

    print(f"\nDone; the four stages took {sum(seconds.values()) / 60:.1f} minutes.")
    print(f"  alignment report   {folders[1] / 'report.html'}")
    print(f"  aligned encoder    {policy.encoder}  (CLIPModel.from_pretrained reads it)")
    print(f"  policy             {evaluation.policy}  (lerobot-eval reads it)")
    report = (folders[3] / "report.html").resolve()
    print(f"  evaluation report  {report}  <- open this one")
    return report


def begin_anew(folders: Sequence[Path]) -> None:
    """Delete what the four stages left in their folders, all of it or nothing.

    Raises:
        UserError: a folder is a link or in use, or holds an evaluation of another policy.
    """
    from vla.integrations.collect import parts_folder

    if others := sorted(path.parent for path in folders[-1].glob("*/begun.json")):
        raise UserError(
            f"{others[0]}: an evaluation of its own, which fresh would delete; move it out of {folders[-1]}"
        )
    parts = parts_folder(folders[0])
    if links := [folder for folder in (*folders, parts) if folder.is_symlink()]:
        raise UserError(
            f"{links[0]}: is a link, which fresh does not follow; empty {links[0].resolve()}, or remove the link"
        )
    held = [folder for folder in (*folders[1:], parts) if folder.is_dir()]
    locks = [lock_folder(folder) for folder in held]  # all of them, before anything is deleted
    for folder in (folders[0], *held):
        shutil.rmtree(folder, ignore_errors=True)
    for lock in locks:
        lock.close()


def again(config: PipelineConfig) -> str:
    """The command that goes on with what this one began."""
    return "the same command" + " without --fresh" * config.fresh


def opening(
    config: PipelineConfig, data: CollectConfig, align: AlignConfig, policy: PolicyTrainConfig, evaluation: EvalConfig
) -> str:
    """What is about to happen."""
    tasks = ", ".join(data.env.tasks) or "all tasks"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = "the encoder is fine-tuned" if policy.tune else "the encoder stays frozen"
    return (
        f"Concord, {config.name}: align, then act.\n\n"
        f"  1. collect   scripted demonstrations on {data.env.name} ({tasks}) -> {data.output}\n"
        f"  2. align     vision and language encoders on triplets by InfoNCE, {align.steps} steps -> {align.output}\n"
        f"  3. policy    behaviour cloning of an action head, {policy.steps} steps; {encoder} -> {policy.output}\n"
        f"  4. evaluate  {evaluation.episodes} episodes, then swapped, blank and wrong instructions -> {evaluation.output}\n\n"
        f"Interrupted, {again(config)} goes on where it stopped."
        + (SLOWER if align.precision == "auto" and not multiplies_bf16(device) else "")
    )
