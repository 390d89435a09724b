"""The whole pipeline on a small tabletop run, by the configurations called `demo`."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from vla.config import AlignConfig, CollectConfig, DemoConfig, EvalConfig, PolicyTrainConfig
from vla.config_io import load_config

OPENING = """\
Concord demo: align, then act. On two CPU cores it takes about a quarter of an hour and needs 2 GB of disk.

  1. collect   scripted demonstrations of reach, push and place on a tabletop, four goals in every scene
  2. align     vision and language encoders on vision-language-action triplets, by InfoNCE
  3. policy    behaviour cloning of an action head on the frozen, aligned patch tokens
  4. evaluate  100 episodes, the same scenes with swapped, blank and wrong instructions, and videos

Interrupted, `make demo` goes on where it stopped.
"""


def demo(config: DemoConfig) -> Path:
    """Run the four stages, skipping finished ones, and return the report."""
    from vla.eval.evaluate import evaluate
    from vla.integrations.collect import collect
    from vla.training.align import train_align
    from vla.training.policy import train_policy

    def of_stage(cls: type, stage: str):
        return load_config(cls, ["--config_path", f"configs/{stage}/demo.yaml"])

    started = time.perf_counter()
    print(OPENING)
    data = replace(of_stage(CollectConfig, "collect"), workers=config.threads)
    align = replace(of_stage(AlignConfig, "align"), threads=config.threads, resume=True)
    policy = replace(of_stage(PolicyTrainConfig, "policy"), threads=config.threads, resume=True)
    evaluation = replace(of_stage(EvalConfig, "eval"), workers=config.threads)
    if config.fresh:
        for folder in (data.output, align.output, policy.output, evaluation.output):
            shutil.rmtree(folder, ignore_errors=True)

    heading("1 of 4: collect demonstrations")
    collect(data)
    heading("2 of 4: align the encoders")
    if not (Path(align.output) / "report.html").is_file():
        train_align(align)
    heading("3 of 4: train the policy")
    if not (Path(policy.output) / "policy").is_dir():
        train_policy(policy)
    heading("4 of 4: evaluate")
    report = evaluate(evaluation) / "report.html"

    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes.")
    print(f"  alignment report   {Path(align.output) / 'report.html'}")
    print(f"  aligned encoder    {policy.encoder}  (CLIPModel.from_pretrained reads it)")
    print(f"  policy             {evaluation.policy}  (lerobot-eval reads it)")
    print(f"  evaluation report  {report.resolve()}  <- open this one")
    return report


def heading(text: str) -> None:
    """Announce a stage."""
    print(f"\n=== {text} ===", flush=True)
