"""Pictures for the documentation, drawn from the environments themselves."""

import textwrap
from pathlib import Path

from envs import make_env

SEEDS = (3, 14, 15, 92, 65, 35, 89, 79)


def tabletop_picture(path: Path) -> Path:
    """Eight scenes as people see them, each with its instruction; PNG."""
    from matplotlib.figure import Figure

    env = make_env("tabletop")
    page = Figure(figsize=(10, 5.8), layout="constrained")
    for axes, seed in zip(page.subplots(2, 4).flat, SEEDS, strict=True):
        env.reset(seed=seed)
        axes.imshow(env.render())
        axes.set_title("\n".join(textwrap.wrap(env.task_description, 34)), fontsize=8.5)
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=90)
    return path
