"""The report of an evaluation, from its result alone."""

from pathlib import Path
from typing import Any

from vla.eval.episode import EpisodeRecord
from vla.eval.report import Figure, Report, Section, Table, Video, figure, line_style, with_interval
from vla.versions import told

SPLIT_TEXTS = {
    "paraphrase": "new wordings of known words (level 1 the verb's part, level 2 the object's)",
    "synonym": "unseen words (level 1 verbs, level 2 nouns and colours)",
    "combination": "unseen combinations of verb, colour and shape (level 2: the pair is never named in training)",
    "distractors": "additional objects",
    "light": "brightness, colour and gradient of the light",
    "texture": "patterned table",
    "camera": "camera shifted and rotated",
    "position": "positions outside the training range",
}


LANGUAGE = ("paraphrase", "synonym", "combination")  # splits whose levels are kinds; those of the others are amounts


def evaluation_report(result: dict[str, Any], output: Path, films: list[EpisodeRecord]) -> Report:
    """What evaluate.py writes as report.html."""
    sections = [
        Section("Success by task", "", (rate_table("Success by task", result["tasks"]), rate_figure(result["tasks"])))
    ]
    splits = {name: part for name, part in result["splits"].items() if name != "train"}
    if splits:
        text = "; ".join(f"{n}: {t}" for n, t in SPLIT_TEXTS.items() if any(s.split("/")[0] == n for s in splits))
        blocks: list[Table | Figure] = [rate_table("Success by split", splits)]
        blocks.append(rate_figure({"train": result} | splits))
        curves = curves_of(result)
        if curves:
            blocks.append(curve_figure(curves, "Success as each perturbation grows"))
        sections.append(Section("What training never saw", f"NAME/LEVEL. {text}.", tuple(blocks)))
    if result["grounding"]:
        sections.append(
            Section(
                "Does it obey the instruction?",
                "Swap: the identical initial state, told another goal about another object. Blank and wrong text: nothing, "
                "or another scene's instruction, is told, and the scene's own goal is scored; chance is how often that goal "
                "gets done while the policy is told another goal of the scene. The score is the share of new goals that get "
                "done because they were told: follows new less chance of new.",
                (grounding_table(result["grounding"]),),
            )
        )
    for title, wanted in (("Successes", True), ("Failures", False)):
        videos = tuple(
            Video(output / "videos" / f.video, f"{f.instruction} (seed {f.seed})") for f in films if f.success == wanted
        )
        if videos:
            sections.append(Section(title, "", videos))
    return Report(
        title=f"Evaluation on {result['config']['env']}",
        answers=tuple(answers(result)),
        sections=tuple(sections),
        command=result["command"],
        protocol=protocol(result),
    )


def failures_report(result: dict[str, Any], output: Path, films: list[EpisodeRecord]) -> Report:
    """The failure browser: failed episodes by split, each as a video with where the policy looked."""
    parts: dict[str, list[EpisodeRecord]] = {}
    for film in films:
        name = "swapped instructions" if film.kind == "swap" else f"{film.split}/{film.level}"
        parts.setdefault("plain" if name == "train/1" else name, []).append(film)
    sections = tuple(
        Section(
            f"{name}: {len(members)} of its failures",
            "",
            tuple(Video(output / "failures" / f.video, f"{f.task}: {f.instruction} (seed {f.seed})") for f in members),
        )
        for name, members in parts.items()
    )
    failed = sum(not e["success"] for e in result["episodes"] if e["kind"] in ("success", "swap"))
    return Report(
        title="Where it fails",
        answers=(
            f"{len(films)} of {failed} failed episodes, taken in turn from every split.",
            "Beside each picture the same one, lit where the text-conditioned pooling looks; other policies have the picture only.",
        ),
        sections=sections,
        command=result["command"],
        protocol=protocol(result),
    )


