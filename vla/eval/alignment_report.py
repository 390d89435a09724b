"""The report of an alignment run, from its metrics.jsonl and alignment.json alone."""

import json
from pathlib import Path

from vla.eval.report import Figure, Report, Section, Table, figure, percent, write_report

TITLES = {
    "context_action": "context -> action (text-conditioned patches against the action chunk)",
    "word_patch": "words <-> patches (late interaction)",
    "vision_language": "vision <-> language (pooled image against the instruction)",
    "state": "scene <-> state (patches against proprio)",
}


def write_alignment_report(folder: Path) -> Path:
    """Write FOLDER/report.html and return it."""
    record = json.loads((folder / "alignment.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    validation = [line for line in lines if any(key.startswith("validation/") for key in line)]
    terms = [name for name in TITLES if f"{name}/loss" in train[-1]]
    blocks: list[Table | Figure] = [loss_figure(train, name) for name in terms]
    report = Report(
        title="Stage one: alignment",
        answers=tuple(answers(record["metrics"])),
        sections=(
            Section(
                "Held-out measures",
                "Every measure stands beside its chance level.",
                (measure_table(record["metrics"]),),
            ),
            Section("Measures over training", "", tuple(measure_figures(validation))),
            Section(
                "Losses",
                "The dashed line is the chance level, the dotted one the floor of soft targets.",
                tuple(blocks),
            ),
            Section("Health of the batches", "", (health_table(train),)),
        ),
        command=f"python scripts/train_align.py --config_path {folder / 'config.yaml'} --output=NEW_FOLDER",
        protocol={
            "steps": str(record["steps"]),
            "seconds": str(record["seconds"]),
            "control": record["shuffle"],
            "data": f"{record['data']['root']} ({record['data']['episodes']} episodes, {record['data']['fingerprint']})",
            "loss weights": json.dumps(record["loss"]),
        }
        | record["versions"],
    )
    path = folder / "report.html"
    write_report(path, report)
    return path


def answers(metrics: dict[str, float]) -> list[str]:
    """The sentences at the top."""
    sentences = []
    if "zero_shot" in metrics:
        sentences.append(
            f"Shown a held-out picture, the encoder picks the right instruction among those of the scene "
            f"{percent(metrics['zero_shot'])} of the time; chance is {percent(metrics['zero_shot/chance'])}."
        )
    sentences.append(
        f"Picture and instruction together find their own action chunk first {percent(metrics['context_to_action_r1'])} "
        f"of the time; chance is {percent(metrics['context_to_action_r1/chance'])}."
    )
    if "target_probe_r2" in metrics:
        sentences.append(
            f"A linear probe reads the instructed object's position from the text-conditioned context with R² "
            f"{metrics['target_probe_r2']:.2f}; without the text, {metrics['target_probe_r2_no_text']:.2f}."
        )
    return sentences


def measure_table(metrics: dict[str, float]) -> Table:
    """Each measure with its chance level."""
    names = [name for name in metrics if not name.endswith("/chance")]
    rows = tuple(
        (name, f"{metrics[name]:.3f}", f"{metrics[name + '/chance']:.3f}" if name + "/chance" in metrics else "")
        for name in names
    )
    return Table("Measures on held-out episodes", ("measure", "value", "chance"), rows)


def loss_figure(train: list[dict], name: str) -> Figure:
    """A term's loss with its chance level and floor."""
    steps = [line["step"] for line in train]
    loss, chance = ([line[f"{name}/{key}"] for line in train] for key in ("loss", "chance"))
    floor = [line[f"{name}/loss"] - line[f"{name}/excess"] for line in train]

    def draw(axes) -> None:
        axes.plot(steps, loss, color="#1f5fbf")
        axes.plot(steps, chance, "--", color="#888")
        axes.plot(steps, floor, ":", color="#888")
        axes.set(xlabel="step", ylabel="nats", title=TITLES[name])

    return figure(
        draw,
        f"{TITLES[name]}: from {loss[0]:.2f} to {loss[-1]:.2f} nats; chance {chance[-1]:.2f}, floor {floor[-1]:.2f}.",
    )


def measure_figures(validation: list[dict]) -> list[Figure]:
    """Held-out measures over the steps, where there is more than one evaluation."""
    if len(validation) < 2:
        return []
    steps = [line["step"] for line in validation]
    names = [n for n in ("zero_shot", "context_to_action_r1", "target_probe_r2") if f"validation/{n}" in validation[-1]]

    def draw(axes) -> None:
        for name in names:
            axes.plot(steps, [line[f"validation/{name}"] for line in validation], marker="o", label=name)
        axes.set(xlabel="step", ylim=(0, 1))
        axes.legend(frameon=False)

    return [figure(draw, "Held-out measures over training: " + ", ".join(names) + ".")]


def health_table(train: list[dict]) -> Table:
    """Means over the second half of the run."""
    half = train[len(train) // 2 :]
    names = (
        "distinct_goals",
        "distinct_scenes",
        "collision_rate",
        "idle_rate",
        "triplets_per_s",
        "data_wait",
        "grad_norm",
    )
    names += tuple(key for key in half[-1] if key.endswith("/scale"))
    rows = tuple((name, f"{sum(line[name] for line in half) / len(half):.3f}") for name in names)
    return Table("Means over the second half of the run", ("quantity", "value"), rows)
