"""Pre- and post-processing of the `concord` policy: LeRobot's own steps, with floored quantile ranges."""

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from vla.policies.concord.configuration_concord import ConcordConfig
from vla.types import ACTION_KEY, RANGE_FLOOR, STATE_KEY

NARROW = 0.999 * RANGE_FLOOR  # so that rounding takes nothing floored for too narrow


def make_concord_pre_post_processors(
    config: ConcordConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """The pipelines around the policy.

    Raises:
        ValueError: statistics are given but lack q01 or q99 of state or action.
    """
    stats = None if dataset_stats is None else {**dataset_stats, **floored_stats(dataset_stats)}
    return make_default_pre_post_processors(config, stats)


def floored_stats(stats: dict[str, dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of states and actions whose range from q01 to q99 is nowhere too small to divide by; what has that stays as it is.

    A dimension that hardly varies but for rare values, as a flag, takes its extremes. Statistics are (n,) each, in the data's units, by name
    (q01, q99 and, where they are known, min and max) and by key.

    Raises:
        ValueError: they lack q01 or q99 of state or action.
    """
    floored = {}
    for key in (STATE_KEY, ACTION_KEY):
        missing = [name for name in ("q01", "q99") if name not in stats.get(key, {})]
        if missing:
            raise ValueError(f"statistics of {key} lack {', '.join(missing)}")
        values = {name: torch.as_tensor(v, dtype=torch.float32) for name, v in stats[key].items() if name != "count"}
        low, high = values["q01"], values["q99"]
        narrow = high - low < NARROW
        low = torch.where(narrow, values.get("min", low), low)
        high = torch.where(narrow, values.get("max", high), high)
        narrow, centre = high - low < NARROW, (low + high) / 2
        low = torch.where(narrow, centre - RANGE_FLOOR / 2, low)
        high = torch.where(narrow, centre + RANGE_FLOOR / 2, high)
        floored[key] = values | {"q01": low, "q99": high}
    return floored
