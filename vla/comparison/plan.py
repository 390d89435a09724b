"""What a comparison runs: data, encoders, their measures, policies, evaluations.

Every encoder gets the text tower of the aligned one of its seed, so that arms differ in what they see, not in how they read.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from vla.comparison.chosen import chosen_arms, named, numbers_of
from vla.comparison.data import aligned_beside, data_sets, make_data
from vla.comparison.jobs import Job
from vla.comparison.work import (
    ALIGNED,
    clone_everything,
    cloning_run,
    encoder_folder,
    evaluate_policy,
    evaluation_folder,
    make_encoder,
    make_policy,
    measure,
    policy_run,
)
from vla.config import CompareConfig
from vla.policies.concord.modeling_concord import WEIGHTS
from vla.training.align import train_align


def plan_jobs(config: CompareConfig) -> list[Job]:
    """All jobs in a good order: seed by seed, so that the first seed's results are there early."""
    folder, arms = Path(config.output), chosen_arms(config)
    data = Job("data", folder / "data.json", partial(make_data, config), beside=data_sets(config))
    jobs = [data] if arms else []
    for seed in config.seeds if arms else ():
        sources = list(dict.fromkeys(["none", *(arm.source for arm in arms.values() if not arm.name)]))
        if "cloned" in sources and "random" not in sources:
            sources.append("random")
        for source in sorted(sources, key=("none", "random", "cloned", "language", "action", "all").index):
            jobs += encoder_jobs(config, source, seed)
        for name, arm in arms.items():
            if arm.snapshot or arm.source == "vision":
                jobs += finished_encoder_jobs(config, arm.encoder, seed, ("data", f"align-none-{seed}"))
            for count in numbers_of(config, arm):
                run = policy_run(config, name, count, seed)
                encoder = f"encoder-{arm.encoder}-{seed}"
                after = (f"policy-{arm.after}-{count}-{seed}",) if arm.after else ()
                training = Job(
                    f"policy-{name}-{count}-{seed}",
                    run / "policy" / WEIGHTS,
                    partial(make_policy, config, name, arm, count, seed),
                    ("data",) if arm.source == "named" else (encoder, *after),
                )
                if run == cloning_run(config, seed) and "cloned" in sources:  # scratch, which is trained already
                    trained = f"cloning-{seed}"
                else:
                    jobs.append(training)
                    trained = training.name
                jobs.append(evaluation_job(config, (name, count, seed), run / "policy", (trained,)))
    for name, policy in named(config.policies, "policies").items():
        jobs.append(evaluation_job(config, (name, "given", 0), policy, ()))
    return jobs


def encoder_jobs(config: CompareConfig, source: str, seed: int) -> list[Job]:
    """The jobs that make and measure one encoder."""
    folder = Path(config.output)
    needs: tuple[str, ...] = ("data",) if source == "none" else ("data", f"align-none-{seed}")
    jobs = []
    if source in ALIGNED:
        align = replace(
            config.align,
            output=str(folder / "align" / source / str(seed)),
            more=aligned_beside(config),
            shuffle=source,
            seed=seed,
            resume=True,
        )
        jobs.append(
            Job(f"align-{source}-{seed}", Path(align.output) / "report.html", partial(train_align, align), ("data",))
        )
        needs = (*needs, jobs[-1].name)
    if source == "cloned":
        run = cloning_run(config, seed)
        jobs.append(
            Job(
                f"cloning-{seed}",
                run / "policy" / WEIGHTS,
                partial(clone_everything, config, seed),
                (f"encoder-random-{seed}",),
            )
        )
        needs = (*needs, jobs[-1].name)
    return jobs + finished_encoder_jobs(config, source, seed, needs)


def finished_encoder_jobs(config: CompareConfig, encoder: str, seed: int, needs: tuple[str, ...]) -> list[Job]:
    """The jobs that give a trained encoder its text tower and measure it."""
    path, name = encoder_folder(config, encoder, seed), f"encoder-{encoder}-{seed}"
    measures = path.parent / "measures.json"
    return [
        Job(name, path, partial(make_encoder, config, encoder, seed), needs),
        Job(f"measures-{encoder}-{seed}", measures, partial(measure, config, encoder, seed), (name,)),
    ]


def evaluation_job(
    config: CompareConfig, which: tuple[str, int | str, int], policy: Path, needs: tuple[str, ...]
) -> Job:
    """The evaluation of one policy, the same episodes for all."""
    output = evaluation_folder(config, *which)
    return Job(f"eval-{output.name}", output / "report.html", partial(evaluate_policy, config, policy, output), needs)
