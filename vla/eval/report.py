"""One self-contained HTML file: answers first, then sections of tables, figures and videos, then how it was made.

`Report` is plain data; `write_report` renders it. Nothing is loaded from elsewhere, so the file works offline, on a
phone, with a keyboard and with a screen reader.
"""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from vla.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#1f5fbf", "#d1495b", "#2a9d5c", "#8a5fbf", "#c77d1e", "#4d4d4d", "#0f8b8d", "#b0578d")  # of lines
MARKERS = "os^DvPX*"


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first column names its row."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG, with a sentence that says what it shows for those who cannot see it."""

    svg: str
    description: str


@dataclass(frozen=True)
class Video:
    """An mp4 file that is embedded, with a caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, an optional paragraph, and blocks under it."""

    title: str
    text: str = ""
    blocks: tuple[Table | Figure | Video, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a report says; `command` regenerates it."""

    title: str
    answers: tuple[str, ...]
    sections: tuple[Section, ...]
    command: str
    protocol: dict[str, str] = field(default_factory=dict)


def write_report(path: Path, report: Report) -> None:
    """Render to `path`, which appears whole."""
    environment = Environment(loader=PackageLoader("vla.eval", "templates"), autoescape=True)
    environment.globals.update(kind=lambda block: type(block).__name__, video_data=_video_data, svg=Markup)
    write_whole(path, environment.get_template("report.html.jinja").render(report=report))


def markdown(report: Report, title: str, pictures: Path, prefix: str) -> str:
    """The report as Markdown under a heading `title`; its figures become `pictures`/`prefix`_N.svg."""
    parts = [f"## {title}\n", *(f"* {answer}" for answer in report.answers), f"\n`{report.command}`\n"]
    number = 0
    for section in report.sections:
        parts.append(f"### {section.title}\n")
        if section.text:
            parts.append(section.text + "\n")
        for block in section.blocks:
            if isinstance(block, Table):
                lines = [block.header, ("---",) * len(block.header), *block.rows]
                parts.append(f"{block.caption}:\n")
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
            elif isinstance(block, Figure):
                number += 1
                path = pictures / f"{prefix}_{number}.svg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.svg.replace("<svg", '<svg style="background:#fff"', 1))
                parts.append(f"![{block.description}]({pictures.name}/{path.name})\n")
    parts.append("; ".join(f"{name}: {value}" for name, value in report.protocol.items()) + "\n")
    return "\n".join(parts)


def figure(
    draw: Callable[..., None], description: str, size: tuple[float, float] = (7.0, 3.2), grid: tuple[int, int] = (1, 1)
) -> Figure:
    """An SVG figure; `draw` gets the axes, as an array of `grid` where there are several. Colours follow the page, light or dark."""
    with plt.rc_context(
        {
            "font.family": "sans-serif",
            "font.size": 10,
            "svg.fonttype": "none",
            "svg.hashsalt": "concord",
            "axes.edgecolor": "#888",
        }
    ):
        canvas, axes = plt.subplots(*grid, figsize=size, layout="constrained")
        for one in np.atleast_1d(axes).flat:
            one.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(canvas)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return Figure(svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1), description)


def line_style(number: int) -> dict[str, str]:
    """Colour, marker and dashes of the line of a number, so that lines differ without their colours, too."""
    dashes = "-" if number < len(COLORS) else "--"
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": dashes}


def percent(share: float) -> str:
    """0.873 -> `87 %`."""
    return f"{100 * share:.0f} %"


def with_interval(share: float, interval: tuple[float, float] | list[float]) -> str:
    """`87 % [82, 91]`."""
    return f"{100 * share:.0f} % [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _video_data(video: Video) -> str:
    return base64.b64encode(video.path.read_bytes()).decode()
