"""What an instruction asks for, whatever its wording."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A valid goal of a scene: canonical id (e.g. `push/red/star/left`), task family, one wording of it."""

    goal_id: str
    task: str
    instruction: str
