"""The report of a comparison, from its summary alone."""

from typing import Any

from vla.eval.evaluation_report import LANGUAGE, curve_figure
from vla.eval.report import COLORS, Figure, Report, Section, Table, figure


def comparison_report(result: dict[str, Any]) -> Report:
    """What compare.py writes as report.html."""
    groups = list(dict.fromkeys(row["group"] for row in result["success"]))
    sections = [Section("The arms", "", (Table("Arms", ("arm", "what it is"), tuple(result["arms"].items())),))]
    for group in groups:
        rows = [row for row in result["success"] if row["group"] == group]
        sections.append(Section(f"Success, {group}", "", (success_table(group, rows), success_figure(group, rows))))
    sections += level_sections(result["levels"])
    sections.append(
        Section(
            "Differences",
            "First minus second, the same training seeds and episodes. Intervals span training seeds and episodes; p-values are "
            "corrected for the number of differences in one group (Holm).",
            tuple(contrast_table(result, group) for group in groups if any_contrast(result, group)),
        )
    )
    if result["validity"]:
        sections.append(
            Section(
                "Which measure tells success?",
                "Spearman's correlation of a measure of the encoder with the closed-loop success of frozen policies on it, over encoders and "
                "training seeds.",
                (validity_table(result),),
            )
        )
    return Report(
        title="Did the alignment help?",
        answers=tuple(answers(result)),
        sections=tuple(sections),
        command=result["command"],
        protocol=result["protocol"],
    )


def answers(result: dict[str, Any]) -> list[str]:
    """A sentence for each difference at the most demonstrations, on plain episodes first."""
    sentences = []
    for row in result["contrasts"]:
        if row["group"] not in ("plain", "perturbed", "held-out combinations"):
            continue
        low, high = round(100 * row["low"]), round(100 * row["high"])
        points = f"{abs(100 * row['value']):.0f} points [{low}, {high}]"
        where = f"{row['group']} episodes, {demonstrations(row['demonstrations'])}"
        if row["holm_p"] < 0.05 and row["value"] > 0:
            sentences.append(f"{row['first']} beats {row['second']} by {points} ({where}).")
        elif row["holm_p"] < 0.05:
            sentences.append(f"{row['first']} loses to {row['second']} by {points} ({where}).")
        else:
            sentences.append(
                f"{row['first']} and {row['second']} do not differ beyond chance: {100 * row['value']:+.0f} points "
                f"[{low}, {high}] ({where})."
            )
    return sentences


def demonstrations(count: int) -> str:
    """`5 demonstrations of each task`."""
    return f"{count} demonstrations of each task" if count else "all demonstrations"


def interval(row: dict[str, Any]) -> str:
    """`72 % [61, 83]`."""
    return f"{100 * row['value']:.0f} % [{100 * max(row['low'], 0):.0f}, {100 * min(row['high'], 1):.0f}]"


def success_table(group: str, rows: list[dict[str, Any]]) -> Table:
    """Arms by number of demonstrations."""
    numbers = list(dict.fromkeys(row["demonstrations"] for row in rows))
    found = {(row["arm"], row["demonstrations"]): row for row in rows}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [found.get((arm, count)) for count in numbers]
        minutes = [f"{c['minutes']:.0f}" for c in cells if c and c["minutes"] is not None]
        lines.append((arm, *(interval(c) if c else "-" for c in cells), minutes[-1] if minutes else "-"))
    heads = tuple(demonstrations(count) for count in numbers)
    return Table(f"Success on {group} episodes", ("arm", *heads, "minutes of training"), tuple(lines))