def answers(result: dict[str, Any]) -> list[str]:
    """The sentences at the top."""
    final = result["success_final"]
    at_end = f"; at the final timestep {with_interval(final['success_rate'], final['interval'])}" if final else ""
    sentences = [
        f"The policy succeeds in {with_interval(result['success_rate'], result['interval'])} of {result['n']} episodes{at_end}."
    ]
    if problem := (result.get("golden") or {}).get("problem"):
        sentences.append(f"Warning: {problem}.")
    grounding = result["grounding"]
    if "swap" in grounding:
        follows = grounding["swap"]["follows_new"]
        sentences.append(
            f"It follows {with_interval(follows['success_rate'], follows['interval'])} of {follows['n']} swapped instructions."
        )
    if "score" in grounding:
        score = grounding["score"]
        low, high = (100 * bound for bound in score["interval"])
        sentences.append(
            f"Grounding score {100 * score['value']:.0f} [{low:.0f}, {high:.0f}] of 100: done because told."
        )
    if "blank" in grounding:
        chance = grounding.get("chance")
        beside = f"; chance is {with_interval(chance['success_rate'], chance['interval'])}" if chance else ""
        blank = grounding["blank"]
        sentences.append(
            f"Told nothing, it succeeds in {with_interval(blank['success_rate'], blank['interval'])}{beside}."
        )
    held_out = {n: p for n, p in result["splits"].items() if n.startswith("combination")}
    for name, part in held_out.items():
        sentences.append(
            f"On held-out combinations, level {name.split('/')[1]}, it succeeds in "
            f"{with_interval(part['success_rate'], part['interval'])}."
        )
    return sentences


def rate_table(caption: str, parts: dict[str, dict[str, Any]]) -> Table:
    """Rates with 95 % Wilson intervals."""
    rows = tuple(
        (name, with_interval(part["success_rate"], part["interval"]), str(part["n"])) for name, part in parts.items()
    )
    return Table(caption, ("of", "success, 95 % interval", "episodes"), rows)


def rate_figure(parts: dict[str, dict[str, Any]]) -> Figure:
    """Rates as points with intervals."""
    names = list(parts)
    rates = [parts[n]["success_rate"] for n in names]

    def draw(axes) -> None:
        for row, name in enumerate(names):
            low, high = parts[name]["interval"]
            axes.plot([low, high], [row, row], color="#1f5fbf", lw=3, alpha=0.4, solid_capstyle="round")
            axes.plot(rates[row], row, "o", color="#1f5fbf")
        axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="success rate")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)

    description = "Success rates with intervals: " + ", ".join(
        f"{n} {100 * r:.0f} %" for n, r in zip(names, rates, strict=True)
    )
    return figure(draw, description + ".", (7.0, 0.7 + 0.3 * len(names)))


def curves_of(result: dict[str, Any]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(level, rate) of every perturbation, level 0 being the plain episodes."""
    curves: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for name, part in result["splits"].items():
        split, _, level = name.partition("/")
        if level and split not in LANGUAGE:
            curves.setdefault(split, [(0, result)]).append((int(level), part))
    return curves


def curve_figure(curves: dict[str, list[tuple[int, dict[str, Any]]]], title: str) -> Figure:
    """Success against level, a line each."""

    def draw(axes) -> None:
        for i, (name, points) in enumerate(curves.items()):
            levels = [level + 0.03 * (i - len(curves) / 2) for level, _ in points]
            rates = [part["success_rate"] for _, part in points]
            spread = [[abs(part["success_rate"] - part["interval"][side]) for _, part in points] for side in (0, 1)]
            axes.errorbar(levels, rates, yerr=spread, capsize=2, label=name, **line_style(i))
        axes.set(xticks=sorted({level for points in curves.values() for level, _ in points}), ylim=(0, 1.02))
        axes.set(xlabel="level (0: plain)", ylabel="success rate")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)

    texts = (
        f"{name} {', '.join(f'{100 * part["success_rate"]:.0f} %' for _, part in points)}"
        for name, points in curves.items()
    )
    return figure(draw, f"{title}, from level 0 on: {'; '.join(texts)}.", (7.5, 3.6))


def grounding_table(grounding: dict[str, Any]) -> Table:
    """All grounding measures."""
    parts = {f"swap: {name.replace('_', ' ')}": part for name, part in grounding.get("swap", {}).items()}
    parts |= {f"{name} text": grounding[name] for name in ("blank", "wrong") if name in grounding}
    if "chance" in grounding:
        parts["chance (own goal, told another)"] = grounding["chance"]
    return rate_table("Grounding", parts)


def protocol(result: dict[str, Any]) -> dict[str, str]:
    """How the numbers came about."""
    config = result["config"]
    return {
        "success": "the goal holds at any timestep (episodes end there)"
        if config.get("end_on_success")
        else "the goal holds at any timestep (episodes run to their horizon); final: at the last one",
        "intervals": "95 % Wilson; of the grounding score, Student's t over scenes",
        "seeds": f"{config['seed']} and up, the same in every split",
        "policy": config["policy"],
        "wall time": f"{result['wall_time_s']} s",
    } | told(result["versions"])
