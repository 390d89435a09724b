"""The report of an alignment run, from its metrics.jsonl, alignment.json and views.safetensors alone."""

import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from vla.eval.alignment_views import Views, load_views
from vla.eval.report import COLORS, Figure, Report, Section, Table, figure, percent, write_report

TITLES = {
    "context_action": "context -> action (text-conditioned patches against the action chunk)",
    "word_patch": "words <-> patches (late interaction)",
    "vision_language": "vision <-> language (pooled image against the instruction)",
    "state": "scene <-> state (patches against proprio)",
    "transition_action": "transition <-> actions (two pictures of an episode against the actions between)",
    "transition_language": "transition <-> language (two pictures of an episode against the instruction)",
}


def write_alignment_report(folder: Path) -> Path:
    """Write FOLDER/report.html and return it."""
    record = json.loads((folder / "alignment.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    validation = [line for line in lines if any(key.startswith("validation/") for key in line)]
    terms = [name for name in TITLES if any(f"{name}/loss" in line for line in train)]
    blocks: list[Table | Figure] = [*(loss_figure(train, name) for name in terms), scale_figure(train, terms)]
    report = Report(
        title="Stage one: alignment",
        answers=(
            *answers(record["metrics"], record["loss"]),
            *(f"Warning: {text}" for text in record.get("warnings", ())),
        ),
        sections=(
            Section(
                "Held-out measures",
                "Every measure that has a chance level stands beside it.",
                (measure_table(record["metrics"]),),
            ),
            Section("Measures over training", "", tuple(measure_figures(validation))),
            Section(
                "Held-out rows",
                "Pictures of episodes that stage one has not trained on, and what was asked in them.",
                tuple(view_figures(load_views(folder / "views.safetensors"))),
            ),
            *([way_section(record["way"])] if record["way"] else []),
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


def answers(metrics: dict[str, float], weights: dict[str, float]) -> list[str]:
    """The sentences at the top; none of the context if nothing trained its projection."""
    sentences = []
    if "zero_shot" in metrics:
        sentences.append(
            f"Shown a picture of the second half of a held-out episode, the encoder picks the right instruction among those of the scene (of all held-out goals where the "
            f"scene is unknown or has one) "
            f"{percent(metrics['zero_shot'])} of the time; chance is {percent(metrics['zero_shot/chance'])}."
        )
    if "zero_shot_reworded" in metrics:
        sentences.append(
            f"Told in other words, which the data set has for the same goals, {percent(metrics['zero_shot_reworded'])}; for the "
            f"same pictures in the episodes' own words {percent(metrics['zero_shot_reworded/own_words'])}."
        )
    if weights["context_action"]:
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
    train = [line for line in train if f"{name}/loss" in line]  # a batch may hold nothing for a term
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


def scale_figure(train: list[dict], terms: list[str]) -> Figure:
    """What each term multiplies its cosines by, over the steps."""
    curves = {
        name: [(line["step"], line[f"{name}/scale"]) for line in train if f"{name}/loss" in line] for name in terms
    }

    def draw(axes) -> None:
        for (name, points), color in zip(curves.items(), COLORS, strict=False):
            axes.plot(*zip(*points, strict=True), color=color, label=name)
        axes.set(xlabel="step", ylabel="scale (1 / temperature)")
        axes.legend(frameon=False, fontsize=8)

    said = "; ".join(f"{name} {points[0][1]:.1f} -> {points[-1][1]:.1f}" for name, points in curves.items())
    return figure(draw, f"Scales of the cosines: {said}.")


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


def way_section(way: list[dict[str, float]]) -> Section:
    """What the encoder tells apart at shares of the way from its pretrained start to its trained weights."""
    names = [name for name in way[0] if name != "share" and not name.endswith("/chance")]
    shown = [name for name in names if name.endswith(("zero_shot", "image_to_text_r1", "text_to_image_r1"))]
    shares = [point["share"] for point in way]
    colors: dict[str, str] = {}

    def draw(axes) -> None:
        for name in shown:
            data, measure = name.split("/")
            style = {"new": "-", "old": "--", "old_goals": ":"}[data]
            color = colors.setdefault(measure, COLORS[len(colors)])
            axes.plot(shares, [point[name] for point in way], style, marker="o", color=color, label=name)
        axes.set(xlabel="share of the way from the start (0) to the trained weights (1)", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=8)

    kept = [f"{name} {way[0][name]:.2f} -> {way[-1][name]:.2f}" for name in shown]
    rows = tuple((f"{point['share']:g}", *(f"{point[name]:.3f}" for name in shown)) for point in way)
    return Section(
        "From the pretrained start",
        "Weights between the start and the trained ones, on the held-out episodes of the new data, and of the start's own (old) where "
        "they are given: what falls there was forgotten. old_goals are those of them whose goals the start never trained on.",
        (
            figure(draw, "From start to end: " + "; ".join(kept) + "."),
            Table("Measures along the way", ("share", *shown), rows),
        ),
    )


def view_figures(views: Views) -> list[Figure]:
    """Similarity heat map, map of the embeddings, nearest neighbours."""
    figures = [heat_map(views)]
    if len(views.position):
        figures.append(embedding_map(views))
    return [*figures, neighbours(views)]


def heat_map(views: Views) -> Figure:
    """Pictures against instructions; the right ones are framed."""

    def draw(axes) -> None:
        count, texts = views.similarity.shape
        image = axes.imshow(views.similarity, cmap="viridis")
        for row, picture in enumerate(views.pictures):
            axes.imshow(picture, extent=(-1.7, -0.7, row + 0.5, row - 0.5))
        for row, column in np.argwhere(views.right):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#e4572e", linewidth=2))
        axes.set(xlim=(-1.75, texts - 0.5), ylim=(count - 0.5, -0.5), yticks=[])
        axes.set_xticks(range(texts), [plain(text, 26) for text in views.instructions], rotation=90, fontsize=7)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.figure.colorbar(image, ax=axes, label="cosine", shrink=0.6)

    first = int((views.similarity.argmax(1) == views.right.argmax(1)).sum())
    return figure(
        draw,
        f"Cosine of {len(views.pictures)} pictures at the end of their episodes with their instructions; the right one is framed "
        f"and is the most similar for {first} of them.",
        size=(7.0, 6.0),
    )


def embedding_map(views: Views) -> Figure:
    """Two copies of the map, coloured by goal and by progress."""

    def draw(axes) -> None:
        by_goal, by_progress = axes
        by_goal.scatter(*views.position.T, s=3, color="#bbb")
        for color, (goal, text) in zip(COLORS, views.named_goals.items(), strict=False):
            by_goal.scatter(*views.position[views.goal_id == int(goal)].T, s=12, color=color, label=plain(text, 34))
        by_goal.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.02))
        points = by_progress.scatter(*views.position.T, s=4, c=views.progress, cmap="viridis", vmin=0, vmax=1)
        by_progress.figure.colorbar(points, ax=by_progress, label="progress", location="bottom")
        for one in axes:
            one.set(xticks=[], yticks=[])

    return figure(
        draw,
        f"Map of the contexts of {len(views.position)} held-out rows (t-SNE of the cosines): on the left the most frequent goals in "
        "colour, on the right the share of the episode that has passed.",
        size=(7.0, 4.6),
        grid=(1, 2),
    )


def neighbours(views: Views) -> Figure:
    """Each query in the first column, its neighbours after it."""
    queries, columns = views.neighbour_goal_id.shape
    right = views.neighbour_goal_id[:, 1:] == views.neighbour_goal_id[:, :1]

    def draw(axes) -> None:
        for number, one in enumerate(np.atleast_2d(axes).flat):
            row, column = divmod(number, columns)
            one.imshow(views.neighbours[row, column])
            one.set(xticks=[], yticks=[])
            color = "#4d4d4d" if column == 0 else "#2a9d5c" if right[row, column - 1] else "#999"
            one.set_title(plain(views.neighbour_instructions[number], 22), fontsize=6.5, color=color)

    return figure(
        draw,
        f"{queries} pictures with their instructions (first column) and the {columns - 1} rows of other episodes whose context is the most "
        f"similar; {int(right.sum())} of {right.size} have the same goal (green).",
        size=(7.0, 1.75 * queries),
        grid=(queries, columns),
    )


def plain(text: str, width: int) -> str:
    """A text in lines of at most `width`, that the drawing does not take for a formula."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


def health_table(train: list[dict]) -> Table:
    """Means over the second half of the run."""
    half = train[len(train) // 2 :]
    names = (
        "distinct_goals",
        "distinct_instructions",
        "distinct_scenes",
        "collision_rate",
        "idle_rate",
        "triplets_per_s",
        "data_wait",
        "grad_norm",
    )
    names += tuple(key for key in half[-1] if key.endswith("/scale"))
    names = tuple(
        name for name in names if all(name in line for line in half)
    )  # a run may have begun before one was logged
    rows = tuple((name, f"{sum(line[name] for line in half) / len(half):.3f}") for name in names)
    return Table("Means over the second half of the run", ("quantity", "value"), rows)