def success_figure(group: str, rows: list[dict[str, Any]]) -> Figure:
    """Success against the number of demonstrations, a line an arm."""
    numbers = list(dict.fromkeys(row["demonstrations"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))

    def draw(axes) -> None:
        for i, arm in enumerate(arms):
            points = [row for row in rows if row["arm"] == arm]
            x = [numbers.index(row["demonstrations"]) + 0.05 * (i - len(arms) / 2) for row in points]
            y = [row["value"] for row in points]
            spread = [[r["value"] - max(r["low"], 0) for r in points], [min(r["high"], 1) - r["value"] for r in points]]
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=2, color=COLORS[i % len(COLORS)], label=arm)
        axes.set(xticks=range(len(numbers)), xticklabels=[str(n) if n else "all" for n in numbers], ylim=(0, 1))
        axes.set(xlabel="demonstrations of each task", ylabel="success rate")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

    text = "; ".join(
        f"{row['arm']} {100 * row['value']:.0f} % at {demonstrations(row['demonstrations'])}" for row in rows
    )
    return figure(draw, f"Success on {group} episodes: {text}.", (7.5, 3.6))


def level_sections(rows: list[dict[str, Any]]) -> list[Section]:
    """Every split by its levels: curves for perturbations, a table for kinds of wording and combination."""
    most = max((row["demonstrations"] or float("inf") for row in rows), default=0)
    rows = [row for row in rows if (row["demonstrations"] or float("inf")) == most]
    curves: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    kinds: dict[str, dict[str, str]] = {}
    plain = {row["arm"]: rate_of(row) for row in rows if row["split"] == "train"}
    for row in rows:
        if row["split"] in LANGUAGE:
            kinds.setdefault(row["arm"], {})[f"{row['split']}/{row['level']}"] = interval(row)
        elif row["split"] != "train":
            points = curves.setdefault(row["split"], {}).setdefault(row["arm"], [(0, plain[row["arm"]])])
            points.append((row["level"], rate_of(row)))
    sections = []
    where = demonstrations(0 if most == float("inf") else int(most))
    if curves:
        figures = tuple(curve_figure(arms, f"Success against {name} level") for name, arms in curves.items())
        sections.append(Section("As perturbations grow", f"With {where}.", figures))
    if kinds:
        names = tuple(dict.fromkeys(name for cells in kinds.values() for name in cells))
        lines = tuple((arm, *(cells.get(name, "-") for name in names)) for arm, cells in kinds.items())
        table = Table("Success by kind of wording and combination", ("arm", *names), lines)
        sections.append(Section("New wordings and combinations", f"With {where}.", (table,)))
    return sections


def rate_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a rate with its interval."""
    return {"success_rate": row["value"], "interval": [max(row["low"], 0.0), min(row["high"], 1.0)]}


def any_contrast(result: dict[str, Any], group: str) -> bool:
    """Whether arms that make a difference were run."""
    return any(row["group"] == group for row in result["contrasts"])


def contrast_table(result: dict[str, Any], group: str) -> Table:
    """The differences on one group of episodes."""
    rows = tuple(
        (
            f"{row['first']} - {row['second']}",
            row["says"],
            demonstrations(row["demonstrations"]),
            f"{100 * row['value']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]",
            f"{row['holm_p']:.3f}",
            f"{row['mcnemar_p']:.3f}",
        )
        for row in result["contrasts"]
        if row["group"] == group
    )
    heads = (
        "difference",
        "shows",
        "demonstrations",
        "points, 95 % interval",
        "p (Holm)",
        "p (McNemar, these seeds only)",
    )
    return Table(f"Differences on {group} episodes", heads, rows)


def validity_table(result: dict[str, Any]) -> Table:
    """Measures by the strength of their correlation with plain success."""
    rows = sorted(result["validity"], key=lambda row: -abs(row["rho"]))
    return Table(
        "Correlation of measures with success",
        ("measure", "episodes", "demonstrations", "Spearman's rho, 95 % interval", "encoders"),
        tuple(
            (
                row["measure"].replace("_", " "),
                row["group"],
                demonstrations(row["demonstrations"]),
                f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]",
                str(row["encoders"]),
            )
            for row in rows
        ),
    )
