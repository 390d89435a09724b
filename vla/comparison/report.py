"""The report of a comparison, from its summary alone."""

from collections import Counter
from typing import Any

from vla.eval.evaluation_report import LANGUAGE, curve_figure
from vla.eval.report import Figure, Report, Section, Table, figure, line_style

MAIN_GROUPS = ("plain", "perturbed", "held-out combinations")  # what the answers at the top are about


def comparison_report(result: dict[str, Any]) -> Report:
    """What compare.py writes as report.html."""
    groups = list(dict.fromkeys(row["group"] for row in result["success"]))
    sections = [Section("The arms", "", (Table("Arms", ("arm", "what it is"), tuple(result["arms"].items())),))]
    for group in groups:
        rows = [row for row in result["success"] if row["group"] == group]
        sections.append(Section(f"Success, {group}", "", (success_table(group, rows), success_figure(group, rows))))
    sections += level_sections(result["levels"])
    if result["contrasts"]:
        sections.append(
            Section(
                "Differences",
                f"First minus second, the same training seeds and episodes. {spanned(result)} All episodes of one scene count as one "
                "observation. p-values are corrected for the arms compared on one group of episodes at the same numbers of demonstrations "
                "(Holm); the intervals are not. McNemar's test is of each training seed alone.",
                tuple(contrast_table(result, group) for group in groups if any_contrast(result, group)),
            )
        )
    if result.get("measures"):  # older versions wrote none
        sections.append(
            Section(
                "What the encoders know",
                "Measures of each frozen encoder on held-out episodes of what it was aligned on, a value for every training seed: linear probes "
                "(R², 0 is knowing nothing) for the instructed object's position, the proprio state and the time to go, then retrieval and "
                "zero-shot accuracy, by chance as in the last line. What was not trained, as a cloned encoder's projections, says nothing.",
                (measures_table(result["measures"]),),
            )
        )
    if result["validity"]:
        sections.append(
            Section(
                "Which measure tells success?",
                "Spearman's correlation of a measure of the encoder with the closed-loop success of frozen policies on it. Each encoder is "
                "the mean of its training seeds. The strongest of many measures owe part of their place to luck.",
                validity_tables(result),
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
    """What is transferred, if something is; a sentence for each difference at its most demonstrations, on plain episodes first, and what is done as told."""
    most: dict[tuple[str, str], int] = {}
    for row in result["contrasts"]:
        pair = row["first"], row["second"]
        most[pair] = max(most.get(pair, number_of_second(row)), number_of_second(row), key=amount)
    shown = [group for group in MAIN_GROUPS if any_contrast(result, group)]
    sentences = [
        difference_sentence(row)
        for group in shown
        for row in result["contrasts"]
        if row["group"] == group and number_of_second(row) == most[row["first"], row["second"]]
    ]
    swapped = [row for row in result["success"] if row["group"] == "swapped instructions"]
    if not sentences:
        sentences = [
            f"{row['arm']} succeeds in {interval(row)} ({demonstrations(row['demonstrations'])})."
            for row in result["success"]
            if row["group"] == "plain"
        ]
    return (
        transferred(result.get("config", {}))
        + sentences
        + [
            f"{row['arm']} follows {interval(row)} of the instructions that were exchanged for another of the scene "
            f"({demonstrations(row['demonstrations'])})."
            for row in swapped
            if row["demonstrations"] in (usual_number(swapped), None)
        ]
    )


def transferred(config: dict[str, Any]) -> list[str]:
    """What encoders and policies saw of the tasks in few-shot transfer."""
    if not config.get("transfer"):
        return []
    tasks = " and ".join(config["transfer"])
    beside = " beside all demonstrations of the others" if config.get("transfer_weight") else ""
    return [
        f"Few-shot transfer: encoders, aligned or cloned, are pretrained on all tasks but {tasks}; policies clone the given number of "
        f"demonstrations of each of these{beside}, and are evaluated on {tasks} alone."
    ]


def difference_sentence(row: dict[str, Any]) -> str:
    """Who beats whom by how much, or that chance explains it."""
    value, low, high = (100 * row[name] for name in ("value", "low", "high"))
    seeds = "" if row["seeds"] > 1 else ", one training seed"
    where = f"{row['group']}, {compared_demonstrations(row)}{seeds}"
    if row["holm_p"] < 0.05 and value > 0:
        return f"{row['first']} beats {row['second']} by {value:.0f} points [{low:.0f}, {high:.0f}] ({where})."
    if row["holm_p"] < 0.05:
        return f"{row['first']} loses to {row['second']} by {-value:.0f} points [{-high:.0f}, {-low:.0f}] ({where})."
    alone = low > 0 or high < 0
    what = "chance among several comparisons" if alone else "chance"
    return f"{row['first']} and {row['second']} do not differ beyond {what}: {value:+.0f} points [{low:.0f}, {high:.0f}] ({where})."


def spanned(result: dict[str, Any]) -> str:
    """What the intervals of differences are over."""
    seeds = max((row["seeds"] for row in result["contrasts"]), default=1)
    if seeds > 1:
        return f"Intervals span {seeds} training seeds and the scenes."
    return "Intervals span the scenes alone: with one training seed they say nothing of others."


def amount(count: int | None) -> float:
    """For ordering numbers of demonstrations: 0 stands for all; policies as given come first."""
    return -1.0 if count is None else count or float("inf")


def numbers_in(rows: list[dict[str, Any]]) -> list[int | None]:
    """The numbers of demonstrations, the fewest first, policies as given last."""
    return sorted({row["demonstrations"] for row in rows}, key=lambda number: (number is None, amount(number)))


def usual_number(rows: list[dict[str, Any]]) -> int | None:
    """The number of demonstrations that most rows have, of equals the largest, but for snapshots, which have one; None if all are of policies as given."""
    counted = Counter(
        row["demonstrations"] for row in rows if row["demonstrations"] is not None and "@" not in row["arm"]
    )
    return max(counted, key=lambda number: (counted[number], amount(number)), default=None)


def demonstrations(count: int | None) -> str:
    """`5 demonstrations of each task`."""
    if count is None:
        return "as given"
    return f"{count} demonstrations of each task" if count else "all demonstrations"


def number_of_second(row: dict[str, Any]) -> int:
    """The number of demonstrations of a difference's second arm; files of older versions know only differences at the same one."""
    return row.get("demonstrations_of_second", row["demonstrations"])


def compared_demonstrations(row: dict[str, Any]) -> str:
    """`5 demonstrations of each task`, or `25 demonstrations of each task against all demonstrations`."""
    first, second = row["demonstrations"], number_of_second(row)
    return demonstrations(first) + (f" against {demonstrations(second)}" if first != second else "")


def interval(row: dict[str, Any]) -> str:
    """`72 % [61, 83]`."""
    return f"{100 * row['value']:.0f} % [{100 * max(row['low'], 0):.0f}, {100 * min(row['high'], 1):.0f}]"


def success_table(group: str, rows: list[dict[str, Any]]) -> Table:
    """Arms by number of demonstrations."""
    numbers = numbers_in(rows)
    found = {(row["arm"], row["demonstrations"]): row for row in rows}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [found.get((arm, count)) for count in numbers]
        minutes = [f"{c['minutes']:.0f}" for c in cells if c and c["minutes"] is not None]
        lines.append((arm, *(interval(c) if c else "-" for c in cells), minutes[-1] if minutes else "-"))
    heads = tuple(demonstrations(count) for count in numbers)
    return Table(
        f"Success rates with 95 % intervals, {group}",
        ("arm", *heads, "minutes of training, token caches aside"),
        tuple(lines),
    )


def success_figure(group: str, rows: list[dict[str, Any]]) -> Figure:
    """Success against the number of demonstrations, a line an arm."""
    numbers = numbers_in(rows)
    arms = list(dict.fromkeys(row["arm"] for row in rows))

    def draw(axes) -> None:
        for i, arm in enumerate(arms):
            points = [row for row in rows if row["arm"] == arm]
            x = [numbers.index(row["demonstrations"]) + 0.05 * (i - len(arms) / 2) for row in points]
            y = [row["value"] for row in points]
            spread = [[r["value"] - max(r["low"], 0) for r in points], [min(r["high"], 1) - r["value"] for r in points]]
            axes.errorbar(x, y, yerr=spread, capsize=2, label=arm, **line_style(i))
        axes.set(
            xticks=range(len(numbers)),
            xticklabels=["given" if n is None else str(n) if n else "all" for n in numbers],
            ylim=(0, 1),
        )
        axes.set(xlabel="demonstrations of each task", ylabel="success rate")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

    text = "; ".join(
        f"{row['arm']} {100 * row['value']:.0f} % at {demonstrations(row['demonstrations'])}" for row in rows
    )
    return figure(draw, f"Success, {group}: {text}.", (7.5, 3.6))


def level_sections(rows: list[dict[str, Any]]) -> list[Section]:
    """Every split by its levels: curves for perturbations, a table for kinds of wording and combination."""
    usual, every = usual_number(rows), {row["arm"] for row in rows}
    rows = [row for row in rows if row["demonstrations"] in (usual, None)]
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
    where = "policies as they are" if usual is None else demonstrations(usual)
    if missing := sorted(arm for arm in every - {row["arm"] for row in rows} if "@" not in arm):
        where += f"; {', '.join(missing)}, trained on other numbers, {'is' if len(missing) == 1 else 'are'} in the tables above"
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
            compared_demonstrations(row),
            f"{100 * row['value']:+.0f} [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]",
            f"{row['holm_p']:.3f}",
            ", ".join(f"{p:.3f}" for p in row["mcnemar_p"]) if row["mcnemar_p"] else "-",
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
        "p (McNemar, each seed)",
    )
    return Table(f"Differences, {group}", heads, rows)


def measures_table(rows: list[dict[str, Any]]) -> Table:
    """Arms by measures, `0.80, 0.79, 0.77` for three training seeds; the chance level last."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))

    def line(name: str, chosen: list[dict[str, Any]], key: str) -> tuple[str, ...]:
        of = [[f"{row[key]:.2f}" for row in chosen if row["measure"] == m and row[key] is not None] for m in measures]
        return (name, *(", ".join(values) or "-" for values in of))

    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [line(arm, [row for row in rows if row["arm"] == arm], "value") for arm in arms]
    first = [
        row for row in rows if row["arm"] == arms[0]
    ]  # chance is of a seed's held-out episodes, alike for all arms
    heads = ("encoder of", *(measure.replace("_", " ") for measure in measures))
    return Table("Alignment measures by training seed", heads, (*lines, line("chance", first, "chance")))


def validity_tables(result: dict[str, Any]) -> tuple[Table, ...]:
    """For each number of demonstrations measures by groups of episodes, the strongest correlation in the first group first."""
    tables = []
    for count in dict.fromkeys(row["demonstrations"] for row in result["validity"]):
        rows = [row for row in result["validity"] if row["demonstrations"] == count]
        groups = list(dict.fromkeys(row["group"] for row in rows))
        cells: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            cells.setdefault(row["measure"], {})[row["group"]] = row
        order = sorted(cells, key=lambda measure: -abs(cells[measure].get(groups[0], {}).get("rho", 0)))
        tables.append(
            Table(
                f"Spearman's rho with success, {demonstrations(count)}, {rows[0]['encoders']} encoders",
                ("measure", *groups),
                tuple(
                    (measure.replace("_", " "), *(correlation(cells[measure].get(group)) for group in groups))
                    for measure in order
                ),
            )
        )
    return tuple(tables)


def correlation(row: dict[str, Any] | None) -> str:
    """`+0.90 [+0.10, +0.99]`."""
    return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row else "-"
