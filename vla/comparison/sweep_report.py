"""The report of a sweep or of ablations, from its result alone."""

from typing import Any

from vla.comparison.points import label
from vla.comparison.report import interval
from vla.eval.report import COLORS, Figure, Report, Section, Table, figure, with_interval
from vla.eval.statistics import holm

MEASURES = (
    "image_to_text_r1",
    "context_to_action_r1",
    "zero_shot",
    "target_probe_r2",
    "state_probe_r2",
    "old/zero_shot",  # these three on the data that `align.forgetting` names, the last on goals that the start was not trained on
    "old/text_to_image_r1",
    "old_goals/zero_shot",
)


def sweep_report(result: dict[str, Any]) -> Report:
    """One table, and a figure for each swept field or a table of what each ablation changes."""
    swept, rows, points = result["swept"], result["rows"], result["points"]
    measures = measured(rows)
    lines = tuple(
        (
            label(row["point"]),
            str(row["seed"]),
            with_interval(row["success"], row["interval"]),
            *(f"{row['measures'][name]:.3f}" if name in row["measures"] else "-" for name in measures),
            f"{row['minutes']:.0f}",
        )
        for row in rows
    )
    header = (
        "values",
        "training seed",
        "success",
        *(name.replace("_", " ") for name in measures),
        "minutes of stage one",
    )
    every = Section("All runs", "", (Table("Success and alignment measures", header, lines),))
    if swept:
        title, answers = f"Sweep of {', '.join(swept)}", (highest_sentence(points),)
        parts = [Section(name, "", (field_figure(name, values, points, rows),)) for name, values in swept.items()]
        if points[0]["groups"]["plain"]["success"]["seeds"] > 1:
            parts.insert(
                0, Section("All points", "Intervals are over training seeds and episodes.", (points_table(points),))
            )
    else:
        compared = [point for point in points if "difference" in point["groups"]["plain"]]
        title, answers = "What each part gives", ablation_sentences(compared)
        parts = [
            Section(
                "One change at a time",
                "Each run against the configuration as it is, on the same episodes, in points of success. Intervals are over "
                "training seeds and episodes; with one seed over episodes alone.",
                (ablation_table(points),) if compared else (),
            )
        ]
    failed = tuple(f"{label(point)}: failed, see the logs in jobs." for point in result["failed"])
    return Report(
        title=title,
        answers=(*failed, *answers),
        sections=(*parts, every),
        command=result.get("command", ""),
        protocol={key: str(value) for key, value in result["versions"].items()},
    )


def measured(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The alignment measures that any of the runs has."""
    return tuple(name for name in MEASURES if any(name in row["measures"] for row in rows))


def highest_sentence(points: list[dict[str, Any]]) -> str:
    """Which point succeeds most, over its training seeds."""
    best = max(points, key=lambda point: point["groups"]["plain"]["success"]["value"])
    success = best["groups"]["plain"]["success"]
    seeds = f"{success['seeds']} training seeds" if success["seeds"] > 1 else "one training seed"
    return (
        f"The highest success, {interval(success)} ({seeds}), is at {label(best['point'])}. The best of several is too high by "
        "chance; its neighbours say whether it stands out."
    )


def points_table(points: list[dict[str, Any]]) -> Table:
    """Success over training seeds at every point, by group of episodes."""
    groups = tuple(points[0]["groups"])
    lines = tuple(
        (label(point["point"]), *(interval(point["groups"][group]["success"]) for group in groups)) for point in points
    )
    return Table("Success over training seeds", ("values", *groups), lines)


def ablation_sentences(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """What each change does to success on plain episodes, beyond chance or not (Holm's correction for the number of changes)."""
    differences = [row["groups"]["plain"]["difference"] for row in rows]
    sentences = []
    for row, difference, p in zip(rows, differences, holm([d["p_value"] for d in differences]), strict=True):
        sure = "" if p < 0.05 else ", not beyond chance among so many changes"
        seeds = "" if difference["seeds"] > 1 else " (one training seed)"
        sentences.append(f"{label(row['point'])}: {points_of_success(difference)} points of success{seeds}{sure}.")
    return tuple(sentences)


def ablation_table(rows: list[dict[str, Any]]) -> Table:
    """Success of the first as it is and the differences of all changes from it, by group of episodes."""
    groups = tuple(rows[0]["groups"])
    lines = [("as it is", *(interval(rows[0]["groups"][group]["success"]) for group in groups))]
    for row in rows[1:]:
        lines.append(
            (label(row["point"]), *(points_of_success(row["groups"][group]["difference"]) for group in groups))
        )
    return Table("Differences in success", ("change", *groups), tuple(lines))


def points_of_success(difference: dict[str, Any]) -> str:
    """`-12 [-20, -4]`."""
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.0f} [{low:+.0f}, {high:+.0f}]"


def field_figure(
    name: str, values: tuple[str, ...], points: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> Figure:
    """Success over training seeds with its interval, and each run's probe for the instructed object, against one field's values."""

    def draw(axes) -> None:
        for point in points:
            success, x = point["groups"]["plain"]["success"], values.index(point["point"][name])
            spread = [[success["value"] - success["low"]], [success["high"] - success["value"]]]
            axes.errorbar([x], [success["value"]], yerr=spread, marker="o", capsize=3, color=COLORS[0])
        for row in rows:
            if "target_probe_r2" in row["measures"]:
                x = values.index(row["point"][name])
                axes.plot([x], [max(0.0, row["measures"]["target_probe_r2"])], marker="s", color=COLORS[1])
        axes.set(xticks=range(len(values)), xticklabels=values, ylim=(0, 1), xlabel=name)
        axes.set_ylabel("success (dots), probe for the instructed object (squares)", fontsize=8)
        axes.grid(axis="y", alpha=0.3)

    said = "; ".join(f"{point['point'][name]}: {interval(point['groups']['plain']['success'])}" for point in points)
    return figure(draw, f"Success against {name}: {said}.")
